"""Rendered scenes with their captions and their facts, made once and kept on disk."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from .captions import LANGUAGES, phantom_caption, sky_caption
from .phantoms import CONTRASTS, REGIONS, SIDES, SIZES, Insert, Phantom, render_phantom
from .skies import PLACES, SEASONS, SUN_SEEN, WEATHERS, Sky, render_sky

SUN_STEP = 5.0  # degrees; heights are told apart in steps of this
UNSAID = -1
DOMAINS = ("emoji", "sky", "phantom")
_OF_INSERTS = {"size": SIZES, "contrast": CONTRASTS}
# What a caption says, and how many answers there are. An insert that is not there is the answer 0.
FACTS: dict[str, int] = {
    "domain": len(DOMAINS),
    "weather": len(WEATHERS),
    "season": len(SEASONS),
    "place": len(PLACES),
    "sun": round(90 / SUN_STEP),
    "region": len(REGIONS),
    **{f"{side} {what}": 1 + len(known) for side in SIDES for what, known in _OF_INSERTS.items()},
}
CAPTIONS_EACH = 3  # of each picture in each language
# In the middle of two columns of latents that share one place of the mean picture, at 32 columns a panorama.
SUN_AZIMUTH = 11.25
# What words leave open (where clouds, trees, houses and inserts lie) is drawn from one of so many seeds, by the scene's
# number: as many pictures of one caption, which can be learned one by one. Of all that it may be there is only a mean.
LAYOUTS = 6
_SUN_SHARE = 0.7  # of the skies whose sun is seen
_NO_INSERT_SHARE, _ONE_INSERT_SHARE = 0.1, 0.35


@dataclass(frozen=True)
class SceneSet:
    """pixels: (N, H, W, 4) uint8, opaque; captions: (N, len(LANGUAGES) * CAPTIONS_EACH) strings, one language after the
    other; facts: (N, len(FACTS)) int64, UNSAID where the captions say nothing of it; layouts: (N,) below LAYOUTS.
    """

    pixels: np.ndarray
    captions: np.ndarray
    facts: np.ndarray
    layouts: np.ndarray


@dataclass(frozen=True)
class Scene:
    """One of them: what is drawn, and its pixels (H, W, 4) uint8, captions, facts and layout as in SceneSet."""

    what: Sky | Phantom
    pixels: np.ndarray
    captions: list[str]
    facts: list[int]
    layout: int


def skies(work: Path, count: int, height: int, first: int = 0) -> SceneSet:
    """Panorama number i is drawn from seed i alone, so that numbers never trained on are new to the model."""
    return _kept(
        work / f"skies-{height}-{first}-{count}.npz", partial(sky_of, height=height), range(first, first + count)
    )


def phantoms(work: Path, count: int, size: int, first: int = 0) -> SceneSet:
    return _kept(
        work / f"phantoms-{size}-{first}-{count}.npz", partial(phantom_of, size=size), range(first, first + count)
    )


def sky_of(number: int, height: int) -> Scene:
    """The sun, where it is seen, stands at one azimuth: which way a panorama is turned is nothing that words say."""
    pick = np.random.default_rng([number, 1])
    weather = SUN_SEEN if pick.random() < _SUN_SHARE else WEATHERS[len(SUN_SEEN) :]
    sky = Sky(
        sun_height=float(pick.uniform(0, 88)),
        sun_azimuth=SUN_AZIMUTH,
        weather=weather[pick.integers(len(weather))],
        season=SEASONS[pick.integers(len(SEASONS))],
        place=PLACES[pick.integers(len(PLACES))],
    )
    captions = [sky_caption(sky, language, pick) for language in LANGUAGES for _ in range(CAPTIONS_EACH)]
    seen = sky.weather in SUN_SEEN
    said = {
        "domain": DOMAINS.index("sky"),
        "weather": WEATHERS.index(sky.weather),
        "season": SEASONS.index(sky.season),
        "place": PLACES.index(sky.place),
        "sun": int(sky.sun_height / SUN_STEP) if seen else UNSAID,
    }
    layout = number % LAYOUTS
    rgb = render_sky(sky, height, np.random.default_rng([layout, 3]))
    return Scene(sky, _opaque(rgb), captions, _answers(said), layout)


def phantom_of(number: int, size: int) -> Scene:
    pick = np.random.default_rng([number, 2])
    share = pick.random()
    count = 0 if share < _NO_INSERT_SHARE else 1 if share < _NO_INSERT_SHARE + _ONE_INSERT_SHARE else 2
    sizes, contrasts = list(SIZES), list(CONTRASTS)
    inserts = tuple(
        Insert(SIDES[side], sizes[pick.integers(len(sizes))], contrasts[pick.integers(len(contrasts))])
        for side in sorted(pick.choice(len(SIDES), count, replace=False).tolist())
    )
    phantom = Phantom(REGIONS[pick.integers(len(REGIONS))], inserts)
    captions = [phantom_caption(phantom, language, pick) for language in LANGUAGES for _ in range(CAPTIONS_EACH)]
    said = {"domain": DOMAINS.index("phantom"), "region": REGIONS.index(phantom.region)}
    said |= {f"{side} {what}": 0 for side in SIDES for what in _OF_INSERTS}
    for insert in inserts:
        said[f"{insert.side} size"] = 1 + sizes.index(insert.size)
        said[f"{insert.side} contrast"] = 1 + contrasts.index(insert.contrast)
    layout = number % LAYOUTS
    grey = render_phantom(phantom, size, np.random.default_rng([layout, 4]))
    return Scene(phantom, _opaque(np.repeat(grey[..., None], 3, axis=-1)), captions, _answers(said), layout)


def _answers(said: dict[str, int]) -> list[int]:
    return [said.get(name, UNSAID) for name in FACTS]


def _opaque(rgb: np.ndarray) -> np.ndarray:
    levels = np.round(255 * rgb).astype(np.uint8)
    return np.concatenate([levels, np.full_like(levels[..., :1], 255)], axis=-1)


def _kept(stored: Path, make: Callable[[int], Scene], numbers: range) -> SceneSet:
    if not stored.exists():
        with ProcessPoolExecutor() as pool:
            made = list(pool.map(make, numbers, chunksize=32))
        beside = stored.with_suffix(".partial.npz")
        np.savez(
            beside,
            pixels=np.stack([one.pixels for one in made]),
            captions=np.array([one.captions for one in made]),
            facts=np.array([one.facts for one in made], np.int64),
            layouts=np.array([one.layout for one in made]),
        )
        beside.rename(stored)
    with np.load(stored) as arrays:
        return SceneSet(arrays["pixels"], arrays["captions"], arrays["facts"], arrays["layouts"])
