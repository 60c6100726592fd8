"""Teaching the fusion network: words, a picture or both -> the mean latents of the picture that was meant."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..denoising.unet_sampler import stretched
from ..fusing.fusion_network import FusionNetwork
from .examples import READ, WAYS, Batch, Examples
from .loop import Plan, device, run_stage, seeded
from .tables import Tables, index
from .training_set import TrainingSet

# Where a scene shows what its words say, which is a few places: there it counts more, or clouds and edges would drown
# it. Shares of the picture: left, top, right, bottom; the sun's column, and both inserts.
SAID_WEIGHT = {
    1: [((0.5, 0.0, 0.5625, 0.5625), 16.0)],
    2: [((0.125, 0.375, 0.4375, 0.625), 4.0), ((0.5625, 0.375, 0.875, 0.625), 4.0)],
}
EXIT_HIDDEN = 3500  # what 60 MB leave room for, see FusionNetwork
BLUR = 0.05  # of what is asked for, which has unit variance
ENDS_WEIGHT = 0.5  # of the difference of the errors at a panorama's two ends, which meet only where it is small


def fused(network: FusionNetwork, batch: Batch, noise: float | Tensor, generator: torch.Generator) -> Tensor:
    """Tokens (B, G*G, 16) for a mixed batch, asked for as in ``joined``."""
    return network.fuse_normalised(joined(network, batch, noise, generator))


def joined(network: FusionNetwork, batch: Batch, noise: float | Tensor, generator: torch.Generator) -> Tensor:
    """What a mixed batch asks for (B, text_width + image_width), each side normalised or null.

    noise: by which it is blurred so neighbours agree, one for all, or (B, 1).
    """
    text = torch.where(batch.has_text, network.text_norm(batch.text), network.null_text)
    image = torch.where(batch.has_image, network.image_norm(batch.image), network.null_image[batch.way])
    asked = torch.cat([text, image], dim=-1)
    return asked + noise * torch.randn(asked.shape, generator=generator, device=asked.device)


def on_grid(tokens: Tensor, columns: int) -> Tensor:
    """(B, G*G, C) -> (B, C, G, columns), as the sampler lays it out."""
    side = int(tokens.shape[1] ** 0.5)
    return stretched(tokens.transpose(1, 2).unflatten(2, (side, side)), columns)


def said_weight(grid: int) -> Tensor:
    """(3, G*G): how much each place counts, by domain."""
    weight = torch.ones(3, grid, grid)
    for domain, places in SAID_WEIGHT.items():
        for bounds, counts in places:
            left, top, right, bottom = (round(bound * grid) for bound in bounds)
            weight[domain, top:bottom, left:right] = counts
    return weight.flatten(1)


def new_fusion(tables: Tables) -> FusionNetwork:
    """It begins with the mean of all pictures for an answer."""
    grid, channels = tables.grid_and_channels
    network = FusionNetwork(
        hidden=1280, num_blocks=3, gated=True, grid=grid, channels=channels, ways=len(WAYS), chooses=True,
        exit_hidden=EXIT_HIDDEN, styles=len(READ),
    )  # fmt: skip
    with torch.no_grad():
        network.exit.bias.copy_(tables.means().mean(0).flatten())
    return network


def reaching_further(network: FusionNetwork) -> FusionNetwork:
    """What its layers say, of a network whose gated last layer has EXIT_HIDDEN units; one that has goes on as it is.

    Units that it had not add nothing until they have learned. What it remembers it forgets: that lies in what its
    layers said.
    """
    network.forget()
    had = network.config["exit_hidden"]
    if had >= EXIT_HIDDEN:
        return network
    wider = FusionNetwork(**{**configured(network), "exit_hidden": EXIT_HIDDEN})
    assert wider.exit_block is not None
    nn.init.zeros_(wider.exit_block.narrow.weight)
    nn.init.zeros_(wider.exit_block.narrow.bias)
    state = wider.state_dict()
    for name, weights in network.state_dict().items():
        if state[name].shape == weights.shape:
            state[name].copy_(weights)
        elif name.startswith("exit_block.widen"):  # gates, then values
            for into, known in zip(state[name].chunk(2), weights.chunk(2), strict=True):
                into[:had] = known
        else:
            state[name][:, :had] = weights
    return wider


def configured(network: FusionNetwork) -> dict[str, Any]:
    """What it was built with, by name."""
    return {name: value for name, value in network.config.items() if not name.startswith("_")}


def train_fusion(
    work: Path,
    pictures: TrainingSet,
    tables: Tables,
    network: FusionNetwork,
    plan: Plan,
) -> FusionNetwork:
    """On two cores, in float32, a batch of 256 learns more in the same time than one of 512 or of 128."""
    torch.manual_seed(0)
    if network.reader is not None:
        network.reader.requires_grad_(False)  # nothing that is drawn passes through it
        network.image_norm.requires_grad_(False)  # by which it reads
    examples = Examples(pictures, tables)
    means, weights = tables.means(), said_weight(tables.grid_and_channels[0]).to(device())

    def loss_at(step: int) -> dict[str, Tensor]:
        drawn = examples.draw(step, plan.batch)
        made = fused(network, drawn, BLUR, seeded(step))
        domain = pictures.domain_of(drawn.rows)
        wanted, weight = means[index(drawn.rows)], weights[index(domain)]
        emoji = int((domain == 0).sum())  # they come first
        error = made.float() - wanted
        apart = (error.square().mean(dim=2) * weight).mean(dim=1)
        side = tables.grid_and_channels[0]
        columns = error[torch.from_numpy(domain == 1).to(error.device)].unflatten(1, (side, side))
        ends = (columns[:, :, 0] - columns[:, :, -1]).square().mean(dim=(1, 2))
        return {
            "emoji": apart[:emoji].sum() / plan.batch,
            "scenes": apart[emoji:].sum() / plan.batch,
            "ends": ENDS_WEIGHT * ends.sum() / plan.batch,
        }

    run_stage("fusion", work, plan, nn.ModuleDict({"fusion": network}), loss_at)
    return network
