"""Teaching the fusion network: words, a picture or both -> the mean latents of the picture that was meant."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fusing.fusion_network import FusionNetwork
from .catalogue import STYLES
from .loop import Plan, run_stage
from .pictures import PictureSet

HOUSE_STYLES = tuple(STYLES.index(name) for name in ("fluent-3d", "noto", "twemoji", "fluent-color"))
NAME_SHARE = 0.85  # how often a concept is called by its name; a keyword such as "love" names many pictures at once
BOTH_SHARE, WORDS_SHARE = 0.78, 0.14  # the remaining share sees a picture alone


@dataclass(frozen=True)
class Tables:
    """Everything the stage learns from, encoded once.

    captions: (M, 512) text_embeds; caption_concept, caption_is_name: (M,); features: (N, V, 256) pooled features of
    each picture, clean first, then V-1 varied views; latents: (N, 16, 8, 8), the encoder's times ``scaling_factor``,
    which gives them unit variance.
    """

    captions: Tensor
    caption_concept: np.ndarray
    caption_is_name: np.ndarray
    features: Tensor
    latents: Tensor
    scaling_factor: float


@dataclass(frozen=True)
class Batch:
    """text: (B, 512); image: (B, 256); has_text, has_image: (B, 1) bool; rows: (B,) pictures that are meant."""

    text: Tensor
    image: Tensor
    has_text: Tensor
    has_image: Tensor
    rows: np.ndarray


class Examples:
    """Draws batches: which picture is meant, by which words, in the style of which other picture."""

    def __init__(self, pictures: PictureSet, tables: Tables) -> None:
        self._tables = tables
        self._rows = pictures.training_rows()
        self._concept, self._style = pictures.concept, pictures.style
        self._of_style = [self._rows[self._style[self._rows] == style] for style in range(len(STYLES))]
        order = {style: rank for rank, style in enumerate(HOUSE_STYLES)}
        # Words alone mean one style, or their mean over styles would be a blur: the first house style drawn.
        house: dict[int, int] = {}
        for row in sorted(self._rows.tolist(), key=lambda row: order.get(int(self._style[row]), len(STYLES))):
            house.setdefault(int(self._concept[row]), row)
        self._house = np.full(len(pictures.concepts), -1)
        self._house[list(house)] = list(house.values())
        self._names = _by_concept(tables.caption_concept, tables.caption_is_name, len(pictures.concepts))
        self._keywords = _by_concept(tables.caption_concept, ~tables.caption_is_name, len(pictures.concepts))

    def draw(self, step: int, size: int) -> Batch:
        pick = np.random.default_rng([step, 7])
        rows = pick.choice(self._rows, size)
        way = pick.random(size)
        has_image = (way < BOTH_SHARE) | (way >= BOTH_SHARE + WORDS_SHARE)
        has_text = way < BOTH_SHARE + WORDS_SHARE
        rows = np.where(has_image, rows, self._house[self._concept[rows]])
        captions = np.array([self._caption(pick, concept) for concept in self._concept[rows]])
        style_rows = np.array([pick.choice(self._of_style[style]) for style in self._style[rows]])
        seen = np.where(has_text, style_rows, rows)
        view = pick.integers(0, self._tables.features.shape[1], size)
        return Batch(
            text=self._tables.captions[captions],
            image=self._tables.features[seen, view],
            has_text=torch.from_numpy(has_text)[:, None],
            has_image=torch.from_numpy(has_image)[:, None],
            rows=rows,
        )

    def _caption(self, pick: np.random.Generator, concept: int) -> int:
        keywords = self._keywords[concept]
        pool = self._names[concept] if len(keywords) == 0 or pick.random() < NAME_SHARE else keywords
        return int(pool[pick.integers(len(pool))])


def fused(network: FusionNetwork, batch: Batch, noise: float, generator: torch.Generator) -> Tensor:
    """Tokens (B, 64, 16) for a mixed batch, with the normalised inputs blurred by ``noise`` so neighbours agree."""
    text = torch.where(batch.has_text, network.text_norm(batch.text), network.null_text)
    image = torch.where(batch.has_image, network.image_norm(batch.image), network.null_image)
    joined = torch.cat([text, image], dim=-1)
    return network.fuse_normalised(joined + noise * torch.randn(joined.shape, generator=generator))


def train_fusion(
    work: Path, pictures: PictureSet, tables: Tables, network: FusionNetwork, plan: Plan, batch: int = 512
) -> FusionNetwork:
    torch.manual_seed(0)
    examples = Examples(pictures, tables)
    wanted_tokens = tables.latents.flatten(2).transpose(1, 2).contiguous()

    def loss_at(step: int) -> dict[str, Tensor]:
        drawn = examples.draw(step, batch)
        made = fused(network, drawn, 0.05, torch.Generator().manual_seed(step))
        return {"latents": F.mse_loss(made, wanted_tokens[drawn.rows])}

    run_stage("fusion", work, plan, nn.ModuleDict({"fusion": network}), loss_at)
    return network


def _by_concept(concept: np.ndarray, wanted: np.ndarray, count: int) -> list[np.ndarray]:
    rows: list[list[int]] = [[] for _ in range(count)]
    for row in np.flatnonzero(wanted & (concept >= 0)):
        rows[concept[row]].append(int(row))
    return [np.array(found, dtype=np.int64) for found in rows]
