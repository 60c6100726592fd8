"""Many pictures as one job: seeds of one condition, or prompts x seeds x strengths; each equals its own single run."""

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .checkpoints import Checkpoint
from .conditioning import FusedConditioning, GenerationReport, ImageFeatures, Pictures, PromptEmbeds
from .fusing.ways import in_one_way
from .fusion import fuse
from .generation import OnStep, Preview, drawn_in_turn, planned
from .image_encoder import encode_image
from .model_cache import ModelCache
from .store.embedding_store import EmbeddingStore
from .store.recall import recalled
from .text_encoder import encode_prompt

MOST_PICTURES = 1024
MOST_PIXELS = 2**28  # of all pictures together, three gigabytes of them
LARGEST_CHUNK = 64
_BETWEEN_NUMBERS = re.compile(r"[\s,;\u3001\uff0c\uff1b]+")


@dataclass(frozen=True)
class Cell:
    """One picture of a grid. strength: None where there is no picture that it could weigh."""

    prompt: str
    seed: int
    strength: float | None


@dataclass(frozen=True)
class Grid:
    """Pictures and what each of them is, in the order prompt, seed, strength, the last of them the fastest.

    columns: strengths where there are several, else seeds; the rows are what is left.
    """

    pictures: Pictures
    cells: tuple[Cell, ...]
    columns: int

    @property
    def row_labels(self) -> list[str]:
        firsts = self.cells[:: self.columns]
        by_seed = len({cell.seed for cell in firsts}) > 1
        return [f"seed {cell.seed}: {cell.prompt}" if by_seed else cell.prompt for cell in firsts]

    @property
    def column_labels(self) -> list[str]:
        row = self.cells[: self.columns]
        by_strength = row[0].strength != row[-1].strength
        return [f"{cell.strength:g}" if by_strength else f"seed {cell.seed}" for cell in row]


def draw_variants(
    cache: ModelCache,
    checkpoint: Checkpoint,
    conditioning: FusedConditioning,
    seeds: Sequence[int],
    *,
    at_once: int = 8,
    on_step: OnStep | None = None,
    **settings: Any,
) -> Pictures:
    """One picture of a condition (a batch of one) for each seed, ``at_once`` of them in a batch.

    Each is the picture that ``generate`` gives for that seed alone; what a batch changes is the order of additions,
    which some kernels choose by its size. settings: as ``generate`` takes them. on_step counts over the whole.
    The report adds up over the chunks; its psnr and ssim are those of the worst. Raises ValueError for no seeds, for
    more than MOST_PICTURES or MOST_PIXELS, for pictures to start from other than one, and as ``generate`` does.
    """
    given = {"condition": conditioning.tokens}
    if settings.get("image") is not None:
        given["picture to start from"] = settings["image"]
    for name, entries in given.items():
        if (count := entries.shape[0]) != 1:
            raise ValueError(f"expected one {name}, got a batch of {count}: let Generate draw it")
    return _draw(cache, checkpoint, [(conditioning, seed) for seed in seeds], at_once, on_step, settings)


