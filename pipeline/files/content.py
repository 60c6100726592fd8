"""What a component is, whatever its files are called: a digest of all its weights and of its configuration."""

import hashlib
import inspect
import json
import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .components import Component
from .safetensors_files import CheckpointError, TensorEntry, check_weights, read_json

log = logging.getLogger(__name__)

# What says where a configuration came from, and nothing about the network.
_PROVENANCE = {
    "_class_name",
    "_commit_hash",
    "_diffusers_version",
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
}
# Layouts of single files whose tensors are named as in a diffusers folder.
_NAMED_ALIKE = {"", "as_is", "clip", "diffusers_flux", "diffusers_unet", "qwen_image"}
_CHUNK = 4 * 2**20
_THREADS = 8
_MOST_REMEMBERED = 4096
_LARGEST_MEMORY = 4 * 2**20


@dataclass(frozen=True)
class Content:
    """digest: equal for components that are the same network with the same weights; bytes: of their weights on disk."""

    digest: str
    bytes: int
    mtime_ns: int


class Digests:
    """Reads every weight once to tell models apart by what they are, and remembers it by path, size and mtime.

    folder: where it is remembered beyond the process; only within it if None. Safe to call from any thread.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._path = folder / "weights.json" if folder else None
        self._known: dict[str, tuple[str, int]] = _remembered(self._path)
        self._configs: dict[tuple[Any, ...], str] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Digests, (self._folder,)  # a lock cannot be copied

    def of(self, part: Component) -> Content:
        """The component as it lies on disk now. Raises CheckpointError if it is gone, or changes meanwhile."""
        stats = _stats(part)
        place = json.dumps([part.prefix, *((str(path.resolve()), *stats[path]) for path in part.weights)])
        with self._lock:
            known = self._known.get(place)
        if known is None:
            known = _weights_digest(part)
            if _stats(part) != stats:
                raise CheckpointError(f"{part.where}: expected it to lie still while it is read, but it was changed")
            self._remember(place, known)
        weights, size = known
        form = "" if part.form in _NAMED_ALIKE else part.form
        told = f"{part.library}.{part.class_name} {form} {self._config(part, stats[part.config])} {weights}"
        newest = max(mtime_ns for _, mtime_ns in stats.values())
        return Content(hashlib.sha256(told.encode()).hexdigest(), size, newest)

    def _config(self, part: Component, status: tuple[int, int]) -> str:
        place = (part.config, status, part.class_name, repr(part.options))
        if place not in self._configs:
            self._configs[place] = json.dumps(_effective_config(part), sort_keys=True, default=repr)
        return self._configs[place]

    def _remember(self, place: str, known: tuple[str, int]) -> None:
        with self._lock:
            self._known[place] = known
            while len(self._known) > _MOST_REMEMBERED:
                del self._known[next(iter(self._known))]
            if self._path is None:
                return
            beside = self._path.with_suffix(f".{os.getpid()}.part")
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                beside.write_text(json.dumps(self._known), "utf-8")
                os.replace(beside, self._path)
            except OSError as error:  # a full or read-only disk: it is only read again next time
                log.warning("could not remember the digest of weights in %s: %s", self._path, error)


def _remembered(path: Path | None) -> dict[str, tuple[str, int]]:
    if path is None or not path.is_file():
        return {}
    try:
        found = read_json(path, largest=_LARGEST_MEMORY)
        return {place: (str(digest), int(size)) for place, (digest, size) in found.items()}
    except (CheckpointError, TypeError, ValueError):
        return {}  # spoiled: everything is read again


def _stats(part: Component) -> dict[Path, tuple[int, int]]:
    try:
        return {path: ((status := path.stat()).st_size, status.st_mtime_ns) for path in (part.config, *part.weights)}
    except OSError as error:
        raise CheckpointError(f"expected {error.filename}, which was there before: {error.strerror}") from error


def _effective_config(part: Component) -> Mapping[str, Any]:
    """With the defaults of what the file does not say, so that a short and a long configuration may agree."""
    config = read_json(part.config) | dict(part.options)
    model = part.load_class()
    if part.library == "transformers":
        config = model.config_class.from_dict(config).to_dict()
    else:
        parameters = inspect.signature(model.__init__).parameters.values()
        defaults = {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}
        config = defaults | config
    return {key: value for key, value in config.items() if key not in _PROVENANCE}


def _weights_digest(part: Component) -> tuple[str, int]:
    """Of the names, types, shapes and bytes of all tensors, however many files they lie in."""
    started = time.perf_counter()
    files = [check_weights(path) for path in part.weights]
    tensors = [
        # CLIP's names begin with text_model or not, by the age of what wrote them, and mean the same.
        (name.removeprefix(part.prefix).removeprefix("text_model."), file.path, entry)
        for file in files
        for name, entry in file.entries.items()
        if name.startswith(part.prefix) and not name.endswith("position_ids")  # a table that old files hold
    ]
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda each: _bytes_digest(each[1], each[2]), tensors)
        lines = [
            f"{name} {entry.dtype} {entry.shape} {digest}"
            for (name, _, entry), digest in zip(tensors, digests, strict=True)
        ]
    size = sum(entry.stop - entry.start for _, _, entry in tensors)
    log.info("told %s of %s by its %d bytes in %.2f s", part.name, part.where, size, time.perf_counter() - started)
    return _digest_of(lines), size


def _digest_of(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _bytes_digest(path: Path, entry: TensorEntry) -> str:
    digest = hashlib.sha256()  # processors have instructions for it; threads hash side by side
    with open(path, "rb") as file:
        file.seek(entry.start)
        left = entry.stop - entry.start
        while left > 0 and (chunk := file.read(min(_CHUNK, left))):
            digest.update(chunk)
            left -= len(chunk)
    if left:
        raise CheckpointError(f"{path} is truncated: {left:,} bytes are missing since it was opened")
    return digest.hexdigest()
