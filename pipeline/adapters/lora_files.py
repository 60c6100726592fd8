"""What a LoRA file holds: for which family it was made, and its layers by the names of diffusers' modules."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..files.safetensors_files import CheckpointError
from .weight_changes import DORA, LOHA, LOKR, Parts, matrix, rank_of

Shapes = Mapping[str, tuple[int, ...]]

_UNET, _FLUX, _FLUX2, _SD3 = (
    "UNet2DConditionModel",
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "SD3Transformer2DModel",
)
_IN_ONE_ROW = frozenset(
    {"HunyuanDiT2DModel", "PixArtTransformer2DModel", "SanaTransformer2DModel", "Transformer2DModel"}
)
UNETS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}
# What is stored by methods that change a weight in other ways than ``weight_changes`` knows.
_OTHER_METHODS = {"oft_": "OFT", "lora_controlnet": "Control-LoRA"}
# What lies beside the two factors of a LoRA, or in their place.
_OTHER_PARTS = re.compile(
    r"(?P<stem>.+?)\.(?P<part>hada_[wt][12](_[ab])?|lokr_[wt][12](_[ab])?|lora_mid|dora_scale|lora_magnitude_vector)"
    r"(\.default)?(\.weight)?"
)
_DOWN = (".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight", ".lora.down.weight", "_lora.down.weight")
_UP = (".lora_up.weight", ".lora_B.weight", ".lora_B.default.weight", ".lora.up.weight", "_lora.up.weight")
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class MadeFor:
    """name: of the family; denoisers: classes it may be of; width: of the words its cross-attention hears, if told."""

    name: str
    denoisers: frozenset[str]
    width: int | None = None


@dataclass(frozen=True)
class Layer:
    """What a file adds to one layer: ``scale`` times what ``weight_changes`` makes of its parts.

    component, path: where the module is, as diffusers and transformers name it.
    """

    component: str
    path: str
    parts: Parts
    scale: float


def refuse_other_methods(name: str, keys: Iterable[str]) -> None:
    for key in keys:
        for mark, method in _OTHER_METHODS.items():
            if mark in key:
                raise CheckpointError(f"{name}: expected a LoRA, LoHa, LoKr or DoRA, found {method} ({key})")


def made_for(shapes: Shapes) -> MadeFor | None:
    """Told by names, and by widths where the names are those of several families; None where neither tells."""
    shapes = {name: tuple(part.shape) for name, part in gathered(stand_ins(shapes))[0].items()}
    names = [key.replace(".", "_") for key in shapes]

    def has(*parts: str) -> bool:
        return any(part in name for name in names for part in parts)

    if has("noise_refiner", "context_refiner"):
        return MadeFor("Z-Image", frozenset({"ZImageTransformer2DModel"}))
    if has("down_blocks_", "up_blocks_", "mid_block_", "input_blocks_", "output_blocks_", "middle_block_"):
        width = next((shape[1] for key, shape in shapes.items() if _hears_words(key, shape)), None)
        return MadeFor(UNETS.get(width or 0, "Stable Diffusion"), frozenset({_UNET}), width)
    if has("img_mlp_net", "txt_mlp_net", "img_mod_1"):
        return MadeFor("Qwen-Image", frozenset({"QwenImageTransformer2DModel"}))
    if has("joint_blocks_"):
        return MadeFor("Stable Diffusion 3", frozenset({_SD3}))
    if has("stream_modulation", "to_qkv_mlp_proj", "ff_linear_in"):
        return MadeFor("FLUX.2", frozenset({_FLUX2}))
    if has("double_blocks_", "single_blocks_"):
        return _flux_by_width(shapes)
    if has("single_transformer_blocks_"):
        if has("proj_mlp", "norm1_linear", "ff_net"):
            return MadeFor("FLUX.1", frozenset({_FLUX}))
        return MadeFor("FLUX", frozenset({_FLUX, _FLUX2}))
    if has("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
        joint = frozenset({_FLUX, _FLUX2, _SD3, "QwenImageTransformer2DModel"})
        return MadeFor("FLUX, Qwen-Image or Stable Diffusion 3", joint)
    if has("blocks_0_attn2"):
        return MadeFor("Sana, PixArt or HunyuanDiT", _IN_ONE_ROW)
    return None


def _hears_words(key: str, shape: tuple[int, ...]) -> bool:
    return bool(re.search(r"attn2[._](processor[._])?to_[kv]", key)) and key.endswith(_DOWN) and len(shape) > 1


def _flux_by_width(shapes: Shapes) -> MadeFor:
    """The gated layers of FLUX.2 are 6 and 9 times as wide as what enters them, where FLUX.1's are 4 and 7 times."""
    for key, shape in shapes.items():
        if re.search(r"(img_mlp[._]0|linear1)\.", key) and key.endswith(_DOWN):
            up = shapes.get(key.replace("lora_down", "lora_up").replace("lora_A", "lora_B"), shape)
            gated = up[0] in (6 * shape[1], 9 * shape[1])
            return MadeFor("FLUX.2", frozenset({_FLUX2})) if gated else MadeFor("FLUX.1", frozenset({_FLUX}))
    return MadeFor("FLUX", frozenset({_FLUX, _FLUX2}))


def stand_ins(shapes: Shapes) -> dict[str, Tensor]:
    """Zeros that take no memory in place of a file's tensors: by them its names are converted before it is read."""
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


