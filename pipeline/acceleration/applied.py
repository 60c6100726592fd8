"""A speed plan laid over one run: which entries of the cache it draws from, what is laid over them, in which order."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from ..checkpoints import Checkpoint
from ..denoising.latents import use_vae
from ..model_cache import ModelCache
from ..private_views import private_view
from ..residency import place_of
from ..speed_plan import SpeedPlan
from .compiling import compile_view
from .cpu_convolutions import SUMMED, fitted_to_cpu
from .decoders import TinyDecoder, open_tiny_decoder
from .memory_formats import use_channels_last
from .precision import decoder_precision, precision
from .quantising import use_quantised
from .step_cache import with_step_cache
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

    From the weights outwards: their precision, in which quantised ones are entries of their own; the adapters, laid
    over either by whoever lends them; the cache that stands in for steps; compiling, which has to see all of that. What
    is laid over the module lies on a view of this run's own, and ends with the run, whatever ends it. Raises ValueError
    for what the model or the machine cannot do, where the plan does not leave that out.
    """
    lay = functools.partial(_laid, plan, applied)
    dtype = precision(checkpoint, plan, cache.residency.device)
    with ExitStack() as stack:
        lent = None
        if plan.quantisation != "off":
            quantised = functools.partial(use_quantised, cache, checkpoint, name, plan.quantisation, dtype)
            lent = lay("quantisation", plan.quantisation, lambda: stack.enter_context(quantised()))
        applied.precision = "" if lent is None else f"{plan.quantisation} and "
        if plan.memory_format != "contiguous":
            ordered = functools.partial(use_channels_last, cache, checkpoint, name, dtype)
            lent = lay("memory_format", plan.memory_format, lambda: stack.enter_context(ordered()))
        if lent is None:
            lent = stack.enter_context(checkpoint.use(cache, name, dtype))
        applied.precision += str(place_of(lent)[1]).removeprefix("torch.")
        if plan.compile == "off":  # the compiler arranges convolutions by itself
            lent = fitted_to_cpu(lent)
        view = _with_cache(lent, plan, steps, applied)
        if view is None and plan.compile == "off":
            yield _counted(lent, applied.work)
            return
        cached, view = view is not None, private_view(lent) if view is None else view
        stack.callback(_emptied, view)
        compilation = None
        if plan.compile != "off":
            compilation = lay("compile", f"compiled, {plan.compile}", lambda: compile_view(view, plan.compile))
        yield view if cached else _counted(view, applied.work)
        if compilation is not None:
            applied.notices.extend(compilation.notices())


@dataclass(frozen=True)
class Decoders:
    """What makes pixels of a run's latents; None is the model's own. looks: for those on the way."""

    result: TinyDecoder | None
    looks: TinyDecoder | None

    @contextmanager
    def use(self, cache: ModelCache, checkpoint: Checkpoint, plan: SpeedPlan) -> Iterator[Any]:
        with self._lent(cache, checkpoint, plan) as decoder:
            yield fitted_to_cpu(decoder)

    def _lent(self, cache: ModelCache, checkpoint: Checkpoint, plan: SpeedPlan) -> AbstractContextManager[Any]:
        if self.result is not None:
            return self.result.use(cache, precision(checkpoint, plan, cache.residency.device))
        dtype = decoder_precision(checkpoint, plan, cache.residency.device)
        if plan.memory_format != "contiguous":
            if cache.residency.device.type != "cpu":
                dtype = dtype or checkpoint.family.vae_dtype
            return use_channels_last(cache, checkpoint, "vae", dtype)
        return use_vae(cache, checkpoint, dtype)

    def use_for_looks(self, cache: ModelCache, vae: Any) -> AbstractContextManager[Any]:
        """vae: the model's own, which is in use while there is something to look at."""
        return nullcontext(vae) if self.looks is None else self.looks.use(cache)


def open_decoders(checkpoint: Checkpoint, plan: SpeedPlan) -> Decoders:
    """Checked, and nothing read but headers. Raises ValueError where one decodes other latents than the model makes."""
    result, looks = (None if path is None else open_tiny_decoder(path) for path in (plan.decoder, plan.preview))
    for decoder in (result, looks):
        if decoder is not None:
            decoder.check_fits(checkpoint)
    return Decoders(result, looks or result)


def _with_cache(lent: Any, plan: SpeedPlan, steps: int, applied: Applied) -> Any | None:
    """A view with one cache that stands in for steps; None where the plan has none, or leaves out those that it has.

    One only, since what either skips the other would count as computed. What is set by hand comes first.
    """
    caches = {
        "unet_cache": (
            plan.unet_cache > 1,
            f"UNet cache, every {plan.unet_cache} steps",
            lambda: with_unet_cache(lent, plan.unet_cache, steps, applied.work),
        ),
        "step_cache": (
            plan.step_cache > 0,
            f"step cache, up to {plan.step_cache:g}",
            lambda: with_step_cache(lent, plan.step_cache, steps, applied.work),
        ),
    }
    before = len(applied.notices)
    for dial in sorted(caches, key=lambda dial: dial in plan.where_it_fits):
        wanted, said, lay = caches[dial]
        view = _laid(plan, applied, dial, said, lay) if wanted else None
        if view is not None:
            del applied.notices[before:]  # the one that fits takes the place of the one that does not
            return view
    return None


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
    """The same, each call of which is a step that was computed: a view of the outermost module alone, at no cost."""
    view = object.__new__(type(module))
    view.__dict__.update(vars(module))
    whole = module._compiled_call_impl

    def count(*_: Any) -> None:
        work.steps_computed += 1

    def call(*arguments: Any, **options: Any) -> Any:
        count()
        return whole(*arguments, **options)

    if whole is not None:  # a hook would be compiled with it, and again for each number
        view.__dict__["_compiled_call_impl"] = call
    else:
        view.__dict__["_forward_pre_hooks"] = module._forward_pre_hooks.copy()
        view.register_forward_pre_hook(count)
    return view


def _emptied(view: Any) -> None:
    """Hooks and compiled calls refer to the view that they lie on. Such a circle must not keep weights that the cache
    lets go of until Python looks for circles."""
    for module in list(view.modules()):
        module._parameters.clear()
        module._buffers.clear()
        vars(module).pop(SUMMED, None)
        module._compiled_call_impl = None
