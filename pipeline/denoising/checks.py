"""What cannot be drawn is refused before anything is loaded, with what was expected and what came."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from ..checkpoints import Checkpoint
from ..conditioning import FusedConditioning
from ..speed_plan import SpeedPlan
from .diffusers_generation import Source

SMALLEST_SIDE, LARGEST_SIDE, LARGEST_BATCH = 16, 4096, 64
MOST_STEPS = 1000


def check_numbers(steps: int, guidance_scale: float, width: int, height: int, batch_size: int, strength: float) -> None:
    for name, value, low, high in (
        ("steps", steps, 1, MOST_STEPS),
        ("width", width, SMALLEST_SIDE, LARGEST_SIDE),
        ("height", height, SMALLEST_SIDE, LARGEST_SIDE),
        ("batch size", batch_size, 1, LARGEST_BATCH),
        ("guidance scale", guidance_scale, 0, 100),
        ("denoise", strength, 0, 1),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name} must be {low} to {high}, got {value}")


def check_space(checkpoint: Checkpoint, conditioning: FusedConditioning) -> None:
    expected = checkpoint.identity_of("fusion" if checkpoint.has("fusion") else "text_encoder")
    if conditioning.space.model != expected:
        raise ValueError(f"expected a condition of {expected}, got one of {conditioning.space}")


def check_sigmas(checkpoint: Checkpoint, sigmas: Sequence[float], image: Tensor | None, plan: SpeedPlan) -> None:
    """For the host's schedules, which its own samplers of Stable Diffusion walk along."""
    if not checkpoint.family.own_sampler or checkpoint.has("fusion"):
        raise ValueError(f"expected no sigmas for {checkpoint.family.name}, which has steps of its own, got some")
    if image is not None:
        raise ValueError("expected sigmas to draw along or an image to draw from, got both")
    walks = {"steps": plan.num_inference_steps, "shift": plan.shift}
    walks["scheduler"] = None if plan.scheduler == "checkpoint" else plan.scheduler
    given = ", ".join(f"{name} {value}" for name, value in walks.items() if value is not None)
    if given:
        raise ValueError(
            f"expected {len(sigmas)} sigmas to draw along, or a speed plan that says how; got both: {given}"
        )
    falling = all(high > low >= 0 for high, low in pairwise(sigmas))
    if not 2 <= len(sigmas) <= MOST_STEPS + 1 or not falling or not math.isfinite(sigmas[0]):
        quoted = ", ".join(f"{sigma:g}" for sigma in sigmas[:6])
        raise ValueError(f"expected 2 to {MOST_STEPS + 1} falling sigmas, got {len(sigmas)}: {quoted}")


def check_channels(checkpoint: Checkpoint, unet: Any, source: Source | None) -> None:
    extra = unet.config.in_channels - unet.config.out_channels
    if extra and (source is None or source.mask is None):
        raise ValueError(
            f"expected a picture and a mask for {checkpoint.folder.name}, whose denoiser has {extra} channels for "
            f"them; got {'words' if source is None else 'a picture'} alone"
        )