def draw_grid(
    cache: ModelCache,
    checkpoint: Checkpoint,
    prompts: Sequence[str],
    seeds: Sequence[int],
    strengths: Sequence[float] = (),
    *,
    negative_prompt: str | None = None,
    image: Tensor | None = None,
    mask: Tensor | None = None,
    method: str = "concat",
    at_once: int = 8,
    store: EmbeddingStore | None = None,
    on_step: OnStep | None = None,
    **settings: Any,
) -> Grid:
    """Every prompt with every seed and every strength; each cell is what the single stages give for the three.

    A prompt is encoded once however often it comes, and the picture once. image: (1, 3, H, W) in 0..1 and mask:
    (1, H, W), as ``encode_image`` takes them; without one, strengths have no meaning and are left out. method,
    strengths: as ``fuse`` has them. store: where embeddings are looked up first. The rest is as in ``draw_variants``.
    """
    if image is None:
        strengths = ()
    elif not strengths:
        raise ValueError("expected at least one strength for the picture, got none")
    if not prompts:
        raise ValueError("expected at least one prompt, got none")
    # Before anything is encoded.
    _check_count(len(prompts) * len(seeds) * (len(strengths) or 1), at_once, settings)
    if image is not None and image.shape[0] != 1:
        raise ValueError(f"expected one picture for the whole grid, got {image.shape[0]}")
    for strength in strengths:
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must be 0 (words alone) to 1 (picture alone), got {strength:g}")
    started = time.perf_counter()
    words = {prompt: _words(cache, checkpoint, store, prompt, negative_prompt) for prompt in dict.fromkeys(prompts)}
    told = time.perf_counter()
    features = None if image is None else _features(cache, checkpoint, store, image, mask)
    seen = time.perf_counter()
    weights = [*strengths] or [None]
    conditions = {
        (prompt, weight): fuse(
            cache, checkpoint, embeds, features, method=method, strength=0.0 if weight is None else weight
        )
        for prompt, embeds in words.items()
        for weight in weights
    }
    fused = time.perf_counter()
    cells = tuple(Cell(prompt, seed, weight) for prompt in prompts for seed in seeds for weight in weights)
    jobs = [(conditions[cell.prompt, cell.strength], cell.seed) for cell in cells]
    pictures = _draw(cache, checkpoint, jobs, at_once, on_step, settings)
    spent = {"text": told - started, "features": seen - told, "fusion": fused - seen}
    before = {name: 1000 * seconds for name, seconds in spent.items() if name != "features" or image is not None}
    columns = len(strengths) if len(strengths) > 1 else len(seeds)
    return Grid(replace(pictures, milliseconds=before | pictures.milliseconds), cells, columns)


