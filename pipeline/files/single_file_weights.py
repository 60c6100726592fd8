"""One component read from its files: its tensors alone, renamed as diffusers and transformers name them."""

import importlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from . import pixart_names
from .components import Component
from .safetensors_files import CheckpointError, TensorEntry, check_weights, read_json

Tensors = dict[str, torch.Tensor]

# Beside a weight of 8 bits: by what its values were divided, or how a kernel would use them.
_SCALES = (".scale_weight", ".weight_scale")
_NO_WEIGHTS = ("scaled_fp8", ".scale_input", ".input_scale", ".comfy_quant", *_SCALES)


def build(part: Component, dtype: torch.dtype) -> nn.Module:
    """Reads no other component's tensors. The caller holds the lock on building. Raises CheckpointError.

    Nothing is initialised only to be overwritten, and a network that the weights could not fill takes no memory.
    """
    config = read_json(part.config) | dict(part.options)
    tensors = CONVERTERS[part.form or "as_is"](read_tensors(part, dtype), config)
    build_with = _transformers if part.library == "transformers" else _diffusers
    module, lacking = build_with(part.load_class(), config, tensors, dtype)
    if lacking:
        raise CheckpointError(
            f"{part.where}: expected the weights of a {part.class_name}; {len(lacking)} are missing or of another "
            f"shape, the first being {sorted(lacking)[0]}"
        )
    return module


def read_tensors(part: Component, dtype: torch.dtype) -> Tensors:
    """The component's tensors by their names less the prefix.

    8-bit floats, and 8-bit integers of which each row has a scale, are multiplied out to ``dtype``.
    """
    tensors: Tensors = {}
    for path in part.weights:
        entries = check_weights(path).entries
        names = [name for name in entries if name.startswith(part.prefix)]
        for name in names:
            if name.endswith(".weight_scale_2") or (name.endswith(".weight") and _is_packed(entries, name)):
                raise CheckpointError(
                    f"{path}: expected plain weights, 8-bit floats, or 8-bit integers and a scale of each row, found "
                    f"quantised {name}"
                )
        with safe_open(path, framework="pt") as file:
            for name in names:
                if name.endswith(_NO_WEIGHTS):
                    continue
                tensor = file.get_tensor(name)
                if name.endswith(".weight") and entries[name].dtype == "I8":
                    scale = file.get_tensor(_row_scale(name)).float()
                    tensor = (tensor * scale.reshape(-1, 1)).to(dtype)
                elif entries[name].dtype.startswith("F8"):
                    tensor = tensor.to(dtype)
                    stem = name.removesuffix(".weight")
                    for scale in (f"{stem}{end}" for end in _SCALES):
                        if scale in entries:
                            tensor *= file.get_tensor(scale).to(dtype)
                tensors[name.removeprefix(part.prefix)] = tensor
    return tensors


def _is_packed(entries: Mapping[str, TensorEntry], name: str) -> bool:
    """Whether it is neither floats nor rows of integers: four bits of two values in a byte, or blocks with scales."""
    weight, scale = entries[name], entries.get(_row_scale(name))
    if weight.dtype == "I8" and len(weight.shape) == 2 and scale is not None:
        return not scale.dtype.startswith(("F", "BF")) or scale.shape not in (weight.shape[:1], (*weight.shape[:1], 1))
    return weight.dtype in ("U8", "I8")


def _row_scale(name: str) -> str:
    return f"{name.removesuffix('.weight')}.weight_scale"


# --- layouts: each converter takes the tensors without prefix, and the configuration of the class ---


def _utilities() -> Any:
    return importlib.import_module("diffusers.loaders.single_file_utils")


