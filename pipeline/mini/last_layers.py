"""What the fusion network says of some drawings, moved by its last layers alone: a question of least squares.

The tokens are linear in what these layers are given. So the weights by which some answers change as wanted, while all
others stay, need no steps down a gradient: they follow from sums over the examples, and one decomposition (ridge
regression, doi 10.1080/00401706.1970.10488634).
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..fusing.fusion_network import FusionNetwork
from .examples import NUMBER_OF, Examples
from .fusion_stage import BLUR, joined
from .loop import device, seeded
from .tables import Tables, index
from .training_set import TrainingSet

BATCHES, BATCH = 40, 2048  # of examples as the stages draw them; all together count as much as all names, below
UNSEEN = 10_000_000  # the first batch: no stage draws so many
MOVED_COUNTS = 5.0  # a drawing that is to be said otherwise, by its names, where another counts 1
RIDGE = 1e-4  # of the inputs' mean square

# Inputs of the network (B, text_width + image_width), which of the moves each is to make, -1 for none, and how much it
# counts.
Asked = tuple[Tensor, np.ndarray, np.ndarray]


@torch.no_grad()
def move_answers(
    network: FusionNetwork, pictures: TrainingSet, tables: Tables, rows: np.ndarray, moves: Tensor
) -> float:
    """Change its last layers so that drawings ``rows`` (K,) are said ``moves`` (K, G*G, C) away from where they were.

    All else is to stay, as far as least squares find it worth. Returns the share of the moves that is made where the
    drawings are asked for by their names, 1 for all.
    """
    layers = network.last_layers
    widths = [layer.in_features for layer in layers]
    wanted, place = moves.flatten(1), np.full(len(tables.features), -1)
    place[rows] = np.arange(len(rows))
    squares = torch.zeros(sum(widths) + 1, sum(widths) + 1, device=device())
    products = torch.zeros(sum(widths) + 1, wanted.shape[1], device=device())
    for asked, move, counts in _all_asked(network, pictures, tables, place):
        seen, moved = _seen(network, asked), np.flatnonzero(move >= 0)
        counted = seen * index(counts)[:, None]
        squares += counted.T @ seen
        products += counted[index(moved)].T @ wanted[index(move[moved])]
    squares.diagonal().add_(RIDGE * squares.diagonal().mean())
    change = torch.cholesky_solve(products.double(), torch.linalg.cholesky(squares.double())).float()
    *parts, bias = change.split([*widths, 1])
    for layer, part in zip(layers, parts, strict=True):
        layer.weight.add_(part.T)
    layers[0].bias.add_(bias[0])
    some = np.arange(0, len(rows), max(1, len(rows) // BATCH))
    made = _seen(network, by_names(network, pictures, tables, rows[some])) @ change
    return float((made * wanted[index(some)]).sum() / wanted[index(some)].square().sum())


def by_names(network: FusionNetwork, pictures: TrainingSet, tables: Tables, rows: np.ndarray, name: int = 0) -> Tensor:
    """(B, text_width + image_width) that asks for each drawing of ``rows`` by its bare name, in its style.

    name: 0 in English, 1 in Chinese.
    """
    emoji = pictures.emoji
    captions = tables.bare_names[emoji.concept[rows], name]
    text = network.text_norm(tables.captions[index(captions)])
    return torch.cat([text, network.null_image[index(NUMBER_OF[emoji.style[rows]])]], dim=-1)


def _all_asked(network: FusionNetwork, pictures: TrainingSet, tables: Tables, place: np.ndarray) -> Iterator[Asked]:
    """place: (N,), of each picture, which of the moves is its own, -1 where it has none."""
    examples, drawings = Examples(pictures, tables), pictures.emoji.training_rows()
    names = tables.bare_names.shape[1]
    for number in range(UNSEEN, UNSEEN + BATCHES):
        drawn = examples.draw(number, BATCH)
        said = drawn.has_text[:, 0].cpu().numpy()
        counts = np.full(BATCH, names * len(drawings) / (BATCHES * BATCH), dtype=np.float32)
        yield joined(network, drawn, BLUR, seeded(number)), np.where(said, place[drawn.rows], -1), counts
    for name in range(names):
        for some in np.array_split(drawings, len(drawings) // BATCH + 1):
            counts = np.where(place[some] >= 0, MOVED_COUNTS, 1).astype(np.float32)
            yield by_names(network, pictures, tables, some, name), place[some], counts


def _seen(network: FusionNetwork, asked: Tensor) -> Tensor:
    """(B, W): what the last layers are given, side by side, and 1 for the bias."""
    return torch.cat([*network.before_last(asked), asked.new_ones(len(asked), 1)], dim=1)
