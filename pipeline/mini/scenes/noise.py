"""Smooth noise on the plane, for clouds, waves and rock."""

import numpy as np

_TABLE = 256


def noise(points: np.ndarray, generator: np.random.Generator, octaves: int = 4) -> np.ndarray:
    """(..., 2) -> (...) in 0..1: values on a lattice, joined smoothly, each octave at half the size and weight."""
    values = generator.random((_TABLE, _TABLE), dtype=np.float32)
    points, total, weight = points.astype(np.float32), np.zeros(points.shape[:-1], np.float32), 0.0
    for octave in range(octaves):
        scaled = points * 2**octave + np.float32(17.3 * octave)
        corner = np.floor(scaled).astype(np.int32)
        part = scaled - corner
        part = part * part * (3 - 2 * part)
        column, row = corner[..., 0] % _TABLE, corner[..., 1] % _TABLE
        right, below = (column + 1) % _TABLE, (row + 1) % _TABLE
        upper = values[row, column] * (1 - part[..., 0]) + values[row, right] * part[..., 0]
        lower = values[below, column] * (1 - part[..., 0]) + values[below, right] * part[..., 0]
        total += (upper * (1 - part[..., 1]) + lower * part[..., 1]) / 2**octave
        weight += 1 / 2**octave
    return total / weight
