"""What a GGUF file says about itself, checked before any package parses it. Nothing in it is ever executed.

Layout, little-endian: magic, version, two counts, then that many key-value pairs and tensor descriptions, each with
lengths of its own (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Readers believe these numbers: one that
claims 2**60 entries in a file of 51 bytes keeps them busy for ever. Here each is held against what the file can hold.
"""

import hashlib
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .safetensors_files import MOST_ENTRIES, CheckpointError, shown

LARGEST_HEADER = 256 * 2**20  # bytes before the first tensor; a vocabulary of 260,000 words takes 15 MB
MOST_VALUES = 4_000_000  # in all lists together; readers make several objects of each
_LONGEST_NAME = 65_535  # bytes, of keys and tensors; the format's own bound
_MOST_DIMENSIONS = 4
_MOST_VALUES_A_BYTE = 8  # the smallest quantisation takes 1.6 bits a weight
_VERSIONS = (2, 3)
_STRING, _LIST = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes, by the number of the type
_KEPT = ("general.architecture", "general.name")
_SAMPLES, _SAMPLE_BYTES = 16, 4096


@dataclass(frozen=True)
class GgufFile:
    """A file whose header is whole. weights: numbers in all tensors; digest: of the header and samples of the rest."""

    path: Path
    size: int
    tensors: int
    weights: int
    architecture: str
    digest: str


def check_gguf(path: Path) -> GgufFile:
    """Walk the header alone, in bounded time and memory. Raises CheckpointError, naming what is wrong and where."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"expected a file at {path}, found a folder or device")
        with open(path, "rb") as file:
            return _Walk(path, file).check()
    except FileNotFoundError:
        raise CheckpointError(f"expected {path}, found no such file") from None
    except OSError as error:
        raise CheckpointError(f"expected to read {path}, got: {error.strerror or error}") from error


class _Walk:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.place = 0
        self.values = 0
        self.digest = hashlib.sha256()
        self.kept: dict[str, str] = {}

    def check(self) -> GgufFile:
        magic = self._take(4, "the magic")
        if magic != b"GGUF":
            raise self._wrong("GGUF weights", f"a file that starts with {magic!r}")
        if (version := self._number("<I", "the version")) not in _VERSIONS:
            raise self._wrong(f"version {' or '.join(map(str, _VERSIONS))}", f"version {version}")
        tensors = self._count("<Q", "tensors", at_least=24, most=MOST_ENTRIES)
        pairs = self._count("<Q", "key-value pairs", at_least=13, most=MOST_ENTRIES)
        for _ in range(pairs):
            self._pair()
        weights = sum(self._tensor() for _ in range(tensors))
        if weights > (self.size - self.place) * _MOST_VALUES_A_BYTE:
            raise self._wrong(f"the bytes of {weights:,} weights", f"{self.size - self.place:,} bytes after the header")
        if not (architecture := self.kept.get("general.architecture")):
            raise self._wrong("a general.architecture", "none")
        for sample in range(_SAMPLES):
            self.file.seek(self.place + (self.size - self.place) * sample // _SAMPLES)
            self.digest.update(self.file.read(_SAMPLE_BYTES))
        return GgufFile(self.path, self.size, tensors, weights, architecture, self.digest.hexdigest())

    def _pair(self) -> None:
        key = self._string("a key", most=_LONGEST_NAME).decode("utf-8", "replace")
        kind = self._number("<I", f"the type of {shown(key)}")
        if kind == _STRING:
            value = self._string(shown(key), most=LARGEST_HEADER)
            if key in _KEPT:
                self.kept[key] = value[:200].decode("utf-8", "replace")
        elif kind == _LIST:
            self._list(key)
        else:
            self._take(self._width(kind, key), shown(key))

    def _list(self, key: str) -> None:
        kind = self._number("<I", f"the type of {shown(key)}")
        width = 8 if kind == _STRING else self._width(kind, key)  # a string is at least its length; lists hold no lists
        count = self._count("<Q", f"values of {shown(key)}", at_least=width, most=MOST_VALUES - self.values)
        self.values += count
        if kind == _STRING:
            for _ in range(count):
                self._string(shown(key), most=LARGEST_HEADER)
        else:
            self._take(count * width, shown(key))

    def _tensor(self) -> int:
        name = shown(self._string("the name of a tensor", most=_LONGEST_NAME).decode("utf-8", "replace"))
        dimensions = self._number("<I", f"the dimensions of {name}")
        if dimensions > _MOST_DIMENSIONS:
            raise self._wrong(f"at most {_MOST_DIMENSIONS} dimensions of {name}", f"{dimensions:,}")
        weights = 1
        for _ in range(dimensions):
            weights *= self._number("<Q", f"the shape of {name}")
        self._number("<I", f"the type of {name}")
        if (offset := self._number("<Q", f"the place of {name}")) >= self.size:
            raise self._wrong(f"{name} inside the file of {self.size:,} bytes", f"it at byte {offset:,}")
        return weights

    def _width(self, kind: int, key: str) -> int:
        if kind not in _SIZES:
            raise self._wrong(f"a known type for {shown(key)}", f"number {kind}")
        return _SIZES[kind]

    def _count(self, form: str, what: str, at_least: int, most: int) -> int:
        """How many of something follow, each of which takes ``at_least`` so many bytes."""
        count = self._number(form, f"the number of {what}")
        if count > most or count * at_least > self.size - self.place:
            left = self.size - self.place
            raise self._wrong(
                f"{what} that fit into the {left:,} bytes left, and at most {most:,}", f"{count:,} of them"
            )
        return count

    def _string(self, what: str, most: int) -> bytes:
        length = self._number("<Q", f"the length of {what}")
        if length > most:
            raise self._wrong(f"at most {most:,} bytes of {what}", f"{length:,}")
        return self._take(length, what)

    def _number(self, form: str, what: str) -> int:
        return struct.unpack(form, self._take(struct.calcsize(form), what))[0]

    def _take(self, count: int, what: str) -> bytes:
        if count > self.size - self.place:
            raise self._wrong(f"{count:,} bytes for {what}", f"the file's end after {self.size - self.place:,}")
        if self.place + count > LARGEST_HEADER:
            raise self._wrong(f"a header of at most {LARGEST_HEADER:,} bytes", "a longer one")
        taken = self.file.read(count)
        self.place += count
        self.digest.update(taken)
        return taken

    def _wrong(self, expected: str, found: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: expected {expected}, found {found} (at byte {self.place:,})")
