"""Embeddings as files: one safetensors file each, the tensors under numbers and all else as JSON in its metadata."""

import contextlib
import io
import json
import os
import stat
import uuid
import zlib
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from .. import conditioning
from ..conditioning import FusedConditioning, ImageFeatures, PromptEmbeds, Space
from ..files.safetensors_files import CheckpointError, TensorEntry, check_weights, layout_of, shown

Embeddings = PromptEmbeds | ImageFeatures | FusedConditioning

LARGEST_FILE = 2**30
FORMAT = "duet-embeddings-1"
_MOST_NOTES = 2**20  # bytes of a file's header
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
# Nothing but the plain values of conditioning can come out of a file.
_TYPES = {name: value for name, value in vars(conditioning).items() if isinstance(value, type) and is_dataclass(value)}


def write_embeddings(path: Path, embeddings: Embeddings) -> int:
    """One safetensors file: the tensors, and all else as JSON in its metadata; gives its bytes.

    Written beside and then renamed, so that no reader ever finds a part of it. Raises OSError.
    """
    data = _as_bytes(embeddings)
    beside = path.with_name(f"{path.name.removesuffix('.safetensors')}.{uuid.uuid4().hex}.part")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    return len(data)


def read_embeddings(path: Path) -> Embeddings:
    """What ``write_embeddings`` wrote, on the CPU. In bounded memory.

    Raises FileNotFoundError where there is none, and CheckpointError for any other file.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe or a device could wait, or read, for ever
            raise CheckpointError(f"expected a file at {path}, found a folder or device")
        if status.st_size > LARGEST_FILE:
            raise CheckpointError(
                f"{path}: expected embeddings of at most {LARGEST_FILE:,} bytes, found {status.st_size:,}"
            )
        with open(path, "rb", buffering=0) as file:
            return _read(path, file, status.st_size)
    except (FileNotFoundError, CheckpointError):
        raise
    except OSError as error:
        raise CheckpointError(f"expected to read {path}, got: {error.strerror or error}") from error
    except (ValueError, TypeError, RecursionError) as error:
        check_weights(path)  # which says what else it is, if it is no safetensors file at all
        raise CheckpointError(f"{path}: expected embeddings that Duet saved; {error}") from error


def _as_bytes(embeddings: Embeddings) -> bytes:
    tensors: dict[str, Tensor] = {}
    value = _told(embeddings, tensors)
    return save(tensors, {"duet": json.dumps({"format": FORMAT, "crc32": _crc32(tensors), "value": value})})


def _crc32(tensors: Mapping[str, Tensor]) -> int:
    """Of the tensors' bytes; a header that has changed is noticed as it is read."""
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, total)
    return total


