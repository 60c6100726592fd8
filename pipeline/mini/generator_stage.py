"""Teaching the generator: a flow from the fusion network's mean picture, plus a little noise, to the picture itself.

Stochastic interpolants with data-dependent coupling (Albergo et al., arXiv 2310.03725): x_sigma = (1 - sigma) x +
sigma (mean + s noise), and the network learns the velocity (mean + s noise) - x. The walk is short, so one to four
Euler steps do.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..fusing.fusion_network import FusionNetwork
from .fusion_stage import WAYS, Batch, Examples, Tables, by_way, fused, index, on_grid, strange_rows
from .loop import Plan, device, run_stage, seeded
from .training_set import TrainingSet

START_NOISE = 0.1  # s, relative to latents of unit variance, as in the family's table; 0.3 taught it wrong detail
FIRST_STEP_SHARE = 0.3  # how often sigma is exactly 1, which is all that a one-step run ever sees
TRAIN_TIMESTEPS = 1000
# Up to this much blur, each example its own, where the fusion network was taught with half of it: on unseen pairs it
# errs more, and this must be mended too. Much blur for all (0.15) made every style look like the most frequent one.
BLUR = 0.1
# Of drawings by words and a picture, these are begun between two styles, up to half of the way to the other: where a
# pair was never seen together, the fusion network's first picture lies between designs too.
BETWEEN_SHARE, BETWEEN = 0.35, 0.5
WIDE_EVERY = 3  # steps, of which one sees panoramas, whose latents are of another shape
# Of a batch: drawings whose concept and style the network that begins them has never seen together. Only from such
# beginnings can it be learned what to do with them: of all others the network knows the drawing by heart.
STRANGE_SHARE = 0.35


def new_generator(grid: int, channels: int) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=grid,
        in_channels=3 * channels,  # where the walk is, and the two pictures of the tokens
        out_channels=channels,
        down_block_types=("DownBlock2D",) * 3,
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("UpBlock2D",) * 3,
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        cross_attention_dim=2 * channels,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    nn.init.zeros_(unet.conv_out.weight)  # untaught, it leaves the mean picture as it is
    return unet


def widened(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """As of now, for one that saw only the first of the tokens' pictures: of the second it makes nothing yet."""
    config: Any = unet.config
    fresh = new_generator(config.sample_size, config.out_channels)
    weights = unet.state_dict()
    for name, wanted in fresh.state_dict().items():
        missing = wanted.shape[1] - weights[name].shape[1] if wanted.ndim > 1 else 0
        if missing:
            weights[name] = torch.cat([weights[name], wanted.new_zeros(len(wanted), missing, *wanted.shape[2:])], dim=1)
    fresh.load_state_dict(weights)
    return fresh


@dataclass(frozen=True)
class Start:
    """Where a batch of walks begins, and where it is to lead.

    tokens: (B, N, 2C); mean: the same as two pictures (B, 2C, h, w); wanted: latents (B, C, h, w) of the pictures
    ``rows``; named: the drawing that words and style ask for, which is another one where that cannot be known. turned:
    by how many columns mean and wanted are.
    """

    tokens: Tensor
    mean: Tensor
    wanted: Tensor
    rows: np.ndarray
    named: np.ndarray
    turned: int


