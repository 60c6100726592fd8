"""The pack's own sampler, for the small model and for Stable Diffusion from words alone."""

import functools
import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..conditioning import FusedConditioning
from .panorama import continued, cut, meeting

Shown = tuple[list[Tensor], list[Tensor]]


def denoise(
    unet: Any,
    scheduler: Any,
    noise: Tensor,
    conditioning: FusedConditioning,
    *,
    num_inference_steps: int,
    guidance_scale: float,
    start_noise: float,
    generators: list[torch.Generator],
    sigmas: Sequence[float] | None = None,
    image_embeds: Shown | None = None,
    closes: bool = False,
    on_step: Callable[[int, int, Tensor], None],
) -> Tensor:
    """Noise (B, C, h, w) -> latents, for a condition of B entries on the same device.

    With a grid, the walk starts at the mean picture plus a little noise (arXiv 2310.03725) and the denoiser sees that
    mean in its channels; without one, it starts at noise alone. guidance_scale above 1 steers away from the negative
    (arXiv 2207.12598). generators: for schedulers that add noise of their own. sigmas: in place of the scheduler's own
    steps, for Euler's method, from the first to the last. image_embeds: of pictures that an IP-Adapter shows, and in
    place of them. closes: a panorama, which the denoiser sees continued at both ends.
    """
    negative = conditioning.negative
    columns = noise.shape[-1]
    grid = _on_grid(conditioning, columns)
    if grid is not None:
        # Straight steps from sigma 1 down to 1/steps; the scheduler adds the final 0.
        sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps).tolist()
        scheduler.set_timesteps(sigmas=sigmas, device=noise.device)
        latents = grid + start_noise * noise
    elif sigmas is not None:
        scheduler, start = _along(sigmas, scheduler, noise.device)
        latents = start * noise
    else:
        scheduler.set_timesteps(num_inference_steps, device=noise.device)
        latents = noise * scheduler.init_noise_sigma
    shown, hidden = image_embeds or (None, None)
    options = {"generator": generators} if _adds_noise(type(scheduler)) else {}
    for number, timestep in enumerate(scheduler.timesteps):
        seen = latents if grid is not None else scheduler.scale_model_input(latents, timestep)
        predicted = _predict(unet, seen, timestep, conditioning.tokens, grid, shown, closes)
        if guidance_scale > 1 and negative is not None:
            away = _predict(unet, seen, timestep, negative.tokens, _on_grid(negative, columns), hidden, closes)
            predicted = away + guidance_scale * (predicted - away)
        latents = scheduler.step(predicted, timestep, latents, return_dict=False, **options)[0]
        on_step(number + 1, len(scheduler.timesteps), latents)
    return latents


@functools.cache  # a tenth of a millisecond, in every run
def _adds_noise(kind: Any) -> bool:
    return "generator" in inspect.signature(kind.step).parameters


def stretched(grid: Tensor, columns: int) -> Tensor:
    """(B, C, h, w) -> (B, C, h, columns): half a panorama's mean picture, with each column twice, closing."""
    times, rest = divmod(columns, grid.shape[-1])
    if rest or not times:
        raise ValueError(f"expected whole times {grid.shape[-1]} columns, got {columns}")
    return meeting(grid).repeat_interleave(times, dim=-1) if times > 1 else grid


def _along(sigmas: Sequence[float], scheduler: Any, device: torch.device) -> tuple[Any, float]:
    """Euler's method (arXiv 2206.00364, algorithm 1 without its second order) along a host's sigmas, with the betas of
    ``scheduler``, and how much noise it starts from, as the host has both.

    The denoiser is told whole timesteps, the nearest. From the very top the start has the variance that it sees there,
    sqrt(1 + sigma^2); from below it is sigma, for what is to come on top of a picture.
    """
    euler_class: Any = importlib.import_module("diffusers").EulerDiscreteScheduler
    euler = euler_class.from_config(scheduler.config, timestep_type="discrete")
    top = float(euler.sigmas.max())
    euler.set_timesteps(sigmas=list(sigmas), device=device)
    euler.timesteps = euler.timesteps.round()
    euler.set_begin_index(0)  # else it is looked up by the timestep, of which there may be two alike
    first = sigmas[0]
    return euler, math.sqrt(1 + first**2) if first > top or math.isclose(first, top, rel_tol=1e-5) else first


def _predict(
    unet: Any,
    latents: Tensor,
    timestep: Tensor,
    tokens: Tensor,
    grid: Tensor | None,
    shown: list[Tensor] | None,
    closes: bool,
) -> Tensor:
    seen = latents if grid is None else torch.cat([latents, grid], dim=1)
    seen = continued(seen) if closes else seen
    added = None if shown is None else {"image_embeds": shown}
    predicted = unet(seen, timestep, encoder_hidden_states=tokens, added_cond_kwargs=added, return_dict=False)[0]
    return cut(predicted) if closes else predicted


def _on_grid(conditioning: FusedConditioning, columns: int) -> Tensor | None:
    if conditioning.grid is None:
        return None
    return stretched(conditioning.tokens.transpose(1, 2).unflatten(2, conditioning.grid), columns)
