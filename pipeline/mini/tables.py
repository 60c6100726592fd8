"""What the fusion network and the generator learn from, encoded once: captions, features of pictures, latents."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .autoencoder import encode_pictures
from .loop import device, seeded
from .training_set import TrainingSet
from .vision import augment, embed_pictures, framed, over_background
from .words import Captions, embed_texts

logger = logging.getLogger(__name__)

VIEWS = 4  # of each picture, the first one clean


@dataclass(frozen=True)
class Tables:
    """Everything the stage learns from, encoded once; rows as in TrainingSet.

    captions: (M, 512) text_embeds of emoji; caption_concept, caption_is_name: (M,); bare_names: (concepts, 2), which of
    the captions are a concept's name and nothing else, in English and Chinese, -1 of one that is held out;
    scene_captions: (S, K, 512), K of each scene; features: (N, V, 256) pooled features of each picture, clean first,
    then V-1 varied views; square: (N, 16, 16, 16) latents of all that is square, times ``scaling_factor``, which gives
    them unit variance, and zeros where a panorama is; wide: (skies, 16, 16, 32), those of the panoramas, which begin at
    row ``wide_from``. Tensors lie on the device that learns.
    """

    captions: Tensor
    caption_concept: np.ndarray
    caption_is_name: np.ndarray
    bare_names: np.ndarray
    scene_captions: Tensor
    features: Tensor
    square: Tensor
    wide: Tensor
    wide_from: int
    scaling_factor: float

    def latents_of(self, rows: np.ndarray) -> Tensor:
        """Rows of panoramas alone, or of none."""
        wide = rows - self.wide_from
        return self.wide[index(wide)] if 0 <= wide[0] < len(self.wide) else self.square[index(rows)]

    @property
    def grid_and_channels(self) -> tuple[int, int]:
        return self.square.shape[-1], self.square.shape[1]

    def means(self) -> Tensor:
        """(N, G*G, 16): what the network is to say of each row. Of a panorama, the mean of neighbours side by side."""
        square = self.square.clone()
        size = square.shape[-1]
        square[self.wide_from : self.wide_from + len(self.wide)] = F.adaptive_avg_pool2d(self.wide, (size, size))
        return square.flatten(2).transpose(1, 2).contiguous()


def index(rows: np.ndarray) -> Tensor:
    return torch.from_numpy(rows).to(device())


@torch.no_grad()
def load_tables(
    work: Path, pictures: TrainingSet, captions: Captions, tokenizer, text_encoder, image_encoder, vae
) -> Tables:
    """From ``work``, where everything is encoded first, whole or not at all."""
    stored = work / "tables.pt"
    if not stored.exists():
        logger.info("encoding every caption and picture once")
        of_concepts = np.flatnonzero(captions.concept >= 0)
        said = np.concatenate([scene.captions for scene in pictures.scenes])
        drawn, wide, ellipses = (
            encode_pictures(vae, pixels, closes)
            for pixels, closes in zip(pictures.pixels, (False, True, False), strict=True)
        )
        spread = torch.cat([each.flatten() for each in (drawn, wide, ellipses)]).std()
        hollow = drawn.new_zeros(len(wide), *drawn.shape[1:])
        partial = stored.with_suffix(".partial")
        torch.save(
            {
                "captions": embed_texts(text_encoder, tokenizer, [captions.texts[row] for row in of_concepts]),
                "caption_concept": torch.from_numpy(captions.concept[of_concepts]),
                "caption_is_name": torch.from_numpy(captions.is_name[of_concepts]),
                "scene_captions": embed_texts(text_encoder, tokenizer, said.ravel().tolist()).unflatten(0, said.shape),
                "features": torch.cat([_views(image_encoder, pixels) for pixels in pictures.pixels]),
                "square": torch.cat([drawn, hollow, ellipses]) / spread,
                "wide": wide / spread,
                "scaling_factor": 1 / spread,
            },
            partial,
        )
        partial.rename(stored)
    read = torch.load(stored, weights_only=True, map_location=device())
    return Tables(
        read["captions"],
        read["caption_concept"].cpu().numpy(),
        read["caption_is_name"].cpu().numpy(),
        _bare_names(captions, pictures),
        read["scene_captions"],
        read["features"],
        read["square"],
        read["wide"],
        pictures.starts[1],
        float(read["scaling_factor"]),
    )


def _bare_names(captions: Captions, pictures: TrainingSet) -> np.ndarray:
    """(concepts, 2), by rows of the captions of concepts."""
    concepts = pictures.emoji.concepts
    of_concepts = np.flatnonzero(captions.concept >= 0)
    row_of = {(captions.concept[row], captions.texts[row]): place for place, row in reversed([*enumerate(of_concepts)])}
    return np.array(
        [
            [row_of.get((number, concept.label[language]), -1) for language in ("en", "zh")]
            for number, concept in enumerate(concepts)
        ]
    )


def _views(image_encoder: Any, pixels: torch.Tensor) -> torch.Tensor:
    """(N, VIEWS, 256): the eye's features of each picture, clean and varied."""
    generator = seeded(0)
    found = []
    for chunk in pixels.split(256):
        clean = framed(over_background(chunk))
        views = [clean, *(augment(clean, generator) for _ in range(VIEWS - 1))]
        found.append(torch.stack([embed_pictures(image_encoder, view) for view in views], dim=1))
    return torch.cat(found)