def read_prompts(text: str) -> list[str]:
    """One prompt a line; empty lines are none."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_strengths(text: str) -> list[float]:
    """Numbers from 0 to 1 with commas, semicolons or blanks between them. Raises ValueError naming one that is none."""
    found = []
    for part in filter(None, _BETWEEN_NUMBERS.split(text)):
        try:
            number = float(part)
        except ValueError:
            number = math.nan
        if not 0 <= number <= 1:
            raise ValueError(f"expected strengths such as 0.25, 0.5, 0.75, each from 0 to 1, got {part[:40]!r}")
        found.append(number)
    return list(dict.fromkeys(found))


def _draw(
    cache: ModelCache,
    checkpoint: Checkpoint,
    jobs: Sequence[tuple[FusedConditioning, int]],
    at_once: int,
    on_step: OnStep | None,
    settings: dict[str, Any],
) -> Pictures:
    _check_count(len(jobs), at_once, settings)
    # In the way that each seed takes, since those that the words leave open make conditions of other sizes.
    chunks = _chunks([(in_one_way(condition, [seed]), seed) for condition, seed in jobs], at_once)
    drawings = (
        planned(
            cache,
            checkpoint,
            _joined([condition for condition, _ in chunk]),
            seed=[seed for _, seed in chunk],
            on_step=_over_the_whole(on_step, number, len(chunks)),
            **settings,
        )
        for number, chunk in enumerate(chunks)
    )
    # On a CPU the two only take the cores from each other: .96 to 1.26 of the time, see docs/benchmarks.md.
    beside = cache.residency.device.type != "cpu"
    sides: dict[str, Tensor | None] = {}
    reports, notices, drawn = [], {}, 0
    for number, (chunk, pictures) in enumerate(zip(chunks, drawn_in_turn(drawings, beside=beside), strict=True)):
        notices |= dict.fromkeys(pictures.notices)
        reports.append(pictures.report)
        for name in ("pixels", "alpha", "latents"):
            part: Tensor | None = getattr(pictures, name)
            if number == 0:  # room for all of them, so that none is held twice
                sides[name] = None if part is None else part.new_empty(len(jobs), *part.shape[1:])
            whole = sides[name]
            if whole is not None and part is not None:
                whole[drawn : drawn + len(chunk)] = part
        drawn += len(chunk)
    report, pixels, alpha = _added_up(reports), sides["pixels"], sides["alpha"]
    assert pixels is not None and alpha is not None
    return Pictures(pixels, alpha, dict(report.milliseconds), report, tuple(notices), sides["latents"])


def _added_up(reports: Sequence[GenerationReport]) -> GenerationReport:
    def all_of(name: str) -> list[Any]:
        return [value for report in reports if (value := getattr(report, name)) is not None]

    summed = ("steps_computed", "steps_skipped", "blocks_computed", "blocks_skipped", "cache_hits", "cache_misses")
    milliseconds: dict[str, float] = {}
    for report in reports:
        for name, spent in report.milliseconds.items():
            milliseconds[name] = milliseconds.get(name, 0.0) + spent
    return replace(
        reports[0],
        **{name: sum(all_of(name)) for name in summed},
        **{name: max(all_of(name), default=None) for name in ("model_bytes", "peak_bytes")},
        **{name: min(all_of(name), default=None) for name in ("psnr", "ssim")},
        milliseconds=milliseconds,
        retries=tuple(dict.fromkeys(stage for report in reports for stage in report.retries)),
    )


def _chunks(jobs: Sequence[tuple[FusedConditioning, int]], at_once: int) -> list[list[tuple[FusedConditioning, int]]]:
    """Neighbours together, as long as their conditions are of one size: prompts of other lengths are drawn apart."""
    chunks: list[list[tuple[FusedConditioning, int]]] = []
    for job in jobs:
        if chunks and len(chunks[-1]) < at_once and _size(chunks[-1][0][0]) == _size(job[0]):
            chunks[-1].append(job)
        else:
            chunks.append([job])
    return chunks


def _size(condition: FusedConditioning | None) -> tuple[Any, ...]:
    if condition is None:
        return ()
    pooled = () if condition.pooled is None else condition.pooled.shape
    return (condition.tokens.shape, pooled, condition.grid, _size(condition.negative), _size(condition.second))


def _joined(conditions: Sequence[FusedConditioning]) -> FusedConditioning:
    """Conditions of one size as a batch."""
    first = conditions[0]
    if len(conditions) == 1:
        return first
    pooled = [condition.pooled for condition in conditions if condition.pooled is not None]
    negatives = [condition.negative for condition in conditions if condition.negative is not None]
    seconds = [condition.second for condition in conditions if condition.second is not None]
    return replace(
        first,
        tokens=torch.cat([condition.tokens for condition in conditions]),
        pooled=torch.cat(pooled) if pooled else None,
        mask=torch.cat([condition.mask for condition in conditions]),
        negative=_joined(negatives) if negatives else None,
        second=_joined(seconds) if seconds else None,
        notices=tuple(dict.fromkeys(notice for condition in conditions for notice in condition.notices)),
    )


def _over_the_whole(on_step: OnStep | None, number: int, chunks: int) -> OnStep | None:
    if on_step is None:
        return None

    def counted(step: int, total: int, preview: Preview) -> None:
        on_step(number * total + step, chunks * total, preview)

    return counted


def _words(
    cache: ModelCache, checkpoint: Checkpoint, store: EmbeddingStore | None, prompt: str, negative: str | None
) -> PromptEmbeds:
    if store is None:
        return encode_prompt(cache, checkpoint, prompt, negative)
    return recalled(store, encode_prompt, cache, checkpoint, prompt, negative)


def _features(
    cache: ModelCache, checkpoint: Checkpoint, store: EmbeddingStore | None, image: Tensor, mask: Tensor | None
) -> ImageFeatures:
    if store is None:
        return encode_image(cache, checkpoint, image, mask)
    return recalled(store, encode_image, cache, checkpoint, image, mask)


def _check_count(count: int, at_once: int, settings: dict[str, Any]) -> None:
    if not 1 <= at_once <= LARGEST_CHUNK:
        raise ValueError(f"expected 1 to {LARGEST_CHUNK} pictures at once, got {at_once}")
    if not 1 <= count <= MOST_PICTURES:
        raise ValueError(
            f"expected 1 to {MOST_PICTURES} pictures in one job (prompts x seeds x strengths), got {count:,}"
        )
    pixels = count * settings.get("width", 512) * settings.get("height", 512)
    if pixels > MOST_PIXELS:
        raise ValueError(
            f"expected at most {MOST_PIXELS:,} pixels in one job, got {count} pictures with {pixels:,}: draw fewer or "
            "smaller ones"
        )
