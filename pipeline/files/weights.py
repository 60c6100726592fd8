"""Reading safetensors files of our own choice: their shapes, their tensors, their identity for the cache."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..model_cache import ModelKey
from .content import Content
from .safetensors_files import check_weights


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """Of every tensor, by name; of a file whose header was checked before."""
    with safe_open(path, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # no mapping


def read_tensors(weights: tuple[Path, ...], wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """Copies, since a tensor that is mapped from a file changes with the file. Raises CheckpointError."""
    tensors = {}
    for path in weights:
        check_weights(path)  # again: it may have been replaced since it was opened
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name).clone() for name in file.keys() if wanted(name)}  # noqa: SIM118
    return tensors


def key_of(weights: tuple[Path, ...], component: str, dtype: torch.dtype, content: Content) -> ModelKey:
    """The weights as they lie on disk now, equal for equal ``content`` anywhere."""
    return ModelKey(
        path=weights[0].resolve(),
        size=content.bytes,
        mtime_ns=content.mtime_ns,
        component=component,
        dtype=dtype,
        content=content.digest,
    )
