"""Teaching the fusion network: words, a picture or both -> the mean latents of the picture that was meant."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..denoising.unet_sampler import stretched
from ..fusing.fusion_network import FusionNetwork
from .catalogue import STYLES
from .loop import Plan, device, run_stage, seeded
from .pictures import PictureSet
from .scenes.scene_set import LAYOUTS
from .training_set import TrainingSet

# The ways that words alone are drawn in, one style each, and of scenes one layout each; the first is the house style.
# Two of the eight are left out, which nobody expects who showed no picture: black silhouettes, and a set that has a
# seventh of the concepts.
WAYS = tuple(STYLES.index(name) for name in ("fluent-3d", "noto", "twemoji", "fluent-color", "fluent-flat", "blob"))
assert len(WAYS) == LAYOUTS
NAME_SHARE = 0.85  # how often a concept is called by its name; a keyword such as "love" names many pictures at once
# The remaining share sees a picture alone. Scenes have no style to take from another picture.
BOTH_SHARE, WORDS_SHARE = 0.78, 0.14
SCENE_BOTH_SHARE, SCENE_WORDS_SHARE = 0.2, 0.7
# How often a style is shown by several pictures at once, in any proportions. Of single ones the network had known each
# by heart: shown the mean of a style's pictures, a judge found the right concept .65 of the time, not .91.
TOGETHER_SHARE, TOGETHER = 0.5, 4
DOMAIN_SHARES = (0.78, 0.14, 0.08)  # of a batch: emoji, of which there is most to know, panoramas, phantoms
# Where a scene shows what its words say, which is a few places: there it counts more, or clouds and edges would drown
# it. Shares of the picture: left, top, right, bottom; the sun's column, and both inserts.
SAID_WEIGHT = {
    1: [((0.5, 0.0, 0.5625, 0.5625), 16.0)],
    2: [((0.125, 0.375, 0.4375, 0.625), 4.0), ((0.5625, 0.375, 0.875, 0.625), 4.0)],
}
EXIT_HIDDEN = 2560  # what 60 MB leave room for, see FusionNetwork
ENDS_WEIGHT = 0.5  # of the difference of the errors at a panorama's two ends, which meet only where it is small


NOTHING = np.array([], dtype=np.int64)


@dataclass(frozen=True)
class Tables:
    """Everything the stage learns from, encoded once; rows as in TrainingSet.

    captions: (M, 512) text_embeds of emoji; caption_concept, caption_is_name: (M,); scene_captions: (S, K, 512), K of
    each scene; features: (N, V, 256) pooled features of each picture, clean first, then V-1 varied views; square:
    (N, 16, 16, 16) latents of all that is square, times ``scaling_factor``, which gives them unit variance, and zeros
    where a panorama is; wide: (skies, 16, 16, 32), those of the panoramas, which begin at row ``wide_from``. Tensors
    lie on the device that learns.
    """

    captions: Tensor
    caption_concept: np.ndarray
    caption_is_name: np.ndarray
    scene_captions: Tensor
    features: Tensor
    square: Tensor
    wide: Tensor
    wide_from: int
    scaling_factor: float

    def latents_of(self, rows: np.ndarray) -> Tensor:
        """Rows of panoramas alone, or of none."""
        wide = rows - self.wide_from
        return self.wide[index(wide)] if 0 <= wide[0] < len(self.wide) else self.square[index(rows)]

    @property
    def grid_and_channels(self) -> tuple[int, int]:
        return self.square.shape[-1], self.square.shape[1]

    def means(self) -> Tensor:
        """(N, G*G, 16): what the network is to say of each row. Of a panorama, the mean of neighbours side by side."""
        square = self.square.clone()
        size = square.shape[-1]
        square[self.wide_from : self.wide_from + len(self.wide)] = F.adaptive_avg_pool2d(self.wide, (size, size))
        return square.flatten(2).transpose(1, 2).contiguous()


@dataclass(frozen=True)
class Batch:
    """text: (B, 512); image: (B, 256); has_text, has_image: (B, 1) bool; rows: (B,) pictures that are meant.

    way: (B,), the way to draw what words alone mean: a style of drawings, a layout of scenes.
    """

    text: Tensor
    image: Tensor
    has_text: Tensor
    has_image: Tensor
    rows: np.ndarray
    way: Tensor


class Examples:
    """Draws batches: which picture is meant, by which words, in the style of which other picture.

    without: rows of drawings that are never meant, besides those that are held out.
    """

    def __init__(self, pictures: TrainingSet, tables: Tables, without: np.ndarray = NOTHING) -> None:
        self._tables = tables
        drawings, *scenes = pictures.training_rows()
        self._rows = (np.setdiff1d(drawings, without), *scenes)
        self._first_scene = pictures.starts[1]
        self._layouts = np.concatenate([scene.layouts for scene in pictures.scenes])
        self._of_layout = [_Pools(self._layouts[rows - self._first_scene], rows, LAYOUTS) for rows in self._rows[1:]]
        emoji, trained = pictures.emoji, self._rows[0]
        self._concept, self._style = emoji.concept, emoji.style
        self._of_style = _Pools(self._style[trained], trained, len(STYLES))
        self._drawings = by_way(self._concept[trained], self._style[trained], trained, len(emoji.concepts))
        # Words in a way whose drawing is held out stand for nothing: another style's would teach the wrong answer.
        pairs = emoji.pairs
        held = emoji.held_out().pairs | {pairs[row] for row in without}
        taught = [(c, w) for c in range(len(emoji.concepts)) for w in range(len(WAYS)) if (c, WAYS[w]) not in held]
        of_concept, ways = np.array(taught).T
        self._ways = _Pools(of_concept, ways, len(emoji.concepts))
        named, rows = tables.caption_is_name, np.arange(len(tables.caption_concept))
        self._names, self._keywords = (
            _Pools(tables.caption_concept[some], rows[some], len(emoji.concepts)) for some in (named, ~named)
        )

    def meant(self, step: int, rows: np.ndarray) -> Batch:
        """Drawings ``rows``, each by its name and another picture in its style."""
        pick = np.random.default_rng([step, 8])
        yes = np.ones(len(rows), dtype=bool)
        text = self._tables.captions[index(self._names.draw(pick, self._concept[rows]))]
        return _batch(text, self._style_or_content(pick, rows, yes), yes, yes, rows, np.zeros_like(rows))

    def draw(self, step: int, size: int, shares: Sequence[float] = DOMAIN_SHARES) -> Batch:
        """shares: of emoji, panoramas and phantoms, one domain after the other."""
        pick = np.random.default_rng([step, 7])
        counts = [round(size * share) for share in shares[1:]]
        parts = [self._emoji(pick, size - sum(counts))]
        parts += [self._scenes(pick, domain, count) for domain, count in enumerate(counts, start=1)]
        return _joined([part for part in parts if len(part.rows)])

    def _emoji(self, pick: np.random.Generator, size: int) -> Batch:
        rows = pick.choice(self._rows[0], size)
        has_text, has_image = _given(pick, size, BOTH_SHARE, WORDS_SHARE)
        way = self._ways.draw(pick, self._concept[rows])
        rows = np.where(has_image, rows, self._drawings[way, self._concept[rows]])
        concepts = self._concept[rows]
        by_name = (pick.random(size) < NAME_SHARE) | ~self._keywords.has(concepts)
        captions = np.where(by_name, self._names.draw(pick, concepts), self._keywords.draw(pick, concepts))
        text = self._tables.captions[index(captions)]
        return _batch(text, self._style_or_content(pick, rows, has_text), has_text, has_image, rows, way)

    def _style_or_content(self, pick: np.random.Generator, rows: np.ndarray, has_text: np.ndarray) -> Tensor:
        """(B, 256): beside words, other pictures in the style of each of ``rows``, one or several; else itself."""
        others = [self._of_style.draw(pick, self._style[rows]) for _ in range(TOGETHER)]
        several = has_text & (pick.random(len(rows)) < TOGETHER_SHARE)
        shares = np.where(several[:, None], pick.dirichlet([0.5] * TOGETHER, len(rows)), np.eye(TOGETHER)[0])
        shown = [self._shown(pick, np.where(has_text, other, rows)) for other in others]
        return (index(shares.T[..., None].astype(np.float32)) * torch.stack(shown)).sum(dim=0)

    def _scenes(self, pick: np.random.Generator, domain: int, size: int) -> Batch:
        """A picture beside words shows the layout, which is all that they leave open."""
        rows = pick.choice(self._rows[domain], size)
        has_text, has_image = _given(pick, size, SCENE_BOTH_SHARE, SCENE_WORDS_SHARE)
        layout = self._layouts[rows - self._first_scene]
        seen = np.where(has_text, self._of_layout[domain - 1].draw(pick, layout), rows)
        captions = self._tables.scene_captions
        text = captions[index(rows - self._first_scene), index(pick.integers(0, captions.shape[1], size))]
        return _batch(text, self._shown(pick, seen), has_text, has_image, rows, layout)

    def _shown(self, pick: np.random.Generator, rows: np.ndarray) -> Tensor:
        """One view of each."""
        views = self._tables.features.shape[1]
        return self._tables.features[index(rows), index(pick.integers(0, views, len(rows)))]


def index(rows: np.ndarray) -> Tensor:
    return torch.from_numpy(rows).to(device())


def by_way(concept: np.ndarray, style: np.ndarray, rows: np.ndarray, concepts: int) -> np.ndarray:
    """(WAYS, concepts): the row that words alone mean. A concept not drawn in a way's style is drawn in the first that
    there is, those of WAYS before the others; -1 where there is none at all.
    """
    order = [*WAYS, *(other for other in range(len(STYLES)) if other not in WAYS)]
    of_style = np.full((len(STYLES), concepts), -1)
    of_style[style, concept] = rows
    ordered = of_style[order]
    first = ordered[(ordered >= 0).argmax(axis=0), np.arange(concepts)]
    found = ordered[: len(WAYS)]
    return np.where(found >= 0, found, first)


class _Pools:
    """Values by key, to draw from many keys at once; an empty one gives any value, see ``has``."""

    def __init__(self, keys: np.ndarray, values: np.ndarray, count: int) -> None:
        self._values = values[np.argsort(keys, kind="stable")]
        self._sizes = np.bincount(keys, minlength=count)
        self._starts = np.cumsum(self._sizes) - self._sizes

    def has(self, keys: np.ndarray) -> np.ndarray:
        return self._sizes[keys] > 0

    def draw(self, pick: np.random.Generator, keys: np.ndarray) -> np.ndarray:
        places = self._starts[keys] + (pick.random(len(keys)) * self._sizes[keys]).astype(np.int64)
        return self._values[np.minimum(places, len(self._values) - 1)]


def _given(pick: np.random.Generator, size: int, both: float, words: float) -> tuple[np.ndarray, np.ndarray]:
    """Whether each hears words, and whether it sees a picture."""
    lot = pick.random(size)
    return lot < both + words, (lot < both) | (lot >= both + words)


def _batch(
    text: Tensor, image: Tensor, has_text: np.ndarray, has_image: np.ndarray, rows: np.ndarray, way: np.ndarray
) -> Batch:
    return Batch(text, image, index(has_text)[:, None], index(has_image)[:, None], rows, index(way))


def _joined(parts: Sequence[Batch]) -> Batch:
    def all_of(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    rows = np.concatenate([part.rows for part in parts])
    return Batch(all_of("text"), all_of("image"), all_of("has_text"), all_of("has_image"), rows, all_of("way"))


def fused(network: FusionNetwork, batch: Batch, noise: float | Tensor, generator: torch.Generator) -> Tensor:
    """Tokens (B, G*G, 16) for a mixed batch, with the normalised inputs blurred by ``noise`` so neighbours agree.

    noise: one for all, or (B, 1).
    """
    text = torch.where(batch.has_text, network.text_norm(batch.text), network.null_text)
    image = torch.where(batch.has_image, network.image_norm(batch.image), network.null_image[batch.way])
    joined = torch.cat([text, image], dim=-1)
    blur = torch.randn(joined.shape, generator=generator, device=joined.device)
    return network.fuse_normalised(joined + noise * blur)


def on_grid(tokens: Tensor, columns: int) -> Tensor:
    """(B, G*G, C) -> (B, C, G, columns), as the sampler lays it out."""
    side = int(tokens.shape[1] ** 0.5)
    return stretched(tokens.transpose(1, 2).unflatten(2, (side, side)), columns)


def said_weight(grid: int) -> Tensor:
    """(3, G*G): how much each place counts, by domain."""
    weight = torch.ones(3, grid, grid)
    for domain, places in SAID_WEIGHT.items():
        for bounds, counts in places:
            left, top, right, bottom = (round(bound * grid) for bound in bounds)
            weight[domain, top:bottom, left:right] = counts
    return weight.flatten(1)


def new_fusion(tables: Tables) -> FusionNetwork:
    """It begins with the mean of all pictures for an answer."""
    grid, channels = tables.grid_and_channels
    network = FusionNetwork(
        hidden=1280, num_blocks=3, gated=True, grid=grid, channels=channels, ways=len(WAYS), chooses=True,
        exit_hidden=EXIT_HIDDEN,
    )  # fmt: skip
    with torch.no_grad():
        network.exit.bias.copy_(tables.means().mean(0).flatten())
    return network


def reaching_further(network: FusionNetwork) -> FusionNetwork:
    """The same function, of a network that ends in a gated layer too; one that does is returned as it is."""
    if network.exit_block is not None:
        return network
    wider = FusionNetwork(**{**configured(network), "exit_hidden": EXIT_HIDDEN})
    wider.load_state_dict(network.state_dict(), strict=False)
    assert wider.exit_block is not None
    nn.init.zeros_(wider.exit_block.narrow.weight)
    nn.init.zeros_(wider.exit_block.narrow.bias)
    return wider


def configured(network: FusionNetwork) -> dict[str, Any]:
    """What it was built with, by name."""
    return {name: value for name, value in network.config.items() if not name.startswith("_")}


def strange_rows(pictures: PictureSet) -> np.ndarray:
    """Of each concept with three drawings or more to learn from, one: as many as are held out of it for measuring."""
    pick = np.random.default_rng(5)
    rows = pick.permutation(pictures.training_rows())
    _, first, count = np.unique(pictures.concept[rows], return_index=True, return_counts=True)
    return np.sort(rows[first[count >= 3]])


def train_fusion(
    work: Path,
    pictures: TrainingSet,
    tables: Tables,
    network: FusionNetwork,
    plan: Plan,
    name: str = "fusion",
    without: np.ndarray = NOTHING,
) -> FusionNetwork:
    """On two cores, in float32, a batch of 256 learns more in the same time than one of 512 or of 128."""
    torch.manual_seed(0)
    examples = Examples(pictures, tables, without)
    means, weights = tables.means(), said_weight(tables.grid_and_channels[0]).to(device())

    def loss_at(step: int) -> dict[str, Tensor]:
        drawn = examples.draw(step, plan.batch)
        made = fused(network, drawn, 0.05, seeded(step))
        domain = pictures.domain_of(drawn.rows)
        wanted, weight = means[index(drawn.rows)], weights[index(domain)]
        emoji = int((domain == 0).sum())  # they come first
        error = made.float() - wanted
        apart = (error.square().mean(dim=2) * weight).mean(dim=1)
        side = tables.grid_and_channels[0]
        columns = error[torch.from_numpy(domain == 1).to(error.device)].unflatten(1, (side, side))
        ends = (columns[:, :, 0] - columns[:, :, -1]).square().mean(dim=(1, 2))
        return {
            "emoji": apart[:emoji].sum() / plan.batch,
            "scenes": apart[emoji:].sum() / plan.batch,
            "ends": ENDS_WEIGHT * ends.sum() / plan.batch,
        }

    run_stage(name, work, plan, nn.ModuleDict({"fusion": network}), loss_at)
    return network
