"""A picture made ready for an encoder: framed, scaled to 0..1, normalised, and varied if wanted."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .vision.resizing import fit_to

NORMALISATIONS = ("none", "range", "mean-std")


@dataclass(frozen=True)
class Augmentation:
    """How far each picture of a batch may be varied at random.

    rotate_degrees: largest turn either way; flip: mirrored with probability one half; scale: largest relative change
    of size, 0.2 meaning 0.8 to 1.2 times.
    """

    rotate_degrees: float = 0.0
    flip: bool = False
    scale: float = 0.0

    @property
    def does_nothing(self) -> bool:
        return not (self.rotate_degrees or self.flip or self.scale)


@dataclass(frozen=True)
class PreparedImage:
    """pixels: (B, 3, S, S) in 0..1; mask: (B, S, S) in 0..1, 1 where the picture counts."""

    pixels: Tensor
    mask: Tensor


def prepare_image(
    pixels: Tensor,
    mask: Tensor | None,
    *,
    size: int,
    fit: str = "crop",
    normalise: str = "none",
    augmentation: Augmentation = Augmentation(),
    seed: int = 0,
) -> PreparedImage:
    """Frame (B, C, H, W) pixels into ``size`` x ``size``; C is 1 (grey), 3 or 4 (the last one alpha, joined with mask).

    mask: (B or 1, H, W), 1 where the picture counts, resized if it has another size. Values are expected in 0..1; of a
    picture that leaves that range, what reaches from its lowest or 0 to its highest or 1 becomes 0..1. ``seed`` makes
    the augmentation repeatable. Raises ValueError on an impossible shape, size, mask or a value that is no number.
    """
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3, 4) or 0 in pixels.shape:
        raise ValueError(
            f"expected pictures shaped (batch, 1, 3 or 4 channels, height, width), got {tuple(pixels.shape)}"
        )
    if not torch.isfinite(pixels).all():
        raise ValueError("expected finite pixel values, got NaN or infinity in the picture")
    if not 8 <= size <= 4096:
        raise ValueError(f"size must be 8 to 4096 pixels, got {size}")
    if normalise not in NORMALISATIONS:
        raise ValueError(f"normalise must be one of {', '.join(NORMALISATIONS)}, got {normalise!r}")
    weight = _joined_mask(pixels, mask)
    rgb = pixels[:, :3].expand(-1, 3, -1, -1).float() if pixels.shape[1] == 1 else pixels[:, :3].float()
    framed = fit_to(_into_range(rgb), size, size, fit, fill=1.0)
    weight = fit_to(weight, size, size, fit, fill=0.0)
    if not augmentation.does_nothing:
        framed, weight = _augment(framed, weight, augmentation, seed)
    return PreparedImage(_normalised(framed, normalise), weight[:, 0])


def _joined_mask(pixels: Tensor, mask: Tensor | None) -> Tensor:
    """(B, 1, H, W): alpha times mask."""
    batch, channels, height, width = pixels.shape
    weight = pixels[:, 3:].float().clamp(0, 1) if channels == 4 else pixels.new_ones((batch, 1, height, width)).float()
    if mask is None:
        return weight
    if mask.ndim != 3 or mask.shape[0] not in (1, batch):
        raise ValueError(f"expected a mask shaped (1 or {batch}, height, width), got {tuple(mask.shape)}")
    return weight * fit_to(mask.float().clamp(0, 1)[:, None], width, height, "stretch")


def _into_range(rgb: Tensor) -> Tensor:
    """Each picture by as much as it leaves 0..1: within not at all, and next to nothing where it errs by rounding."""
    low = rgb.amin(dim=(1, 2, 3), keepdim=True).clamp(max=0)
    high = rgb.amax(dim=(1, 2, 3), keepdim=True).clamp(min=1)
    return (rgb - low) / (high - low)


def _normalised(pixels: Tensor, how: str) -> Tensor:
    if how == "range":
        low, high = pixels.amin(dim=(1, 2, 3), keepdim=True), pixels.amax(dim=(1, 2, 3), keepdim=True)
        return (pixels - low) / (high - low).clamp(min=1e-6)
    if how == "mean-std":  # grey middle, and two standard deviations either way fill the range
        mean, spread = pixels.mean(dim=(1, 2, 3), keepdim=True), pixels.std(dim=(1, 2, 3), keepdim=True)
        return (0.5 + 0.25 * (pixels - mean) / spread.clamp(min=1e-6)).clamp(0, 1)
    return pixels


def _augment(pixels: Tensor, weight: Tensor, how: Augmentation, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch = pixels.shape[0]
    turn = (2 * torch.rand(batch, generator=generator) - 1) * math.radians(how.rotate_degrees)
    zoom = 1 + (2 * torch.rand(batch, generator=generator) - 1) * how.scale
    mirror = torch.where(torch.rand(batch, generator=generator) < (0.5 if how.flip else 0.0), -1.0, 1.0)
    affine = torch.zeros(batch, 2, 3)
    affine[:, 0, 0], affine[:, 0, 1] = torch.cos(turn) * mirror / zoom, -torch.sin(turn) / zoom
    affine[:, 1, 0], affine[:, 1, 1] = torch.sin(turn) * mirror / zoom, torch.cos(turn) / zoom
    grid = F.affine_grid(affine, [batch, 1, *pixels.shape[-2:]], align_corners=False).to(pixels.device)
    # What turns into the frame from outside is white and does not count, like the padding of a frame.
    turned = 1 - F.grid_sample(1 - pixels, grid, align_corners=False)
    return turned.clamp(0, 1), F.grid_sample(weight, grid, align_corners=False).clamp(0, 1)
