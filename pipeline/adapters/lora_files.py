"""What a LoRA file holds: for which family it was made, and its layers by the names of diffusers' modules."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..files.safetensors_files import CheckpointError

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
# What is stored beside or in place of the two factors of a LoRA (arXiv 2106.09685) by methods that are not one.
_OTHER_METHODS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_w1": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "lora_mid": "LoCon with a core tensor",
    "lora_controlnet": "Control-LoRA",
}
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
class Factors:
    """One layer: what it adds to a module's output is ``scale`` * up(down(input)). down: (r, in, ...), up: (out, r).

    component, path: where the module is, as diffusers and transformers name it.
    """

    component: str
    path: str
    down: Tensor
    up: Tensor
    scale: float


def refuse_other_methods(name: str, keys: Iterable[str]) -> None:
    for key in keys:
        for mark, method in _OTHER_METHODS.items():
            if mark in key:
                raise CheckpointError(f"{name}: expected a LoRA of two factors for each layer, found {method} ({key})")


def made_for(shapes: Shapes) -> MadeFor | None:
    """Told by names, and by widths where the names are those of several families; None where neither tells."""
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


def factors_of(
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    *,
    pipeline: Any,
    layers_per_block: int,
    denoiser: str,
    components: Iterable[str],
) -> tuple[list[Factors], list[str]]:
    """The layers of a file, and the names that belong to none.

    settings: what diffusers writes of a LoRA into a file's metadata. pipeline: the family's class in diffusers, which
    knows the layouts that its users have, such as Kohya's; layers_per_block: of its denoiser, by which Kohya's blocks
    are counted. Raises ValueError, KeyError and the like for a layout that it does not know.
    """
    convert = getattr(pipeline, "lora_state_dict", None)
    named: Mapping[str, Tensor] = _with_alphas_in(tensors)
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
    factors = []
    for (component, path), pair in sides.items():
        if pair.keys() != {"A", "B"} or pair["A"].ndim < 2 or pair["B"].ndim < 2:
            left.append(path)
            continue
        scale = _scale(settings, component, path, pair["A"].shape[0])
        factors.append(Factors(component, path, pair["A"], pair["B"], scale))
    return factors, left


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