def _told(value: object, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON; its tensors by their names in ``tensors``."""
    if isinstance(value, Tensor):
        name = f"tensor-{len(tensors)}"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, tuple | list):
        return {"tuple": [_told(item, tensors) for item in value]}
    if isinstance(value, Mapping):
        return {"dict": {str(key): _told(item, tensors) for key, item in value.items()}}
    if type(value) in _TYPES.values():
        told = {field.name: _told(getattr(value, field.name), tensors) for field in fields(value)}  # type: ignore[arg-type]
        return {"type": type(value).__name__, "fields": told}
    raise TypeError(f"expected a value of conditioning, got a {type(value).__name__}")


def _read(path: Path, file: io.FileIO, size: int) -> Embeddings:
    """The header is read once, and the tensors lie in one buffer, into which the file goes without a copy."""
    length = int.from_bytes(file.read(8), "little")
    if length > _MOST_NOTES:
        raise ValueError(f"expected a header of at most {_MOST_NOTES:,} bytes, it claims {length:,}")
    if 8 + length > size:
        raise ValueError(f"its header claims {length:,} bytes, the file has {size:,}")
    entries, metadata = layout_of(path, file.read(length))
    start = 8 + length
    stop = max((entry.stop for entry in entries.values()), default=start)
    if stop != size:
        raise ValueError(f"its header describes {stop:,} bytes, the file has {size:,}")
    data = np.empty(stop - start, dtype=np.uint8)  # a process that starts has numpy at hand before torch
    while start < stop:
        got = file.readinto(data[start - stop :].data)
        if not got:
            raise ValueError(f"expected {stop:,} bytes, read {start:,}")
        start += got
    return _value(entries, metadata, data, stop - len(data))


def _value(entries: Mapping[str, TensorEntry], metadata: Any, data: np.ndarray, start: int) -> Embeddings:
    """What is described, of the bytes that ``data`` holds from ``start`` of the file on."""
    notes = json.loads(metadata.get("duet", "{}")) if isinstance(metadata, dict) else None
    if not isinstance(notes, dict) or notes.get("format") != FORMAT:
        raise ValueError(f"its metadata has no {FORMAT}")
    total = 0
    for _, entry in sorted(entries.items()):
        total = zlib.crc32(data[entry.start - start : entry.stop - start].data, total)
    if notes.get("crc32") != total:
        raise ValueError("its tensors have changed since")
    tensors = {name: _tensor(entry, data[entry.start - start : entry.stop - start]) for name, entry in entries.items()}
    value = _meant(notes.get("value"), tensors)
    if not isinstance(value, Embeddings):
        raise ValueError(f"it holds {shown(notes.get('value'))}")
    _check(value)
    return value


def _tensor(entry: TensorEntry, data: np.ndarray) -> Tensor:
    if entry.dtype not in _DTYPES:
        raise ValueError(f"expected tensors of {', '.join(_DTYPES)}, found {shown(entry.dtype)}")
    dtype = _DTYPES[entry.dtype]
    if not len(data):  # which torch makes no tensor of
        return torch.empty(entry.shape, dtype=dtype)
    # The format does not promise that a tensor begins where its type may; safetensors itself writes them so.
    aligned = data if data.ctypes.data % dtype.itemsize == 0 else data.copy()
    return torch.frombuffer(aligned, dtype=dtype).view(entry.shape)


def _meant(told: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of ``_told``. Raises ValueError or TypeError."""
    if not isinstance(told, dict):
        return told
    match told:
        case {"tensor": str(name)} if name in tensors:
            return tensors[name]
        case {"tuple": list(items)}:
            return tuple(_meant(item, tensors) for item in items)
        case {"dict": dict(items)}:
            return {key: _meant(item, tensors) for key, item in items.items()}
        case {"type": str(name), "fields": dict(items)} if name in _TYPES:
            return _TYPES[name](**{key: _meant(item, tensors) for key, item in items.items()})
    raise ValueError(f"it describes {shown(told)}")


def _check(value: Embeddings) -> None:
    tokens, pooled, space = value.tokens, value.pooled, value.space
    if not isinstance(tokens, Tensor) or tokens.ndim != 3:
        raise ValueError(f"expected tokens of shape (B, L, D), found {shown(getattr(tokens, 'shape', tokens))}")
    if not isinstance(space, Space) or not isinstance(space.model, str) or space.width != tokens.shape[-1]:
        raise ValueError(f"expected a space {tokens.shape[-1]} wide, found {space}")
    if not (pooled is None or (isinstance(pooled, Tensor) and pooled.ndim == 2 and len(pooled) == len(tokens))):
        raise ValueError(f"expected pooled of shape (B, P), found {shown(getattr(pooled, 'shape', pooled))}")
    if not isinstance(value.notices, tuple) or not all(isinstance(notice, str) for notice in value.notices):
        raise ValueError(f"expected sentences as notices, found {shown(value.notices)}")
    grid = value.grid if isinstance(value, ImageFeatures | FusedConditioning) else None
    if isinstance(value, ImageFeatures) or grid is not None:
        _check_grid(grid, tokens.shape[1], whole=isinstance(value, ImageFeatures))
    if isinstance(value, ImageFeatures):
        if pooled is None:
            raise ValueError("expected pooled features of a picture, found none")
        return
    if not isinstance(value.mask, Tensor) or value.mask.shape != tokens.shape[:2] or value.mask.dtype != torch.bool:
        raise ValueError(f"expected a mask of shape {tuple(tokens.shape[:2])}, found {shown(value.mask)}")
    for other in (value.negative, getattr(value, "second", None)):
        if other is not None:
            if type(other) is not type(value):
                raise ValueError(f"expected a negative of the same kind, found {shown(type(other))}")
            _check(other)


def _check_grid(grid: object, tokens: int, whole: bool) -> None:
    """whole: one grid; else there may be several ways to draw, one after the other."""
    sides = grid if isinstance(grid, tuple) and len(grid) == 2 else ()
    area = sides[0] * sides[1] if sides and all(type(side) is int and side > 0 for side in sides) else 0
    if not area or tokens % area or (whole and tokens != area):
        raise ValueError(f"expected a grid (h, w) for {tokens} tokens, found {shown(grid)}")


def moved(value: Any, device: torch.device) -> Any:
    """The same value with every tensor on ``device`` and contiguous, as it comes from a file."""
    return _with_each_tensor(value, lambda tensor: tensor.to(device).contiguous())


def copied(value: Any) -> Any:
    """The same value with tensors of its own."""
    return _with_each_tensor(value, Tensor.clone)


def bytes_of(value: Any) -> int:
    """Of all tensors in it."""
    sizes: list[int] = []
    _with_each_tensor(value, lambda tensor: sizes.append(tensor.nbytes) or tensor)
    return sum(sizes)


def _with_each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return tuple(_with_each_tensor(item, change) for item in value)
    if isinstance(value, Mapping):
        return {key: _with_each_tensor(item, change) for key, item in value.items()}
    if type(value) in _TYPES.values():
        changed = {field.name: _with_each_tensor(getattr(value, field.name), change) for field in fields(value)}
        return type(value)(**changed)
    return value
