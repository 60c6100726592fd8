"""Making a picture fit a frame, so that preparing, generating and finishing agree on what crop and pad mean."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

FITS = ("crop", "pad", "stretch")
_MOST_CUT = 4  # frames that all of a picture would fill, scaled to be cropped: of a column of pixels, thousands


def fit_to(pixels: Tensor, width: int, height: int, fit: str, fill: float = 0.0) -> Tensor:
    """(B, C, H, W) -> (B, C, height, width), anti-aliased, values of each channel kept within its range.

    crop: the shorter side fills the frame and the rest is cut evenly; pad: the longer side fits and the rest is
    ``fill``; stretch: both sides fit and the proportions change. Raises ValueError for any other ``fit``.
    """
    if fit not in FITS:
        raise ValueError(f"fit must be one of {', '.join(FITS)}, got {fit!r}")
    old_height, old_width = pixels.shape[-2:]
    if fit == "stretch":
        return _resample(pixels, width, height)
    ratios = (width / old_width, height / old_height)
    scale = max(ratios) if fit == "crop" else min(ratios)
    if fit == "crop" and max(ratios) > _MOST_CUT * min(ratios):
        pixels = _middle(pixels, width, height, scale)
        old_height, old_width = pixels.shape[-2:]
    new_width, new_height = max(1, round(old_width * scale)), max(1, round(old_height * scale))
    resized = _resample(pixels, new_width, new_height)
    if fit == "crop":
        left, top = (new_width - width) // 2, (new_height - height) // 2
        return resized[..., top : top + height, left : left + width]
    framed = torch.full((*pixels.shape[:2], height, width), fill, dtype=pixels.dtype, device=pixels.device)
    left, top = (width - new_width) // 2, (height - new_height) // 2
    framed[..., top : top + new_height, left : left + new_width] = resized
    return framed


def _middle(pixels: Tensor, width: int, height: int, scale: float) -> Tensor:
    """What a frame shows of pictures that are scaled to crop them, and a little more than the filter looks at."""
    margin = math.ceil(3 * max(1.0, 1 / scale))
    for axis, side in ((-1, width), (-2, height)):
        spare = max(0, (pixels.shape[axis] - math.ceil(side / scale)) // 2 - margin)
        pixels = pixels.narrow(axis, spare, pixels.shape[axis] - 2 * spare)
    return pixels


def _resample(pixels: Tensor, width: int, height: int) -> Tensor:
    if pixels.shape[-2:] == (height, width):
        return pixels
    # Bicubic overshoots at edges. Each picture has a range of its own, or it would be another one in a batch.
    low, high = pixels.amin(dim=(-2, -1), keepdim=True), pixels.amax(dim=(-2, -1), keepdim=True)
    return F.interpolate(pixels, (height, width), mode="bicubic", antialias=True).clamp(low, high)
