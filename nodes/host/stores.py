"""What this host holds for us, each made once at its first use: the cache, the store, the digests."""

# pyright: reportMissingImports=false, reportMissingModuleSource=false

import functools
import threading
from collections.abc import Callable
from pathlib import Path

import comfy.model_management as memory
import folder_paths
import torch
from server import PromptServer

from ...pipeline.files.content import Digests
from ...pipeline.model_cache import ModelCache
from ...pipeline.store.embedding_store import EmbeddingStore
from .progress import reading
from .residency import ComfyResidency

_making_cache = threading.Lock()


def model_cache() -> ModelCache:
    """The one cache of this host, made at its first use. It may hold half of the machine's memory."""
    with _making_cache:
        return _make_cache()


@functools.cache
def _make_cache() -> ModelCache:
    cache = ModelCache(ComfyResidency(), budget_bytes=memory.get_total_memory(torch.device("cpu")) // 2)
    _when_freed(let_go)
    return cache


_EMBEDDINGS_BYTES = 2**30  # some thousand prompts, or some hundred of the largest encoders
_RECENT_BYTES = 2**26  # of these in memory: some hundred prompts, or a dozen of the largest encoders


@functools.cache
def embedding_store() -> EmbeddingStore:
    """The one store of this host, in a folder of its user directory that the host serves to nobody."""
    return EmbeddingStore(_own_folder() / "embeddings", _EMBEDDINGS_BYTES, recent_bytes=_RECENT_BYTES)


@functools.cache
def weights_digests() -> Digests:
    """The contents of all weights that were read in this host, remembered in the same folder."""
    return Digests(_own_folder() / "digests", reading)


def let_go() -> None:
    """Of every model, and of what is in memory of the store."""
    model_cache().unload()
    embedding_store().recent.clear()


def _when_freed(let_go: Callable[[], None]) -> None:
    """Let 'Free model and node cache' let go of what is ours too.

    The host drops what its node outputs own, and tells nobody. It takes the wish from the queue's flags, between
    prompts and on the one thread that may touch its list of models: so we look on as it does. 'Unload models' alone
    needs nothing from us, since the host moves our weights off as it does its own.
    """
    queue = getattr(getattr(PromptServer, "instance", None), "prompt_queue", None)
    if queue is None:  # imported without a running server
        return
    take_flags = queue.get_flags

    @functools.wraps(take_flags)
    def get_flags(*arguments, **options):
        flags = take_flags(*arguments, **options)
        if flags.get("free_memory"):
            let_go()
        return flags

    queue.get_flags = get_flags


def _own_folder() -> Path:
    try:
        return Path(folder_paths.get_system_user_directory("duet"))
    except AttributeError:  # an older host
        return Path(folder_paths.get_user_directory()) / "__duet"
