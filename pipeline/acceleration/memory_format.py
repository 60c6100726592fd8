"""Convolutions whose weights lie channels last, as the kernels for them like it: models of their own in the cache.

A weight that lies otherwise is another tensor, and the shared one is never changed. A copy for each run would be made
anew each time, and giving only the pictures channels last has each weight turned around at each step, which costs what
it gains. So it is an entry of the cache, read from the checkpoint: as many bytes as the other, which goes when room is
needed, unless somebody uses it too.
"""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..adapters.private_views import adapted
from ..checkpoints import Checkpoint
from ..model_cache import ModelCache, ModelKey

_LEAST_SHARE = 0.05  # of the weights; below, as in a transformer that cuts its patches so, nothing is to be gained


def use_channels_last(
    cache: ModelCache, checkpoint: Checkpoint, component: str, dtype: torch.dtype | None = None
) -> AbstractContextManager[Any]:
    """``with use_channels_last(cache, checkpoint, "vae") as vae:`` - in place of ``checkpoint.use``, with its adapters.

    dtype: float32 on a CPU unless given, else the family's own. Raises ValueError for a model that is no matter of
    convolutions.
    """
    on_cpu = cache.residency.device.type == "cpu"
    dtype = dtype or (torch.float32 if on_cpu else checkpoint.family.device_dtype)
    module = cache.use(*channels_last(checkpoint.key(component, dtype), lambda: checkpoint.build(component, dtype)))
    acting = [adapter for adapter in checkpoint.adapters if adapter.acts_on(component)]
    return adapted(module, cache, acting, component, dtype) if acting else module


def channels_last(key: ModelKey, build: Callable[[], nn.Module]) -> tuple[ModelKey, Callable[[], nn.Module]]:
    """What ``cache.use`` takes, of the same model with its convolutions channels last."""
    return variant(key, "channels last"), lambda: _channels_last(build())


def variant(key: ModelKey, words: str) -> ModelKey:
    """Of the same weights in another form; as they are replaced on disk, so is this."""
    content = hashlib.sha256(f"{key.content} {words}".encode()).hexdigest() if key.content else ""
    return replace(key, component=f"{key.component} in {words}", content=content)


def _channels_last(module: nn.Module) -> nn.Module:
    convolutions = [part.weight for part in module.modules() if isinstance(part, nn.Conv2d)]
    share = sum(weight.numel() for weight in convolutions) / sum(each.numel() for each in module.parameters())
    if share < _LEAST_SHARE:
        raise ValueError(
            f"expected a model of convolutions for channels_last, got a {type(module).__name__}, of whose weights they "
            f"are {share:.1%}"
        )
    with torch.inference_mode(False):
        for weight in convolutions:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return module
