"""Panoramas, which close: beyond the last column lies the first. Convolutions, which pad with zeros, do not know it."""

import torch
from torch import Tensor

BESIDE = 6  # latents of the other end that are laid beside each end; what zeros reach of them is cut off again
# How far the outermost columns of a mean picture, and those next to them, go to one another, of what parts them: each
# was said apart, and what is said of neighbours errs more alike than what is said of the ends.
MEETING = (0.25, 0.125)


def continued(values: Tensor, scale: int = 1) -> Tensor:
    """(..., W) -> (..., BESIDE + W + BESIDE), going on at either end with the other. scale: columns for each latent."""
    beside = BESIDE * scale
    return torch.cat([values[..., -beside:], values, values[..., :beside]], dim=-1)


def cut(values: Tensor, scale: int = 1) -> Tensor:
    """Undoes ``continued``. scale: columns of ``values`` for each that was continued."""
    return values[..., BESIDE * scale : -BESIDE * scale]


def meeting(mean: Tensor) -> Tensor:
    """(..., W), W at least 4 -> the same, with ends that meet more nearly."""
    share = mean.new_zeros(mean.shape[-1])
    for place, far in enumerate(MEETING):
        share[place], share[-1 - place] = -far, far
    return mean + share * (mean[..., :1] - mean[..., -1:])
