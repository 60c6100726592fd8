"""The last step of a picture: framed to its final size, then flattened onto a colour or left with its alpha."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .vision.resizing import fit_to

LARGEST_SIDE = 16_384


@dataclass(frozen=True)
class FinishedPicture:
    """pixels: (B, 3 or 4, H, W) in 0..1, four channels where alpha was kept; alpha: (B, 1, H, W)."""

    pixels: Tensor
    alpha: Tensor


def finish_picture(
    pixels: Tensor,
    alpha: Tensor | None,
    *,
    width: int = 0,
    height: int = 0,
    fit: str = "crop",
    background: tuple[float, float, float] | None = None,
) -> FinishedPicture:
    """Frame (B, 3 or 4, H, W) pictures to width x height; 0 keeps that side's own proportion.

    alpha: (B or 1, 1, H, W) in 0..1; a fourth channel of ``pixels`` counts as alpha too. background: RGB in 0..1 to
    flatten onto, or None to keep alpha as a fourth channel. Raises ValueError on impossible shapes or sizes.
    """
    if pixels.ndim != 4 or pixels.shape[1] not in (3, 4) or 0 in pixels.shape:
        raise ValueError(f"expected pictures shaped (batch, 3 or 4 channels, height, width), got {tuple(pixels.shape)}")
    if not torch.isfinite(pixels).all():
        raise ValueError("expected finite pixel values, got NaN or infinity in the picture")
    batch, channels, old_height, old_width = pixels.shape
    for name, side in (("width", width), ("height", height)):
        if not 0 <= side <= LARGEST_SIDE:
            raise ValueError(f"{name} must be 0 (keep) to {LARGEST_SIDE}, got {side}")
    if not width and not height:
        width, height = old_width, old_height
    width = width or max(1, round(old_width * height / old_height))
    height = height or max(1, round(old_height * width / old_width))
    if max(width, height) > LARGEST_SIDE:
        raise ValueError(
            f"expected sides of at most {LARGEST_SIDE}, but pictures of {old_width}x{old_height} kept in proportion "
            f"would have {width}x{height}"
        )

    opaque = pixels[:, 3:] if channels == 4 else pixels.new_ones((batch, 1, old_height, old_width))
    if alpha is not None:
        if alpha.shape[0] not in (1, batch):
            raise ValueError(f"expected 1 or {batch} masks for {batch} pictures, got {alpha.shape[0]}")
        opaque = opaque * fit_to(alpha.to(pixels), old_width, old_height, "stretch")
    # Colour is weighted by alpha while it is resampled, or the hidden colour of transparent pixels bleeds into edges.
    weighted = fit_to(torch.cat([pixels[:, :3] * opaque, opaque], dim=1), width, height, fit)
    colour, opaque = weighted[:, :3], weighted[:, 3:].clamp(0, 1)
    if background is None:
        straight = (colour / opaque.clamp(min=1e-6)).clamp(0, 1)
        return FinishedPicture(torch.cat([straight, opaque], dim=1), opaque)
    ground = colour.new_tensor(background)[None, :, None, None]
    return FinishedPicture((colour + (1 - opaque) * ground).clamp(0, 1), torch.ones_like(opaque))
