"""What a component is, whatever its files are called: a digest of all its weights and of its configuration."""

import contextlib
import hashlib
import inspect
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .components import Component, load_class
from .hashing import Span, hash_spans, pieces_of
from .libraries import library_marks
from .safetensors_files import CheckpointError, check_weights, read_json

log = logging.getLogger(__name__)

# Given what is read and how many bytes of it, once for each reading; gives what is told the bytes read so far.
Watch = Callable[[str, int], Callable[[int], None]]

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
_LIBRARIES = ("diffusers", "transformers")  # whose classes have defaults for what a configuration leaves out
_SMALL = (".jinja", ".json", ".model", ".txt")
_MOST_REMEMBERED = 4096
_LARGEST_MEMORY = 16 * 2**20  # a place is a few hundred bytes, of a model in many files some thousands


@dataclass(frozen=True)
class Content:
    """digest: equal for components that are the same network with the same weights; bytes: of their weights on disk."""

    digest: str
    bytes: int
    mtime_ns: int


class Digests:
    """Reads every weight once to tell models apart by what they are, and remembers it by path, size and mtime.

    folder: where it is remembered beyond the process; only within it if None. watch: follows each reading of weights on
    the thread that asks; what it raises ends the reading, of which nothing is remembered. Safe to call from any thread.
    """

    def __init__(self, folder: Path | None = None, watch: Watch | None = None) -> None:
        self._folder = folder
        self._watch = watch
        self._path = folder / "weights.json" if folder else None
        self._known: dict[str, tuple[str, int]] = _remembered(self._path)
        self._places: dict[tuple[object, ...], tuple[str, int]] = {}  # the same, without the time to write places down
        self._marks: dict[str, tuple[str, int, int]] = {}  # of libraries, which stay as long as the process
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Digests, (self._folder, self._watch)  # a lock cannot be copied

    def of(self, part: Component) -> Content:
        """The component as it lies on disk now. Raises CheckpointError if it is gone, or changes meanwhile."""
        status = _stat(part.config)
        place = ("config", str(part.config), *status, part.library, part.class_name, repr(part.options))
        config = self._config(place, part.library, part.class_name, lambda: read_json(part.config) | dict(part.options))
        told = f"{part.library}.{part.class_name} {_form(part.form)} {config}"
        return self._content(part.weights, told, part.prefix, status[1])

    def of_network(
        self, weights: Sequence[Path], library: str, class_name: str, config: Mapping[str, Any], form: str = ""
    ) -> Content:
        """Of weights whose configuration is no file. Equal to what ``of`` gives for the same network. Raises likewise.

        library: "" where the class has no defaults to add to its configuration.
        """
        # By its digest: a LoRA's settings may be a megabyte of text, and all that is remembered is one small file.
        as_given = hashlib.sha256(json.dumps(dict(config), sort_keys=True, default=repr).encode()).hexdigest()
        config_digest = self._config(("given", library, class_name, as_given), library, class_name, lambda: config)
        return self._content(weights, f"{library}.{class_name} {_form(form)} {config_digest}", "", 0)

    def of_files(self, paths: Iterable[Path]) -> str:
        """Of the names and all bytes of small files, such as those of a tokenizer. Raises as ``of`` does."""
        paths = sorted(paths)
        place = ("files", *((str(path), *_stat(path)) for path in paths))

        def read() -> tuple[str, int]:
            found = [path.read_bytes() for path in paths]
            lines = [f"{path.name} {hashlib.sha256(data).hexdigest()}" for path, data in zip(paths, found, strict=True)]
            return _digest_of(lines), sum(map(len, found))

        return self._known_or(place, read)[0]

    def _content(self, weights: Sequence[Path], told: str, prefix: str, mtime_ns: int) -> Content:
        stats = {path: _stat(path) for path in weights}
        place = (prefix, *((str(path.resolve()), *stats[path]) for path in weights))

        def read() -> tuple[str, int]:
            found = self._read(weights, prefix)
            if {path: _stat(path) for path in weights} != stats:
                raise CheckpointError(f"{weights[0]}: expected it to lie still while it is read, but it was changed")
            return found

        digest, size = self._known_or(place, read)
        newest = max(mtime_ns, *(stat[1] for stat in stats.values()))
        return Content(hashlib.sha256(f"{told} {digest}".encode()).hexdigest(), size, newest)

    def _read(self, weights: Sequence[Path], prefix: str) -> tuple[str, int]:
        """Of the names, types, shapes and bytes of all tensors, in however many files; of other files all bytes."""
        started = time.perf_counter()
        described = [each for path in weights for each in _spans(path, prefix)]
        size = sum(span.stop - span.start for _, span in described)
        # A model of one file is named by it, one of a folder by the folder.
        name = weights[0].parent.name if weights[0].name.startswith(("model", "diffusion_pytorch")) else weights[0].name
        log.info("reading the %d bytes of %s once, to know it again by any name", size, name)
        on_read = self._watch(name, size) if self._watch else None
        digests = hash_spans([span for _, span in described], on_read)
        log.info("told %s by its %d bytes in %.2f s", weights[0], size, time.perf_counter() - started)
        return _digest_of(f"{told} {digest}" for (told, _), digest in zip(described, digests, strict=True)), size

    def _config(
        self, place: tuple[object, ...], library: str, class_name: str, read: Callable[[], Mapping[str, Any]]
    ) -> str:
        """Of a configuration with the defaults of its class; remembered, because to import the class takes seconds."""
        if library in _LIBRARIES and library not in self._marks:
            self._marks[library] = library_marks(library)[0]
        place = (*place, self._marks.get(library))

        def digest() -> tuple[str, int]:
            whole = effective(library, class_name, read())
            return hashlib.sha256(json.dumps(whole, sort_keys=True, default=repr).encode()).hexdigest(), 0

        return self._known_or(place, digest)[0]

    def _known_or(self, place: tuple[object, ...], read: Callable[[], tuple[str, int]]) -> tuple[str, int]:
        if (known := self._places.get(place)) is not None:
            return known
        written = json.dumps(place)
        with self._lock:
            known = self._known.get(written)
        if known is None:
            known = read()
            self._remember(written, known)
        if len(self._places) >= _MOST_REMEMBERED:
            self._places.clear()
        self._places[place] = known
        return known

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
                with contextlib.suppress(OSError):
                    beside.unlink()


