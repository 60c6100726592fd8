"""A speed plan laid over one run: which entries of the cache it draws from, what is laid over them, in which order."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..adapters.private_views import private_view
from ..checkpoints import Checkpoint
from ..model_cache import ModelCache
from .plan import SpeedPlan
from .unet_cache import with_unet_cache
from .work import Work

_WORDS = {"step_cache": "step cache", "unet_cache": "UNet cache", "memory_format": "memory format"}


@dataclass
class Applied:
    """What came of a plan in one run, to which ``work`` is counted.

    precision: of the denoiser, as torch names it; shortcuts: in words, those that were on; notices: those left out.
    """

    work: Work
    precision: str = ""
    shortcuts: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


@contextmanager
def use_denoiser(
    cache: ModelCache, checkpoint: Checkpoint, name: str, plan: SpeedPlan, steps: int, applied: Applied
) -> Iterator[Any]:
    """``name`` of the checkpoint as the plan has it, for one run of ``steps`` steps: pinned while in the block.

    From the weights outwards: their precision, the adapters (by ``Checkpoint.use``), the cache that stands in for
    steps. What is laid over the module lies on a view of this run's own, and ends with the run, whatever ends it.
    Raises ValueError for what the model cannot do, where the plan does not leave that out.
    """
    lay = functools.partial(_laid, plan, applied)
    with ExitStack() as stack:
        whole = stack.enter_context(checkpoint.use(cache, name, precision(plan)))
        cached = None
        if plan.unet_cache > 1:
            said = f"UNet cache, every {plan.unet_cache} steps"
            cached = lay("unet_cache", said, lambda: with_unet_cache(whole, plan.unet_cache, steps, applied.work))
        applied.precision = str(whole.dtype).removeprefix("torch.")
        yield cached if cached is not None else _counted(whole, applied.work)


def precision(plan: SpeedPlan) -> torch.dtype | None:
    """None where it is the model's own to choose."""
    return None if plan.dtype == "automatic" else getattr(torch, plan.dtype)


def decoder_precision(checkpoint: Checkpoint, plan: SpeedPlan) -> torch.dtype | None:
    """The plan's, except where the family's decoder is known to overflow in half precision."""
    chosen = precision(plan)
    known = checkpoint.family.vae_dtype
    return known if known is not None and chosen in (torch.float16, torch.bfloat16) else chosen


def _laid(plan: SpeedPlan, applied: Applied, dial: str, said: str, lay: Callable[[], Any]) -> Any | None:
    """What ``lay`` gives; None where it cannot be and the plan leaves it out then."""
    try:
        laid = lay()
    except ValueError as error:
        if dial not in plan.where_it_fits:
            raise
        applied.notices.append(f"{_WORDS.get(dial, dial)} left out: {error}")
        return None
    applied.shortcuts.append(said)
    return laid


def _counted(module: Any, work: Work) -> Any:
    """The same, each call of which counts as a step that was computed."""
    view = private_view(module)

    def count(*_: Any) -> None:
        work.steps_computed += 1

    view.register_forward_pre_hook(count)
    return view
