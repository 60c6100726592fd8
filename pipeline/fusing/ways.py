"""A condition may hold several first pictures, one for each way to draw what its words leave open; the seed chooses."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ..conditioning import FusedConditioning


def ways_of(conditioning: FusedConditioning) -> int:
    """How many first pictures there are; 1 for a condition that is none."""
    if conditioning.grid is None:
        return 1
    height, width = conditioning.grid
    return conditioning.tokens.shape[1] // (height * width)


def in_one_way(conditioning: FusedConditioning, numbers: Sequence[int]) -> FusedConditioning:
    """With the first picture number ``numbers[i]`` of each entry i, counted round and round. A negative likewise."""
    ways, negative = ways_of(conditioning), conditioning.negative
    if negative is not None:
        negative = in_one_way(negative, numbers)
    if ways == 1:
        return replace(conditioning, negative=negative)

    def chosen(side: Tensor) -> Tensor:
        return side.unflatten(1, (ways, -1))[list(range(len(numbers))), [number % ways for number in numbers]]

    return replace(conditioning, tokens=chosen(conditioning.tokens), mask=chosen(conditioning.mask), negative=negative)
