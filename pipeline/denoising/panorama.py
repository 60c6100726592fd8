"""Panoramas, which close: beyond the last column lies the first. Convolutions, which pad with zeros, do not know it."""

import torch
from torch import Tensor

BESIDE = 6  # latents of the other end that are laid beside each end; what zeros reach of them is cut off again


def continued(values: Tensor, scale: int = 1) -> Tensor:
    """(..., W) -> (..., BESIDE + W + BESIDE), going on at either end with the other. scale: columns for each latent."""
    beside = BESIDE * scale
    return torch.cat([values[..., -beside:], values, values[..., :beside]], dim=-1)


def cut(values: Tensor, scale: int = 1) -> Tensor:
    """Undoes ``continued``. scale: columns of ``values`` for each that was continued."""
    return values[..., BESIDE * scale : -BESIDE * scale]
