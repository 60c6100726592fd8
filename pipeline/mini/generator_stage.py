"""Teaching the generator: a flow from the fusion network's mean picture, plus a little noise, to the picture itself.

Stochastic interpolants with data-dependent coupling (Albergo et al., arXiv 2310.03725): x_sigma = (1 - sigma) x +
sigma (mean + s noise), and the network learns the velocity (mean + s noise) - x. The walk is short, so one to four
Euler steps do.
"""

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..fusing.fusion_network import FusionNetwork
from .examples import Batch, Examples
from .fusion_stage import fused, on_grid
from .loop import Plan, device, run_stage, seeded
from .tables import Tables
from .training_set import TrainingSet

# s, relative to latents of unit variance, as in the family's table; 0.3 taught it wrong detail, and 0.1 was all still
# there after one step, a sixth of the error.
START_NOISE = 0.03
FIRST_STEP_SHARE = 0.3  # how often sigma is exactly 1, which is all that a one-step run ever sees
TRAIN_TIMESTEPS = 1000
# Up to this much blur, each example its own, where the fusion network was taught with half of it: on unseen pairs it
# errs more, and this must be mended too. Much blur for all (0.15) made every style look like the most frequent one.
BLUR = 0.1
# Of drawings by words, these are begun between two styles, up to half of the way to the other: where a
# pair was never seen together, the fusion network's first picture lies between designs too.
BETWEEN_SHARE, BETWEEN = 0.35, 0.5
WIDE_EVERY = 3  # steps, of which one sees panoramas, whose latents are of another shape


def new_generator(grid: int, channels: int) -> UNet2DConditionModel:
    """Small: since the fusion network reaches the latents, four times as many weights moved them by 0.07%."""
    unet = UNet2DConditionModel(
        sample_size=grid,
        in_channels=2 * channels,
        out_channels=channels,
        down_block_types=("DownBlock2D",) * 3,
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("UpBlock2D",) * 3,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        cross_attention_dim=channels,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    nn.init.zeros_(unet.conv_out.weight)  # untaught, it leaves the mean picture as it is
    return unet


class Starts:
    """Where walks begin: batches of one shape, with the fusion network's first pictures of what is meant."""

    def __init__(self, pictures: TrainingSet, tables: Tables, network: FusionNetwork) -> None:
        self._examples, self._tables = Examples(pictures, tables), tables
        self._network = network
        nn.Module.to(network, device())

    @torch.no_grad()
    def draw(self, step: int, size: int, generator: torch.Generator) -> tuple[Batch, int, Tensor, Tensor, Tensor]:
        """The batch, its turn, its tokens (B, N, C), these as pictures and the latents wanted, both (B, C, h, w).

        One batch in WIDE_EVERY is of panoramas, half as many, since they are as large as two. They are turned by some
        columns, so that the ends, of which the fusion network does not know that they meet, meet within the picture.
        """
        wide = step % WIDE_EVERY == 0
        drawn = self._examples.draw(step, size // 2 if wide else size, (0, 1, 0) if wide else (0.85, 0, 0.15))
        wanted = self._tables.latents_of(drawn.rows)
        blur = BLUR * torch.rand(len(drawn.rows), 1, generator=generator, device=device())
        tokens = fused(self._network, drawn, blur, generator).float()
        if not wide:
            tokens = tokens.lerp(*self._another(drawn, round(0.85 * size), blur, generator))
        mean, turned = on_grid(tokens, wanted.shape[-1]), 0
        if wide:
            turned = int(torch.randint(wanted.shape[-1], (1,), generator=generator, device=device()))
        return drawn, turned, tokens, mean.roll(turned, dims=-1), wanted.roll(turned, dims=-1)

    def _another(self, drawn: Batch, drawings: int, blur: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The tokens of each in the style of the one before, and how far (B, 1, 1) to go there.

        drawings: how many of the batch these are, which come first.
        """
        way = torch.cat([drawn.way[:drawings].roll(1, 0), drawn.way[drawings:]])
        tokens = fused(self._network, replace(drawn, way=way), blur, generator).float()
        lots = torch.rand(2, len(tokens), 1, 1, generator=generator, device=device())
        far = BETWEEN * lots[0] * (lots[1] < BETWEEN_SHARE) * drawn.has_text[:, :, None]
        far[drawings:] = 0
        return tokens, far


def train_generator(
    work: Path,
    pictures: TrainingSet,
    tables: Tables,
    network: FusionNetwork,
    unet: UNet2DConditionModel,
    plan: Plan,
) -> UNet2DConditionModel:
    torch.manual_seed(0)
    starts = Starts(pictures, tables, network)

    def loss_at(step: int) -> dict[str, Tensor]:
        generator = seeded(step)
        _, _, tokens, mean, wanted = starts.draw(step, plan.batch, generator)
        sigma = torch.rand(len(mean), generator=generator, device=mean.device)
        first = torch.rand(len(mean), generator=generator, device=mean.device) < FIRST_STEP_SHARE
        sigma = sigma.masked_fill(first, 1.0)
        start = mean + START_NOISE * torch.randn(mean.shape, generator=generator, device=mean.device)
        return {"velocity": F.mse_loss(velocity_at(unet, tokens, mean, start, wanted, sigma), start - wanted)}

    run_stage("generator", work, plan, nn.ModuleDict({"unet": unet}), loss_at)
    return unet


def velocity_at(
    unet: UNet2DConditionModel, tokens: Tensor, mean: Tensor, start: Tensor, wanted: Tensor, sigma: Tensor
) -> Tensor:
    """What the network says at ``sigma`` (B,) of the way from ``start`` to ``wanted``, both (B, C, h, w)."""
    at = sigma[:, None, None, None]
    seen = torch.cat([(1 - at) * wanted + at * start, mean], dim=1)
    return unet(seen, sigma * TRAIN_TIMESTEPS, encoder_hidden_states=tokens, return_dict=False)[0].float()
