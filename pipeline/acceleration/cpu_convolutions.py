"""The same convolutions with less work or traffic, for a CPU in float32. What comes out differs by rounding alone.

Upsampling: a 3x3 convolution of a picture whose pixels were doubled reads each of them several times. Row by row, two
of its three weights meet the same pixel and may be added first; so each of the four pixels that one becomes is a 2x2
convolution of the small picture, with 4 of 9 multiplications (the sub-pixel view of arXiv 1609.05158, section 2.2).

Small planes: for each call oneDNN lays the weights out anew, which takes longer than to convolve a few pixels with
them. There the pixels are gathered and multiplied by the weights as they lie (im2col, Chellapilla et al. 2006).
"""

import functools
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SUMMED = "_quarters"  # the attribute of a layer where it keeps the weights that it added up
_MOST_PIXELS = 128  # of a batch's output planes together, up to which gathering them is cheaper
_FEWEST_WEIGHTS = 2**22  # 16 MB: those below fit a processor's cache, and laying them out costs little
_FEWEST_DOUBLED = 2**19  # weights of a doubling's convolution, below which there is nothing to gain
_FEWEST_PIXELS = 1024  # of a plane that is doubled, below which adding up the weights costs what it saves

# Seen to have no convolution of either kind, so that small models are not walked through in every run.
_as_they_are: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def fitted_to_cpu(module: Any) -> Any:
    """A view of a UNet or decoder whose convolutions suit a CPU, around the very same parameters; else the module.

    The view is for one run: weights that it has added up live as long as it does.
    """
    if module in _as_they_are or next(module.parameters()).device.type != "cpu":
        return module
    view = _fitted(module, {})
    if view is module:
        _as_they_are.add(module)
    return view


def _fitted(module: nn.Module, seen: dict[int, nn.Module]) -> nn.Module:
    if id(module) in seen:
        return seen[id(module)]
    parts = {name: part if part is None else _fitted(part, seen) for name, part in module._modules.items()}
    kind = _kind_for(module)
    if kind is None and all(part is module._modules[name] for name, part in parts.items()):
        view = module
    else:
        view = object.__new__(kind or type(module))
        view.__dict__.update(vars(module))
        view.__dict__["_modules"] = parts
    seen[id(module)] = view
    return view


def _kind_for(module: nn.Module) -> type[nn.Module] | None:
    if type(module) is nn.Conv2d and _is_plain(module) and module.weight.numel() >= _FEWEST_WEIGHTS:
        return _GatheringConv2d
    if type(module).__name__ == "Upsample2D" and type(module).__module__ == "diffusers.models.upsampling":
        convolution: Any = getattr(module, "conv", None)
        plain = type(convolution) is nn.Conv2d and _is_plain(convolution) and convolution.kernel_size == (3, 3)
        large = plain and convolution.weight.numel() >= _FEWEST_DOUBLED
        if large and module.interpolate and module.norm is None and convolution.padding == (1, 1):
            return _doubling(type(module))
    return None


def _is_plain(convolution: nn.Conv2d) -> bool:
    weight = convolution.weight
    return (
        type(weight) is nn.Parameter
        and weight.dtype == torch.float32
        and weight.is_contiguous()
        and convolution.groups == 1
        and convolution.padding_mode == "zeros"
        and not isinstance(convolution.padding, str)
    )


class _GatheringConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        paddings: Any = self.padding  # numbers, as _is_plain has seen
        settings = zip(input.shape[-2:], paddings, self.dilation, self.kernel_size, self.stride, strict=True)
        sides = [
            (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for side, padding, dilation, kernel, stride in settings
        ]
        count = input.shape[0]
        if input.ndim != 4 or count * sides[0] * sides[1] > _MOST_PIXELS:
            return super().forward(input)
        gathered = F.unfold(input, self.kernel_size, self.dilation, paddings, self.stride)
        columns = gathered[0] if count == 1 else gathered.transpose(0, 1).flatten(1)
        weight = self.weight.flatten(1)
        made = weight @ columns if self.bias is None else torch.addmm(self.bias[:, None], weight, columns)
        return made.view(-1, count, *sides).transpose(0, 1)


@functools.cache
def _doubling(kind: Any) -> Any:
    """diffusers' Upsample2D, which is not imported before it is there, with the convolution drawn into the doubling."""

    class DoublingUpsample2D(kind):
        def forward(self, hidden_states: Tensor, output_size: Any = None, *others: Any, **options: Any) -> Tensor:
            hooked = self.conv._forward_hooks or self.conv._forward_pre_hooks
            small = hidden_states.shape[0] * hidden_states.shape[-2] * hidden_states.shape[-1] < _FEWEST_PIXELS
            # Another size, or a LoRA that has to hear the convolution.
            if small or output_size is not None or hooked:
                return super().forward(hidden_states, output_size, *others, **options)
            if SUMMED not in self.__dict__:
                self.__dict__[SUMMED] = quarters(self.conv.weight)
            return doubled_convolution(hidden_states, self.__dict__[SUMMED], self.conv.bias)

    return DoublingUpsample2D


def quarters(weight: Tensor) -> list[Tensor]:
    """(O, I, 3, 3) -> four of (O, I, 2, 2): for the upper left, upper right, lower left and lower right pixel."""
    upper = torch.stack([weight[:, :, 0], weight[:, :, 1] + weight[:, :, 2]], dim=2)
    lower = torch.stack([weight[:, :, 0] + weight[:, :, 1], weight[:, :, 2]], dim=2)
    found = []
    for half in (upper, lower):
        left = torch.stack([half[..., 0], half[..., 1] + half[..., 2]], dim=-1)
        right = torch.stack([half[..., 0] + half[..., 1], half[..., 2]], dim=-1)
        found += [left, right]
    return found


def doubled_convolution(pixels: Tensor, weights: list[Tensor], bias: Tensor | None) -> Tensor:
    """(B, I, H, W) -> (B, O, 2H, 2W): the 3x3 convolution, padded by one, of the pixels doubled either way."""
    count, _, height, width = pixels.shape
    made = pixels.new_empty(count, weights[0].shape[0], 2 * height, 2 * width)
    padded = F.pad(pixels, (1, 1, 1, 1))
    for number, weight in enumerate(weights):
        row, column = divmod(number, 2)
        seen = padded[:, :, row : row + height + 1, column : column + width + 1]
        made[:, :, row::2, column::2] = F.conv2d(seen, weight, bias)
    return made
