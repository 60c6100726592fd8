"""Teaching the fusion network to choose: of what words and style mean together, and the words alone in each way.

What it learns from is told by a network that never saw one drawing of each concept, a fold: for those it errs as the
model does for pairs that nobody drew, and what was meant is known.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC
from torch import Tensor, nn

from ..fusing.fusion_network import FusionNetwork
from .examples import WAYS, Examples, by_way, strange_rows
from .finish_losses import ImageNetEye, LineUp, over_colour
from .fusion_stage import configured, on_grid
from .loop import Plan, device, run_stage, seeded
from .tables import Tables
from .training_set import TrainingSet

STRANGE_TIMES = 2  # how often each drawing that the fold never saw is asked for
KNOWN, SCENES = 3000, 1000  # and how many that it saw
STYLE_VALUE = 0.7  # of the right style, where the right concept is worth 1
BLUR = 0.05
RECOGNISED = 5  # among the first so many of its style


@dataclass(frozen=True)
class Cases:
    """pictures: (N, 1 + ways, G*G, C), see ``FusionNetwork.candidates``; image: (N, 256), normalised; values:
    (N, 1 + ways) in 0 to 1 + STYLE_VALUE, how good it would be to draw each.
    """

    pictures: Tensor
    image: Tensor
    values: Tensor


def choosing(network: FusionNetwork) -> FusionNetwork:
    """The same network with an untaught choice, which changes nothing."""
    wider = FusionNetwork(**{**configured(network), "chooses": True})
    kept = {name: weight for name, weight in network.state_dict().items() if not name.startswith("choice.")}
    wider.load_state_dict(kept, strict=False)
    return wider.eval()


def train_choice(
    work: Path,
    pictures: TrainingSet,
    tables: Tables,
    network: FusionNetwork,
    fold: FusionNetwork,
    vae: AutoencoderDC,
    plan: Plan,
) -> FusionNetwork:
    """The loss is the value that is lost where one is drawn by its share of a softmax."""
    torch.manual_seed(0)
    network = choosing(network).requires_grad_(False)
    assert network.choice is not None
    network.choice.requires_grad_(True)
    cases = judged(pictures, tables, fold, vae)
    choice, best = network.choice, cases.values.amax(dim=1)

    def loss_at(step: int) -> dict[str, Tensor]:
        generator = seeded(step)
        some = torch.randint(len(best), (plan.batch,), generator=generator, device=device())
        seen = cases.pictures[some].float()
        blur = BLUR * torch.rand(len(some), 1, 1, 1, generator=generator, device=device())
        seen = seen + blur * torch.randn(seen.shape, generator=generator, device=device())
        shares = choice(seen, cases.image[some]).float().softmax(dim=1)
        return {"lost": (best[some] - (shares * cases.values[some]).sum(dim=1)).mean()}

    run_stage("choice", work, plan, nn.ModuleDict({"choice": choice}), loss_at)
    return network


@torch.no_grad()
def judged(pictures: TrainingSet, tables: Tables, fold: FusionNetwork, vae: AutoencoderDC) -> Cases:
    """Drawings are judged by whether an ImageNet network recognises them; of scenes, both together are always right.

    So are those that the fold did see, though it draws them worse than the model, which had longer to learn. Taken for
    right, they taught the choice that a blur is what was learned, and it never chose another.
    """
    eye = ImageNetEye()
    line_up, strange = LineUp(eye, pictures.emoji), strange_rows(pictures.emoji)
    examples = Examples(pictures, tables, without=strange)
    known = np.setdiff1d(line_up.rows, strange)
    pick = np.random.default_rng(0)
    rows = np.concatenate([np.tile(strange, STRANGE_TIMES), pick.permutation(known)[:KNOWN]])
    concept, style = pictures.emoji.concept, pictures.emoji.style
    in_ways = by_way(concept[known], style[known], known, len(pictures.emoji.concepts))
    found: list[Cases] = []
    for step, some in enumerate(np.array_split(rows, len(rows) // 64 + 1)):
        drawn = examples.meant(step, some)
        seen, image = fold.candidates(drawn.text, drawn.image)
        both = _gists(eye, vae, on_grid(seen[:, 0], int(seen.shape[2] ** 0.5)) / tables.scaling_factor)
        values = [_value(line_up, both, some)]
        for way, own in enumerate(in_ways[:, concept[some]]):
            # Where the way is of the very drawing that the fold never saw, it is no better than both together.
            drawable = torch.from_numpy((own >= 0) & ((WAYS[way] != style[some]) | np.isin(some, known)))
            real = line_up.gists_of(np.where(own >= 0, own, known[0]))
            values.append(_value(line_up, torch.where(drawable.to(both.device)[:, None], real, both), some))
        found.append(Cases(seen.half(), image, torch.stack(values, dim=1)))
    for step in range(SCENES // 64 + 1):
        drawn = examples.draw(step, 128, (0, 0.6, 0.4))
        of_both = (drawn.has_text & drawn.has_image)[:, 0]
        seen, image = fold.candidates(drawn.text[of_both], drawn.image[of_both])
        values = image.new_zeros(seen.shape[:2])
        values[:, 0] = 1 + STYLE_VALUE
        found.append(Cases(seen.half(), image, values))
    return Cases(*(torch.cat([getattr(each, name) for each in found]) for name in ("pictures", "image", "values")))


def _gists(eye: ImageNetEye, vae: AutoencoderDC, latents: Tensor) -> Tensor:
    made = vae.decode(latents.contiguous(memory_format=torch.channels_last), return_dict=False)[0].float()
    white = over_colour(made.clamp(-1, 1), torch.ones(1, 3, 1, 1, device=made.device))
    return eye.gist(eye.layers(white.clamp(0, 1)))


def _value(line_up: LineUp, gists: Tensor, rows: np.ndarray) -> Tensor:
    of_style, of_concept = line_up.ranks(gists, rows)
    return 0.5 * (of_style < RECOGNISED) + 0.5 / (1 + of_style) + STYLE_VALUE * (of_concept == 0)
