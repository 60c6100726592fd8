"""Retouching: latents that show a drawing for what it is, and a fusion network that says these.

What tells two finishes of one drawing apart is a small part of its latents, and a mean of the error over all of them
pays it no heed: what the network says is near the true latents and looks like the wrong finish. The decoder can draw
the right one from latents close by. So each drawing's latents, as the network says them, go a few steps down the
gradient of what two ImageNet networks see of the picture made of them, and then the network learns to say where they
have come. The moves are small, and of each a part suffices.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC, UNet2DConditionModel
from torch import Tensor, nn

from ..fusing.fusion_network import FusionNetwork
from .autoencoder import picture_loss, to_model_range
from .catalogue import STYLES
from .examples import NUMBER_OF
from .finish_losses import Onlookers, layers_apart, over_colour
from .fusion_stage import on_grid, train_fusion
from .generator_stage import START_NOISE, velocity_at
from .loop import Plan, device, halves_pay, seeded
from .tables import Tables, index
from .training_set import TrainingSet

RETOUCHED = ("fluent-color", "fluent-flat", "fluent-3d")  # three finishes, often of one drawing
STEPS, RATE, MOMENTUM = 4, 0.04, 0.5  # relative to latents of unit variance
TOLD_WEIGHT = 0.2
CHUNK = 32


def train_retouch(
    work: Path,
    pictures: TrainingSet,
    tables: Tables,
    network: FusionNetwork,
    unet: UNet2DConditionModel,
    vae: AutoencoderDC,
    plan: Plan,
) -> FusionNetwork:
    """The fusion network, taught what is retouched in place of the true latents. Choice and reader stay as they are."""
    retouched = retouch(work, pictures, tables, network, unet, vae)
    network.requires_grad_(True)
    for part in (network.text_norm, network.image_norm, network.choice):  # by these two norms the choice reads
        if part is not None:
            part.requires_grad_(False)
    return train_fusion(work, pictures, retouched, network, plan, "retouch")


def retouch(
    work: Path,
    pictures: TrainingSet,
    tables: Tables,
    network: FusionNetwork,
    unet: UNet2DConditionModel,
    vae: AutoencoderDC,
) -> Tables:
    """The tables with RETOUCHED styles retouched. Each chunk is kept in ``work``, where a kill leaves it."""
    emoji = pictures.emoji
    rows = emoji.training_rows()
    rows = rows[np.isin(emoji.style[rows], [STYLES.index(name) for name in RETOUCHED])]
    folder = work / "retouched"
    folder.mkdir(parents=True, exist_ok=True)
    chunks = {
        folder / f"{number:04}.pt": some for number, some in enumerate(np.array_split(rows, len(rows) // CHUNK + 1))
    }
    if not all(stored.exists() for stored in chunks):
        hand = _Retoucher(pictures, tables, network, unet, vae)
        for seed, (stored, some) in enumerate(chunks.items()):
            if not stored.exists():
                partial = stored.with_suffix(".partial")
                torch.save(hand.moved(some, seed), partial)
                partial.rename(stored)
    square = tables.square.clone()
    for stored, some in chunks.items():
        latents = torch.load(stored, weights_only=True, map_location=device())
        square[index(some)] = on_grid(latents, square.shape[-1])
    return replace(tables, square=square)


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
        self._onlookers = Onlookers(pictures.emoji)
        self._white = torch.ones(1, 3, 1, 1, device=device())
        concepts, first = np.unique(tables.caption_concept, return_index=True)
        self._name = np.full(len(pictures.emoji.concepts), -1)
        self._name[concepts] = first  # an English name, bare

    def moved(self, rows: np.ndarray, seed: int) -> Tensor:
        """Tokens (B, G*G, 16) of drawings by their names, moved.

        Each drawing's gradient is brought to unit mean square, so that all move as far.
        """
        tokens = self._said(rows)
        real = self._pictures.each(rows, to_model_range)
        pace = torch.zeros_like(tokens)
        for step in range(STEPS):
            tokens.requires_grad_(True)
            with torch.autocast(device().type, torch.bfloat16, enabled=halves_pay()):
                loss = self._loss(tokens, real, rows, step, seeded(STEPS * seed + step))
            (slope,) = torch.autograd.grad(loss, tokens)
            slope = slope / slope.square().mean(dim=(1, 2), keepdim=True).sqrt().clamp_min(1e-12)
            pace = MOMENTUM * pace + slope
            tokens = tokens.detach() - RATE * pace
        return tokens

    @torch.no_grad()
    def _said(self, rows: np.ndarray) -> Tensor:
        emoji, network = self._pictures.emoji, self._network
        text = network.text_norm(self._tables.captions[index(self._name[emoji.concept[rows]])])
        return network.fuse_normalised(
            torch.cat([text, network.null_image[index(NUMBER_OF[emoji.style[rows]])]], dim=-1)
        )

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
        return picture_loss(made, real) + layers_apart(seen, wanted) + TOLD_WEIGHT * told
