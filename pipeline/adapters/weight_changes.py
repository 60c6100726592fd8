"""In which forms a small file holds the change of a large weight, and what each adds to what a layer gives.

The parts have the names of LyCORIS (arXiv 2309.14859); r is the rank.

LoRA   lora_up (out, r), lora_down (r, in): their product (arXiv 2106.09685); lora_mid (r, r, kh, kw) between both
LoHa   hada_w1_a (out, r) hada_w1_b (r, in), and the same of w2: two products, multiplied value by value (arXiv
       2108.06098)
LoKr   lokr_w1 (a, b), lokr_w2 (c, d): their Kronecker product, (a c, b d); each whole, or itself a product of _a and _b
DoRA   dora_scale beside any of them: the length of each row, or column, of the changed weight (arXiv 2402.09353)

Where there is a core, hada_t1, hada_t2 or lokr_t2 (r, r, kh, kw), the left side of its product lies as (r, out).
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Parts = Mapping[str, Tensor]

LORA, LOHA, LOKR, DORA = "lora_", "hada_", "lokr_", "dora_scale"


def matrix(parts: Parts) -> Tensor:
    """The change as (out, in * kernel). Raises RuntimeError or KeyError for parts that do not belong together."""
    if _is(LOKR, parts):
        return torch.kron(_side(parts, "lokr_w1"), _side(parts, "lokr_w2").flatten(1))
    if _is(LOHA, parts):
        return (_side(parts, "hada_w1") * _side(parts, "hada_w2")).flatten(1)
    down = parts["lora_down"]
    if "lora_mid" in parts:
        down = torch.einsum("orhw,ri->oihw", parts["lora_mid"], down.flatten(1))
    return parts["lora_up"].flatten(1) @ down.flatten(1)


def rank_of(parts: Parts) -> int | None:
    """By which alpha is divided; None for a Kronecker product of whole matrices, which has none."""
    right = ("lora_down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
    return next((parts[name].shape[0] for name in right if name in parts), None)


class WeightChange(nn.Module):
    """What a file adds to one layer: ``scale`` times its matrix, of which never more is held than the file has."""

    def __init__(self, parts: Parts, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale = scale
        for name, part in parts.items():
            self.register_parameter(name, nn.Parameter(part.to(dtype).clone(), requires_grad=False))

    def lay_over(self, module: nn.Module, strength: float) -> None:
        """On a Linear or a Conv2d of a run's own view."""
        parts = dict(self.named_parameters())
        if parts.keys() == {"lora_down", "lora_up"}:  # by far the most, and in a form that a compiler reads well
            hook = partial(_add_lora, parts["lora_down"], parts["lora_up"], self.scale * strength)
        elif DORA in parts:
            hook = partial(_add_with_lengths, parts, self.scale, strength, {})
        else:
            hook = partial(_add, parts, self.scale * strength)
        module.register_forward_hook(hook)


def _is(kind: str, parts: Iterable[str]) -> bool:
    return any(name.startswith(kind) for name in parts)


def _side(parts: Parts, name: str) -> Tensor:
    """One factor of a LoHa or a LoKr, whole."""
    if name in parts:
        return parts[name]
    left, right = parts[f"{name}_a"], parts[f"{name}_b"]
    core = parts.get(name.replace("_w", "_t"))
    return left @ right if core is None else torch.einsum("ijhw,ip,jr->prhw", core, left, right)


def _add_lora(
    down: Tensor, up: Tensor, scale: float, module: Any, inputs: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    """A hook after the layer: output + scale * up(down(input))."""
    seen = inputs[0].to(down.dtype)
    rank = down.shape[0]
    if isinstance(module, nn.Conv2d):
        narrow = _convolved(module, seen, down.reshape(rank, *module.weight.shape[1:]))
        added = F.conv2d(narrow, up.reshape(-1, rank, 1, 1))
    else:
        added = F.linear(F.linear(seen, down.flatten(1)), up.flatten(1))
    return output + scale * added.to(output.dtype)


def _add(parts: Parts, scale: float, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + scale * _change(parts, module, inputs[0]).to(output.dtype)


def _add_with_lengths(
    parts: Parts,
    scale: float,
    strength: float,
    known: dict[str, Any],
    module: Any,
    inputs: tuple[Tensor, ...],
    output: Tensor,
) -> Tensor:
    """DoRA, W' = magnitude * (W + change) / |W + change|, ``strength`` of the way from W to W'.

    known: what the lengths are multiplied by, computed at the first of a run's calls.
    """
    if not known:
        known["gain"], known["by_row"] = _gain(parts, scale, module.weight)
    gain, seen = known["gain"].to(output.dtype), inputs[0]
    is_conv = isinstance(module, nn.Conv2d)
    across = gain.reshape(-1, 1, 1) if is_conv else gain
    if known["by_row"]:
        bias = 0 if module.bias is None else module.bias.reshape(-1, 1, 1) if is_conv else module.bias
        changed = across * (output - bias + scale * _change(parts, module, seen).to(output.dtype)) + bias
        return output + strength * (changed - output)
    longer = seen * across.to(seen.dtype)
    further = longer - seen
    base = _convolved(module, further, module.weight) if is_conv else F.linear(further, module.weight)
    return output + strength * (base + scale * _change(parts, module, longer)).to(output.dtype)


def _gain(parts: Parts, scale: float, weight: Tensor) -> tuple[Tensor, bool]:
    """(out,) where each row has a length, which is so unless the file's lengths lie beside each other; else (in,)."""
    magnitude = parts[DORA].float()
    rows = weight.float().flatten(1) + scale * matrix({name: part.float() for name, part in parts.items()})
    by_row = magnitude.ndim == 1 or magnitude.shape[0] == weight.shape[0]
    length = rows.norm(dim=1) if by_row else rows.unflatten(1, (weight.shape[1], -1)).norm(dim=(0, 2))
    return magnitude.flatten() / length.clamp(min=1e-12), by_row


def _change(parts: Parts, module: Any, seen: Tensor) -> Tensor:
    """What the change alone makes of the layer's input."""
    dtype = next(iter(parts.values())).dtype
    seen, is_conv = seen.to(dtype), isinstance(module, nn.Conv2d)
    if _is(LOKR, parts):
        return _kronecker(_side(parts, "lokr_w1"), _side(parts, "lokr_w2"), module if is_conv else None, seen)
    # A product of values is no product of matrices: there is no way around the whole, and making it costs less than
    # one layer does on some hundred tokens.
    weight = matrix(parts).reshape(module.weight.shape)
    return _convolved(module, seen, weight) if is_conv else F.linear(seen, weight)


def _kronecker(left: Tensor, right: Tensor, conv: nn.Conv2d | None, seen: Tensor) -> Tensor:
    """(left x right) seen, by each factor alone: (a, b) and (c, d) of an input of b d channels."""
    groups = left.shape[1]
    if conv is None:
        within = F.linear(seen.unflatten(-1, (groups, -1)), right)
        return (left @ within).flatten(-2)
    right = right.reshape(right.shape[0], -1, *conv.kernel_size)
    within = _convolved(conv, seen.unflatten(1, (groups, -1)).flatten(0, 1), right).unflatten(0, (-1, groups))
    return torch.einsum("ab,nbchw->nachw", left, within).flatten(1, 2)


def _convolved(module: nn.Conv2d, seen: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(seen, weight, stride=module.stride, padding=module.padding, dilation=module.dilation)
