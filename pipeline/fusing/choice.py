"""Which first picture to draw where words and a style may never have been seen together."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Choice(nn.Module):
    """Scores first pictures: what words and picture mean together, and what the words alone mean in each of their ways.

    Words and a style that were never learned together are fused to a blur between designs. That can be seen, and one of
    the ways is still a drawing, perhaps in the style most like the one that was shown. So a small CNN looks at each,
    beside the first and the mean of all. Untaught, it prefers the first.
    """

    def __init__(self, ways: int, channels: int, image_width: int, width: int = 32, hidden: int = 64) -> None:
        super().__init__()
        self.look = nn.Conv2d(channels, width, 3, stride=2, padding=1)
        self.compare = nn.Conv2d(3 * width, hidden, 3, stride=2, padding=1)
        self.style = nn.Linear(image_width, hidden)
        self.way = nn.Parameter(torch.zeros(1 + ways, hidden))
        self.judge = nn.Linear(hidden, hidden)
        self.score = nn.Linear(hidden, 1)
        self.preference = nn.Parameter(F.one_hot(torch.tensor(0), 1 + ways).float())
        nn.init.zeros_(self.score.weight)

    def forward(self, pictures: Tensor, image: Tensor) -> Tensor:
        """(B, 1 + ways), the highest of what is to be drawn.

        pictures: (B, 1 + ways, G*G, channels), that of both first; image: (B, image_width), normalised.
        """
        batch, count, places, _ = pictures.shape
        side = int(places**0.5)
        seen = F.gelu(self.look(pictures.transpose(2, 3).unflatten(3, (side, side)).flatten(0, 1)))
        seen = seen.unflatten(0, (batch, count))
        beside = torch.cat([seen, seen[:, :1].expand_as(seen), seen.mean(dim=1, keepdim=True).expand_as(seen)], dim=2)
        told = F.gelu(self.compare(beside.flatten(0, 1))).mean(dim=(2, 3)).unflatten(0, (batch, count))
        told = F.gelu(told + self.style(image)[:, None] + self.way)
        return self.score(F.gelu(self.judge(told)))[..., 0] + self.preference
