"""A fused condition pulled towards a picture's features by gradient, no further from its start than asked for."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checkpoints import Checkpoint
from .conditioning import FusedConditioning, ImageFeatures
from .denoising.latents import for_decoder
from .fusing.ways import in_one_way
from .model_cache import ModelCache
from .vision.gram import gram_matrix

MOST_STEPS, LARGEST_RADIUS, LONGEST = 500, 2.0, 3600.0
_STRIDE, _MOMENTUM = 0.1, 0.9  # of the radius in the first step; of the direction that is kept
_ROUGHNESS = 4.0  # weight of what is rougher than the start; chosen on 16 pairs by the judge of benchmarks/refine.py
_LAYER = "pooler_output"

Preview = Callable[[], Tensor]
OnStep = Callable[[int, int, float, Preview], None]


@dataclass(frozen=True)
class Refinement:
    """losses: before the first step and after each, the mean over the batch; similarity: cosine of the picture's pooled
    features with the reference's, before and after, likewise; moved: how far the tokens went, relative to their length.
    """

    conditioning: FusedConditioning
    losses: tuple[float, ...]
    similarity: tuple[float, float]
    moved: float


@dataclass(frozen=True)
class _Point:
    """Each (B,): the loss, and the cosine alone. pixels: (B, 3, H, W), the picture that the tokens are."""

    loss: Tensor
    cosine: Tensor
    pixels: Tensor


def refine(
    cache: ModelCache,
    checkpoint: Checkpoint,
    conditioning: FusedConditioning,
    image: ImageFeatures,
    *,
    radius: float = 0.5,
    num_steps: int = 20,
    seconds: float = 30.0,
    on_step: OnStep | None = None,
) -> Refinement:
    """Descend from the condition to one whose picture has more of the reference's features.

    The tokens are a first picture on the latents' grid; it is decoded, laid over white and seen by the image encoder.
    The loss is 1 - cosine of the pooled features; where ``image`` carries Gram statistics, the mean of that and
    1 - cosine of those, which follows the style (arXiv 1508.06576). A picture that becomes rougher than the start, by
    its total variation, pays for it: what only the encoder could see is mostly noise. Steps of a length that falls to
    zero, with momentum, each projected back on a ball around the start: projected gradient descent, as in
    arXiv 1706.06083.
    radius: of that ball, relative to the length of each entry's tokens; 0.5 keeps what the words say. The best point
    of each entry is kept, so that it is never worse than the start. A batch of one meets a batch of any size. Of a
    condition that words leave open in several ways, the first is refined and returned alone.
    on_step(step, total, loss, preview) is called after each; preview() is the first picture, RGB (3, h, w) in 0..1;
    what it raises stops the run. When ``seconds`` have passed, the run ends after the step under way, with a notice.
    Works inside inference mode too. Raises ValueError for numbers out of range or a model or features that do not fit,
    FloatingPointError where the loss is no number.
    """
    _check(checkpoint, conditioning, image, radius, num_steps, seconds)
    conditioning = in_one_way(conditioning, [0] * conditioning.tokens.shape[0])
    started = time.perf_counter()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        checkpoint.use(cache, "vae") as vae,
        checkpoint.use(cache, "image_encoder") as encoder,
    ):
        # Clones, because autograd refuses what was made in inference mode.
        start = conditioning.tokens.to(next(vae.parameters())).clone()
        target = replace(image, pooled=image.pooled.clone(), gram=None if image.gram is None else image.gram.clone())
        start = start.expand(max(start.shape[0], image.pooled.shape[0]), -1, -1)
        grid = conditioning.grid or (1, 1)

        roughness = _roughness(_picture(vae, start, grid)).detach()

        def at(tokens: Tensor) -> _Point:
            return _seen(encoder, _picture(vae, tokens, grid), target, roughness)

        best, losses, cosines, done = _descend(at, start, radius, num_steps, started + seconds, on_step)
    notices = list(conditioning.notices)
    if done < num_steps:
        notices.append(f"refined {done} of {num_steps} steps, when its {seconds:g} seconds were over")
    refined = replace(
        conditioning,
        tokens=best.to(conditioning.tokens),
        mask=conditioning.mask.expand(best.shape[0], -1),
        notices=tuple(notices),
    )
    moved = _length(best - start) / _length(start)
    return Refinement(refined, losses, cosines, moved.mean().item())


def _descend(
    at: Callable[[Tensor], _Point],
    start: Tensor,
    radius: float,
    num_steps: int,
    deadline: float,
    on_step: OnStep | None,
) -> tuple[Tensor, tuple[float, ...], tuple[float, float], int]:
    """The best tokens, the losses, the cosine before and after, and how many steps were done."""
    ball = radius * _length(start)
    tokens, direction = start, torch.zeros_like(start)
    point, slope = _slope(at, tokens)
    best, best_loss, best_cosine, first_cosine = tokens, point.loss, point.cosine, point.cosine
    losses, step = [point.loss.mean().item()], 0
    while step < num_steps and (step == 0 or time.perf_counter() < deadline):
        direction = _MOMENTUM * direction + slope / _length(slope).clamp(min=1e-12)
        stride = _STRIDE * ball * (1 - step / num_steps)
        away = tokens - stride * direction / _length(direction).clamp(min=1e-12) - start
        tokens = start + away * (ball / _length(away).clamp(min=1e-12)).clamp(max=1)
        point, slope = _slope(at, tokens)
        better = (point.loss < best_loss)[:, None, None]
        best = torch.where(better, tokens, best)
        best_cosine = torch.where(better[:, 0, 0], point.cosine, best_cosine)
        best_loss = torch.minimum(point.loss, best_loss)
        losses.append(point.loss.mean().item())
        step += 1
        if on_step is not None:
            on_step(step, num_steps, losses[-1], lambda shown=point.pixels[0]: shown.clamp(0, 1).float().cpu())
    return best, tuple(losses), (first_cosine.mean().item(), best_cosine.mean().item()), step


def _slope(at: Callable[[Tensor], _Point], tokens: Tensor) -> tuple[_Point, Tensor]:
    """The point, and the gradient of its loss, without a graph."""
    free = tokens.detach().requires_grad_()
    point = at(free)
    if not torch.isfinite(point.loss).all():
        raise FloatingPointError("refining gave a loss that is no number")
    (slope,) = torch.autograd.grad(point.loss.sum(), free)
    return _Point(point.loss.detach(), point.cosine.detach(), point.pixels.detach()), slope


def _picture(vae: Any, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The picture that the tokens are, over white: (B, 3, H, W). The VAE's four channels are premultiplied RGBA."""
    latents = tokens.transpose(1, 2).unflatten(2, grid)
    values = (vae.decode(for_decoder(vae, latents), return_dict=False)[0] + 1) / 2
    return values if values.shape[1] == 3 else values[:, :3] + 1 - values[:, 3:]


