"""What the small model's panoramas and phantoms show of what was said: the words are checked against the picture.

Scenes are of numbers that were never trained on; captions come from the same grammar, English and Chinese in turn. Of
phantoms there are but 200, by region, sides, sizes and contrasts, and all were trained on: asked is whether the words
find the right one. Which of two is larger, or brighter, half are right by chance. The same measures, taken of the
renderer's own pictures, are told beside them: no model can be expected to do better.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pipeline.mini.scenes.phantoms import CONTRASTS, SIDES, SIZES, Phantom, inserts_in
from pipeline.mini.scenes.scene_set import CAPTIONS_EACH, Scene, phantom_of, sky_of
from pipeline.mini.scenes.skies import SUN_SEEN, Sky, seam_error, sun_height_in

UNSEEN = 1_000_000  # the first number that is asked for
SUN_WITHIN = 15.0  # degrees

Draw = Callable[[Sequence[str], int, int], np.ndarray]  # texts, width, height -> (N, height, width, 3) in 0..1


@dataclass(frozen=True)
class Asked:
    """A scene, and one of its captions."""

    scene: Scene
    caption: str


def skies_shown(draw: Draw, count: int, height: int) -> dict[str, Any]:
    """Of skies whose sun is seen: how often it stands within 15 degrees of what was said, and the mean seam."""
    asked = _first(count, partial(sky_of, height=height), _has_sun)
    heights = np.array([one.scene.what.sun_height for one in asked if isinstance(one.scene.what, Sky)])

    def shown(pictures: np.ndarray) -> dict[str, float]:
        off = np.array([sun_height_in(picture) for picture in pictures]) - heights
        return {
            "sun_within_15": round(float((np.abs(off) <= SUN_WITHIN).mean()), 4),
            "seam": round(float(np.mean([seam_error(picture) for picture in pictures])), 3),
        }

    drawn = shown(draw([one.caption for one in asked], 2 * height, height))
    return {f"sky_{name}": value for name, value in drawn.items()} | {"sky_rendered": shown(_rendered(asked))}


def phantoms_shown(draw: Draw, count: int, size: int) -> dict[str, Any]:
    """side: one insert, found on its side and not on the other; size, contrast: of two, which is larger, and which is
    brighter. ``count`` phantoms for each.
    """
    found: dict[str, Any] = {}
    rendered: dict[str, float] = {}
    for kind, wanted in {"side": _has_one, "size": _has_two_sizes, "contrast": _has_two_contrasts}.items():
        asked = _first(count, partial(phantom_of, size=size), wanted)

        def right(pictures: np.ndarray, kind: str = kind, asked: Sequence[Asked] = asked) -> float:
            shows = [
                _shows(kind, picture.mean(-1), one.scene.what) for picture, one in zip(pictures, asked, strict=True)
            ]
            return round(float(np.mean(shows)), 4)

        found[f"phantom_{kind}"] = right(draw([one.caption for one in asked], size, size))
        rendered[kind] = right(_rendered(asked))
    return found | {"phantom_rendered": rendered}


def _rendered(asked: Sequence[Asked]) -> np.ndarray:
    return np.stack([one.scene.pixels[..., :3] / 255 for one in asked])


def _has_sun(what: Sky | Phantom) -> bool:
    return isinstance(what, Sky) and what.weather in SUN_SEEN


def _has_one(what: Sky | Phantom) -> bool:
    return isinstance(what, Phantom) and len(what.inserts) == 1


def _has_two_sizes(what: Sky | Phantom) -> bool:
    return isinstance(what, Phantom) and len({insert.size for insert in what.inserts}) == 2


def _has_two_contrasts(what: Sky | Phantom) -> bool:
    return isinstance(what, Phantom) and len({insert.contrast for insert in what.inserts}) == 2


def _shows(kind: str, grey: np.ndarray, what: Sky | Phantom) -> bool:
    assert isinstance(what, Phantom)
    found = inserts_in(grey, what.region)
    if kind == "side":
        (insert,) = what.inserts
        other = SIDES[1 - SIDES.index(insert.side)]
        return found[insert.side].area > 0 == found[other].area
    left, right = what.inserts  # in the order of SIDES
    if kind == "size":
        return bool((found["left"].area < found["right"].area) == (SIZES[left.size] < SIZES[right.size]))
    return bool(
        (found["left"].contrast < found["right"].contrast) == (CONTRASTS[left.contrast] < CONTRASTS[right.contrast])
    )


def _first(count: int, make: Callable[[int], Scene], wanted: Callable[[Sky | Phantom], bool]) -> list[Asked]:
    """The first that are wanted; in English, then Chinese, in turn."""
    found: list[Asked] = []
    number = UNSEEN
    while len(found) < count:
        scene = make(number)
        if wanted(scene.what):
            found.append(Asked(scene, scene.captions[CAPTIONS_EACH * (len(found) % 2)]))
        number += 1
    return found
