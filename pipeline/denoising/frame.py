"""The size that is drawn, and the size that comes out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..family import Family
from ..vision.resizing import fit_to


@dataclass(frozen=True)
class Frame:
    """What is denoised, and what comes out, in pixels: the two differ where a model cannot make what is asked for.

    fit: how the one becomes the other; closes: a panorama, whose last column meets its first; notices: what a user is
    told of it.
    """

    width: int
    height: int
    out_width: int
    out_height: int
    fit: str
    notices: tuple[str, ...]
    closes: bool = False


def frame_for(family: Family, width: int, height: int, *, from_picture: bool) -> Frame:
    """The nearest size that the family can make."""
    asked = (width, height)
    if family.fixed_size:
        side = family.native_size
        if family.panoramas and width == 2 * height:
            told = f"made at {2 * side}x{side}, a panorama that closes, and resized to {width}x{height}"
            return Frame(2 * side, side, width, height, "stretch", () if height == side else (told,), closes=True)
        told = f"made at {side}x{side}, the model's one size, and resized to {width}x{height}"
        return Frame(side, side, width, height, "pad", () if asked == (side, side) else (told,))
    step = family.size_multiple
    width, height = (max(step, round(side / step) * step) for side in asked)
    if from_picture and 0 < family.largest_source < width * height:
        scale = (family.largest_source / (width * height)) ** 0.5
        small_width, small_height = (max(step, int(side * scale) // step * step) for side in (width, height))
        told = f"made at {small_width}x{small_height}, its largest from a picture, and resized to {width}x{height}"
        return Frame(small_width, small_height, width, height, "stretch", (told,))
    told = f"{asked[0]}x{asked[1]} rounded to {width}x{height}, multiples of {step}"
    return Frame(width, height, width, height, "stretch", () if asked == (width, height) else (told,))


def resized(pixels: Tensor, alpha: Tensor, frame: Frame) -> tuple[Tensor, Tensor]:
    """Pictures as they were drawn -> as they come out. Both (B, C, H, W) in 0..1."""
    if pixels.shape[-2:] == (frame.out_height, frame.out_width):
        return pixels, alpha
    # Padded with transparency, so nothing is cut off; weighted by alpha, or hidden colour bleeds into the edges.
    both = fit_to(torch.cat([pixels * alpha, alpha], dim=1), frame.out_width, frame.out_height, frame.fit)
    return (both[:, :3] / both[:, 3:].clamp(min=1 / 255)).clamp(0, 1), both[:, 3:].clamp(0, 1)