def gathered(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, "_Others"]]:
    """A file as if it were all LoRA, by whose names converters know layers; and what lies elsewhere, by stem.

    A layer of another method is stood for by two factors of rank 1, of no memory.
    """
    kept, others = {}, {}
    for name, tensor in tensors.items():
        match = _OTHER_PARTS.fullmatch(name)
        if match is None:
            kept[name] = tensor
        else:
            part = DORA if match["part"] == "lora_magnitude_vector" else match["part"]
            others.setdefault(match["stem"], _Others({})).parts[part] = tensor
    for stem, found in others.items():
        if any(name.startswith((LOHA, LOKR)) for name in found.parts):
            found.is_whole = True
            alpha, rank = kept.pop(f"{stem}.alpha", None), rank_of(found.parts)
            # A stand-in is zero, and of it only the shape is asked.
            found.scale = 1.0 if alpha is None or rank is None else alpha.float().reshape(-1)[0].item() / rank
            rows, columns = matrix({name: part.to("meta") for name, part in found.parts.items()}).shape
            nothing = torch.zeros(())
            kept[f"{stem}.lora_down.weight"] = nothing.expand(1, columns)
            kept[f"{stem}.lora_up.weight"] = nothing.expand(rows, 1)
    return kept, others


@dataclass
class _Others:
    """parts: those that are no factors of a LoRA; is_whole: there are no others in this layer."""

    parts: dict[str, Tensor]
    is_whole: bool = False
    scale: float = 1.0


def layers_of(
    name: str,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    *,
    pipeline: Any,
    layers_per_block: int,
    denoiser: str,
    components: Iterable[str],
) -> tuple[list[Layer], list[str]]:
    """The layers of the file ``name``, and the names in it that belong to none.

    settings: what diffusers writes of a LoRA into a file's metadata. pipeline: the family's class in diffusers, which
    knows the layouts that its users have, such as Kohya's; layers_per_block: of its denoiser, by which Kohya's blocks
    are counted. Raises ValueError, KeyError and the like for a layout that it does not know; CheckpointError for
    another method on a layer that is in several pieces here, since only a LoRA can be taken apart.
    """
    convert = getattr(pipeline, "lora_state_dict", None)
    as_lora, others = gathered(tensors)
    named = prepared = _with_alphas_in(as_lora)
    # Converters rename a factor and hand it on, or take it apart.
    beside = {id(prepared[stem + up]): stem for stem in others for up in _UP if stem + up in prepared}
    if convert is not None:
        found = convert(dict(named), unet_config=SimpleNamespace(layers_per_block=layers_per_block))
        named = found[0] if isinstance(found, tuple) else found
    sides: dict[tuple[str, str], dict[str, Tensor]] = {}
    left = []
    for component, keys in _by_component(named, denoiser, components).items():
        for key, tensor in _as_peft(keys, is_text=component != denoiser).items():
            match = _FACTOR.fullmatch(key)
            if match is None:
                if not key.endswith(".alpha"):
                    left.append(key)
                continue
            sides.setdefault((component, match[1]), {})[match[2]] = tensor
    layers = []
    for (component, path), pair in sides.items():
        if pair.keys() != {"A", "B"} or pair["A"].ndim < 2 or pair["B"].ndim < 2:
            left.append(path)
            continue
        other = others.pop(beside.get(id(pair["B"]), ""), _Others({}))
        if other.is_whole:
            layers.append(Layer(component, path, other.parts, other.scale))
            continue
        scale = _scale(settings, component, path, pair["A"].shape[0])
        parts = {"lora_down": pair["A"], "lora_up": pair["B"], **other.parts}
        layers.append(Layer(component, path, parts, scale))
    if others:
        stem, other = next(iter(others.items()))
        raise CheckpointError(
            f"{name}: expected each layer that is no plain LoRA to be one of the model, found "
            f"{next(iter(other.parts))} of {stem}, which is in several pieces there or has no factors"
        )
    return layers, left


def _with_alphas_in(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each alpha multiplied into its layer and then set to the rank, so that no converter has anything to scale."""
    found = dict(tensors)
    for key in [key for key in tensors if key.endswith(".alpha")]:
        stem = key.removesuffix(".alpha")
        for down, up in zip(_DOWN, _UP, strict=True):
            if stem + down in found and stem + up in found:
                rank = found[stem + down].shape[0]
                scale = tensors[key].float().reshape(-1)[0].item() / rank
                if scale and scale != 1:  # zero: a stand-in, of which only the name and the shape are asked
                    found[stem + up] = found[stem + up] * scale
                found[key] = torch.tensor(float(rank))
    return found


def _by_component(
    named: Mapping[str, Tensor], denoiser: str, components: Iterable[str]
) -> dict[str, dict[str, Tensor]]:
    known, found = set(components), {}
    for key, tensor in named.items():
        key = key.removeprefix("base_model.model.")
        first, _, rest = key.partition(".")
        if first in ("unet", "transformer", "diffusion_model"):
            first = denoiser
        elif first not in known:
            first, rest = denoiser, key
        found.setdefault(first, {})[rest] = tensor
    return found


def _as_peft(keys: dict[str, Tensor], *, is_text: bool) -> dict[str, Tensor]:
    """diffusers has named the factors in three ways; here lora_A and lora_B."""
    from diffusers.utils.state_dict_utils import (
        StateDictType,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    if not is_text:
        return convert_unet_state_dict_to_peft(keys)
    for written in (StateDictType.DIFFUSERS_OLD, StateDictType.DIFFUSERS):
        keys = convert_state_dict_to_peft(keys, original_type=written)
    return keys


def _scale(settings: Mapping[str, Any], component: str, path: str, rank: int) -> float:
    alphas = settings.get(f"{component}.alpha_pattern") or {}
    alpha = alphas.get(path, settings.get(f"{component}.lora_alpha", rank)) if isinstance(alphas, dict) else rank
    return float(alpha) / rank if isinstance(alpha, int | float) else 1.0
