"""Which style a picture is in, read before anything is fused."""

from torch import Tensor, nn
from torch.nn import functional as F


class StyleReader(nn.Module):
    """A classifier of the styles that drawings were learned in, and of what is in none of them."""

    def __init__(self, image_width: int, styles: int, hidden: int = 512) -> None:
        super().__init__()
        self.widen = nn.Linear(image_width, hidden)
        self.score = nn.Linear(hidden, styles + 1)

    def forward(self, image: Tensor) -> Tensor:
        """image: (B, image_width), normalised -> (B, styles + 1), unnormalised log-odds, those of none last."""
        return self.score(F.gelu(self.widen(image)))
