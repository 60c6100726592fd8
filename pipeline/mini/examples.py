"""Batches to learn from: which picture is meant, by which words, in the style of which other picture."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .catalogue import STYLES
from .scenes.scene_set import LAYOUTS
from .tables import Tables, index
from .training_set import TrainingSet

# The ways that words alone are drawn in, one style each, and of scenes one layout each; the first is the house style.
# Two of the eight are left out, which nobody expects who showed no picture: black silhouettes, and a set that has a
# seventh of the concepts.
WAYS = tuple(STYLES.index(name) for name in ("fluent-3d", "noto", "twemoji", "fluent-color", "fluent-flat", "blob"))
assert len(WAYS) == LAYOUTS
READ = (*WAYS, *(style for style in range(len(STYLES)) if style not in WAYS))  # the styles, by FusionNetwork's numbers
NUMBER_OF = np.argsort(READ)  # those of each style
NAME_SHARE = 0.85  # how often a concept is called by its name; a keyword such as "love" names many pictures at once
# The remaining share sees a picture alone. Scenes have no style to take from another picture.
BOTH_SHARE, WORDS_SHARE = 0.78, 0.14
SCENE_BOTH_SHARE, SCENE_WORDS_SHARE = 0.2, 0.7
# How often a style is shown by several pictures at once, in any proportions. A network that was shown single ones, and
# took them as they are, knew each by heart: of what it drew by the mean of a style's a judge knew .65, not .91.
TOGETHER_SHARE, TOGETHER = 0.5, 4
STRAY_SHARE = 0.1  # how often words are beside a picture of a domain taken at random, where all may meet all
DOMAIN_SHARES = (0.78, 0.14, 0.08)  # of a batch: emoji, of which there is most to know, panoramas, phantoms


@dataclass(frozen=True)
class Batch:
    """text: (B, 512); image: (B, 256); has_text, has_image: (B, 1) bool; rows: (B,) pictures that are meant.

    way: (B,), the way to draw what words mean: a style of drawings, by its place in READ, a layout of scenes. Of words
    beside a drawing that is all that is left of it (see FusionNetwork), and ``has_image`` false.
    """

    text: Tensor
    image: Tensor
    has_text: Tensor
    has_image: Tensor
    rows: np.ndarray
    way: Tensor


@dataclass(frozen=True)
class Asked:
    """text: (B, 512); image: (B, 256); said, shown: (B,), a row that the words mean, and one in the picture's style."""

    text: Tensor
    image: Tensor
    said: np.ndarray
    shown: np.ndarray


