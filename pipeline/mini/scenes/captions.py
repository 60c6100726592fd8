"""Words for rendered scenes, from a small grammar in English and Chinese: the same facts in many turns of phrase."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .phantoms import Phantom
from .skies import SUN_SEEN, Sky

LANGUAGES = ("en", "zh")
_DEGREES_SHARE = 0.3  # of the captions with a sun that give its height as a number though a word would do
_WORD_REACH = 5.0  # degrees from the middle of a word's range: one that named all heights in it would mean a blur


def sky_caption(sky: Sky, language: str, generator: np.random.Generator) -> str:
    """The sun is named only where it is seen. language: "en" or "zh"."""
    words = _grammar()[language]
    told = {name: _one(words[name][getattr(sky, name)], generator) for name in ("weather", "season", "place")}
    if sky.weather not in SUN_SEEN:
        return _one(words["sky without sun"], generator).format(**told)
    names = _sun_names(words["sun"], sky.sun_height)
    if not names or generator.random() < _DEGREES_SHARE:
        sun = words["degrees"].format(degrees=round(sky.sun_height / 5) * 5)
    else:
        sun = _one(names, generator)
    return _one(words["sky"], generator).format(sun=sun, **told)


def _sun_names(ranges: list[tuple[float, list[str]]], height: float) -> list[str]:
    """ranges: up to which height which names do, in order."""
    bottom = 0.0
    for top, names in ranges:
        if height <= top:
            return names if abs(height - (bottom + top) / 2) <= _WORD_REACH else []
        bottom = top
    return []


def phantom_caption(phantom: Phantom, language: str, generator: np.random.Generator) -> str:
    """Every insert by side, size and contrast, in any order. language: "en" or "zh"."""
    words = _grammar()[language]
    region = _one(words["region"][phantom.region], generator)
    if not phantom.inserts:
        return _one(words["plain phantom"], generator).format(region=region)
    kinds = ("side", "size", "contrast")
    inserts = [
        _one(words["insert"], generator).format(
            **{kind: _one(words[kind][getattr(insert, kind)], generator) for kind in kinds}
        )
        for insert in generator.permutation(np.array(phantom.inserts, dtype=object))
    ]
    return _one(words["phantom"], generator).format(region=region, inserts=words["and"].join(inserts))


def _one(choices: list[str], generator: np.random.Generator) -> str:
    return choices[generator.integers(len(choices))]


@cache
def _grammar() -> dict[str, Any]:
    return json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
