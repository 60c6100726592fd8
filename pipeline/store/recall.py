"""Ask the store of embeddings before the encoder: what was seen before needs no encoder in memory."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from ..checkpoints import Checkpoint
from ..model_cache import ModelCache
from .embedding_files import Embeddings
from .embedding_store import EmbeddingStore

E = TypeVar("E", bound=Embeddings)
P = ParamSpec("P")

# The components of a checkpoint that say what words, or a picture, become.
WORDS = ("text_encoder", "tokenizer")
PICTURES = ("image_encoder", "feature_extractor")


def recalled(store: EmbeddingStore, encode: Callable[P, E], *arguments: P.args, **options: P.kwargs) -> E:
    """``encode(*arguments, **options)``, or what it gave for them when they were last the same.

    encode: such as ``encode_prompt`` or ``encode_image``, whose result depends on nothing else. Of a checkpoint among
    the arguments, the content of its encoders and the files beside them count, what is laid over it, and its own name,
    since the space that embeddings carry has it; of a model cache, its device. Raises what ``encode`` raises, and
    TypeError for an argument that cannot be told.
    """
    parts = (encode.__module__.rpartition(".")[2], encode.__qualname__, _told(arguments), _told(options))
    caches = [argument for argument in arguments if isinstance(argument, ModelCache)]
    device = caches[0].residency.device if caches else torch.device("cpu")
    return store.recall(parts, lambda: encode(*arguments, **options), device)


def _told(value: Any) -> Any:
    """A value as the store takes it."""
    if isinstance(value, ModelCache):
        return str(value.residency.device.type)
    if isinstance(value, Checkpoint):
        encoders = {
            name: (value.digests.of(part).digest if part.weights else part.class_name, _files(_beside(part.config)))
            for name, part in value.components.items()
            if name.startswith(WORDS + PICTURES)
        }
        laid_over = [adapter.identity for adapter in value.adapters if any(map(adapter.acts_on, encoders))]
        return ["checkpoint", value.folder.name, value.family.name, encoders, laid_over]
    if isinstance(value, Path):
        return ["path", value.name, _files(_beside(value / "any") if value.is_dir() else [value])]
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        told = {field.name: _told(getattr(value, field.name)) for field in fields(value) if field.compare}
        return [type(value).__name__, told]
    if isinstance(value, Mapping):
        return {str(key): _told(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_told(item) for item in value]
    return value


def _beside(path: Path) -> list[Path]:
    """A tokenizer is as many files as lie in its folder."""
    return [other for other in sorted(path.parent.iterdir()) if other.is_file()]


def _files(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    return [(path.name, status.st_size, status.st_mtime_ns) for path in paths if (status := path.stat())]
