"""What some things are said beyond what the layers of a network say of them: keys to know them by, and values."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Four values that what is normally distributed, of unit variance, is best told by: Max, Quantizing for Minimum
# Distortion, IRE Transactions on Information Theory 6(1), 1960, table I. And where one passes into the next.
LEVELS = (-1.510, -0.4528, 0.4528, 1.510)
BOUNDS = (-0.9816, 0.0, 0.9816)
SCALES = (4, 123)  # bytes of the least float8_e5m2 that is normal, and of the largest that is finite
NEARBY = range(-3, 4)  # how many bytes from a token's root mean square its scale may lie
KEY_WIDTH = 64
REACH = 12.0  # standard deviations of one thing's keys: what lies further off than this is rather none that is known


class Memory(nn.Module):
    """A sparse layer beside dense ones: what it adds is the value of the one key that is meant, or nothing.

    What the layers of a network learn they share among all that is asked, so a small part that one thing needs for
    itself costs them as much as any other, and disturbs what else they say. Here it takes 2 bits of each number, and
    what lies far from it stays as it is. Keys and values as in key-value memories (Miller et al. 2016, arXiv
    1606.03126, section 3.1).

    A query is linear in what is asked: the axes along which things lie far apart for how much the askings of one vary
    (linear discriminants), in units of that variation. So the probability that a key is meant follows from distances
    alone, and so does that of none being meant.
    size: keys; tokens, channels: of a value.
    """

    keys: Tensor
    codes: Tensor
    scales: Tensor
    levels: Tensor

    def __init__(self, size: int, asked: int, tokens: int, channels: int) -> None:
        super().__init__()
        self.query = nn.Linear(asked, KEY_WIDTH, bias=False)
        self.register_buffer("keys", torch.zeros(size, KEY_WIDTH))
        self.register_buffer("codes", torch.zeros(size, tokens * channels // 4, dtype=torch.uint8))
        self.register_buffer("scales", torch.zeros(size, tokens))
        self.register_buffer("levels", torch.tensor(LEVELS), persistent=False)

    def forward(self, asked: Tensor) -> Tensor:
        """asked: (..., W) -> (..., tokens * channels), what is to be added."""
        share, nearest = self._meant(asked.flatten(0, -2))
        added = share[:, None] * self.values(nearest).flatten(1)
        return added.to(asked.dtype).unflatten(0, asked.shape[:-1])

    def knows(self, asked: Tensor, least: float = 0.5) -> Tensor:
        """asked: (B, W) -> (B,) bool, whether any one key is meant with a probability of more than ``least``."""
        return self._meant(asked)[0] > least

    def _meant(self, asked: Tensor) -> tuple[Tensor, Tensor]:
        """asked: (B, W) -> the likeliest key's probability, and which it is, both (B,)."""
        query = F.linear(asked.float(), self.query.weight.float())
        closeness = -torch.cdist(query, self.keys.float()).square() / 2
        share, nearest = F.pad(closeness, (0, 1), value=-(REACH**2) / 2).softmax(dim=1)[:, :-1].max(dim=1)
        return share, nearest

    def values(self, which: Tensor) -> Tensor:
        """(B,) -> (B, tokens, channels)."""
        places = torch.arange(0, 8, 2, device=which.device)
        numbers = (self.codes[which][..., None].int() >> places & 3).flatten(1)
        scales = self.scales[which].float()
        return self.levels.float()[numbers].unflatten(1, (scales.shape[1], -1)) * scales[..., None]

    @torch.no_grad()
    def keep(self, query: Tensor, keys: Tensor, values: Tensor) -> None:
        """query: (W, KEY_WIDTH); keys: (size, KEY_WIDTH); values: (size, tokens, channels), rounded as they are kept.

        Each token has a scale, in a byte: most of a value lies in few of its tokens. Of those about its root mean
        square it is the one by which least is lost, so that what was kept once is kept again as it is.
        """
        bounds, levels = (torch.tensor(each, device=values.device) for each in (BOUNDS, LEVELS))
        spread = values.square().mean(dim=2).sqrt().to(torch.float8_e5m2).view(torch.uint8).int()
        numbers = torch.zeros_like(values, dtype=torch.int64)
        scales, lost = torch.ones_like(values[..., 0]), torch.full_like(values[..., 0], torch.inf)
        for far in NEARBY:
            tried = (spread + far).clamp(*SCALES).to(torch.uint8).view(torch.float8_e5m2).to(values.dtype)
            told = torch.bucketize(values / tried[..., None], bounds)
            loses = (levels[told] * tried[..., None] - values).square().sum(dim=2)
            better = loses < lost
            scales, lost = torch.where(better, tried, scales), torch.where(better, loses, lost)
            numbers = torch.where(better[..., None], told, numbers)
        self.query.weight.copy_(query.T)
        self.keys.copy_(keys)
        self.scales.copy_(scales)
        self.codes.copy_(_packed(numbers.flatten(1).unflatten(1, (-1, 4)).unbind(dim=2)))


def _packed(numbers: Sequence[Tensor]) -> Tensor:
    """Four numbers of 2 bits in a byte, the first one lowest."""
    return sum((number << 2 * place for place, number in enumerate(numbers)), torch.zeros_like(numbers[0])).byte()
