"""Which precision is meant, and which is fast where."""

import functools

import torch

from ..checkpoints import Checkpoint
from ..speed_plan import SpeedPlan


@functools.cache
def multiplies_by_tiles() -> bool:
    """Whether this CPU multiplies bfloat16 by tiles (AMX), several times as fast as float32.

    AVX-512 alone does not count: what it gains by half the bytes it may lose again by converting.
    """
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        return bool(capabilities().get("amx_bf16", False))
    older = getattr(torch.cpu, "_is_amx_tile_supported", None)  # before 2.11 there is nothing public to ask
    return older is not None and bool(older())


def precision(checkpoint: Checkpoint, plan: SpeedPlan, device: torch.device) -> torch.dtype | None:
    """Of a model that runs by ``plan`` on ``device``; None where it is the model's own to choose.

    "fastest" is bfloat16 on a CPU that multiplies it by tiles; on others, and on a GPU, the model's own is the fastest.
    So it is for the built-in model, whose products are too small to make up for converting: 1.3 times the time.
    """
    if plan.dtype == "fastest":
        is_large = checkpoint.family.tasks is not None
        return torch.bfloat16 if is_large and device.type == "cpu" and multiplies_by_tiles() else None
    return None if plan.dtype == "automatic" else getattr(torch, plan.dtype)


def decoder_precision(checkpoint: Checkpoint, plan: SpeedPlan, device: torch.device) -> torch.dtype | None:
    """The plan's, except where the family's decoder is known to overflow in half precision."""
    chosen = precision(checkpoint, plan, device)
    known = checkpoint.family.vae_dtype
    return known if known is not None and chosen in (torch.float16, torch.bfloat16) else chosen
