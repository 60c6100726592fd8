"""All that the small model learns from, as one row of pictures: emoji drawings, then panoramas, then phantoms."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .loop import device
from .pictures import PictureSet, load_pictures
from .scenes.scene_set import SceneSet, phantoms, skies

SIZE = 128  # pixels a side; a panorama is twice as wide
SKIES, PHANTOMS = 3000, 3000
SHARES = (0.7, 0.15, 0.15)  # of a batch: emoji, panoramas, phantoms


@dataclass(frozen=True)
class TrainingSet:
    """Rows 0..E-1 are emoji, E..E+S-1 panoramas, the rest phantoms."""

    emoji: PictureSet
    skies: SceneSet
    phantoms: SceneSet

    @property
    def scenes(self) -> tuple[SceneSet, SceneSet]:
        return self.skies, self.phantoms

    @property
    def starts(self) -> tuple[int, int, int]:
        """The first row of each domain."""
        emoji, sky = len(self.emoji.pixels), len(self.skies.pixels)
        return 0, emoji, emoji + sky

    def training_rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each domain, the rows that may be trained on."""
        _, sky, phantom = self.starts
        return (
            self.emoji.training_rows(),
            np.arange(sky, phantom),
            np.arange(phantom, phantom + len(self.phantoms.pixels)),
        )

    def domain_of(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.starts, rows, side="right") - 1

    @cached_property
    def pixels(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each domain (N, H, W, 4) uint8, on the device that learns."""
        emoji, sky, phantom = (
            torch.from_numpy(some.pixels).to(device()) for some in (self.emoji, self.skies, self.phantoms)
        )
        return emoji, sky, phantom

    def pixels_of(self, rows: np.ndarray) -> Tensor:
        """(B, H, W, 4) uint8, for rows of one domain, in their order."""
        domain = int(self.domain_of(rows[:1])[0])
        return self.pixels[domain][torch.from_numpy(rows - self.starts[domain]).to(device())]

    def each(self, rows: np.ndarray, see: Callable[[Tensor], Tensor]) -> Tensor:
        """``see(pixels)`` -> (b, ...) of each domain's rows, put together in the order of ``rows``."""
        domains = self.domain_of(rows)
        places = [np.flatnonzero(domains == domain) for domain in range(len(SHARES))]
        found = torch.cat([see(self.pixels_of(rows[place])) for place in places if len(place)])
        return found[torch.from_numpy(np.argsort(np.concatenate(places))).to(found.device)]


def load_training_set(work: Path, size: int = SIZE) -> TrainingSet:
    """From ``work``, where it is drawn first: some ten minutes on two cores."""
    return TrainingSet(load_pictures(work, size), skies(work, SKIES, size), phantoms(work, PHANTOMS, size))


def counts_of(batch: int) -> tuple[int, int, int]:
    """How many of each domain make up a batch."""
    others = [round(batch * share) for share in SHARES[1:]]
    return batch - sum(others), others[0], others[1]
