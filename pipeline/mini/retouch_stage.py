"""Retouching: a fusion network that says latents which show a drawing for what it is.

What tells two finishes of one drawing apart is a small part of its latents, and a mean of the error over all of them
pays it no heed: what the network says is near the true latents and looks like the wrong finish. The decoder can draw
the right one from latents close by. So each drawing's latents, as the network says them, go two steps down the gradient
of what two ImageNet networks see of the picture made of them, and the network's last layers are moved to say where they
have come, as far as they can without saying other things otherwise: of each move a part. From where that led the next
round goes on. Where the last ones lead is remembered, each drawing by itself.
"""

import logging
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC, UNet2DConditionModel
from torch import Tensor, nn

from ..fusing.fusion_network import FusionNetwork
from .autoencoder import picture_loss, to_model_range
from .catalogue import STYLES
from .finish_losses import Onlookers, layers_apart, over_colour
from .fusion_stage import on_grid
from .generator_stage import START_NOISE, velocity_at
from .last_layers import by_names, move_answers
from .loop import Plan, device, halves_pay, seeded
from .remembering import remember
from .tables import Tables
from .training_set import TrainingSet

logger = logging.getLogger(__name__)

RETOUCHED = ("fluent-color", "fluent-flat", "fluent-3d")  # three finishes, often of one drawing
STEPS, MOMENTUM = 2, 0.5
LAYERS_WEIGHT, TOLD_WEIGHT = 3.0, 0.2  # what else is told apart pleases these networks, and no other
SIZES = (224, 192)  # pixels high, about as large as they were taught with
REMEMBERED = 2  # the last rounds: the layers, which are smooth, say as much of the moves as they can before


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
    for number in range(1, plan.steps + 1):
        rows, moves = retouch(work / f"retouched-{number}", pictures, tables, network, unet, vae, plan)
        if number <= plan.steps - REMEMBERED:
            share = move_answers(network, pictures, tables, rows, moves)
        else:
            share = remember(network, pictures, tables, rows, moves)
        logger.info("retouch %d/%d: moves of %.4f, made %.2f", number, plan.steps, moves.square().mean(), share)
    return network


def retouch(
    folder: Path,
    pictures: TrainingSet,
    tables: Tables,
    network: FusionNetwork,
    unet: UNet2DConditionModel,
    vae: AutoencoderDC,
    plan: Plan,
) -> tuple[np.ndarray, Tensor]:
    """The drawings in RETOUCHED styles (K,), and by how much their tokens move (K, G*G, C).

    Each batch is kept in ``folder``, where a kill leaves it.
    """
    emoji = pictures.emoji
    rows = emoji.training_rows()
    rows = rows[np.isin(emoji.style[rows], [STYLES.index(name) for name in RETOUCHED])]
    folder.mkdir(parents=True, exist_ok=True)
    batches = {
        folder / f"{number:04}.pt": some
        for number, some in enumerate(np.array_split(rows, len(rows) // plan.batch + 1))
    }
    if not all(stored.exists() for stored in batches):
        hand = _Retoucher(pictures, tables, network, unet, vae)
        for seed, (stored, some) in enumerate(batches.items()):
            if not stored.exists():
                partial = stored.with_suffix(".partial")
                torch.save(hand.moves(some, seed, plan.learning_rate), partial)
                partial.rename(stored)
    return rows, torch.cat([torch.load(stored, weights_only=True, map_location=device()) for stored in batches])


class _Retoucher:
    def __init__(
        self,
        pictures: TrainingSet,
        tables: Tables,
        network: FusionNetwork,
        unet: UNet2DConditionModel,
        vae: AutoencoderDC,
    ) -> None:
        self._pictures, self._tables = pictures, tables
        self._network, self._unet, self._vae = network, unet, vae
        for part in (network, unet, vae):
            nn.Module.to(part, device())
            part.eval().requires_grad_(False)
        self._onlookers = Onlookers(pictures.emoji, SIZES)
        self._white = torch.ones(1, 3, 1, 1, device=device())

    def moves(self, rows: np.ndarray, seed: int, rate: float) -> Tensor:
        """(B, G*G, C), from where the network says drawings by their English names.

        Each drawing's gradient is brought to unit mean square, so that all move as far.
        """
        with torch.no_grad():
            said = self._network.fuse_normalised(by_names(self._network, self._pictures, self._tables, rows))
        real = self._pictures.each(rows, to_model_range)
        tokens, pace = said, torch.zeros_like(said)
        for step in range(STEPS):
            tokens.requires_grad_(True)
            with torch.autocast(device().type, torch.bfloat16, enabled=halves_pay()):
                loss = self._loss(tokens, real, rows, step, seeded(STEPS * seed + step))
            (slope,) = torch.autograd.grad(loss, tokens)
            slope = slope / slope.square().mean(dim=(1, 2), keepdim=True).sqrt().clamp_min(1e-12)
            pace = MOMENTUM * pace + slope
            tokens = tokens.detach() - rate * pace
        return tokens - said.detach()

    def _loss(self, tokens: Tensor, real: Tensor, rows: np.ndarray, step: int, generator: torch.Generator) -> Tensor:
        mean = on_grid(tokens, self._tables.grid_and_channels[0])
        start = mean + START_NOISE * torch.randn(mean.shape, generator=generator, device=mean.device)
        sigma = torch.ones(len(mean), device=mean.device)
        latents = start - velocity_at(self._unet, tokens, mean, start, start, sigma)  # at 1, no target is seen
        latents = (latents / self._tables.scaling_factor).contiguous(memory_format=torch.channels_last)
        made = self._vae.decode(latents, return_dict=False)[0].float()
        eye, line_up, size = self._onlookers.at(step)
        seen = eye.layers(over_colour(made, self._white), size)
        with torch.no_grad():
            wanted = eye.layers(over_colour(real, self._white), size)
        told = line_up(eye.gist(seen), rows)
        return picture_loss(made, real) + LAYERS_WEIGHT * layers_apart(seen, wanted) + TOLD_WEIGHT * told
