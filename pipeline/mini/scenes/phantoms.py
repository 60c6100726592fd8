"""Phantoms of medical physics: ellipses of tissue as in Shepp and Logan (1974), with inserts as their words say.

They teach; they are no images of anybody. Left and right are sides of the picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .noise import noise

Region = Literal["head", "chest"]
Side = Literal["left", "right"]
Size = Literal["small", "medium", "large"]
Contrast = Literal["dark", "faint", "bright"]
REGIONS: tuple[Region, ...] = ("head", "chest")
SIDES: tuple[Side, ...] = ("left", "right")
SIZES: dict[Size, float] = {"small": 0.055, "medium": 0.095, "large": 0.145}  # radius; the picture is 2 wide
CONTRASTS: dict[Contrast, float] = {"dark": -0.20, "faint": 0.16, "bright": 0.48}  # added to the tissue

# Middle of the place on the right where an insert lies, and its radius; on the left mirrored. Only tissue lies there.
_PLACES: dict[Region, tuple[float, float, float]] = {"head": (0.345, 0.02, 0.20), "chest": (0.50, -0.02, 0.20)}
_TISSUE: dict[Region, float] = {"head": 0.42, "chest": 0.28}
# Grey, middle (x right, y down), half axes, turned by degrees clockwise.
_ELLIPSES: dict[Region, tuple[tuple[float, float, float, float, float, float], ...]] = {
    "head": (
        (0.95, 0.0, 0.0, 0.70, 0.90, 0),  # skull
        (0.42, 0.0, 0.0, 0.63, 0.83, 0),  # brain
        (0.20, -0.06, -0.08, 0.042, 0.24, -8),  # ventricles
        (0.20, 0.06, -0.08, 0.042, 0.24, 8),
        (0.50, 0.0, -0.50, 0.20, 0.12, 0),
        (0.36, 0.0, 0.50, 0.16, 0.12, 0),
    ),
    "chest": (
        (0.50, 0.0, 0.0, 0.95, 0.66, 0),  # soft tissue
        (0.28, -0.44, -0.04, 0.36, 0.48, 4),  # lungs; brighter than real ones, so that darker is possible
        (0.28, 0.44, -0.04, 0.36, 0.48, -4),
        (0.58, 0.05, -0.20, 0.20, 0.24, 25),  # heart
        (0.90, 0.0, 0.44, 0.11, 0.13, 0),  # spine
        (0.72, 0.0, 0.33, 0.05, 0.05, 0),
    ),
}


@dataclass(frozen=True)
class Insert:
    side: Side
    size: Size
    contrast: Contrast


@dataclass(frozen=True)
class Phantom:
    """inserts: none, one, or one on each side."""

    region: Region
    inserts: tuple[Insert, ...]


@dataclass(frozen=True)
class Found:
    """What a side of a picture shows. area: in pixels, 0 for no insert; contrast: grey against the tissue, -1..1."""

    area: float
    contrast: float


def render_phantom(phantom: Phantom, size: int, generator: np.random.Generator) -> np.ndarray:
    """(size, size) float32 in 0..1, sampled twice as finely. generator: for places, tilts and the texture."""
    fine = 2 * size
    row, column = np.mgrid[:fine, :fine]
    across, down = (2 * (column + 0.5) / fine - 1), (2 * (row + 0.5) / fine - 1)
    tilt = np.radians(generator.uniform(-4, 4))
    scale = generator.uniform(0.94, 1.02)
    turned = (np.cos(tilt) * across + np.sin(tilt) * down) / scale
    down = (np.cos(tilt) * down - np.sin(tilt) * across) / scale
    grey = np.zeros((fine, fine))
    for level, *ellipse in _ELLIPSES[phantom.region]:
        wobble = generator.uniform(0.96, 1.04, 2)
        grey = np.where(_inside(turned, down, ellipse, wobble), level + generator.uniform(-0.015, 0.015), grey)
    for insert in phantom.inserts:
        x, y, reach = _PLACES[phantom.region]
        radius = SIZES[insert.size] * generator.uniform(0.92, 1.08)
        loose = max(0.0, reach - radius - 0.02)
        angle, away = generator.uniform(0, 2 * np.pi), loose * np.sqrt(generator.random())
        x = (x if insert.side == "right" else -x) + away * np.cos(angle)
        inside = (turned - x) ** 2 + (down - y - away * np.sin(angle)) ** 2 < radius**2
        grey = np.where(inside, _TISSUE[phantom.region] + CONTRASTS[insert.contrast], grey)
    texture = noise(np.stack([across, down], -1) * 9, generator, octaves=3) - 0.5
    grey = grey + 0.05 * texture * (grey > 0)
    return grey.reshape(size, 2, size, 2).mean((1, 3)).clip(0, 1).astype(np.float32)


def _inside(
    across: np.ndarray,
    down: np.ndarray,
    ellipse: Sequence[float],
    wobble: np.ndarray,
) -> np.ndarray:
    x, y, half_width, half_height, turned = ellipse
    cos, sin = np.cos(np.radians(turned)), np.sin(np.radians(turned))
    along, athwart = cos * (across - x) + sin * (down - y), cos * (down - y) - sin * (across - x)
    return (along / (half_width * wobble[0])) ** 2 + (athwart / (half_height * wobble[1])) ** 2 < 1


# --- what a picture shows of it ---

_LEAST_CONTRAST = 0.07  # of grey: above the texture, below the faintest insert
_LEAST_AREA = 0.0008  # of the picture: a third of the smallest insert


def inserts_in(picture: np.ndarray, region: Region) -> dict[Side, Found]:
    """What lies at each side's place of (S, S) grey in 0..1, against the middle grey of the tissue there."""
    size = len(picture)
    row, column = np.mgrid[:size, :size]
    across, down = 2 * (column + 0.5) / size - 1, 2 * (row + 0.5) / size - 1
    x, y, reach = _PLACES[region]
    middles: dict[Side, float] = {"left": -x, "right": x}
    places: dict[Side, np.ndarray] = {
        side: (across - middle) ** 2 + (down - y) ** 2 < reach**2 for side, middle in middles.items()
    }
    # What most of the two places together show is tissue, even where a large insert fills one.
    tissue = _commonest(picture[places["left"] | places["right"]])
    found: dict[Side, Found] = {}
    for side, place in places.items():
        apart = (picture - tissue) * place
        strongest = apart.flat[np.abs(apart).argmax()]
        inside = place & (apart * np.sign(strongest) > abs(strongest) / 2)
        there = abs(strongest) > _LEAST_CONTRAST and inside.sum() >= _LEAST_AREA * size * size
        found[side] = Found(float(inside.sum()), float(np.median(apart[inside]))) if there else Found(0.0, 0.0)
    return found


def _commonest(greys: np.ndarray) -> float:
    counts, edges = np.histogram(greys, bins=25, range=(0, 1))
    best = int((counts[:-1] + counts[1:]).argmax())
    return float(np.median(greys[(greys >= edges[best]) & (greys <= edges[best + 2])]))
