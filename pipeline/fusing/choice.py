"""Which picture words are fused with: the one that is shown, or that of one of the ways to draw them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Choice(nn.Module):
    """Whether words and a style were learned together, and if not, in which way the words alone come nearest to it.

    Fused, words and a style that never met give a blur between designs; in one of the ways the words give a drawing,
    perhaps in the style most like the one that is shown. Which way that is depends on both, and so does whether they
    met: the two sides are multiplied, as content and style are in bilinear models (Tenenbaum and Freeman, Neural
    Computation 12(6), 2000, eq. 1). Untaught, it keeps to what is shown.
    """

    def __init__(self, ways: int, text_width: int, image_width: int, hidden: int = 384, styles: int = 64) -> None:
        super().__init__()
        self.words = nn.Linear(text_width, hidden)
        self.style = nn.Sequential(nn.Linear(image_width, styles), nn.GELU(), nn.Linear(styles, hidden))
        self.score = nn.Linear(hidden, 1 + ways)
        nn.init.zeros_(self.score.weight)
        with torch.no_grad():
            self.score.bias.copy_(F.one_hot(torch.tensor(0), 1 + ways))

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        """text: (B, text_width); image: (B, image_width), both normalised -> (B, 1 + ways), the highest to be fused.

        First the log-odds that both were learned together, p to 1 - p, then the log of each way's share of the 1 - p:
        so the highest is the likeliest.
        """
        together, ways = self.score(F.gelu(self.words(text)) * self.style(image)).tensor_split([1], dim=1)
        return torch.cat([together, ways.log_softmax(dim=1)], dim=1)
