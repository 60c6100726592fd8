"""How much of the small model's quality one step keeps: top-5 of the quality protocol at 1 step over that at 16.

The questions, the judge and the artist are those of ``mini_quality``; every number of steps draws the same seen
concepts from the same noise. ``python -m benchmarks few_steps`` prints one JSON object alone: the ratio and its error,
since the shares are of a sample, the shares by number of steps, and the ratio to the best of them, because more steps
are not always better. Needs the optional group ``train``, and real pictures that the judge has seen: --prepare draws
them and shows them to it, once, in some ten minutes.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.checkpoints import open_checkpoint
from pipeline.mini import MODEL_FOLDER
from pipeline.mini.pictures import load_pictures

from ._judge import Artist, Judge, questions_of

FEW, BETWEEN, MANY = 1, 4, 16
AIM = 0.9
COUNT = 200  # eighty seconds on two cores


def measure(folder: Path, work: Path, count: int) -> dict[str, Any]:
    pictures = load_pictures(work, open_checkpoint(folder).family.native_size)
    questions = questions_of(pictures, count)["seen"]
    judge, artist = Judge(pictures, work), Artist(pictures, folder)

    def right(steps: int) -> np.ndarray:
        return judge.ranks(judge.features(artist.draw(questions, "en", steps)), questions) < 5

    found = {steps: right(steps) for steps in (FEW, BETWEEN, MANY)}
    few, many = found[FEW], found[MANY]
    shares = {steps: round(float(answers.mean()), 4) for steps, answers in found.items()}
    ratio = float(few.mean() / many.mean()) if many.any() else None
    return {
        "ratio": None if ratio is None else round(ratio, 4),
        "ours": shares[FEW],
        "host": None,
        "diffusers": None,
        "unit": f"top-5 share at {FEW} step / at {MANY} steps",
        "aim": f">= {AIM}",
        "met": None if ratio is None else ratio >= AIM,
        "top5_by_steps": {str(steps): share for steps, share in shares.items()},
        "ratio_to_the_best": round(shares[FEW] / max(shares.values()), 4) if any(shares.values()) else None,
        "standard_error": _error(few, many),
        "questions": len(questions),
    }


def _error(few: np.ndarray, many: np.ndarray) -> float | None:
    """One standard error of the ratio of two shares of one sample, by the delta method."""
    p, q, both = few.mean(), many.mean(), (few & many).mean()
    if not p or not q:
        return None
    relative = (1 - p) / p + (1 - q) / q - 2 * (both - p * q) / (p * q)  # less the more the two go together
    return round(float(p / q) * math.sqrt(max(float(relative), 0.0) / len(few)), 4)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks few_steps", description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--work", type=Path, default=Path(".cache/mini"))
    parser.add_argument("--count", type=int, default=COUNT, help="at most this many seen concepts")
    parser.add_argument("--prepare", action="store_true", help="only what is made once and kept in --work")
    chosen = parser.parse_args(arguments)
    if chosen.count < 1:
        parser.error(f"--count must be at least 1, got {chosen.count}")
    if chosen.prepare:
        Judge(load_pictures(chosen.work, open_checkpoint(chosen.model).family.native_size), chosen.work)
        print(json.dumps({"prepared": str(chosen.work)}))
        return
    print(json.dumps(measure(chosen.model, chosen.work, chosen.count)))
