"""What a LoRA file holds: its layers by the names of diffusers' modules."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..files.safetensors_files import CheckpointError
from .weight_changes import DORA, Parts, matrix, rank_of

Shapes = Mapping[str, tuple[int, ...]]

# What is stored by methods that change a weight in other ways than ``weight_changes`` knows.
_OTHER_METHODS = {"oft_": "OFT", "lora_controlnet": "Control-LoRA"}
# Changes of norms, biases and whole weights, which some files hold beside their factors.
_NO_FACTORS = (".w_norm", ".b_norm", ".diff", ".diff_b")
# What lies beside the two factors of a LoRA, or in their place.
_OTHER_PARTS = re.compile(
    r"(?P<stem>.+?)\.(?P<part>hada_[wt][12](_[ab])?|lokr_[wt][12](_[ab])?|lora_mid|dora_scale|lora_magnitude_vector)"
    r"(\.default)?(\.weight)?"
)
DOWN = (
    ".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight", ".lora.down.weight", "_lora.down.weight",
    ".lora_linear_layer.down.weight",
)  # fmt: skip
_UP = (
    ".lora_up.weight", ".lora_B.weight", ".lora_B.default.weight", ".lora.up.weight", "_lora.up.weight",
    ".lora_linear_layer.up.weight",
)  # fmt: skip
# Before a module's name in diffusers, its dots made underscores: what SimpleTuner writes of LyCORIS, for any family.
FLAT = "lycoris_"
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class Layer:
    """What a file adds to one layer: ``scale`` times what ``weight_changes`` makes of its parts.

    component, path: where the module is, as diffusers and transformers name it; or FLAT and that, without dots.
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


def stand_ins(shapes: Shapes) -> dict[str, Tensor]:
    """Zeros that take no memory in place of a file's tensors: by them its names are converted before it is read."""
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


@dataclass(frozen=True)
class _Other:
    """A layer that is not two factors and no more. alpha: as the file has it; size: (out, in * kernel)."""

    stem: str
    parts: Parts
    alpha: Tensor | None
    size: tuple[int, int]

    def scale(self, as_lora: float) -> float:
        """as_lora: the scale of a LoRA of this layer without an alpha of its own."""
        rank = rank_of(self.parts)
        if self.alpha is not None and rank is not None:
            return self.alpha.float().reshape(-1)[0].item() / rank
        return as_lora if "lora_down" in self.parts else 1.0


def gathered(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[_Other], list[str]]:
    """A file as if it were all LoRA, by whose names converters know layers; the layers that are not; what is neither.

    Number i of the others is stood for by two factors of rank 1 and of no memory, whose values are 1 and i + 1:
    converters rename factors, multiply them by alpha / rank, which is 1 here, or take them apart, which shows in sizes.
    """
    kept, parts, left = {}, {}, []
    for name, tensor in tensors.items():
        if name.startswith(FLAT):  # PEFT's names for the factors are those that converters leave as they are
            name = name.replace(".lora_down.", ".lora_A.").replace(".lora_up.", ".lora_B.")
        match = _OTHER_PARTS.fullmatch(name)
        if name.endswith(_NO_FACTORS):
            left.append(name)
        elif match is None:
            kept[name] = tensor
        elif match["part"] == "lora_magnitude_vector":  # PEFT's are of rows, whatever their shape
            parts.setdefault(match["stem"], {})[DORA] = tensor.flatten()
        else:
            parts.setdefault(match["stem"], {})[match["part"]] = tensor
    others = []
    for stem, found in parts.items():
        dotted = "." in stem or stem.startswith(FLAT)
        names = (f"{stem}.lora_A.weight", f"{stem}.lora_B.weight") if dotted else (
            f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"
        )  # fmt: skip
        for down, up in zip(DOWN, _UP, strict=True):
            if stem + down in kept and stem + up in kept:
                names = stem + down, stem + up
                found |= {"lora_down": kept[names[0]], "lora_up": kept[names[1]]}
        rows, columns = matrix({name: part.to("meta") for name, part in found.items()}).shape
        alpha = kept.get(f"{stem}.alpha")
        others.append(_Other(stem, found, alpha, (rows, columns)))
        kept[names[0]] = torch.ones(()).expand(1, columns)
        kept[names[1]] = torch.tensor(float(len(others))).expand(rows, 1)
        if alpha is not None:
            kept[f"{stem}.alpha"] = torch.tensor(1.0)
    return kept, others, left


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
    as_lora, others, left = gathered(tensors)
    named: Mapping[str, Tensor] = _with_alphas_in(as_lora)
    if convert is not None:
        found = convert(dict(named), unet_config=SimpleNamespace(layers_per_block=layers_per_block))
        named = found[0] if isinstance(found, tuple) else found
    sides: dict[tuple[str, str], dict[str, Tensor]] = {}
    for component, keys in _by_component(named, denoiser, components).items():
        for key, tensor in _as_peft(keys, is_text=component != denoiser).items():
            match = _FACTOR.fullmatch(key)
            if match is None:
                if not key.endswith(".alpha"):
                    left.append(key)
                continue
            sides.setdefault((component, match[1]), {})[match[2]] = tensor
    layers, waiting = [], {float(number): other for number, other in enumerate(others, start=1)}
    for (component, path), pair in sides.items():
        if pair.keys() != {"A", "B"} or pair["A"].ndim < 2 or pair["B"].ndim < 2:
            left.append(path)
            continue
        scale = _scale(settings, component, path, pair["A"].shape[0])
        parts: Parts = {"lora_down": pair["A"], "lora_up": pair["B"]}
        if waiting and (other := _stood_for(pair, waiting)) is not None:
            rank = rank_of(other.parts) or 1
            scale, parts = other.scale(_scale(settings, component, path, rank)), other.parts
        layers.append(Layer(component, path, parts, scale))
    if waiting:
        other = next(iter(waiting.values()))
        raise CheckpointError(
            f"{name}: expected each layer that is no plain LoRA to be one of the model, found "
            f"{next(iter(other.parts))} of {other.stem}, which is in several pieces there"
        )
    return layers, left


def _stood_for(pair: Mapping[str, Tensor], waiting: dict[float, _Other]) -> _Other | None:
    """The layer in whose place these two factors were converted, no longer waiting; None where they are a LoRA's own.

    Those are no constants but by a rare chance, and where they are, of a rank or a size of their own.
    """
    down, up = pair["A"].flatten(1), pair["B"].flatten(1)
    if down.shape[0] != 1 or bool((down != 1).any()):
        return None
    number = float(up[0, 0])
    other = waiting.get(number)
    if other is None or other.size != (up.shape[0], down.shape[1]) or bool((up != number).any()):
        return None
    return waiting.pop(number)


def _with_alphas_in(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each alpha multiplied into its layer and then set to the rank, so that no converter has anything to scale."""
    found = dict(tensors)
    for key in [key for key in tensors if key.endswith(".alpha")]:
        stem = key.removesuffix(".alpha")
        for down, up in zip(DOWN, _UP, strict=True):
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
