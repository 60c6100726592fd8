"""Convolutions whose weights lie channel by channel for each pixel (channels_last): models of their own in the cache.

The order in memory is what cuDNN's and oneDNN's fast kernels for half precision read, and what is computed stays the
same but for the order of its sums.
"""

import hashlib
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..checkpoints import Checkpoint
from ..model_cache import ModelCache, ModelKey
from ..private_views import adapted


def use_channels_last(
    cache: ModelCache, checkpoint: Checkpoint, component: str, dtype: torch.dtype | None = None
) -> AbstractContextManager[Any]:
    """``with use_channels_last(cache, checkpoint, "unet") as unet:`` - in place of ``checkpoint.use``.

    dtype: unless given, float32 on a CPU and the family's own on any other device. Raises ValueError for a transformer,
    which has no convolutions that would gain.
    """
    if component == "transformer":
        raise ValueError(
            f"expected a UNet for the memory format channels_last, got the transformer of {checkpoint.folder.name}, "
            "which has no convolutions that would gain"
        )
    on_cpu = cache.residency.device.type == "cpu"
    dtype = dtype or (torch.float32 if on_cpu else checkpoint.family.device_dtype)
    module = cache.use(_key(checkpoint, component, dtype), lambda: _build(checkpoint, component, dtype))
    acting = [adapter for adapter in checkpoint.adapters if adapter.acts_on(component)]
    return adapted(module, cache, acting, component, dtype) if acting else module


def _key(checkpoint: Checkpoint, component: str, dtype: torch.dtype) -> ModelKey:
    key = checkpoint.key(component, dtype)
    content = hashlib.sha256(f"{key.content} channels_last".encode()).hexdigest()
    return replace(key, component=f"{component} in channels_last", content=content)


def _build(checkpoint: Checkpoint, component: str, dtype: torch.dtype) -> nn.Module:
    module = checkpoint.build(component, dtype)
    with torch.inference_mode(False):
        for parameter in module.parameters():
            if parameter.ndim == 4:  # Module.to would refuse those of a film, which have five
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return module
