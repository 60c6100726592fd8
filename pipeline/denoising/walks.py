"""How often a scheduler calls for the denoiser."""

from typing import Any

from ..family import Family
from .diffusers_generation import Source

_FEW = 4


def steps_walked(scheduler: Any, num_inference_steps: int, family: Family, source: Source | None) -> int:
    """Steps of a run: fewer from a picture, except in families that take all of them from less noise; and one more by
    schedulers that take a step twice, such as PNDM, though of four or fewer none becomes more.

    ``scheduler`` is set to the steps, as whoever draws sets it again.
    """
    skipped = 0
    if source is not None and family.strength_steps != "all":
        skipped = num_inference_steps - max(1, round(source.strength * num_inference_steps))
    taken = num_inference_steps - skipped
    try:
        scheduler.set_timesteps(num_inference_steps)
    except (TypeError, ValueError):  # one that has to know the picture's size, or sigmas, takes each step once
        return taken
    walked = len(scheduler.timesteps) - skipped * scheduler.order
    return taken if taken <= _FEW else max(taken, walked)
