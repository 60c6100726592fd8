"""Teaching the fusion network to read the style of a picture, before it learns to draw in it."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fusing.fusion_network import FusionNetwork
from .examples import READ, Examples
from .fusion_stage import configured
from .loop import Plan, device, run_stage, seeded
from .tables import Tables, index
from .training_set import TrainingSet

BLUR = 0.1  # of the normalised features
PLAN = Plan(2000, 1024, learning_rate=2e-3, warmup=50, average=0.99)  # half a minute on two cores


def reading(network: FusionNetwork, tables: Tables, pictures: TrainingSet) -> FusionNetwork:
    """The network with an untaught reader. Where it had none, a style that is no way is the mean of its pictures."""
    further = FusionNetwork(**{**configured(network), "styles": len(READ)})
    state, rows = network.state_dict(), pictures.training_rows()[0]
    styles = pictures.emoji.style[rows]
    means = [
        network.image_norm(tables.features[index(rows[styles == style]), 0]).mean(dim=0)
        for style in READ[len(network.null_image) :]
    ]
    state = {name: weights for name, weights in state.items() if not name.startswith("reader.")}
    state["null_image"] = torch.cat([network.null_image, *(mean[None] for mean in means)])
    further.load_state_dict(state, strict=False)
    return further


def train_reader(
    work: Path, pictures: TrainingSet, tables: Tables, network: FusionNetwork, plan: Plan = PLAN
) -> FusionNetwork:
    """By cross-entropy on the styles of pictures, one or several at once; nothing else of the network changes."""
    torch.manual_seed(0)
    nn.Module.to(network, device())
    network = reading(network, tables, pictures)
    nn.Module.to(network, device())
    reader, examples = network.reader, Examples(pictures, tables)
    assert reader is not None

    def loss_at(step: int) -> dict[str, Tensor]:
        image, style = examples.shown(step, plan.batch)
        with torch.no_grad():
            image = network.image_norm(image)
        blur = BLUR * torch.randn(image.shape, generator=seeded(step), device=image.device)
        return {"style": F.cross_entropy(reader(image + blur).float(), style)}

    run_stage("reader", work, plan, nn.ModuleDict({"reader": reader}), loss_at)
    return network