class Starts:
    """Where walks begin: batches of one shape, with the fusion network's first pictures of what is meant.

    fold: a fusion network that never saw ``strange_rows``, which begins these: what it makes of them is what
    ``network`` makes of words and style that are held out (stacked generalisation, Wolpert 1992). Some of these it
    says nearly; of others, whose design is one of its own, nobody could. From there the walk leads to the house style's
    drawing, which the tokens hold too: a drawing in another style says more than a blur in the right one.
    """

    def __init__(self, pictures: TrainingSet, tables: Tables, network: FusionNetwork, fold: FusionNetwork) -> None:
        self._examples, self._tables = Examples(pictures, tables), tables
        self._network, self._fold = network, fold
        emoji, self._strange = pictures.emoji, strange_rows(pictures.emoji)
        self._in_house_style = emoji.style == WAYS[0]
        known = np.setdiff1d(emoji.training_rows(), self._strange)
        house, self._concept = (
            by_way(emoji.concept[known], emoji.style[known], known, len(emoji.concepts)),
            emoji.concept,
        )
        self._house = house[0]
        for each in (network, fold):
            nn.Module.to(each, device())

    @torch.no_grad()
    def draw(self, step: int, size: int, generator: torch.Generator) -> Start:
        """One batch in WIDE_EVERY is of panoramas, half as many, since they are as large as two. They are turned by
        some columns, so that the ends, of which the fusion network does not know that they meet, meet within the
        picture. Others begin with the strange ones.
        """
        wide = step % WIDE_EVERY == 0
        strange = 0 if wide else round(STRANGE_SHARE * size)
        rest = size // 2 if wide else size - strange
        drawn = self._examples.draw(step, rest, (0, 1, 0) if wide else (0.85, 0, 0.15))
        blur = BLUR * torch.rand(rest + strange, 1, generator=generator, device=device())
        tokens = fused(self._network, drawn, blur[strange:], generator).float()
        if not wide:
            tokens = tokens.lerp(*self._another(drawn, round(0.85 * rest), blur[strange:], generator))
        tokens = torch.cat([tokens, self._of_words(self._network, drawn, tokens, generator)], dim=-1)
        rows = named = drawn.rows
        if strange:
            strangers, led, begun_at = self._strangers(step, strange, blur[:strange], generator)
            rows, named = np.concatenate([led, rows]), np.concatenate([strangers, named])
            tokens = torch.cat([begun_at, tokens])
        wanted = self._tables.latents_of(rows)
        mean, turned = on_grid(tokens, wanted.shape[-1]), 0
        if wide:
            turned = int(torch.randint(wanted.shape[-1], (1,), generator=generator, device=device()))
        return Start(tokens, mean.roll(turned, dims=-1), wanted.roll(turned, dims=-1), rows, named, turned)

    def _strangers(
        self, step: int, count: int, blur: Tensor, generator: torch.Generator
    ) -> tuple[np.ndarray, np.ndarray, Tensor]:
        """Drawings that ``fold`` never saw, where walks from there are to lead, and the tokens (count, N, 2C)."""
        rows = np.random.default_rng([step, 9]).choice(self._strange, count)
        drawn = self._examples.meant(step, rows)
        tokens = fused(self._fold, drawn, blur, generator).float()
        # Of the house style's own drawings ``network`` would give away the answer; of others it knows their words.
        known, unknown = (self._of_words(each, drawn, tokens, generator) for each in (self._network, self._fold))
        own = torch.from_numpy(self._in_house_style[rows]).to(tokens.device)
        house = self._house[self._concept[rows]]
        apart, from_house = (
            (tokens - self._tables.square[index(side)].flatten(2).transpose(1, 2)).square().mean(dim=(1, 2))
            for side in (rows, house)
        )
        led = np.where((apart <= from_house).cpu().numpy(), rows, house)
        return rows, led, torch.cat([tokens, torch.where(own[:, None, None], unknown, known)], dim=-1)

    @staticmethod
    def _of_words(network: FusionNetwork, drawn: Batch, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """(B, N, C): what the words alone mean in the first way; ``tokens`` where there are no words or no picture."""
        nobody = torch.zeros_like(drawn.has_image)
        alone = replace(drawn, has_image=nobody, way=torch.zeros_like(drawn.way))
        said = fused(network, alone, 0.0, generator).float()
        return torch.where((drawn.has_text & drawn.has_image)[:, :, None], said, tokens)

    def _another(self, drawn: Batch, drawings: int, blur: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The tokens of each in the style of the one before, and how far (B, 1, 1) to go there.

        drawings: how many of the batch these are, which come first.
        """
        image = torch.cat([drawn.image[:drawings].roll(1, 0), drawn.image[drawings:]])
        tokens = fused(self._network, replace(drawn, image=image), blur, generator).float()
        lots = torch.rand(2, len(tokens), 1, 1, generator=generator, device=device())
        far = BETWEEN * lots[0] * (lots[1] < BETWEEN_SHARE) * (drawn.has_text & drawn.has_image)[:, :, None]
        far[drawings:] = 0
        return tokens, far


def train_generator(
    work: Path,
    pictures: TrainingSet,
    tables: Tables,
    network: FusionNetwork,
    fold: FusionNetwork,
    unet: UNet2DConditionModel,
    plan: Plan,
) -> UNet2DConditionModel:
    torch.manual_seed(0)
    starts = Starts(pictures, tables, network, fold)

    def loss_at(step: int) -> dict[str, Tensor]:
        generator = seeded(step)
        drawn = starts.draw(step, plan.batch, generator)
        mean, wanted = drawn.mean, drawn.wanted
        sigma = torch.rand(len(mean), generator=generator, device=mean.device)
        first = torch.rand(len(mean), generator=generator, device=mean.device) < FIRST_STEP_SHARE
        sigma = sigma.masked_fill(first, 1.0)
        start = begun(mean, torch.randn(wanted.shape, generator=generator, device=mean.device))
        return {"velocity": F.mse_loss(velocity_at(unet, drawn.tokens, mean, start, wanted, sigma), start - wanted)}

    run_stage("generator", work, plan, nn.ModuleDict({"unet": unet}), loss_at)
    return unet


def begun(mean: Tensor, noise: Tensor) -> Tensor:
    """Where a walk starts, (B, C, h, w): the first of the two pictures (B, 2C, h, w), and a little noise."""
    return mean[:, : noise.shape[1]] + START_NOISE * noise


def velocity_at(
    unet: UNet2DConditionModel, tokens: Tensor, mean: Tensor, start: Tensor, wanted: Tensor, sigma: Tensor
) -> Tensor:
    """What the network says at ``sigma`` (B,) of the way from ``start`` to ``wanted``, both (B, C, h, w).

    mean: (B, 2C, h, w), the tokens' pictures.
    """
    at = sigma[:, None, None, None]
    seen = torch.cat([(1 - at) * wanted + at * start, mean], dim=1)
    return unet(seen, sigma * TRAIN_TIMESTEPS, encoder_hidden_states=tokens, return_dict=False)[0].float()