def small_files(folder: Path) -> list[Path]:
    """What lies beside weights and decides too: the words of a tokenizer, how a picture is to be shown."""
    with os.scandir(folder) as entries:
        return [Path(entry.path) for entry in entries if entry.name.endswith(_SMALL) and entry.is_file()]


def _form(form: str) -> str:
    return "" if form in _NAMED_ALIKE else form


def _remembered(path: Path | None) -> dict[str, tuple[str, int]]:
    if path is None or not path.is_file():
        return {}
    try:
        found = read_json(path, largest=_LARGEST_MEMORY)
        return {place: (str(digest), int(size)) for place, (digest, size) in found.items()}
    except (CheckpointError, TypeError, ValueError):
        return {}  # spoiled: everything is read again


def _stat(path: Path) -> tuple[int, int]:
    try:
        return (status := path.stat()).st_size, status.st_mtime_ns
    except OSError as error:
        raise CheckpointError(f"expected {error.filename}, which was there before: {error.strerror}") from error


def effective(library: str, class_name: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the defaults of what the file does not say, so that a short and a long configuration may agree."""
    if library == "transformers":
        with contextlib.suppress(Exception):  # of many kinds; what the class refuses is refused when it is built
            config = load_class(library, class_name).config_class.from_dict(dict(config)).to_dict()
    elif library:
        parameters = inspect.signature(load_class(library, class_name).__init__).parameters.values()
        defaults = {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}
        config = defaults | dict(config)
    return {key: value for key, value in config.items() if key not in _PROVENANCE}


def _spans(path: Path, prefix: str) -> list[tuple[str, Span]]:
    """What there is to hash in a file, each with what else is said of it."""
    if path.suffix.lower() != ".safetensors":
        return [(f"{number}", span) for number, span in enumerate(pieces_of(path))]
    return [
        # CLIP's names begin with text_model or not, by the age of what wrote them, and mean the same.
        (
            f"{name.removeprefix(prefix).removeprefix('text_model.')} {entry.dtype} {entry.shape}",
            Span(path, entry.start, entry.stop),
        )
        for name, entry in check_weights(path).entries.items()
        if name.startswith(prefix) and not name.endswith("position_ids")  # a table that old files hold
    ]


def _digest_of(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
