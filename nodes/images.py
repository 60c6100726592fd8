"""ComfyUI's IMAGE and MASK, and the pipeline's pixels and opacity.

IMAGE is (B, H, W, C) float in 0..1, MASK is (B, H, W). As the host's Load Image has it, MASK is 1 where the picture
is transparent: mask = 1 - alpha. The pipeline has pixels (B, C, H, W), and opacity or alpha, 1 where it is opaque.
"""

import logging
from collections.abc import Callable

import torch
from PIL import Image, ImageColor
from torch import Tensor

log = logging.getLogger(__name__)


def to_pixels(
    image: Tensor, mask: Tensor | None = None, *, lies_over_white: bool = False
) -> tuple[Tensor, Tensor | None]:
    """IMAGE and MASK -> straight RGB (B, 3, H, W) and opacity (B or 1, h, w), None where nothing is transparent.

    Grey becomes three equal channels. A fourth channel is alpha; where a mask comes too, the lower of both counts,
    since many nodes give the same transparency in both places. Load Image gives an all-zero mask of 64x64 with any
    picture that has no alpha, whatever its size.
    lies_over_white: an RGB picture lies over white already, as Generate gives it, and gets its own colours back.
    """
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4):
        raise ValueError(f"expected an IMAGE of shape (B, H, W, 1, 3 or 4); got {tuple(image.shape)}")
    pixels = image.movedim(-1, 1).float()
    opacity = _to_opacity(mask)
    if opacity is not None:  # Load Image gives masks on the CPU, whatever device the host keeps its pictures on
        opacity = opacity.to(pixels.device)
    if pixels.shape[1] == 4:
        pixels, alpha = pixels[:, :3], pixels[:, 3]
        return pixels, alpha if opacity is None else torch.minimum(alpha, _as_large_as(pixels, opacity))
    pixels = pixels.expand(-1, 3, -1, -1)
    if opacity is not None and lies_over_white:
        return from_over_white(pixels, _as_large_as(pixels, opacity).unsqueeze(1)), opacity
    return pixels, opacity


def to_opaque(image: Tensor) -> Tensor:
    """IMAGE -> RGB (B, 3, H, W), laid over white where it is transparent."""
    pixels, opacity = to_pixels(image)
    return pixels if opacity is None else over_white(pixels, opacity.unsqueeze(1))


def to_image(pixels: Tensor) -> Tensor:
    """(B, C, H, W) -> IMAGE."""
    return pixels.movedim(1, -1).float().cpu().contiguous()


def to_mask(opacity: Tensor) -> Tensor:
    """(B, H, W) or (B, 1, H, W), 1 where opaque -> MASK."""
    return (1 - opacity.reshape(-1, *opacity.shape[-2:]).float()).cpu().contiguous()


def to_pil(pixels: Tensor) -> Image.Image:
    """One picture (3, H, W) in 0..1 -> RGB."""
    return Image.fromarray((255 * pixels.float().clamp(0, 1)).round().byte().movedim(0, -1).cpu().numpy())


def to_preview(preview: Callable[[], Tensor]) -> Image.Image | None:
    """A look at what is under way; None where there is no memory for one, or no way, which does not end the run."""
    try:
        return to_pil(preview())
    except (MemoryError, RuntimeError) as error:
        log.warning("no preview: %s", error)
        return None


def over_white(pixels: Tensor, alpha: Tensor) -> Tensor:
    """Lay pictures over white, so that they look right where nobody reads the mask. Both (B, C, H, W)."""
    return 1 + alpha * (pixels - 1)


def from_over_white(pixels: Tensor, alpha: Tensor) -> Tensor:
    """The inverse of ``over_white``; white where nothing was opaque."""
    faintest = 1 / 512  # half a level of an 8-bit alpha: below it there is no colour to bring back
    return torch.where(alpha > faintest, 1 + (pixels - 1) / alpha.clamp(min=faintest), 1.0).clamp(0, 1)


def to_colour(text: str) -> tuple[float, float, float] | None:
    """A colour as CSS writes it -> RGB in 0..1; None for "transparent"."""
    if text.strip().lower() == "transparent":
        return None
    try:
        red, green, blue = ImageColor.getrgb(text.strip())[:3]
    except ValueError as error:
        expected = 'expected a background such as "#ffffff", "white" or "transparent"'
        raise ValueError(f"{expected}; got {text[:40]!r}") from error
    return red / 255, green / 255, blue / 255


def _to_opacity(mask: Tensor | None) -> Tensor | None:
    if mask is None:
        return None
    if mask.ndim not in (2, 3):
        raise ValueError(f"expected a MASK of shape (B, H, W); got {tuple(mask.shape)}")
    return 1 - mask.reshape(-1, *mask.shape[-2:]).float() if mask.any() else None


def _as_large_as(pixels: Tensor, opacity: Tensor) -> Tensor:
    if opacity.shape[-2:] != pixels.shape[-2:] or opacity.shape[0] not in (1, pixels.shape[0]):
        raise ValueError(f"expected a mask for the picture, {_size(pixels)}, or one for all; got {_size(opacity)}")
    return opacity


def _size(pictures: Tensor) -> str:
    return f"{pictures.shape[0]} of {pictures.shape[-1]}x{pictures.shape[-2]}"
