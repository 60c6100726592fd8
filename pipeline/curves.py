"""A curve as a picture, small enough to sit on a node."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor


def draw_curve(values: Sequence[float], width: int = 320, height: int = 120) -> Tensor:
    """RGB (1, 3, height, width) in 0..1: the values from left to right over zero, the first and the last written."""
    if not values or not all(np.isfinite(value) and value >= 0 for value in values):
        raise ValueError(f"expected one number or more, none below zero, got {list(values)[:5]}")
    left, top, right, bottom = 8, 20, width - 8, height - 8
    highest = max([*values, 1e-12])
    steps = max(1, len(values) - 1)
    points = [
        (left + (right - left) * number / steps, bottom - (bottom - top) * value / highest)
        for number, value in enumerate(values)
    ]
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    draw.line([(left, bottom), (right, bottom)], fill=(170, 170, 170))
    draw.line(points if len(points) > 1 else [points[0], (right, points[0][1])], fill=(200, 60, 40), width=2)
    draw.text((left, 4), f"{values[0]:.4f}", fill=(60, 60, 60))
    last = f"{values[-1]:.4f}"
    draw.text((right - draw.textlength(last), 4), last, fill=(60, 60, 60))
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float()[None] / 255
