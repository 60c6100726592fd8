"""Rounding a fusion network's weights to 8 bits, each layer making up for what its own rounding does.

Rounded one by one, weights err independently of what they are multiplied with. GPTQ (Frantar et al., arXiv 2210.17323,
algorithm 1) rounds a layer column by column and lets those that are not yet rounded take over the error, by the second
moments of what the layer is asked.
"""

import torch
from torch import Tensor, nn

from ..fusing.fusion_network import FusionNetwork

EIGHT_BITS = torch.float8_e4m3fn
DAMPING = 0.01  # of the mean of the moments' diagonal: inputs that hardly vary would make their inverse explode
BLOCK = 128  # columns, behind which the rest of a layer is brought up to date at once
CHUNK = 2048


def layers_in_eight_bits(network: FusionNetwork) -> dict[str, nn.Linear]:
    """Those whose weights are stored so: all but the small ones that choose and read, by name."""
    return {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and not name.startswith(("choice.", "reader."))
    }


@torch.no_grad()
def round_weights(network: FusionNetwork, joined: Tensor) -> None:
    """In place, to what 8 bits can say, in the order in which layers are used.

    joined: (N, text_width + image_width), what the network is asked, see ``FusionNetwork.fuse_normalised``.
    """
    for layer in _in_order_of_use(network, joined):
        moments = _moments(network, layer, joined)
        layer.weight.copy_(_rounded(layer.weight, moments))


def _in_order_of_use(network: FusionNetwork, joined: Tensor) -> list[nn.Linear]:
    used: list[nn.Linear] = []

    def note(layer: nn.Module, _: tuple[Tensor]) -> None:
        assert isinstance(layer, nn.Linear)
        used.append(layer)

    hooks = [layer.register_forward_pre_hook(note) for layer in layers_in_eight_bits(network).values()]
    network.fuse_normalised(joined[:1])
    for hook in hooks:
        hook.remove()
    return used


def _moments(network: FusionNetwork, layer: nn.Linear, joined: Tensor) -> Tensor:
    """(in, in): the mean outer product of what the layer is asked, by a network rounded as far as it is."""
    total = torch.zeros(layer.in_features, layer.in_features, device=joined.device)

    def add(_: nn.Module, asked: tuple[Tensor]) -> None:
        total.addmm_(asked[0].T, asked[0])

    hook = layer.register_forward_pre_hook(add)
    for chunk in joined.split(CHUNK):
        network.fuse_normalised(chunk)
    hook.remove()
    return total / len(joined)


def _rounded(weight: Tensor, moments: Tensor) -> Tensor:
    """weight: (out, in) -> the same shape, on the grid of 8 bits."""
    size = len(moments)
    damped = moments + DAMPING * moments.diagonal().mean() * torch.eye(size, device=moments.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    share = torch.linalg.cholesky(inverse, upper=True)
    weight = weight.clone()
    for first in range(0, size, BLOCK):
        last = min(first + BLOCK, size)
        errors = torch.zeros(len(weight), last - first, device=weight.device)
        for column in range(first, last):
            nearest = weight[:, column].to(EIGHT_BITS).to(weight.dtype)
            error = (weight[:, column] - nearest) / share[column, column]
            weight[:, column:last] -= error[:, None] * share[column, column:last]
            weight[:, column] = nearest
            errors[:, column - first] = error
        weight[:, last:] -= errors @ share[first:last, last:]
    return weight
