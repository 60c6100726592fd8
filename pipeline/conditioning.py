"""The values that flow between stages. Nothing here computes; every field states its shape."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Space:
    """Where an embedding lives: two embeddings may meet only if their spaces say that they fit.

    model: identity of the weights that made it, e.g. "duet-mini/text_encoder"; layer: which output of them, e.g.
    "text_embeds"; width: channels of ``tokens``.
    """

    model: str
    layer: str
    width: int

    def __str__(self) -> str:
        return f"{self.model} · {self.layer} · {self.width} wide"


@dataclass(frozen=True)
class PromptEmbeds:
    """Words. tokens: (B, L, D); pooled: (B, P) or None; mask: (B, L) bool, True where a token counts.

    second: what another encoder says of the same words, where the denoiser listens to the two apart (HunyuanDiT).
    notices: sentences for the user, such as which part of the prompt the tokenizer does not know.
    """

    tokens: Tensor
    pooled: Tensor | None
    mask: Tensor
    space: Space
    negative: "PromptEmbeds | None" = None
    notices: tuple[str, ...] = ()
    second: "PromptEmbeds | None" = None


@dataclass(frozen=True)
class ImageFeatures:
    """A picture. tokens: (B, h*w, D) in row order; pooled: (B, P); grid: (h, w).

    weight: (B, h*w) in 0..1, how much of each token's place lies in the region asked for; None where all of it does.
    gram: (B, D, D), the Gram statistics of the tokens, which tell the style (arXiv 1508.06576); None unless asked for.
    """

    tokens: Tensor
    pooled: Tensor
    grid: tuple[int, int]
    space: Space
    notices: tuple[str, ...] = ()
    weight: Tensor | None = None
    gram: Tensor | None = None


@dataclass(frozen=True)
class FusedConditioning:
    """What the generator listens to. tokens: (B, N, D); pooled: (B, P) or None; mask: (B, N) bool.

    grid: (h, w) where the tokens lie on the latents' own grid, else None; N is h*w, or that for each of several ways to
    draw the same, one after the other (``fusing.ways``). second: as in PromptEmbeds.
    """

    tokens: Tensor
    pooled: Tensor | None
    mask: Tensor
    space: Space
    grid: tuple[int, int] | None = None
    negative: "FusedConditioning | None" = None
    notices: tuple[str, ...] = ()
    second: "FusedConditioning | None" = None


def all_numbers(value: PromptEmbeds | ImageFeatures | FusedConditioning) -> bool:
    """Whether no tensor of it holds NaN or infinity."""
    for field in fields(value):
        part = getattr(value, field.name)
        if isinstance(part, Tensor) and not torch.isfinite(part).all():
            return False
        if isinstance(part, PromptEmbeds | FusedConditioning) and not all_numbers(part):
            return False
    return True


@dataclass(frozen=True)
class GenerationReport:
    """What a run of the generator cost, and what its shortcuts cost in turn. All of it was measured, in that run.

    plan: the speed plan's name; shortcuts: those of its dials that were on, in words. milliseconds: by stage, in the
    order they ran. steps_computed and steps_skipped: calls of the denoiser that ran all of it, and that took part or
    all of their prediction from an earlier one; guidance in two calls counts each. blocks_computed and blocks_skipped:
    of the denoiser in those calls, where a cache counts them, else 0. dtype: the denoiser's, such as "float16"; device:
    such as "cuda:0". cache_hits, cache_misses: uses of models in the run that were at hand, and that were read.
    model_bytes: of the models used, each once; peak_bytes: on CUDA the most that was allocated on the device, on a CPU
    the most that the process grew by, None where that cannot be told. retries: the stages that were computed a second
    time, in float32. psnr, in dB and infinite where nothing differs, and ssim, at most 1: the pictures against the same
    without a shortcut, over white; None unless it was asked for.
    """

    plan: str
    milliseconds: Mapping[str, float]
    steps_computed: int
    steps_skipped: int
    dtype: str
    device: str
    cache_hits: int
    cache_misses: int
    model_bytes: int
    peak_bytes: int | None
    blocks_computed: int = 0
    blocks_skipped: int = 0
    retries: tuple[str, ...] = ()
    psnr: float | None = None
    ssim: float | None = None
    shortcuts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pictures:
    """Finished pictures. pixels: (B, 3, H, W) in 0..1, not premultiplied; alpha: (B, 1, H, W) in 0..1.

    milliseconds: time spent by stage name ("generation", "decode"); report: what the run cost; notices: sentences for
    the user. latents: (B, C, h, w) on the CPU, what was decoded, scaled as the denoiser has them; None where they have
    no grid.
    """

    pixels: Tensor
    alpha: Tensor
    milliseconds: dict[str, float]
    report: GenerationReport
    notices: tuple[str, ...] = ()
    latents: Tensor | None = None
