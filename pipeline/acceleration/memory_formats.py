"""Convolutions whose weights lie channel by channel for each pixel (channels_last): models of their own in the cache.

The order in memory is what cuDNN's and oneDNN's fast kernels for half precision read, and what is computed stays the
same but for the order of its sums.
"""

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..checkpoints import Checkpoint
from ..model_cache import ModelCache


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
    return checkpoint.use_altered(cache, component, "channels_last", partial(_build, checkpoint, component), dtype)


def _build(checkpoint: Checkpoint, component: str, dtype: torch.dtype) -> nn.Module:
    module = checkpoint.build(component, dtype)
    with torch.inference_mode(False):
        for parameter in module.parameters():
            if parameter.ndim == 4:  # Module.to would refuse those of a film, which have five
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return module
