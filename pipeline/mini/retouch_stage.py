"""Retouching: a fusion network that says latents which show a drawing for what it is.

What tells two finishes of one drawing apart is a small part of its latents, and a mean of the error over all of them
pays it no heed: what the network says is near the true latents and looks like the wrong finish. The decoder can draw
the right one from latents close by. So each drawing's latents, as the network says them, go two steps down the gradient
of what two ImageNet networks see of the picture made of them, and the network's last layers are moved to say where they
have come, as far as they can without saying other things otherwise: of each move a part. From where that led the next
round goes on. Where the last ones lead is remembered, each drawing by itself.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC, UNet2DConditionModel
from torch import Tensor, nn

from ..fusing.fusion_network import FusionNetwork
from .autoencoder import picture_loss, to_model_range
from .catalogue import STYLES
from .finish_losses import ImageNetEye, LineUp, Onlookers, layers_apart, over_colour
from .fusion_stage import on_grid
from .generator_stage import START_NOISE, velocity_at
from .last_layers import by_names, move_answers
from .loop import Plan, device, halves_pay, seeded
from .pictures import PictureSet
from .remembering import remember
from .tables import Tables
from .training_set import TrainingSet

logger = logging.getLogger(__name__)

RETOUCHED = ("fluent-color", "fluent-flat", "fluent-3d")  # three finishes, often of one drawing
SIZES = (224, 192)  # pixels high, about as large as they were taught with
REMEMBERED = 2  # the last rounds: the layers, which are smooth, say as much of the moves as they can before
MOMENTUM = 0.5


@dataclass(frozen=True)
class Aim:
    """What drawings go down, in so many steps, each so far of the plan's rate.

    picture, layers: how much the picture's own error counts, and what the networks' layers see; told: (line-up, gists,
    rows) -> what it costs where it stands among all drawings.
    """

    steps: int
    pace: float
    picture: float
    layers: float
    told: Callable[[LineUp, Tensor, np.ndarray], Tensor]


def _among_all(line_up: LineUp, gists: Tensor, rows: np.ndarray) -> Tensor:
    return 0.2 * line_up(gists, rows)


# What else is told apart among all pleases these networks, and no other.
NEARER = Aim(steps=2, pace=1.0, picture=1.0, layers=3.0, told=_among_all)


def train_retouch(
    work: Path,
    pictures: TrainingSet,
    tables: Tables,
    network: FusionNetwork,
    unet: UNet2DConditionModel,
    vae: AutoencoderDC,
    plan: Plan,
) -> FusionNetwork:
    """Of the plan: so many rounds, drawings at once, and how far a step goes, of latents of unit variance.

    All but the last layers and the memory stay as they are.
    """
    nn.Module.to(network, device()).eval().requires_grad_(False)
    network.forget()
    hand, rows = Retoucher(pictures, tables, network, unet, vae, NEARER), finishes(pictures.emoji)
    for number in range(1, plan.steps + 1):
        moves = hand.moved(work / f"retouch-{number}", rows, plan)
        if number <= plan.steps - REMEMBERED:
            share = move_answers(network, pictures, tables, rows, moves)
        else:
            share = remember(network, pictures, tables, rows, moves)
        logger.info("retouch %d/%d: moves of %.4f, made %.2f", number, plan.steps, moves.square().mean(), share)
    return network


def finishes(emoji: PictureSet) -> np.ndarray:
    """The learned drawings in RETOUCHED styles, in rising order."""
    learned = emoji.training_rows()
    return learned[np.isin(emoji.style[learned], [STYLES.index(name) for name in RETOUCHED])]


def keep_values(stored: Path, values: Tensor) -> None:
    """There whole or not at all, whatever ends the process."""
    stored.parent.mkdir(parents=True, exist_ok=True)
    partial = stored.with_suffix(".partial")
    torch.save(values, partial)
    partial.rename(stored)


class Retoucher:
    """Moves what the network says of drawings to where the picture made of it is seen for what it is."""

    def __init__(
        self,
        pictures: TrainingSet,
        tables: Tables,
        network: FusionNetwork,
        unet: UNet2DConditionModel,
        vae: AutoencoderDC,
        aim: Aim,
    ) -> None:
        self._pictures, self._tables, self._aim = pictures, tables, aim
        self._network, self._unet, self._vae = network, unet, vae
        for part in (network, unet, vae):
            nn.Module.to(part, device())
            part.eval().requires_grad_(False)
        self._white, self._onlookers = torch.ones(1, 3, 1, 1, device=device()), Onlookers(pictures.emoji, SIZES)

    def moved(self, folder: Path, rows: np.ndarray, plan: Plan) -> Tensor:
        """By how much the tokens of drawings ``rows`` (K,) move, (K, G*G, C).

        Each batch is kept in ``folder``, where a kill leaves it.
        """
        batches = [folder / f"{number:04}.pt" for number in range(len(rows) // plan.batch + 1)]
        for seed, (stored, some) in enumerate(zip(batches, np.array_split(rows, len(batches)), strict=True)):
            if not stored.exists():
                keep_values(stored, self.moves(some, seed, plan.learning_rate * self._aim.pace))
        return torch.cat([torch.load(stored, weights_only=True, map_location=device()) for stored in batches])

    @torch.no_grad()
    def behind(self, rows: np.ndarray, batch: int) -> np.ndarray:
        """(K,): by how much drawings ``rows`` (K,), as they are drawn now, are taken for another style's.

        As ``LineUp.behind`` has it, the mean of the networks.
        """
        return np.concatenate(
            [self._behind(some, seed) for seed, some in enumerate(np.array_split(rows, len(rows) // batch + 1))]
        )

    def _behind(self, rows: np.ndarray, seed: int) -> np.ndarray:
        with torch.autocast(device().type, torch.bfloat16, enabled=halves_pay()):
            drawn = self._drawn(self._said(rows), seeded(seed))
            found = [
                line_up.behind(eye.gist(eye.layers(over_colour(drawn, self._white), size)), rows)
                for eye, line_up, size in map(self._onlookers.at, range(len(SIZES)))
            ]
        return torch.stack(found).mean(dim=0).cpu().numpy()

    def moves(self, rows: np.ndarray, seed: int, rate: float) -> Tensor:
        """(B, G*G, C), from where the network says drawings by their English names.

        Each drawing's gradient is brought to unit mean square, so that all move as far.
        """
        said, real = self._said(rows), self._pictures.each(rows, to_model_range)
        tokens, pace = said, torch.zeros_like(said)
        for step in range(self._aim.steps):
            tokens.requires_grad_(True)
            with torch.autocast(device().type, torch.bfloat16, enabled=halves_pay()):
                drawn = self._drawn(tokens, seeded(self._aim.steps * seed + step))
                loss = self._loss(drawn, real, rows, *self._onlookers.at(step))
            (slope,) = torch.autograd.grad(loss, tokens)
            slope = slope / slope.square().mean(dim=(1, 2), keepdim=True).sqrt().clamp_min(1e-12)
            pace = MOMENTUM * pace + slope
            tokens = tokens.detach() - rate * pace
        return tokens - said.detach()

    @torch.no_grad()
    def _said(self, rows: np.ndarray) -> Tensor:
        return self._network.fuse_normalised(by_names(self._network, self._pictures, self._tables, rows))

    def _drawn(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """(B, 4, H, W), in one step."""
        mean = on_grid(tokens, self._tables.grid_and_channels[0])
        start = mean + START_NOISE * torch.randn(mean.shape, generator=generator, device=mean.device)
        sigma = torch.ones(len(mean), device=mean.device)
        latents = start - velocity_at(self._unet, tokens, mean, start, start, sigma)  # at 1, no target is seen
        latents = (latents / self._tables.scaling_factor).contiguous(memory_format=torch.channels_last)
        return self._vae.decode(latents, return_dict=False)[0].float()

    def _loss(
        self, drawn: Tensor, real: Tensor, rows: np.ndarray, eye: ImageNetEye, line_up: LineUp, size: int
    ) -> Tensor:
        seen = eye.layers(over_colour(drawn, self._white), size)
        with torch.no_grad():
            wanted = eye.layers(over_colour(real, self._white), size)
        apart = self._aim.picture * picture_loss(drawn, real) + self._aim.layers * layers_apart(seen, wanted)
        return apart + self._aim.told(line_up, eye.gist(seen), rows)
