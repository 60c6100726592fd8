"""Teaching the memory of a fusion network: what single drawings are to be said beyond what its layers say."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..fusing.fusion_network import FusionNetwork
from ..fusing.memory import KEY_WIDTH
from .examples import NUMBER_OF
from .fusion_stage import BLUR
from .last_layers import BATCH, by_names
from .loop import device
from .tables import Tables, index
from .training_set import TrainingSet

NOTHING = 1e-6  # of unit variance, mean square: what far keys leave is no value
TOUCHED = 0.01  # the least share of a value that may be added to what it is not meant for


@torch.no_grad()
def remember(network: FusionNetwork, pictures: TrainingSet, tables: Tables, rows: np.ndarray, moves: Tensor) -> float:
    """Let it say drawings ``rows`` (K,) moved by ``moves`` (K, G*G, C) from where it says them, by any of their names.

    What was remembered of these before goes on from there; of others it is remembered no more. At first a value is the
    mean of what either name needs. Returns the share of the moves that is made where they are asked for in English.
    """

    def said(name: int) -> Tensor:
        parts = np.array_split(rows, len(rows) // BATCH + 1)
        return torch.cat([network.fuse_normalised(by_names(network, pictures, tables, some, name)) for some in parts])

    before = said(0)
    network.forget()
    english, chinese = said(0), said(1)
    added = before - english
    at_first = added.square().mean(dim=(1, 2), keepdim=True) < NOTHING
    values = moves + torch.where(at_first, (english - chinese) / 2, added)
    network.remember(*_told_apart(network, pictures, tables, rows), values)
    beside = _taken_for_them(network, pictures, tables, rows)
    if len(beside):
        keys = _told_apart(network, pictures, tables, np.concatenate([rows, beside]))
        network.remember(*keys, torch.cat([values, values.new_zeros(len(beside), *values.shape[1:])]))
    return float(((said(0) - before) * moves).sum() / moves.square().sum())


@torch.no_grad()
def remembered(network: FusionNetwork, pictures: TrainingSet, tables: Tables) -> np.ndarray:
    """The learned drawings, asked for by their English names, to which the memory adds; in rising order.

    Not those that have a key so as not to be taken for others, with nothing behind it.
    """
    drawings = pictures.emoji.training_rows()
    if network.memory is None:
        return drawings[:0]
    known = np.zeros(len(drawings), dtype=bool)
    for places in np.array_split(np.arange(len(drawings)), len(drawings) // BATCH + 1):
        asked = by_names(network, pictures, tables, drawings[places])
        said = network.memory(asked).square().mean(dim=1) >= NOTHING
        known[places] = (network.memory.knows(asked, TOUCHED) & said).cpu().numpy()
    return drawings[known]


def _taken_for_them(network: FusionNetwork, pictures: TrainingSet, tables: Tables, rows: np.ndarray) -> np.ndarray:
    """What is not remembered and lies so near to one of ``rows``, that is, that it needs a key of its own."""
    assert network.memory is not None
    others = np.setdiff1d(pictures.emoji.training_rows(), rows)
    known = np.zeros(len(others), dtype=bool)
    for name in range(tables.bare_names.shape[1]):
        for places in np.array_split(np.arange(len(others)), len(others) // BATCH + 1):
            asked = by_names(network, pictures, tables, others[places], name)
            known[places] |= network.memory.knows(asked, TOUCHED).cpu().numpy()
    return others[known]


def _told_apart(
    network: FusionNetwork, pictures: TrainingSet, tables: Tables, rows: np.ndarray
) -> tuple[Tensor, Tensor]:
    """By what drawings are told apart, (text_width + image_width, KEY_WIDTH), and where each lies (K, KEY_WIDTH).

    Linear discriminants of several classes (Rao, Journal of the Royal Statistical Society B 10(2), 1948): the principal
    axes of the drawings' means, in units of how far the names of one vary. A style is asked for by its null vector, and
    does not.
    """
    concepts, concept_of = np.unique(pictures.emoji.concept[rows], return_inverse=True)
    named = np.flatnonzero(tables.caption_is_name & np.isin(tables.caption_concept, concepts))
    of_concept = index(np.searchsorted(concepts, tables.caption_concept[named]))
    names = network.text_norm(tables.captions[index(named)])
    counts = torch.bincount(of_concept, minlength=len(concepts))[:, None]
    means = names.new_zeros(len(concepts), names.shape[1]).index_add_(0, of_concept, names) / counts
    varied = names - means[of_concept]
    images = network.null_image[index(NUMBER_OF[pictures.emoji.style[rows]])]
    asked = torch.cat([means[index(concept_of)], images], dim=1)
    variance = BLUR**2 * torch.eye(asked.shape[1], device=device())
    variance[: names.shape[1], : names.shape[1]] += varied.T @ varied / len(varied)
    lengths, axes = torch.linalg.eigh(variance)
    to_units = axes * lengths.rsqrt()
    farthest = torch.linalg.svd((asked - asked.mean(dim=0)) @ to_units, full_matrices=False).Vh[:KEY_WIDTH]
    query = to_units @ F.pad(farthest, (0, 0, 0, KEY_WIDTH - len(farthest))).T
    return query, asked @ query
