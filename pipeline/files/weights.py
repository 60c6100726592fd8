"""Reading safetensors files of our own choice: their shapes, their tensors, their identity for the cache."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..model_cache import ModelKey
from .safetensors_files import CheckpointError, check_weights


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


def key_of(weights: tuple[Path, ...], component: str, dtype: torch.dtype) -> ModelKey:
    """The files as they lie on disk now. Raises CheckpointError where one is gone."""
    try:
        files = [path.stat() for path in weights]
    except OSError as error:
        raise CheckpointError(f"expected {error.filename}, which was there before: {error.strerror}") from error
    return ModelKey(
        path=weights[0].resolve(),
        size=sum(file.st_size for file in files),
        mtime_ns=max(file.st_mtime_ns for file in files),
        component=component,
        dtype=dtype,
    )
