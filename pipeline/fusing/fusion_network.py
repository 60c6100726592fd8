"""The trained fusion network: fused = MLP(cat(embed, feature)), the one learned meeting of words and picture."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .choice import Choice
from .memory import Memory
from .style_reader import StyleReader


class FusionNetwork(ModelMixin, ConfigMixin):
    """Pre-norm residual MLP from one text vector and one image vector to a grid of tokens.

    A side that is missing is replaced by a learned null vector, so text alone, picture alone and both are three inputs
    of one function. The tokens lie on the latents' grid: they are the mean picture, which the generator sharpens.
    ways: how many null vectors stand for no picture, each a way of its own to draw what the words leave open.
    styles: how many it knows, the ways first. A picture beside words stands for its style alone if that is known: all
    pictures of a style then say the same, and what is learned of it is learned once. 0: a picture is taken as it is.
    chooses: words beside a picture are drawn in one of those ways where the two were never learned together.
    exit_hidden: units of a gated layer beside the linear one that ends in the tokens, which by itself reaches only
    ``width`` directions of them: of drawings, 7% of the variance lies beyond 1,024. 0 for none.
    remembers: how many things are said otherwise than the layers say them, see Memory. 0 for none.
    """

    @register_to_config
    def __init__(
        self,
        text_width: int = 512,
        image_width: int = 256,
        width: int = 1024,
        hidden: int = 1536,
        num_blocks: int = 2,
        grid: int = 8,
        channels: int = 16,
        gated: bool = False,
        ways: int = 1,
        chooses: bool = False,
        exit_hidden: int = 0,
        styles: int = 0,
        remembers: int = 0,
    ) -> None:
        super().__init__()
        self.text_norm = nn.LayerNorm(text_width)
        self.image_norm = nn.LayerNorm(image_width)
        self.null_text = nn.Parameter(torch.zeros(text_width))
        known = max(ways, styles)
        self.null_image = nn.Parameter(torch.randn(known, image_width) if known > 1 else torch.zeros(1, image_width))
        self.reader = StyleReader(image_width, styles) if styles else None
        self.entry = nn.Linear(text_width + image_width, width)
        self.blocks = nn.ModuleList((_GatedBlock if gated else _Block)(width, hidden) for _ in range(num_blocks))
        self.exit_norm = nn.LayerNorm(width)
        self.exit = nn.Linear(width, grid * grid * channels)
        self.exit_block = _GatedBlock(width, exit_hidden, grid * grid * channels) if exit_hidden else None
        self._shape, self._ways = (grid * grid, channels), ways
        self.choice = Choice(ways, text_width, image_width) if chooses else None
        self.memory = Memory(remembers, text_width + image_width, *self._shape) if remembers else None

    def forward(self, text: Tensor | None, image: Tensor | None, batch_size: int | None = None) -> Tensor:
        """text: (B, text_width) or None; image: (B, image_width) or None -> tokens (B, grid*grid, channels).

        Without a picture (B, ways*grid*grid, channels), one way after the other.
        """
        known = text if text is not None else image
        batch = known.shape[0] if known is not None else batch_size or 1
        left = self.null_text.expand(batch, -1) if text is None else self.text_norm(text)
        right = self._in_each_way(batch) if image is None else self.image_norm(image)[:, None]
        if text is not None and image is not None:
            right = self._meant(left, right[:, 0])[:, None]
        joined = torch.cat([left[:, None].expand(-1, right.shape[1], -1), right], dim=-1)
        return self.fuse_normalised(joined).flatten(1, 2)

    def _in_each_way(self, batch: int) -> Tensor:
        return self.null_image[: self._ways].expand(batch, -1, -1)

    def _meant(self, text: Tensor, image: Tensor) -> Tensor:
        """(B, image_width): what stands for a picture beside words, both normalised, where they are fused."""
        meant = image
        if self.reader is not None:
            style = self.reader(image).argmax(dim=1)
            known = style < len(self.null_image)
            meant = torch.where(known[:, None], self.null_image[style * known], image)
        if self.choice is not None:
            number = self.choice(text, image).argmax(dim=1)
            if self.memory is not None:  # what is remembered was learned together
                number = number.masked_fill(self.memory.knows(torch.cat([text, meant], dim=-1)), 0)
            offered = torch.cat([meant[:, None], self._in_each_way(len(image))], dim=1)
            meant = offered[torch.arange(len(image)), number]
        return meant

    def fuse_normalised(self, joined: Tensor) -> Tensor:
        """joined: (..., text_width + image_width), each side normalised or null -> (..., grid*grid, channels)."""
        said = [layer(seen) for layer, seen in zip(self.last_layers, self.before_last(joined), strict=True)]
        if self.memory is not None:
            said.append(self.memory(joined))
        return torch.stack(said).sum(dim=0).unflatten(-1, self._shape)

    def remember(self, query: Tensor, keys: Tensor, values: Tensor) -> None:
        """Add these to what the layers say, in place of what was remembered before, see ``Memory.keep``."""
        self.memory = Memory(len(keys), query.shape[0], *self._shape).to(query.device)
        self.memory.keep(query, keys, values)
        self.register_to_config(remembers=len(keys))

    def forget(self) -> None:
        """The layers alone are to say what is said."""
        self.memory = None
        self.register_to_config(remembers=0)

    @property
    def last_layers(self) -> list[nn.Linear]:
        """The linear layers that the tokens are the sum of."""
        return [self.exit] if self.exit_block is None else [self.exit, self.exit_block.narrow]

    def before_last(self, joined: Tensor) -> list[Tensor]:
        """joined as in ``fuse_normalised`` -> what each of ``last_layers`` is given, (..., its width)."""
        hidden = self.entry(joined)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        seen = self.exit_norm(hidden)
        return [seen] if self.exit_block is None else [seen, self.exit_block.gated(hidden)]


class _Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, hidden)
        self.narrow = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(nn.functional.gelu(self.widen(self.norm(x))))


class _GatedBlock(nn.Module):
    def __init__(self, width: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 2 * hidden)
        self.narrow = nn.Linear(hidden, out or width)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.gated(x))

    def gated(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., hidden)."""
        gate, value = self.widen(self.norm(x)).chunk(2, dim=-1)
        return nn.functional.silu(gate) * value
