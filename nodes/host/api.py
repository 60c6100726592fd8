"""The host's own types: its node interface, and values of its stock nodes."""

# pyright: reportMissingImports=false, reportMissingModuleSource=false

import functools
import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import comfyui_version
import torch
from comfy.clip_vision import Output as ClipVisionOutput
from comfy_api.latest import io as host_io


def clip_vision_output(tokens: torch.Tensor, pooled: torch.Tensor) -> ClipVisionOutput:
    """What CLIP Vision Encode gives. tokens: (B, N, D), for every layer that a node may ask for; pooled: (B, P)."""
    output = ClipVisionOutput()
    for layer in ("last_hidden_state", "penultimate_hidden_states"):
        output[layer] = tokens
    output["image_embeds"] = pooled
    output["mm_projected"] = None
    return output


def host_version() -> str:
    """Of the ComfyUI that runs, such as 0.3.75."""
    return comfyui_version.__version__


def installed_nodes() -> set[str]:
    """The types that this host can run."""
    return set(sys.modules["nodes"].NODE_CLASS_MAPPINGS)  # the host's own module of that name, not ours


@functools.cache  # the host asks for every schema several times in each run
def _known(call: Callable) -> Callable:
    """The same call, less the keyword arguments that this host is too old to know; they only add comfort."""
    parameters = inspect.signature(call).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return call

    @functools.wraps(call, updated=())
    def filtered(*arguments, **options):
        return call(*arguments, **{name: value for name, value in options.items() if name in parameters})

    return filtered


def _of_several(call: Callable) -> Callable:
    """An input of several types, given as the host's own types or as ours around them."""

    def unwrapped(name: str, types: list[Any], **options: Any) -> Any:
        return _known(call)(name, types=[getattr(kind, "_wrapped", kind) for kind in types], **options)

    return unwrapped


class _Io:
    """The host's ``io``, whose Schema and Inputs accept arguments of newer hosts: a TypeError drops the whole pack."""

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._wrapped, name)
        if name == "Input" and self._wrapped is host_io.MultiType:
            return _of_several(value)
        if name == "Schema" or name in ("Input", "Output"):
            return _known(value)
        if name == "Custom":
            return lambda io_type: _Io(value(io_type))
        return _Io(value) if hasattr(value, "Input") else value


if TYPE_CHECKING:
    io = host_io
else:
    io = _Io(host_io)
