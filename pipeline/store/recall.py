"""Ask the store of embeddings before the encoder: what was seen before needs no encoder in memory."""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, ParamSpec, TypeVar

import torch

from ..checkpoints import Checkpoint
from ..denoising.diffusers_pipelines import pipeline_options
from ..files.content import small_files
from ..files.safetensors_files import read_json
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
    the arguments, all that its encoders are made of counts, what its pipeline is told of them, what is laid over it,
    and its own name, since the space that embeddings carry has it; of a model cache, its device; of anything with a
    method ``told``, what that gives. Raises what ``encode`` raises, and TypeError for an argument that cannot be told.
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
        return _checkpoint(value)
    if callable(told := getattr(value, "told", None)):
        return [type(value).__name__, _told(told())]
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


def _checkpoint(model: Checkpoint) -> list[Any]:
    encoders = {name: part for name, part in model.components.items() if name.startswith(WORDS + PICTURES)}
    told = {
        name: [
            part.digest,  # which the space has, and which sees the notes of a file too
            model.digests.of(part).digest if part.weights else part.class_name,
            _told(part.options),
            model.digests.of_files(small_files(part.folder)),
        ]
        for name, part in encoders.items()
    }
    # Where the largest encoder is left out, its place is filled by zeros, as wide as the denoiser says.
    stands_in = "tokenizer_3" in model.family.windows and "text_encoder_3" not in encoders
    denoiser = _told(read_json(model.components["transformer"].config)) if stands_in else None
    laid_over = [adapter.identity for adapter in model.adapters if any(map(adapter.acts_on, encoders))]
    switches = pipeline_options(model)  # of model_index.json, such as force_zeros_for_empty_prompt
    return ["checkpoint", model.folder.name, repr(model.family), switches, told, denoiser, laid_over]
