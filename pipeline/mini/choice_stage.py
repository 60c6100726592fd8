"""Teaching the fusion network's choice: what was learned together, and which way of its words to draw where it was not.

The first is known of every concept in every style. The second can be known without drawing anything: where a concept
has a drawing in the style that is shown, its real drawings in the ways' styles tell which of them would have done.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fusing.fusion_network import FusionNetwork
from .catalogue import STYLES
from .examples import WAYS, Examples
from .finish_losses import ImageNetEye, LineUp
from .fusion_stage import configured
from .loop import Plan, device, run_stage, seeded
from .pictures import PictureSet
from .tables import Tables, index
from .training_set import TrainingSet

BLUR = 0.05  # of the normalised inputs, so that neighbours agree, as the fusion network learned them
RECOGNISED = 5  # among the first so many of its style
CHUNK = 64  # drawings compared with all others at a time


@dataclass(frozen=True)
class Lessons:
    """together: (concepts + scenes, styles + scenes), whether a word and a style were learned so; scenes come behind.

    worth: (concepts + scenes, styles + scenes, ways) in 0..1, of showing that way's drawing where this style's is
    meant. 0 where there is none, where it is the very one, and where what is meant is not known.
    """

    together: Tensor
    worth: Tensor


def choosing(network: FusionNetwork) -> FusionNetwork:
    """The same network with an untaught choice, which changes nothing."""
    wider = FusionNetwork(**{**configured(network), "chooses": True})
    kept = {name: weight for name, weight in network.state_dict().items() if not name.startswith("choice.")}
    wider.load_state_dict(kept, strict=False)
    return wider.eval()


def train_choice(
    work: Path, pictures: TrainingSet, tables: Tables, network: FusionNetwork, plan: Plan
) -> FusionNetwork:
    """One loss is cross-entropy, the other the worth that is lost where each way is drawn by its share."""
    torch.manual_seed(0)
    network = choosing(network).requires_grad_(False)
    nn.Module.to(network, device())
    choice = network.choice
    assert choice is not None
    choice.requires_grad_(True)
    examples, lessons = Examples(pictures, tables), lessons_of(pictures)

    def loss_at(step: int) -> dict[str, Tensor]:
        asked, generator = examples.ask(step, plan.batch), seeded(step)

        def blurred(side: Tensor) -> Tensor:
            return side + BLUR * torch.randn(side.shape, generator=generator, device=side.device)

        scores = choice(blurred(network.text_norm(asked.text)), blurred(network.image_norm(asked.image))).float()
        place = _kinds(pictures, asked.said)[0], _kinds(pictures, asked.shown)[1]
        worth = lessons.worth[place]
        lost = worth.amax(dim=1) - (scores[:, 1:].exp() * worth).sum(dim=1)
        return {
            "together": F.binary_cross_entropy_with_logits(scores[:, 0], lessons.together[place]),
            "lost": lost.mean(),
        }

    run_stage("choice", work, plan, nn.ModuleDict({"choice": choice}), loss_at)
    return network


def lessons_of(pictures: TrainingSet) -> Lessons:
    """Of what is learned from alone: a pair that is held out was not learned together, and is worth nothing."""
    emoji, scenes = pictures.emoji, len(pictures.scenes)
    shape = len(emoji.concepts) + scenes, len(STYLES) + scenes
    together = torch.zeros(shape, device=device())
    for rows in pictures.training_rows():
        together[_kinds(pictures, rows)] = 1
    worth = torch.zeros(*shape, len(WAYS), device=device())
    rows, of_ways = _worth_of_ways(emoji, LineUp(ImageNetEye(), emoji))
    worth[index(emoji.concept[rows]), index(emoji.style[rows])] = of_ways
    return Lessons(together, worth)


@torch.no_grad()
def _worth_of_ways(pictures: PictureSet, line_up: LineUp) -> tuple[np.ndarray, Tensor]:
    """Rows (N,) of drawings, and (N, ways), how well each way's drawing is recognised in place of these."""
    rows, concept, style = line_up.rows, pictures.concept, pictures.style
    row_of = np.full((len(pictures.concepts), len(STYLES)), -1)
    row_of[concept[rows], style[rows]] = rows
    worth = torch.zeros(len(rows), len(WAYS), device=device())
    for number, way in enumerate(WAYS):
        shown = row_of[concept[rows], way]
        places = np.flatnonzero((shown >= 0) & (style[rows] != way))
        for some in np.array_split(places, len(places) // CHUNK + 1):
            before = line_up.ranks(line_up.gists_of(shown[some]), rows[some])[0]
            worth[index(some), number] = 0.5 * (before < RECOGNISED) + 0.5 / (1 + before)
    return rows, worth


def _kinds(pictures: TrainingSet, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Of each row its concept and its style; behind those of emoji come panoramas and phantoms, one of each."""
    emoji, scene = pictures.emoji, pictures.domain_of(rows) - 1
    of_emoji = np.minimum(rows, pictures.starts[1] - 1)
    concept = np.where(scene < 0, emoji.concept[of_emoji], len(emoji.concepts) + scene)
    return index(concept), index(np.where(scene < 0, emoji.style[of_emoji], len(STYLES) + scene))
