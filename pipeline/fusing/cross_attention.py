"""Words that look at a picture: token attention in the manner of IP-Adapter, which changes nothing until trained."""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class TokenCrossAttention(ModelMixin, ConfigMixin):
    """words + strength * attention(words -> picture), the picture having keys and values of its own (arXiv 2308.06721).

    IP-Adapter adds this inside the denoiser; here it acts on the words before them, so that any denoiser that listens
    to words can use it. The last layer starts at zero, as in ControlNet (arXiv 2302.05543): untrained, it gives exactly
    the words.
    """

    @register_to_config
    def __init__(self, words_width: int = 768, image_width: int = 1280, width: int = 512, num_heads: int = 8) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"expected a width that num_heads divides, got {width} and {num_heads}")
        self.words_norm = nn.LayerNorm(words_width)
        self.image_norm = nn.LayerNorm(image_width)
        self.to_q = nn.Linear(words_width, width, bias=False)
        self.to_k = nn.Linear(image_width, width, bias=False)
        self.to_v = nn.Linear(image_width, width, bias=False)
        self.to_out = nn.Linear(width, words_width)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def forward(self, words: Tensor, picture: Tensor, weight: Tensor | None = None, strength: float = 1.0) -> Tensor:
        """words: (B, L, words_width); picture: (B, N, image_width); weight: (B, N) in 0..1 -> as words.

        A token of weight w is attended to as w of a token would be: log(w) is added to its score.
        """
        seen = self.image_norm(picture)
        query, key, value = (
            side.unflatten(-1, (self.config["num_heads"], -1)).transpose(1, 2)
            for side in (self.to_q(self.words_norm(words)), self.to_k(seen), self.to_v(seen))
        )
        bias = None if weight is None else torch.log(weight.to(query))[:, None, None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return words + strength * self.to_out(attended.transpose(1, 2).flatten(2))
