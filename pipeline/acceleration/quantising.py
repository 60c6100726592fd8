"""Denoisers whose linear layers hold their weights in 8 bits, by torchao: models of their own in the cache."""

import importlib
from contextlib import AbstractContextManager
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import nn

from ..checkpoints import Checkpoint
from ..model_cache import ModelCache
from .compiling import repeated_blocks

# By the name in a speed plan: torchao's configuration, and its options.
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("Int8WeightOnlyConfig", {}),
    "int8 dynamic": ("Int8DynamicActivationInt8WeightConfig", {}),
    "float8": ("Float8DynamicActivationFloat8WeightConfig", {}),
}
_FLOAT8_CAPABILITY = (8, 9)  # Ada and later
_FLOAT8_MULTIPLE = 16  # of either side of a matrix, for the kernel that multiplies 8-bit floats


def use_quantised(
    cache: ModelCache, checkpoint: Checkpoint, component: str, how: str, dtype: torch.dtype | None = None
) -> AbstractContextManager[Any]:
    """``with use_quantised(cache, checkpoint, "unet", "int8") as unet:`` - in place of ``checkpoint.use``.

    The checkpoint's adapters are laid over it as over any other. how: "int8" holds each row of a linear layer of the
    repeated blocks in 8 bits and a scale, and multiplies in ``dtype``; "int8 dynamic" rounds the input as well, for
    each of its rows anew, and multiplies integers; "float8" does so in 8-bit floats, on NVIDIA GPUs from capability
    8.9. Convolutions and all else stay in ``dtype``: float32 on a CPU unless given, else the family's own. Raises
    ValueError where the device or the denoiser does not fit, or torchao is not installed.
    """
    check_quantisation(how, cache.residency.device)
    build = partial(build_quantised, checkpoint, component, how)
    return checkpoint.use_altered(cache, component, how, build, dtype)


def check_quantisation(how: str, device: torch.device) -> None:
    """Raises ValueError, with the reason, where ``device`` cannot run what is quantised so."""
    if how not in _CONFIGS:
        raise ValueError(f"expected to quantise by {', '.join(_CONFIGS)}, got {how!r}")
    if how != "float8":
        return
    wanted = "expected an NVIDIA GPU of capability 8.9 or more (RTX 40, L4, H100) for float8"
    if device.type != "cuda":
        raise ValueError(f"{wanted}, got {device.type}: choose int8")
    found = torch.cuda.get_device_capability(device)
    if found < _FLOAT8_CAPABILITY:
        raise ValueError(f"{wanted}, got one of {found[0]}.{found[1]}: choose int8")


def build_quantised(checkpoint: Checkpoint, component: str, how: str, dtype: torch.dtype) -> nn.Module:
    """Read the weights and quantise them layer by layer, each in place of its floats. On the CPU."""
    quantise = _torchao()
    name, options = _CONFIGS[how]
    config = getattr(quantise, name)(**options | _settings(getattr(quantise, name)))
    module = checkpoint.build(component, dtype)
    layers = _layers(module, _FLOAT8_MULTIPLE if how == "float8" else 1)
    if not layers:
        raise ValueError(
            f"expected a denoiser with linear layers in its blocks to quantise, got the {type(module).__name__} of "
            f"{checkpoint.folder.name}, which has none"
        )
    with torch.inference_mode(False):
        quantise.quantize_(module, config, lambda layer, name: id(layer) in layers)
    for part in module.modules():
        vars(part).pop("extra_repr", None)  # torchao's, which would keep the layer alive in a circle
    return module.eval().requires_grad_(False)


def _layers(module: nn.Module, multiple: int) -> set[int]:
    found = set()
    for block in repeated_blocks(module):
        for layer in block.modules():
            if type(layer) is nn.Linear and not any(side % multiple for side in layer.weight.shape):
                found.add(id(layer))
    return found


def _settings(config: Any) -> dict[str, Any]:
    """What torchao is to leave alone, and to heed, where this version of it has a say in that."""
    reduce = getattr(importlib.import_module("torchao.utils"), "should_reduce_range", None)
    settings: dict[str, Any] = {"version": 2}  # of the tensors, the only one that newer versions of torchao have
    settings["set_inductor_config"] = False  # it is the whole process's
    # Else the sum of two products may overflow the 16 bits that older CPUs hold it in. A GPU has no such instructions.
    settings["reduce_range"] = not torch.cuda.is_available() and reduce is not None and reduce(torch.device("cpu"))
    known = {each.name for each in fields(config)}
    return {name: value for name, value in settings.items() if name in known}


def _torchao() -> Any:
    try:
        import torchao  # noqa: F401  # told apart from an error inside it
    except ImportError:
        raise ValueError("quantisation needs a package that is not installed: pip install torchao") from None
    return importlib.import_module("torchao.quantization")
