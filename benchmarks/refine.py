"""Whether refining brings a picture closer to its reference, and not only in the eyes of the encoder it was refined by.

Words are a concept's CLDR name, the reference is another concept's drawing, as in mini_quality. Each pair is drawn from
the fused condition, from the refined one, and from two others at the same distance from it: in a random direction, and
straight towards what the picture alone would give. "own" is the cosine of features of the encoder that refined it,
"judge" that of an ImageNet CNN (EfficientNet-Lite0) that took no part, "words" the judge's cosine with a real
drawing of what the words say. ``python -m benchmarks refine`` prints one JSON line last. Needs the group ``train``.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from pipeline.checkpoints import open_checkpoint
from pipeline.conditioning import FusedConditioning, PromptEmbeds
from pipeline.fusion import fuse
from pipeline.generation import generate
from pipeline.image_encoder import encode_image
from pipeline.mini import MODEL_FOLDER
from pipeline.mini.pictures import PictureSet, load_pictures
from pipeline.mini.vision import over_background
from pipeline.model_cache import ModelCache
from pipeline.refinement import refine
from pipeline.residency import TorchResidency
from pipeline.text_encoder import encode_prompt

from ._judge import SEED, Question, questions_of

BATCH = 10
SHOWN = 10  # columns of the sheet
LOOKED_AT = 60  # pairs on which the method was chosen; those measured come after
WAYS = ("before", "refined", "random", "line")


def measure(
    folder: Path, work: Path, count: int, sheet: Path | None, **options: Any
) -> dict[str, float | dict[str, float]]:
    bench = _Bench(folder, load_pictures(work, open_checkpoint(folder).family.native_size))
    questions = questions_of(bench.pictures, LOOKED_AT + count)["seen"][LOOKED_AT:]
    parts = [bench.run(questions[place : place + BATCH], **options) for place in range(0, len(questions), BATCH)]
    found = {key: torch.cat([part[key] for part in parts]) for key in parts[0] if key not in ("losses", "seconds")}
    if sheet is not None:
        _draw_sheet(found, [bench.label(question) for question in questions], sheet)
    gain = found["judge refined"] - found["judge before"]
    losses = torch.stack([part["losses"] for part in parts]).mean(dim=0)
    return {
        "pairs": len(questions),
        "loss_first": round(losses[0].item(), 4),
        "loss_last": round(losses[-1].item(), 4),
        **{kind: _means(found, kind) for kind in ("own", "judge", "words")},
        "judge_gain": round(gain.mean().item(), 4),
        "judge_gain_standard_error": round(gain.std().item() / len(gain) ** 0.5, 4),
        "judge_better": round((gain > 0).float().mean().item(), 3),
        "moved": round(found["moved"].mean().item(), 3),
        "ms_per_picture_and_step": round(1000 * statistics.median(part["seconds"].item() for part in parts), 1),
    }


def _means(found: dict[str, Tensor], kind: str) -> dict[str, float]:
    return {way: round(found[f"{kind} {way}"].mean().item(), 4) for way in WAYS}


class _Bench:
    """The model, and what is asked of it."""

    def __init__(self, folder: Path, pictures: PictureSet) -> None:
        self.pictures = pictures
        self._cache = ModelCache(TorchResidency(torch.device("cpu"), 2**32), 2**32)
        self._checkpoint = open_checkpoint(folder)
        self._size = self._checkpoint.family.native_size

    def label(self, question: Question) -> str:
        return self.pictures.concepts[question.concept].label["en"]

    def run(self, questions: Sequence[Question], **options: Any) -> dict[str, Tensor]:
        """By name: likenesses (B,), pictures (B, 3, S, S), losses (steps + 1,) and seconds for a step."""
        reference = over_background(self.pictures.pixels[[question.style_row for question in questions]])
        meant = over_background(self.pictures.pixels[[self._own_drawing(question) for question in questions]])
        features = encode_image(self._cache, self._checkpoint, reference)
        start = fuse(self._cache, self._checkpoint, self._words(questions), features)
        began = time.perf_counter()
        refined = refine(self._cache, self._checkpoint, start, features, seconds=3600, **options)
        steps = len(refined.losses) - 1
        found = {
            "reference": reference,
            "losses": torch.tensor(refined.losses),
            "seconds": torch.tensor((time.perf_counter() - began) / steps / len(questions)),
        }
        moved = refined.conditioning.tokens - start.tokens
        alone = fuse(self._cache, self._checkpoint, None, features)
        noise = torch.randn(moved.shape, generator=torch.Generator().manual_seed(SEED))
        directions = {
            "before": torch.zeros_like(moved),
            "refined": moved,
            "random": _as_long_as(noise, moved),
            "line": _as_long_as(alone.tokens - start.tokens, moved),
        }
        found["moved"] = moved.norm(dim=(1, 2)) / start.tokens.norm(dim=(1, 2))
        wanted, concept = self._judged(reference), self._judged(meant)
        for way, direction in directions.items():
            pixels = self._draw(replace(start, tokens=start.tokens + direction))
            seen, judged = encode_image(self._cache, self._checkpoint, pixels).pooled, self._judged(pixels)
            found |= {
                f"pixels {way}": pixels,
                f"own {way}": F.cosine_similarity(seen, features.pooled),
                f"judge {way}": F.cosine_similarity(judged, wanted),
                f"words {way}": F.cosine_similarity(judged, concept),
            }
        return found

    def _words(self, questions: Sequence[Question]) -> PromptEmbeds:
        words = [encode_prompt(self._cache, self._checkpoint, self.label(question)) for question in questions]
        return replace(words[0], pooled=torch.cat([word.pooled for word in words if word.pooled is not None]))

    def _own_drawing(self, question: Question) -> int:
        """A real drawing of the concept, in the style that was shown where there is one."""
        rows = np.flatnonzero(self.pictures.concept == question.concept)
        alike = rows[self.pictures.style[rows] == question.style]
        return int((alike if len(alike) else rows)[0])

    def _draw(self, condition: FusedConditioning) -> Tensor:
        made = generate(
            self._cache, self._checkpoint, condition, seed=SEED, num_inference_steps=4, width=self._size,
            height=self._size,
        )  # fmt: skip
        return made.pixels * made.alpha + 1 - made.alpha

    def _judged(self, pixels: Tensor) -> Tensor:
        return encode_image(self._cache, self._checkpoint, pixels, encoder="efficientnet-lite0").pooled


def _as_long_as(direction: Tensor, other: Tensor) -> Tensor:
    lengths = direction.norm(dim=(1, 2), keepdim=True).clamp(min=1e-9)
    return direction * other.norm(dim=(1, 2), keepdim=True) / lengths


def _draw_sheet(found: dict[str, Tensor], labels: Sequence[str], path: Path) -> None:
    """The reference, before, refined, and as far straight towards the picture alone, of the first pairs, unchosen."""
    rows = {
        "reference": found["reference"],
        "fused": found["pixels before"],
        "refined": found["pixels refined"],
        "straight": found["pixels line"],
    }
    side, left, top = 112, 70, 22
    count = min(SHOWN, len(labels))
    sheet = Image.new("RGB", (left + count * (side + 4), top + len(rows) * (side + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for column in range(count):
        draw.text((left + column * (side + 4), 6), labels[column][:18], fill="black")
    for row, (name, pixels) in enumerate(rows.items()):
        draw.text((4, top + row * (side + 4) + side // 2 - 6), name, fill="black")
        for column in range(count):
            levels = (255 * pixels[column].clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()
            image = Image.fromarray(levels).resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(image, (left + column * (side + 4), top + row * (side + 4)))
    sheet.save(path, optimize=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks refine", description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--work", type=Path, default=Path(".cache/mini"))
    parser.add_argument("--count", type=int, default=100, help="how many pairs")
    parser.add_argument("--radius", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sheet", type=Path, help="where to draw the first pairs, before and after")
    chosen = parser.parse_args(arguments)
    options = {"radius": chosen.radius, "num_steps": chosen.steps}
    print(json.dumps(measure(chosen.model, chosen.work, chosen.count, chosen.sheet, **options)))


if __name__ == "__main__":
    main()
