"""Training pictures: every drawing as RGBA with premultiplied colour, in one array on disk."""

import io
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from .catalogue import STYLES, Concept, HoldOut, PictureSource, fetch_packages, hold_out, load_concepts


@dataclass(frozen=True)
class PictureSet:
    """All pictures with the concept and style of each.

    pixels: (N, S, S, 4) uint8, colour premultiplied by alpha; concept, style: (N,) indices.
    """

    pixels: np.ndarray
    concept: np.ndarray
    style: np.ndarray
    concepts: tuple[Concept, ...]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return list(zip(self.concept.tolist(), self.style.tolist(), strict=True))

    def held_out(self) -> HoldOut:
        return hold_out(self.pairs)

    def training_rows(self) -> np.ndarray:
        """Row numbers that may be trained on."""
        held = self.held_out()
        keep = [c not in held.concepts and (c, s) not in held.pairs for c, s in self.pairs]
        return np.flatnonzero(keep)


def load_pictures(work: Path, size: int = 64) -> PictureSet:
    """Rasterise everything once into ``work`` (some six minutes on two cores), then read it from there."""
    fetch_packages(work / "packages")
    concepts = load_concepts(work / "packages")
    stored = work / f"pictures-{size}.npz"
    if not stored.exists():
        _rasterise(work / "packages", concepts, size, stored)
    with np.load(stored) as arrays:
        return PictureSet(arrays["pixels"], arrays["concept"], arrays["style"], concepts)


def _rasterise(packages: Path, concepts: tuple[Concept, ...], size: int, stored: Path) -> None:
    jobs = [
        (number, style, drawing)
        for style, name in enumerate(STYLES)
        for source in [PictureSource(packages, name)]
        for number, concept in enumerate(concepts)
        if (drawing := source.find(concept)) is not None
    ]
    with ProcessPoolExecutor() as pool:
        pixels = np.stack(list(pool.map(partial(_draw, size=size), [job[2] for job in jobs], chunksize=16)))
    visible = pixels[..., 3].mean(axis=(1, 2)) > 2  # a few icons use features that the rasteriser leaves blank
    beside = stored.with_suffix(".partial.npz")
    np.savez(
        beside,
        pixels=pixels[visible],
        concept=np.array([job[0] for job in jobs])[visible],
        style=np.array([job[1] for job in jobs])[visible],
    )
    beside.rename(stored)


def _draw(drawing: str | bytes, size: int) -> np.ndarray:
    if isinstance(drawing, str):
        import resvg_py

        drawing = bytes(resvg_py.svg_to_bytes(svg_string=drawing, width=2 * size, height=2 * size))
    with Image.open(io.BytesIO(drawing), formats=["PNG", "WEBP"]) as image:
        rgba = np.asarray(image.convert("RGBA"), dtype=np.float32)
    premultiplied = np.concatenate([rgba[..., :3] * rgba[..., 3:] / 255, rgba[..., 3:]], axis=-1)
    planes = [
        Image.fromarray(premultiplied[..., channel]).resize((size, size), Image.Resampling.LANCZOS)
        for channel in range(4)
    ]
    small = np.clip(np.stack([np.asarray(p) for p in planes], axis=-1).round(), 0, 255)
    # The kernel's negative lobes leave more colour at edges than there is alpha to show it.
    small[..., :3] = np.minimum(small[..., :3], small[..., 3:])
    return small.astype(np.uint8)
