"""FusedConditioning -> pictures: a few denoising steps, then the decoder."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checkpoints import Checkpoint
from .conditioning import FusedConditioning, Pictures
from .model_cache import ModelCache
from .resizing import fit_to

SMALLEST_SIDE, LARGEST_SIDE, LARGEST_BATCH = 16, 4096, 64
MOST_STEPS = 1000

Preview = Callable[[], Tensor]
OnStep = Callable[[int, int, Preview], None]


@dataclass(frozen=True)
class _Frame:
    """What is denoised, and what comes out: the two differ where a model knows one size only."""

    width: int
    height: int
    out_width: int
    out_height: int
    notices: tuple[str, ...]


def generate(
    cache: ModelCache,
    checkpoint: Checkpoint,
    conditioning: FusedConditioning,
    *,
    seed: int,
    num_inference_steps: int = 4,
    guidance_scale: float = 1.0,
    width: int = 512,
    height: int = 512,
    batch_size: int = 1,
    on_step: OnStep | None = None,
) -> Pictures:
    """``batch_size`` pictures for each entry of the conditioning's batch, in that order.

    Picture i starts from noise seeded ``seed + i`` on the CPU, so each equals its own single run and every device gives
    the same start. guidance_scale above 1 steers away from the negative prompt (arXiv 2207.12598) at twice the work.
    on_step(step, total, preview) is called after each step; preview() decodes what there is to RGB (3, h, w) in 0..1,
    and an exception raised there stops the run within a step. Sizes that the model cannot make are rounded, or the
    picture resized, and a notice says so. Raises ValueError on numbers out of range or a condition of another model's
    space, FloatingPointError where the model gives no numbers.
    """
    _check_numbers(num_inference_steps, guidance_scale, width, height, batch_size)
    _check_space(checkpoint, conditioning)
    frame = _frame(checkpoint, width, height)
    count = conditioning.tokens.shape[0] * batch_size
    started = time.perf_counter()
    with checkpoint.use(cache, "vae") as vae, checkpoint.use(cache, "unet") as unet, torch.inference_mode():
        place = {"device": unet.device, "dtype": unet.dtype}
        shape = (
            unet.config.out_channels,
            frame.height // checkpoint.family.downscale,
            frame.width // checkpoint.family.downscale,
        )
        noise = _noise(shape, seed, count).to(**place)
        latents = _denoise(
            unet,
            checkpoint.scheduler(),
            noise,
            _repeated(conditioning, batch_size, place),
            num_inference_steps,
            guidance_scale if conditioning.negative is not None else 1.0,
            start_noise=checkpoint.family.start_noise,
            on_step=lambda step, now: (
                on_step(step, num_inference_steps, lambda: _preview(vae, now)) if on_step else None
            ),
        )
        if not torch.isfinite(latents).all():
            raise FloatingPointError(
                f"{checkpoint.folder.name}: denoising gave values that are no numbers; no picture was made"
            )
        denoised = time.perf_counter()
        pixels, alpha = _decode(vae, latents)
        pixels, alpha = _resized(pixels.float().cpu(), alpha.float().cpu(), frame)
    if not torch.isfinite(pixels).all():
        raise FloatingPointError(
            f"{checkpoint.folder.name}: decoding gave values that are no numbers; no picture was made"
        )
    spent = {"generation": 1000 * (denoised - started), "decode": 1000 * (time.perf_counter() - denoised)}
    # The latents go along for the host's own nodes, which decode, upscale and sample them further.
    return Pictures(pixels, alpha, spent, conditioning.notices + frame.notices, latents.float().cpu())


@dataclass(frozen=True)
class _Listening:
    """The condition as the denoiser takes it: (B, N, D) tokens, also as (B, D, h, w) where they lie on a grid."""

    tokens: Tensor
    negative: Tensor | None
    grid: Tensor | None
    negative_grid: Tensor | None


def _denoise(
    unet: Any,
    scheduler: Any,
    noise: Tensor,
    condition: _Listening,
    steps: int,
    guidance_scale: float,
    *,
    start_noise: float,
    on_step: Callable[[int, Tensor], None],
) -> Tensor:
    """The sampler. With a grid, the walk starts at the mean picture plus a little noise (arXiv 2310.03725) and the
    denoiser sees that mean in its channels; without one, it starts at noise alone."""
    if condition.grid is not None:
        # Straight steps from sigma 1 down to 1/steps; the scheduler adds the final 0.
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist(), device=noise.device)
        latents = condition.grid + start_noise * noise
    else:
        scheduler.set_timesteps(steps, device=noise.device)
        latents = noise * scheduler.init_noise_sigma
    for number, timestep in enumerate(scheduler.timesteps):
        seen = latents if condition.grid is not None else scheduler.scale_model_input(latents, timestep)
        predicted = _predict(unet, seen, timestep, condition.tokens, condition.grid)
        if guidance_scale > 1 and condition.negative is not None:
            away = _predict(unet, seen, timestep, condition.negative, condition.negative_grid)
            predicted = away + guidance_scale * (predicted - away)
        latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
        on_step(number + 1, latents)
    return latents


def _predict(unet: Any, latents: Tensor, timestep: Tensor, tokens: Tensor, grid: Tensor | None) -> Tensor:
    seen = latents if grid is None else torch.cat([latents, grid], dim=1)
    return unet(seen, timestep, encoder_hidden_states=tokens, return_dict=False)[0]


def _decode(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Latents -> RGB (B, 3, H, W) and alpha (B, 1, H, W) in 0..1. A fourth channel is alpha, colour premultiplied."""
    config = vae.config
    shift = getattr(config, "shift_factor", None) or 0.0
    decoded = vae.decode(latents.to(vae.dtype) / config.scaling_factor + shift, return_dict=False)[0]
    values = ((decoded + 1) / 2).clamp(0, 1)
    if values.shape[1] == 3:
        return values, torch.ones_like(values[:, :1])
    alpha = values[:, 3:]
    return (values[:, :3] / alpha.clamp(min=1 / 255)).clamp(0, 1), alpha