def _seen(encoder: Any, pixels: Tensor, target: ImageFeatures, roughness: Tensor) -> _Point:
    """What the encoder makes of the picture. roughness: (B,), of the start."""
    output = encoder((2 * pixels - 1).to(encoder.dtype))
    cosine = _cosine(output.pooler_output.flatten(1), target.pooled)
    loss = 1 - cosine
    if target.gram is not None:
        found = gram_matrix(output.last_hidden_state.flatten(2).transpose(1, 2))
        loss = (loss + 1 - _cosine(found.flatten(1), target.gram.flatten(1))) / 2
    return _Point(loss + _ROUGHNESS * (_roughness(pixels) - roughness).clamp(min=0), cosine, pixels)


def _roughness(pixels: Tensor) -> Tensor:
    """Total variation, the mean difference of neighbours: (B, 3, H, W) -> (B,)."""
    across, down = pixels.diff(dim=-1), pixels.diff(dim=-2)
    return across.abs().mean(dim=(1, 2, 3)) + down.abs().mean(dim=(1, 2, 3))


def _cosine(found: Tensor, wanted: Tensor) -> Tensor:
    return F.cosine_similarity(found.float(), wanted.to(found.device).float(), dim=-1)


def _length(tokens: Tensor) -> Tensor:
    """(B, N, D) -> (B, 1, 1)."""
    return tokens.norm(dim=(1, 2), keepdim=True)


def _check(
    checkpoint: Checkpoint,
    conditioning: FusedConditioning,
    image: ImageFeatures,
    radius: float,
    num_steps: int,
    seconds: float,
) -> None:
    for name, value, low, high in (
        ("radius", radius, 0, LARGEST_RADIUS),
        ("steps", num_steps, 1, MOST_STEPS),
        ("seconds", seconds, 0, LONGEST),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name} must be {low} to {high:g}, got {value}")
    if not (checkpoint.has("fusion") and checkpoint.has("image_encoder")):
        raise ValueError(
            f"expected a model with a fusion network and an image encoder, whose condition is a first picture; "
            f"{checkpoint.folder.name} is none"
        )
    fused, seen = checkpoint.identity_of("fusion"), checkpoint.identity_of("image_encoder")
    if conditioning.space.model != fused or conditioning.grid is None:
        raise ValueError(f"expected a condition of {fused}, got one of {conditioning.space}")
    if (image.space.model, image.space.layer) != (seen, _LAYER):
        raise ValueError(f"expected {_LAYER} of {seen}, got features of {image.space}")
    sizes = conditioning.tokens.shape[0], image.pooled.shape[0]
    if 1 not in sizes and sizes[0] != sizes[1]:
        raise ValueError(
            f"expected batches of one size, or one of them of size 1, got {sizes[0]} conditions and {sizes[1]} pictures"
        )
