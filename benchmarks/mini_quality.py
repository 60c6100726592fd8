"""How well the built-in model draws what it is asked for, judged by a network that had no part in its training.

Drawn in as many steps as the model is meant for, unless --steps says others; top5_by_steps compares them. Prompts are
each concept's CLDR name; the style picture is another concept's, drawn at random with a fixed seed. An
ImageNet CNN (EfficientNet-Lite0, pooled features) ranks all concepts' real pictures of that style by cosine: top-k
means that the right concept is among the first k. In long prompts the name stands in sentences that the model never
learned from (``long_prompts.json``). The style is right where, of the concept's own drawings in all its styles, the
nearest is the one in the style that was shown, which is told of the held-out pairs too, and of styles shown by a
picture that was held out.
Panoramas and phantoms are measured in the picture itself; diversity is 1 - cosine of the judge's features, mean over
pairs of one prompt's pictures from different seeds, words alone; nearest: the cosine of a picture, drawn from words and
style, to the nearest that was trained on, beside that of real drawings that were held out.
``python -m benchmarks mini_quality`` prints one JSON line last. Needs the optional group ``train``.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.checkpoints import open_checkpoint
from pipeline.mini import MODEL_FOLDER
from pipeline.mini.pictures import PictureSet, load_pictures

from ._judge import Artist, Judge, Question, by_unseen_pictures, questions_of
from ._scene_quality import phantoms_shown, skies_shown

BY_STEPS = (1, 2, 4, 16)
COMPARED = 400  # of the questions, at each of these
SCENES = 100  # of each kind
PROMPTS, SEEDS = 20, 16
NEAREST = 100
LONG_PROMPTS: dict[str, list[str]] = json.loads(Path(__file__).with_name("long_prompts.json").read_text("utf-8"))


def measure(folder: Path, work: Path, count: int, steps: int | None = None) -> dict[str, Any]:
    family = open_checkpoint(folder).family
    size, steps = family.native_size, steps or family.default_steps
    pictures = load_pictures(work, size)
    questions = questions_of(pictures, count)
    judge, artist = Judge(pictures, work), Artist(pictures, folder)

    def ranks(
        asked: Sequence[Question], language: str, steps: int = steps, phrases: Sequence[str] = ("{}",)
    ) -> tuple[np.ndarray, Tensor]:
        features = judge.features(artist.draw(asked, language, steps, phrases))
        return judge.ranks(features, asked), features

    seen = questions["seen"]
    english, features = ranks(seen, "en")
    unseen = by_unseen_pictures(pictures, seen)
    of_pairs, pairs = ranks(questions["heldout_pair"], "en")
    by_steps = {other: ranks(seen[:COMPARED], "en", other)[0] for other in BY_STEPS if other != steps}
    by_steps[steps] = english[:COMPARED]
    told = {
        "steps": steps,
        "seen_en_top5": _share(english < 5),
        "seen_zh_top5": _share(ranks(seen, "zh")[0] < 5),
        "seen_en_top1": _share(english < 1),
        "style_accuracy": round(judge.style_accuracy(features, seen), 4),
        "style_accuracy_unseen_pictures": round(judge.style_accuracy(ranks(unseen, "en")[1], unseen), 4),
        "heldout_pair_top5": _share(of_pairs < 5),
        "heldout_pair_style": round(judge.style_accuracy(pairs, questions["heldout_pair"]), 4),
        "heldout_concept_top5": _share(ranks(questions["heldout_concept"], "en")[0] < 5),
        **{
            f"long_{language}_top5": _share(ranks(seen, language, phrases=phrases)[0] < 5)
            for language, phrases in LONG_PROMPTS.items()
        },
        "one_step_top5": _share(by_steps[1] < 5),
        "top5_by_steps": {str(other): _share(ranked < 5) for other, ranked in sorted(by_steps.items())},
        "top1_by_steps": {str(other): _share(ranked < 1) for other, ranked in sorted(by_steps.items())},
        "diversity": diversity(judge, artist, [question.concept for question in seen[:PROMPTS]], pictures, steps),
        "nearest": nearest(judge, pictures, features[:NEAREST]),
        "ms_per_image_1_step": round(artist.milliseconds(seen[:30], 1), 1),
        "ms_per_image_4_steps": round(artist.milliseconds(seen[:30], 4), 1),
        "megabytes": round(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6, 2),
        "questions": {kind: len(some) for kind, some in questions.items()},
    }
    if open_checkpoint(folder).family.panoramas:
        draw = partial(_scene, artist, steps)
        told |= skies_shown(draw, SCENES, size) | phantoms_shown(draw, SCENES, size)
    return told


def diversity(
    judge: Judge, artist: Artist, concepts: Sequence[int], pictures: PictureSet, steps: int
) -> dict[str, float]:
    """Of the same words from SEEDS seeds; beside it, of as many pictures of different words from one seed."""
    names = [pictures.concepts[concept].label["en"] for concept in concepts]
    apart = []
    for name in names:
        drawn = torch.cat([artist.draw_words([name], steps, seed=seed) for seed in range(SEEDS)])
        apart.append(_apart(judge.features(drawn)))
    others = _apart(judge.features(artist.draw_words(names[:SEEDS], steps, seed=0)))
    return {"one_prompt": round(float(np.mean(apart)), 4), "different_prompts": round(others, 4)}


def _apart(features: Tensor) -> float:
    """1 - cosine, mean over pairs of different rows (N, D) of unit length."""
    count = len(features)
    return float(1 - ((features @ features.T).sum() - count) / (count * (count - 1)))


def nearest(judge: Judge, pictures: PictureSet, features: Tensor) -> dict[str, float]:
    """How near pictures come to what was trained on; and how near drawings come that the model never saw."""
    trained = pictures.training_rows()
    known = judge.real[trained]
    unseen = np.setdiff1d(np.arange(len(pictures.pixels)), trained)[:: max(1, len(pictures.pixels) // 4000)]
    drawn, real = ((some @ known.T).amax(dim=1) for some in (features, judge.real[unseen]))
    return {
        "drawn_mean": round(float(drawn.mean()), 4),
        "drawn_above_95": _share((drawn > 0.95).numpy()),
        "real_mean": round(float(real.mean()), 4),
        "real_above_95": _share((real > 0.95).numpy()),
    }


def _scene(artist: Artist, steps: int, texts: Sequence[str], width: int, height: int) -> np.ndarray:
    return artist.draw_words(texts, steps, width=width, height=height).permute(0, 2, 3, 1).numpy()


def _share(right: np.ndarray) -> float:
    return round(float(right.mean()), 4)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--work", type=Path, default=Path(".cache/mini"))
    parser.add_argument("--count", type=int, default=10_000, help="at most this many seen concepts")
    parser.add_argument("--steps", type=int, help="in place of what the model is meant for")
    chosen = parser.parse_args(arguments)
    if chosen.count < 2:
        parser.error(f"expected --count to be 2 or more, got {chosen.count}")
    print(json.dumps(measure(chosen.model, chosen.work, chosen.count, chosen.steps)))


if __name__ == "__main__":
    main()
