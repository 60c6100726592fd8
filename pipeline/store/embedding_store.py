"""A store of embeddings on disk, which knows a prompt or a picture again by its content, even after a restart."""

import contextlib
import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..files.libraries import library_marks
from ..files.safetensors_files import CheckpointError
from .embedding_files import FORMAT, Embeddings, moved, read_embeddings, write_embeddings
from .recent_embeddings import RecentEmbeddings

log = logging.getLogger(__name__)

E = TypeVar("E", bound=Embeddings)

_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
_UNFINISHED = re.compile(r"[0-9a-f]{64}\.[0-9a-f]{32}\.part")
_ABANDONED_S = 3600.0
_LIBRARIES = ("torch", "transformers", "diffusers", "tokenizers", "timm", "efficientnet_lite_pytorch")
# The modules whose text decides an embedding. What finds, checks, names and keeps models does not, and families.py is
# told by what it says of the family in question. A test holds this against what the encoders import.
NUMBERS = (
    "adapters/lora.py",
    "adapters/lora_files.py",
    "adapters/weight_changes.py",
    "private_views.py",
    "checkpoints.py",
    "conditioning.py",
    "denoising/diffusers_pipelines.py",
    "files/single_file_weights.py",
    "files/weights.py",
    "image_encoder.py",
    "image_preparation.py",
    "language/language_model.py",
    "text/characters.py",
    "text/clip_windows.py",
    "text/encoder_files.py",
    "text/prompt_pipelines.py",
    "text/prompt_weights.py",
    "text/text_encoders.py",
    "text_encoder.py",
    "vision/gram.py",
    "vision/image_encoders.py",
    "vision/resizing.py",
)


def digest_of(*parts: object) -> str:
    """SHA-256 of texts, numbers, tensors (by dtype, shape and bytes), None, and tuples, lists and dicts of these.

    Equal on every machine. Raises TypeError for anything else, which might not be.
    """
    hasher = hashlib.sha256()
    _feed(hasher, parts)
    return hasher.hexdigest()


class EmbeddingStore:
    """A folder of embeddings, each under the digest of what made it, that never grows beyond ``budget_bytes`` for long.

    The least recently used make way. Any number of threads and processes may share a folder: a file is there whole or
    not at all. A file under a name of ours that is not what it should be is removed; all others are left alone. A disk
    that is full or read-only costs time, never a result. version: of what makes embeddings, ``code_version`` unless
    given; those of another are not found. recent_bytes: of those made lately that are held in memory too, and
    neither read nor checked again. Those read are not: the first after a start would wait for the copy.
    """

    def __init__(self, folder: Path, budget_bytes: int, version: str | None = None, recent_bytes: int = 0) -> None:
        self.folder = folder
        self.budget_bytes = budget_bytes
        self.recent = RecentEmbeddings(recent_bytes)
        self.hits = self.misses = 0
        self._version = code_version() if version is None else version
        self._bytes: int | None = None  # in the folder; counted when something is first added
        self._lock = threading.Lock()

    def recall(self, parts: tuple[object, ...], make: Callable[[], E], device: torch.device | str = "cpu") -> E:
        """What ``make`` gave when it was last asked for with these ``parts``, or gives now; on ``device``.

        parts: all that decides the result, as ``digest_of`` takes it. The version of the pack and of its libraries is
        added. Both ways give the same bits, laid out alike.
        """
        digest = digest_of(self._version, *parts)
        device = torch.device(device)
        stored = self._get(digest)
        if stored is None:
            stored = moved(make(), torch.device("cpu"))
            self.recent.put(digest, stored)
            self._put(digest, stored)
        # Of the kind that `make` gives, and contiguous on the CPU, as files are.
        return stored if device.type == "cpu" else moved(stored, device)  # type: ignore[return-value]

    def clear(self) -> int:
        """Remove every embedding; gives the bytes freed on disk."""
        self.recent.clear()
        with self._lock:
            freed = sum(size for size, _, path in self._files() if _removed(path))
            self._bytes = 0
        return freed

    def _get(self, digest: str) -> Embeddings | None:
        path = self._path(digest)
        try:
            value = self.recent.get(digest) or read_embeddings(path)
        except FileNotFoundError:
            self.misses += 1
            return None
        except CheckpointError as error:
            log.warning("removed an entry of the store that is not as it was written: %s", error)
            _removed(path)
            self._bytes = None
            self.misses += 1
            return None
        self.hits += 1
        with contextlib.suppress(OSError):
            os.utime(path)  # the order of use, as the next process will find it
        return value

    def _put(self, digest: str, value: Embeddings) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            size = write_embeddings(self._path(digest), value)
        except OSError as error:
            log.warning("embeddings are not kept, since %s cannot be written: %s", self.folder, error)
            return
        with self._lock:
            if self._bytes is not None:
                self._bytes += size
            if self._bytes is None or self._bytes > self.budget_bytes:
                self._trim()

    def _trim(self) -> None:
        files = sorted(self._files(), key=lambda file: file[1])
        total = sum(size for size, _, _ in files)
        for size, _, path in files:
            if total <= self.budget_bytes:
                break
            if _removed(path):
                total -= size
                log.info("removed %s (%d bytes): over the budget of %d bytes", path.name, size, self.budget_bytes)
        self._bytes = total

    def _files(self) -> list[tuple[int, int, Path]]:
        """(bytes, time of last use, path) of each; what a process that was killed left unfinished goes."""
        found = []
        with contextlib.suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                ours, unfinished = _NAME.fullmatch(entry.name), _UNFINISHED.fullmatch(entry.name)
                if not ours and not unfinished:
                    continue
                with contextlib.suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    if ours:
                        found.append((status.st_size, status.st_mtime_ns, Path(entry.path)))
                    elif time.time() - status.st_mtime > _ABANDONED_S:
                        _removed(Path(entry.path))
        return found

    def _path(self, digest: str) -> Path:
        return self.folder / f"{digest}.safetensors"


def code_version(pipeline: Path | None = None) -> str:
    """Of all that turns words and pictures into numbers: of the pack the sources themselves, of libraries the release.

    So an update empties the store only where it may change what is stored. pipeline: another copy of this package.
    """
    sources = _LOADED if pipeline is None else _digest_of_sources(str(pipeline))
    return digest_of(FORMAT, sources, library_marks(*_LIBRARIES))


def _digest_of_sources(pipeline: str) -> str:
    sources = hashlib.sha256()
    for name in NUMBERS:
        with open(f"{pipeline}/{name}", "rb", buffering=0) as file:
            text = file.read()
        sources.update(f"{name} {len(text)};".encode() + text)
    return sources.hexdigest()


# Read as the pack is imported: an update that comes while it runs is not what makes the numbers of this process.
_LOADED = _digest_of_sources(str(Path(__file__).parents[1]))


def _feed(hasher: Any, value: object) -> None:
    """Each value behind its kind and its length, so that no two sequences read the same."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        hasher.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        hasher.update(flat.numpy().data)
    elif isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        hasher.update(f"str {len(text)};".encode() + text)
    elif value is None or isinstance(value, bool | int | float):
        hasher.update(f"{type(value).__name__} {value!r};".encode())
    elif isinstance(value, tuple | list):
        hasher.update(f"list {len(value)};".encode())
        for item in value:
            _feed(hasher, item)
    elif isinstance(value, Mapping):
        _feed(hasher, [part for pair in sorted(value.items()) for part in pair])
    else:
        raise TypeError(f"expected texts, numbers or tensors, got {type(value).__name__}")


def _removed(path: Path) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
