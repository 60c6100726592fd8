"""Conditions, pictures and masks side by side: one entry of each for every picture that is drawn."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import Checkpoint
from ..conditioning import FusedConditioning
from ..residency import place_of
from ..vision.resizing import fit_to
from .diffusers_generation import Source
from .frame import Frame


def source_for(
    checkpoint: Checkpoint, frame: Frame, image: Tensor | None, mask: Tensor | None, strength: float, steps: int
) -> tuple[Source | None, tuple[str, ...]]:
    """The picture and the mask within the frame, and a strength of at least one step."""
    if image is None:
        if mask is not None:
            raise ValueError("expected a picture for the mask, got a mask alone")
        return None, ()
    family = checkpoint.family
    if family.tasks is None:
        raise ValueError(
            f"expected words or a fused condition for {family.name}, which draws from no picture; got one. Let Image "
            "features and Fuse read it"
        )
    if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape:
        raise ValueError(f"expected a picture of shape (B, 3, H, W), got {tuple(image.shape)}")
    if not torch.isfinite(image).all() or (mask is not None and not torch.isfinite(mask).all()):
        raise ValueError("expected a picture and a mask of numbers, found NaN or infinity")
    pixels = fit_to(_unit(image), frame.width, frame.height, "crop")
    if mask is not None:
        if mask.ndim != 3 or mask.shape[0] not in (1, image.shape[0]):
            raise ValueError(f"expected a mask of shape ({image.shape[0]} or 1, H, W), got {tuple(mask.shape)}")
        mask = fit_to(_over(image, mask), frame.width, frame.height, "crop")
    told = f"denoise {strength:g} of {steps} steps is less than half of one; one is taken"
    return Source(pixels, mask, strength), (told,) if round(strength * steps) == 0 else ()


def kept_outside(pixels: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """The image where the mask is 0, to the pixel; (B, 3, H, W)."""
    height, width = pixels.shape[-2:]
    kept, anew = (fit_to(side, width, height, "crop") for side in (_unit(image), _over(image, mask)))
    kept, anew = (side.repeat_interleave(pixels.shape[0] // side.shape[0], dim=0) for side in (kept, anew))
    return kept + anew * (pixels - kept)


def _over(image: Tensor, mask: Tensor) -> Tensor:
    """(B, H, W) -> (B, 1, H, W) of the image's own size, since it is for all of it that a mask speaks."""
    return fit_to(_unit(mask.unsqueeze(1)), image.shape[-1], image.shape[-2], "stretch")


def _unit(side: Tensor) -> Tensor:
    return side.float().cpu().clamp(0, 1)


def together(
    conditioning: FusedConditioning, source: Source | None, batch_size: int
) -> tuple[FusedConditioning, Source | None]:
    """Both with one entry for each picture."""
    words = conditioning.tokens.shape[0]
    pictures = source.pixels.shape[0] if source is not None else 1
    if 1 not in (words, pictures) and words != pictures:
        raise ValueError(
            f"expected as many pictures as conditions, or one of either, got {pictures} pictures and {words} conditions"
        )
    entries = max(words, pictures)
    if source is not None:
        mask = _each(source.mask, entries, batch_size) if source.mask is not None else None
        source = replace(source, pixels=_each(source.pixels, entries, batch_size), mask=mask)
    return _repeated(conditioning, entries, batch_size), source


def _repeated(conditioning: FusedConditioning, entries: int, times: int) -> FusedConditioning:
    return replace(
        conditioning,
        tokens=_each(conditioning.tokens, entries, times),
        pooled=_each(conditioning.pooled, entries, times) if conditioning.pooled is not None else None,
        mask=_each(conditioning.mask, entries, times),
        negative=_repeated(conditioning.negative, entries, times) if conditioning.negative is not None else None,
        second=_repeated(conditioning.second, entries, times) if conditioning.second is not None else None,
    )


def _each(side: Tensor, entries: int, times: int) -> Tensor:
    if (side.shape[0], times) == (entries, 1):
        return side
    return side.expand(entries, *side.shape[1:]).repeat_interleave(times, dim=0)


def on_device(conditioning: FusedConditioning, denoiser: Any) -> FusedConditioning:
    negative = on_device(conditioning.negative, denoiser) if conditioning.negative is not None else None
    return replace(conditioning, tokens=conditioning.tokens.to(*place_of(denoiser)), negative=negative)