class Examples:
    """Draws batches: which picture is meant, by which words, in the style of which other picture."""

    def __init__(self, pictures: TrainingSet, tables: Tables) -> None:
        self._tables = tables
        self._rows = pictures.training_rows()
        self._first_scene = pictures.starts[1]
        self._layouts = np.concatenate([scene.layouts for scene in pictures.scenes])
        self._of_layout = [_Pools(self._layouts[rows - self._first_scene], rows, LAYOUTS) for rows in self._rows[1:]]
        emoji, trained = pictures.emoji, self._rows[0]
        self._concept, self._style = emoji.concept, emoji.style
        self._of_style = _Pools(self._style[trained], trained, len(STYLES))
        self._drawings = by_way(self._concept[trained], self._style[trained], trained, len(emoji.concepts))
        # Words in a way whose drawing is held out stand for nothing: another style's would teach the wrong answer.
        held = emoji.held_out().pairs
        taught = [(c, w) for c in range(len(emoji.concepts)) for w in range(len(WAYS)) if (c, WAYS[w]) not in held]
        of_concept, ways = np.array(taught).T
        self._ways = _Pools(of_concept, ways, len(emoji.concepts))
        named, rows = tables.caption_is_name, np.arange(len(tables.caption_concept))
        self._names, self._keywords = (
            _Pools(tables.caption_concept[some], rows[some], len(emoji.concepts)) for some in (named, ~named)
        )

    def draw(self, step: int, size: int, shares: Sequence[float] = DOMAIN_SHARES) -> Batch:
        """shares: of emoji, panoramas and phantoms, one domain after the other."""
        pick = np.random.default_rng([step, 7])
        counts = [round(size * share) for share in shares[1:]]
        parts = [self._emoji(pick, size - sum(counts))]
        parts += [self._scenes(pick, domain, count) for domain, count in enumerate(counts, start=1)]
        return _joined([part for part in parts if len(part.rows)])

    def shown(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Pictures (B, 256), some of them several in any proportions, and their styles' places in READ (B,), of scenes
        one more.
        """
        pick = np.random.default_rng([step, 10])
        domain = pick.choice(len(self._rows), size, p=DOMAIN_SHARES)
        rows = np.stack([pick.choice(rows, size) for rows in self._rows])
        drawn = self._style_or_content(pick, rows[0], pick.random(size) < TOGETHER_SHARE)
        image = torch.where(index(domain == 0)[:, None], drawn, self._shown(pick, rows[domain, np.arange(size)]))
        return image, index(np.where(domain == 0, NUMBER_OF[self._style[rows[0]]], len(READ)))

    def ask(self, step: int, size: int) -> Asked:
        """Words of anything that was learned beside a picture of any style, whether they were learned together or not.

        Each style as often as any other, and some beside a scene, which is none of theirs.
        """
        pick = np.random.default_rng([step, 8])
        said = pick.choice(len(self._rows), size, p=DOMAIN_SHARES)
        shown = np.where(pick.random(size) < STRAY_SHARE, pick.choice(len(self._rows), size), said)
        meant, seen = (np.stack([pick.choice(rows, size) for rows in self._rows]) for _ in range(2))
        yes = np.ones(size, dtype=bool)
        seen[0] = self._of_style.draw(pick, pick.integers(0, len(STYLES), size))
        drawn = self._style_or_content(pick, seen[0], yes)
        every = np.arange(size)
        seen = seen[shown, every]
        image = torch.where(index(shown == 0)[:, None], drawn, self._shown(pick, seen))
        captions = self._tables.scene_captions
        scene = np.maximum(meant[said, every] - self._first_scene, 0)
        of_scenes = captions[index(scene), index(pick.integers(0, captions.shape[1], size))]
        text = torch.where(index(said == 0)[:, None], self._said(pick, self._concept[meant[0]]), of_scenes)
        return Asked(text, image, meant[said, every], seen)

    def _emoji(self, pick: np.random.Generator, size: int) -> Batch:
        rows = pick.choice(self._rows[0], size)
        has_text, in_its_style = _given(pick, size, BOTH_SHARE, WORDS_SHARE)
        way = self._ways.draw(pick, self._concept[rows])
        rows = np.where(in_its_style, rows, self._drawings[way, self._concept[rows]])
        way = np.where(in_its_style, NUMBER_OF[self._style[rows]], way)
        text = self._said(pick, self._concept[rows])
        return _batch(text, self._shown(pick, rows), has_text, ~has_text, rows, way)

    def _said(self, pick: np.random.Generator, concepts: np.ndarray) -> Tensor:
        """(B, 512): a caption of each."""
        by_name = (pick.random(len(concepts)) < NAME_SHARE) | ~self._keywords.has(concepts)
        captions = np.where(by_name, self._names.draw(pick, concepts), self._keywords.draw(pick, concepts))
        return self._tables.captions[index(captions)]

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


def by_way(concept: np.ndarray, style: np.ndarray, rows: np.ndarray, concepts: int) -> np.ndarray:
    """(WAYS, concepts): the row that words alone mean. A concept not drawn in a way's style is drawn in the first that
    there is, those of WAYS before the others; -1 where there is none at all.
    """
    of_style = np.full((len(STYLES), concepts), -1)
    of_style[style, concept] = rows
    ordered = of_style[list(READ)]
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