def _as_is(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    return tensors


def _ldm_unet(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    named = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    converted = _utilities().convert_ldm_unet_checkpoint(named, config)
    if "time_embed.cond_proj.weight" in tensors:  # of a latent consistency model; diffusers' converter drops it
        converted["time_embedding.cond_proj.weight"] = tensors["time_embed.cond_proj.weight"]
    return converted


def _ldm_vae(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    within = {"encoder.quant_conv.": "quant_conv.", "decoder.post_quant_conv.": "post_quant_conv."}
    for old, new in within.items():  # FLUX.2 keeps them there
        for name in [name for name in tensors if name.startswith(old)]:
            tensors[new + name.removeprefix(old)] = tensors.pop(name)
    converted = _utilities().convert_ldm_vae_checkpoint(tensors, config)
    return converted | {name: tensor for name, tensor in tensors.items() if name.startswith("bn.")}


def _wan_vae(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    return _utilities().convert_wan_vae_to_diffusers(tensors)


def _clip(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    if "text_projection.weight" not in tensors and config["projection_dim"] == config["hidden_size"]:
        # Stable Diffusion 3's files leave it out, since it is the identity there.
        tensors["text_projection.weight"] = torch.eye(config["hidden_size"])
    return tensors


def _open_clip(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    # Stable Diffusion 2 hears the last layer but one, and its configuration ends there.
    layers = config["num_hidden_layers"]
    kept = {
        f"clip.{name}": tensor
        for name, tensor in tensors.items()
        if not name.startswith("transformer.resblocks.") or int(name.split(".")[2]) < layers
    }
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
    return _utilities().convert_open_clip_checkpoint(model, kept, prefix="clip.")


def _sd3(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    return _utilities().convert_sd3_transformer_checkpoint_to_diffusers(tensors)


def _flux(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    return _utilities().convert_flux_transformer_checkpoint_to_diffusers(tensors)


def _flux2(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    return _utilities().convert_flux2_transformer_checkpoint_to_diffusers(tensors)


def _pixart(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    return pixart_names.to_diffusers(tensors)


def _z_image(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    return _utilities().convert_z_image_transformer_checkpoint_to_diffusers(tensors)


CONVERTERS: dict[str, Callable[[Tensors, dict[str, Any]], Tensors]] = {
    "as_is": _as_is,
    "clip": _clip,
    "diffusers_flux": _as_is,
    "diffusers_pixart": _as_is,
    "diffusers_unet": _as_is,
    "flux": _flux,
    "flux2": _flux2,
    "ldm_unet": _ldm_unet,
    "ldm_vae": _ldm_vae,
    "open_clip": _open_clip,
    "pixart": _pixart,
    "qwen_image": _as_is,
    "sd3": _sd3,
    "wan_vae": _wan_vae,
    "z_image": _z_image,
}


# --- modules ---


def _transformers(cls: Any, config: dict[str, Any], tensors: Tensors, dtype: torch.dtype) -> tuple[Any, list[str]]:
    module, report = cls.from_pretrained(
        None,
        config=cls.config_class.from_dict(config),
        state_dict=tensors,
        output_loading_info=True,
        dtype=dtype,
    )
    return module, [*map(str, report["missing_keys"]), *map(str, report["mismatched_keys"])]


def _diffusers(cls: Any, config: dict[str, Any], tensors: Tensors, dtype: torch.dtype) -> tuple[Any, list[str]]:
    with _parameters_without_memory():
        module = cls.from_config(config)
    if hasattr(module, "_fix_state_dict_keys_on_load"):  # the names that older versions gave to attention
        module._fix_state_dict_keys_on_load(tensors)
    as_float32 = tuple(cls._keep_in_fp32_modules or ()) if dtype == torch.float16 else ()
    wanted = module.state_dict()
    given: Tensors = {}
    for name in list(tensors):  # popped one by one, so that no more than one is held twice
        tensor = tensors.pop(name)
        if name in wanted and tensor.shape == wanted[name].shape:
            exact = any(part in name.split(".") for part in as_float32)
            given[name] = tensor.to(torch.float32 if exact else dtype) if tensor.is_floating_point() else tensor
    lacking = [name for name in wanted if name not in given]
    if not lacking:
        module.load_state_dict(given, assign=True)
        for name, table in module.named_buffers():  # those that are no part of a file
            if name not in given and table.is_floating_point():
                table.data = table.to(dtype)
    return module, lacking


class _EmptyOnMeta(TorchFunctionMode):
    """What layers make their weights with: it would ask for memory, though none of it is ever touched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.empty and (kwargs or {}).get("device") is None:
            kwargs = {**(kwargs or {}), "device": "meta"}
        return func(*args, **(kwargs or {}))


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Modules made by this thread have parameters on the meta device, but real buffers, which may be computed tables.

    torch.device("meta") would leave those empty for good.
    """
    thread = threading.get_ident()

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None  # registered as it is
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(on_meta)  # pyright: ignore[reportArgumentType]
    try:
        with _EmptyOnMeta():
            yield
    finally:
        handle.remove()