def _preview(vae: Any, latents: Tensor) -> Tensor:
    """The first picture over white, RGB (3, h, w)."""
    pixels, alpha = _decode(vae, latents[:1])
    return (pixels * alpha + 1 - alpha)[0]


def _noise(shape: tuple[int, int, int], seed: int, count: int) -> Tensor:
    return torch.stack(
        [
            torch.randn(shape, generator=torch.Generator("cpu").manual_seed((seed + number) % 2**64))
            for number in range(count)
        ]
    )


def _repeated(conditioning: FusedConditioning, times: int, place: dict[str, Any]) -> _Listening:
    tokens = conditioning.tokens.repeat_interleave(times, dim=0).to(**place)
    negative = None
    if conditioning.negative is not None:
        negative = conditioning.negative.tokens.expand(conditioning.tokens.shape[0], -1, -1)
        negative = negative.repeat_interleave(times, dim=0).to(**place)
    grid = conditioning.grid
    if grid is None:
        return _Listening(tokens, negative, None, None)

    def on_grid(side: Tensor) -> Tensor:
        return side.transpose(1, 2).unflatten(2, grid)

    return _Listening(tokens, negative, on_grid(tokens), on_grid(negative) if negative is not None else None)


def _frame(checkpoint: Checkpoint, width: int, height: int) -> _Frame:
    family, asked = checkpoint.family, (width, height)
    if family.fixed_size:
        side = family.native_size
        told = f"made at {side}x{side}, the model's one size, and resized to {width}x{height}"
        return _Frame(side, side, width, height, () if asked == (side, side) else (told,))
    step = family.size_multiple
    width, height = (max(step, round(side / step) * step) for side in asked)
    told = f"{asked[0]}x{asked[1]} rounded to {width}x{height}, multiples of {step}"
    return _Frame(width, height, width, height, () if asked == (width, height) else (told,))


def _resized(pixels: Tensor, alpha: Tensor, frame: _Frame) -> tuple[Tensor, Tensor]:
    if pixels.shape[-2:] == (frame.out_height, frame.out_width):
        return pixels, alpha
    # Padded with transparency, so nothing is cut off; weighted by alpha, or hidden colour bleeds into the edges.
    both = fit_to(torch.cat([pixels * alpha, alpha], dim=1), frame.out_width, frame.out_height, "pad")
    return (both[:, :3] / both[:, 3:].clamp(min=1 / 255)).clamp(0, 1), both[:, 3:].clamp(0, 1)


def _check_numbers(steps: int, guidance_scale: float, width: int, height: int, batch_size: int) -> None:
    for name, value, low, high in (
        ("steps", steps, 1, MOST_STEPS),
        ("width", width, SMALLEST_SIDE, LARGEST_SIDE),
        ("height", height, SMALLEST_SIDE, LARGEST_SIDE),
        ("batch size", batch_size, 1, LARGEST_BATCH),
        ("guidance scale", guidance_scale, 0, 100),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name} must be {low} to {high}, got {value}")


def _check_space(checkpoint: Checkpoint, conditioning: FusedConditioning) -> None:
    expected = checkpoint.identity_of("fusion" if checkpoint.has("fusion") else "text_encoder")
    if conditioning.space.model != expected:
        raise ValueError(f"expected a condition of {expected}, got one of {conditioning.space}")
