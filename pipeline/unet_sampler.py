"""The pack's own sampler, for the small model and for Stable Diffusion from words alone."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .conditioning import FusedConditioning


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
    on_step: Callable[[int, int, Tensor], None],
) -> Tensor:
    """Noise (B, C, h, w) -> latents, for a condition of B entries on the same device.

    With a grid, the walk starts at the mean picture plus a little noise (arXiv 2310.03725) and the denoiser sees that
    mean in its channels; without one, it starts at noise alone. guidance_scale above 1 steers away from the negative
    (arXiv 2207.12598). generators: for schedulers that add noise of their own.
    """
    negative = conditioning.negative
    grid = _on_grid(conditioning)
    if grid is not None:
        # Straight steps from sigma 1 down to 1/steps; the scheduler adds the final 0.
        sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps).tolist()
        scheduler.set_timesteps(sigmas=sigmas, device=noise.device)
        latents = grid + start_noise * noise
    else:
        scheduler.set_timesteps(num_inference_steps, device=noise.device)
        latents = noise * scheduler.init_noise_sigma
    options = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for number, timestep in enumerate(scheduler.timesteps):
        seen = latents if grid is not None else scheduler.scale_model_input(latents, timestep)
        predicted = _predict(unet, seen, timestep, conditioning.tokens, grid)
        if guidance_scale > 1 and negative is not None:
            away = _predict(unet, seen, timestep, negative.tokens, _on_grid(negative))
            predicted = away + guidance_scale * (predicted - away)
        latents = scheduler.step(predicted, timestep, latents, return_dict=False, **options)[0]
        on_step(number + 1, len(scheduler.timesteps), latents)
    return latents


def _predict(unet: Any, latents: Tensor, timestep: Tensor, tokens: Tensor, grid: Tensor | None) -> Tensor:
    seen = latents if grid is None else torch.cat([latents, grid], dim=1)
    return unet(seen, timestep, encoder_hidden_states=tokens, return_dict=False)[0]


def _on_grid(conditioning: FusedConditioning) -> Tensor | None:
    if conditioning.grid is None:
        return None
    return conditioning.tokens.transpose(1, 2).unflatten(2, conditioning.grid)
