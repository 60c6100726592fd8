"""Gram statistics: the style of a picture, as a CNN sees it."""

import torch
from torch import Tensor


def gram_matrix(tokens: Tensor, weight: Tensor | None = None) -> Tensor:
    """tokens: (B, N, D), weight: (B, N) -> (B, D, D) in float32: which channels fire together, wherever they do.

    The mean over places of f f^T (equation 3 of arXiv 1508.06576, divided by the number of places).
    """
    values = tokens.float()
    weight = torch.ones_like(values[..., 0]) if weight is None else weight.to(values)
    return (values * weight[..., None]).transpose(1, 2) @ values / weight.sum(dim=1)[:, None, None]
