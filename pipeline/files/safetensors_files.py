"""What a safetensors file says about itself, checked before any weight is read. Nothing in it is ever executed.

Layout: 8 bytes little-endian header length, the header in JSON, then the tensors' bytes without gap or overlap
(https://github.com/huggingface/safetensors).
"""

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

# The format allows headers of 100 MB. The largest models' are below 2 MB, and parsing JSON takes many times its size.
LARGEST_HEADER = 16 * 2**20
MOST_ENTRIES = 100_000
_MOST_NOTES = 400_000
_MOST_DIMENSIONS = 16
_SAMPLES, _SAMPLE_BYTES = 16, 4096

_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


class CheckpointError(ValueError):
    """A model on disk that cannot be used: names the file, what was expected there and what was found."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in a file. dtype: as the format names it, such as "BF16"; start, stop: its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class WeightsFile:
    """A safetensors file that is whole. digest: of its header and a sample of its bytes."""

    path: Path
    size: int
    digest: str
    entries: Mapping[str, TensorEntry] = field(repr=False, compare=False)

    @property
    def tensors(self) -> int:
        return len(self.entries)


def check_weights(path: Path) -> WeightsFile:
    """Read and check the header alone, in bounded time and memory. Raises CheckpointError, naming what is wrong."""
    with _opened(path) as file:
        status = os.fstat(file.fileno())
        header = _header(path, file, status.st_size)
        data_start = 8 + len(header)
        entries = layout_of(path, header)[0]
        expected = max((entry.stop for entry in entries.values()), default=data_start)
        if status.st_size < expected:
            raise CheckpointError(
                f"{path} is truncated: expected {expected:,} bytes, found {status.st_size:,}. Fetch it again"
            )
        if status.st_size > expected:
            raise CheckpointError(
                f"{path} has {status.st_size - expected:,} bytes after its last tensor: expected {expected:,} bytes, "
                f"found {status.st_size:,}. It was not written by safetensors, or was changed since"
            )
        digest = hashlib.sha256(header)
        for place in range(_SAMPLES):
            file.seek(data_start + (expected - data_start) * place // _SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
    return WeightsFile(path, status.st_size, digest.hexdigest(), entries)


def read_json(path: Path, largest: int = 2**20) -> dict[str, Any]:
    """A JSON object of at most ``largest`` bytes. Raises CheckpointError."""
    with _opened(path) as file:
        text = file.read(largest + 1)
    if len(text) > largest:
        raise CheckpointError(f"{path}: expected at most {largest:,} bytes of JSON, found more")
    return _parse(path, text)


def shard_names(index: Path) -> list[str]:
    """The files beside it that an index of sharded weights (model.safetensors.index.json) names."""
    where = read_json(index, largest=LARGEST_HEADER).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise CheckpointError(f"{index}: expected a weight_map from tensors to files, found {shown(where)}")
    names = sorted(set(where.values()))
    for name in names:
        if not name.endswith(".safetensors") or re.search(r"[/\\:\0]", name):
            raise CheckpointError(f"{index}: expected the names of .safetensors files beside it, found {shown(name)}")
    return names


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe or a device could wait, or read, for ever
            raise CheckpointError(f"expected a file at {path}, found a folder or device")
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"expected {path}, found no such file") from None
    except OSError as error:
        raise CheckpointError(f"expected to read {path}, got: {error.strerror or error}") from error


def _header(path: Path, file: BinaryIO, size: int) -> bytes:
    start = file.read(512)
    length = int.from_bytes(start[:8], "little")
    # A header starts with a brace; a pickle's own first bytes may well make a plausible length.
    if len(start) < 8 or length > size - 8 or start[8:9] != b"{":
        raise CheckpointError(f"{path}: expected safetensors weights, found {_looks_like(start, length, size)}")
    if length > LARGEST_HEADER:
        raise CheckpointError(f"{path}: expected a header of at most {LARGEST_HEADER:,} bytes, it claims {length:,}")
    file.seek(8)
    header = file.read(length)
    # Counted before parsing, and counting too much: braces inside strings do not open an object.
    if (opened := header.count(b"{")) > MOST_ENTRIES:
        raise CheckpointError(f"{path}: expected at most {MOST_ENTRIES:,} tensors, the header lists {opened:,}")
    # A tensor has four names and hardly more than twelve commas; notes on training, in strings, have many of both.
    for mark, each in ((b":", 5), (b",", 12)):
        if (values := header.count(mark)) > each * opened + _MOST_NOTES:
            raise CheckpointError(f"{path}: expected tensors, the header lists {values:,} values of {opened:,} tensors")
    return header


def _looks_like(start: bytes, length: int, size: int) -> str:
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        real = re.search(rb"size (\d+)", text)
        meant = f" for {int(real[1]):,} bytes of weights" if real and len(real[1]) < 20 else ""
        return f"a Git LFS pointer{meant}. Run `git lfs pull` in its folder, or download the file itself"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, such as a site's login or error page saved in place of the file. Download the file itself"
    if start.startswith(b"PK\x03\x04"):
        return "a zip archive, as PyTorch writes pickled weights. They can run code and are never opened: convert them"
    if re.match(rb"\x80[\x02-\x05]", start):
        return "a Python pickle. It can run code and is never opened: convert it to safetensors"
    if start.startswith(b"GGUF"):
        return "a GGUF file, another format"
    if size <= 8:
        return f"{size} bytes: empty, or truncated"
    if start[8:9] == b"{":
        return f"a truncated file: its header claims {length:,} bytes, the file has {size:,}"
    return f"{size:,} bytes of something else, which starts with {start[:16]!r}"


def layout_of(path: Path, header: bytes) -> tuple[dict[str, TensorEntry], Any]:
    """The tensors that a header describes, once it is sure that they lie end to end; and its metadata, unchecked."""
    entries = _parse(path, header)
    metadata = entries.pop("__metadata__", None)
    spans = sorted(_span(path, name, entry) for name, entry in entries.items())
    end, data_start = 0, 8 + len(header)
    found = {}
    for start, stop, name in spans:
        if start != end:
            raise CheckpointError(f"{path}: expected tensor {shown(name)} to start at byte {end}, it claims {start}")
        end = stop
        entry = entries[name]
        found[name] = TensorEntry(entry["dtype"], tuple(entry["shape"]), data_start + start, data_start + stop)
    return found, metadata


def _span(path: Path, name: str, entry: Any) -> tuple[int, int, str]:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (start, stop, *shape))
        size = math.prod(shape) * _BITS[dtype] // 8 if whole and len(shape) <= _MOST_DIMENSIONS else -1
    except (KeyError, TypeError, ValueError):
        size = -1
        start = stop = 0
    if size < 0 or stop - start != size:
        raise CheckpointError(f"{path}: tensor {shown(name)} is described wrongly: {shown(entry)}")
    return start, stop, name


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"{path}: expected JSON, found {shown(text[:40])} ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {shown(value)}")
    return value


def shown(value: object) -> str:
    """For an error: what came, and never all of it."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
