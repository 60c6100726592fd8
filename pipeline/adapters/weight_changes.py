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
            # Lengths hardly differ from those that were: what is left of them in half precision is mostly rounding.
            kept = part.to(torch.float32 if name == DORA else dtype)
            self.register_parameter(name, nn.Parameter(kept.clone(), requires_grad=False))

    def lay_over(self, module: nn.Module, strength: float) -> None:
        """On a Linear or a Conv2d of a run's own view."""
        parts = dict(self.named_parameters())
        if parts.keys() == {"lora_down", "lora_up"}:  # by far the most, and in a form that a compiler reads well
            hook = partial(_add_lora, parts["lora_down"], parts["lora_up"], self.scale * strength)
        elif DORA in parts:
            lengths = _lengthened(parts, self.scale, module)
            hook = partial(_add_with_lengths, parts, *lengths, self.scale, strength)
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
    return output + scale * _narrowed(down, up, module, inputs[0].to(down.dtype)).to(output.dtype)


def _add(parts: Parts, scale: float, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + scale * _change(parts, module, inputs[0]).to(output.dtype)


def _add_with_lengths(
    parts: Parts,
    longer: Tensor,
    by_row: bool,
    scale: float,
    strength: float,
    module: Any,
    inputs: tuple[Tensor, ...],
    output: Tensor,
) -> Tensor:
    """DoRA, W' = magnitude * (W + change) / |W + change|, ``strength`` of the way from W to W'.

    longer: magnitude / |W + change| - 1. What other adapters made of the output stays as it is.
    """
    seen = inputs[0]
    further = longer.reshape(-1, 1, 1) if isinstance(module, nn.Conv2d) else longer
    further = further.to(seen.dtype)
    if by_row:
        change = scale * _change(parts, module, seen).to(seen.dtype)
        added = further * (_applied(module, seen, module.weight) + change) + change
    else:
        added = _applied(module, further * seen, module.weight)
        added = added + scale * _change(parts, module, seen + further * seen).to(added.dtype)
    return output + strength * added.to(output.dtype)


def _lengthened(parts: Parts, scale: float, module: Any) -> tuple[Tensor, bool]:
    """What each row is to be longer by, as a share of itself, or each column; and which of the two it is."""
    weight = module.weight
    weight = weight.dequantize() if type(weight).__module__.startswith("torchao") else weight
    lengths = parts[DORA].to(weight.device)
    changed = weight.float().flatten(1) + scale * matrix(
        {name: part.to(weight.device, torch.float32) for name, part in parts.items()}
    )
    by_row = lengths_by_row(lengths, weight.shape[0])
    norms = changed.norm(dim=1) if by_row else changed.unflatten(1, (weight.shape[1], -1)).norm(dim=(0, 2))
    return lengths.flatten() / norms.clamp(min=1e-12) - 1, by_row


def lengths_by_row(lengths: Tensor, rows: int) -> bool:
    """Whether ``dora_scale`` is of rows: one dimension, or the first of them as long as there are rows."""
    return lengths.ndim == 1 or lengths.shape[0] == rows


def _change(parts: Parts, module: Any, seen: Tensor) -> Tensor:
    """What the change alone makes of the layer's input."""
    seen = seen.to(next(part.dtype for name, part in parts.items() if name != DORA))
    if _is(LOKR, parts):
        conv = module if isinstance(module, nn.Conv2d) else None
        return _kronecker(_side(parts, "lokr_w1"), _side(parts, "lokr_w2"), conv, seen)
    if "lora_down" in parts and "lora_mid" not in parts:
        return _narrowed(parts["lora_down"], parts["lora_up"], module, seen)
    # A product of values is no product of matrices: there is no way around the whole, and making it costs less than
    # one layer does on some hundred tokens. Cores are rare.
    return _applied(module, seen, matrix(parts).reshape(module.weight.shape))


def _narrowed(down: Tensor, up: Tensor, module: Any, seen: Tensor) -> Tensor:
    rank = down.shape[0]
    if isinstance(module, nn.Conv2d):
        return F.conv2d(
            _applied(module, seen, down.reshape(rank, *module.weight.shape[1:])), up.reshape(-1, rank, 1, 1)
        )
    return F.linear(F.linear(seen, down.flatten(1)), up.flatten(1))


def _kronecker(left: Tensor, right: Tensor, conv: nn.Conv2d | None, seen: Tensor) -> Tensor:
    """(left x right) seen, by each factor alone: (a, b) and (c, d) of an input of b d channels."""
    groups = left.shape[1]
    if conv is None:
        within = F.linear(seen.unflatten(-1, (groups, -1)), right)
        return (left @ within).flatten(-2)
    right = right.reshape(right.shape[0], -1, *conv.kernel_size)
    within = _applied(conv, seen.unflatten(1, (groups, -1)).flatten(0, 1), right).unflatten(0, (-1, groups))
    return torch.einsum("ab,nbchw->nachw", left, within).flatten(1, 2)


def _applied(module: Any, seen: Tensor, weight: Tensor) -> Tensor:
    """``weight`` in place of the layer's own, without its bias."""
    if isinstance(module, nn.Conv2d):
        return F.conv2d(seen, weight, stride=module.stride, padding=module.padding, dilation=module.dilation)
    return F.linear(seen, weight)
