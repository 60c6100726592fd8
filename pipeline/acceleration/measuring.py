"""How far two pictures are apart: what a shortcut cost, in the two measures that everyone gives."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2  # (K L)^2 for a range of L = 1
_ROUNDING = 1e-3  # half precision may lie this far beyond 0..1


@dataclass(frozen=True)
class Likeness:
    """each: one value for each picture of the batch; mean: of all of it."""

    each: tuple[float, ...]
    mean: float


def psnr(one: Tensor, other: Tensor) -> Likeness:
    """Peak signal-to-noise ratio in dB, infinite for equal pictures. Both (B, C, H, W) in 0..1.

    The mean is that of the mean error, so that one picture without a difference does not hide what others have.
    Raises ValueError for shapes that differ, and for values that are no numbers or out of range.
    """
    errors = [float((a - b).square().mean()) for a, b in _pairs(one, other)]
    return Likeness(tuple(map(_decibels, errors)), _decibels(sum(errors) / len(errors)))


def ssim(one: Tensor, other: Tensor) -> Likeness:
    """Structural similarity, at most 1, which is for equal pictures. Both (B, C, H, W) in 0..1, at least 11 x 11.

    Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", equation 13, with
    their window of 11 x 11 (Gaussian, sigma 1.5) where it lies wholly inside; the mean over places and channels.
    Raises ValueError as ``psnr`` does, and for smaller pictures.
    """
    if min(one.shape[-2:]) < _WINDOW:
        raise ValueError(f"expected pictures of at least {_WINDOW} x {_WINDOW} pixels, got {tuple(one.shape)}")
    each = tuple(float(_similarity(a, b).mean()) for a, b in _pairs(one, other))
    return Likeness(each, sum(each) / len(each))


def _similarity(one: Tensor, other: Tensor) -> Tensor:
    """(C, H, W) twice -> (C, H - 10, W - 10)."""
    mean_one, mean_other = _blurred(one), _blurred(other)
    variance_one = _blurred(one * one) - mean_one.square()
    variance_other = _blurred(other * other) - mean_other.square()
    covariance = _blurred(one * other) - mean_one * mean_other
    alike = (2 * mean_one * mean_other + _C1) * (2 * covariance + _C2)
    return alike / ((mean_one.square() + mean_other.square() + _C1) * (variance_one + variance_other + _C2))


def _blurred(picture: Tensor) -> Tensor:
    away = torch.arange(_WINDOW, dtype=picture.dtype) - _WINDOW // 2
    weights = torch.exp(-away.square() / (2 * _SIGMA**2))
    weights = weights / weights.sum()
    down = F.conv2d(picture.unsqueeze(1), weights.view(1, 1, -1, 1))
    return F.conv2d(down, weights.view(1, 1, 1, -1)).squeeze(1)


def _pairs(one: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """One pair of pictures (C, H, W) at a time, on the CPU in float64: variances are small differences of squares."""
    if one.shape != other.shape or one.ndim != 4 or not one.numel():
        raise ValueError(
            f"expected two batches of pictures of one shape (B, C, H, W), got {tuple(one.shape)} and "
            f"{tuple(other.shape)}"
        )
    for pair in zip(one, other, strict=True):
        a, b = (side.detach().cpu().double() for side in pair)
        for side in (a, b):
            low, high = float(side.min()), float(side.max())
            if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # what is no number is in no range
                raise ValueError(f"expected pictures in 0..1, got values from {low:g} to {high:g}")
        yield a, b


def _decibels(error: float) -> float:
    return math.inf if error == 0 else -10 * math.log10(error)
