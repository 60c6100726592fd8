"""FusedConditioning -> pictures: a few denoising steps, then the decoder, as a speed plan has them."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import ParamSpec

from torch import Tensor

from .acceleration.schedules import schedule_for
from .checkpoints import Checkpoint
from .conditioning import FusedConditioning, Pictures
from .denoising.batches import source_for, together
from .denoising.checks import check_numbers, check_sigmas, check_space
from .denoising.frame import frame_for
from .denoising.latents import seeds_of
from .drawing import Drawing, OnStep, Preview, Task
from .fusing.ways import in_one_way
from .model_cache import ModelCache
from .residency import OutOfDeviceMemory
from .speed_plan import EXACT, SpeedPlan

__all__ = ["OnStep", "Preview", "drawn_in_turn", "generate", "planned"]

P = ParamSpec("P")


def planned(
    cache: ModelCache,
    checkpoint: Checkpoint,
    conditioning: FusedConditioning,
    *,
    seed: int | Sequence[int],
    num_inference_steps: int | None = 4,
    guidance_scale: float | None = 1.0,
    width: int = 512,
    height: int = 512,
    batch_size: int = 1,
    image: Tensor | None = None,
    mask: Tensor | None = None,
    strength: float = 1.0,
    sigmas: Sequence[float] | None = None,
    plan: SpeedPlan = EXACT,
    on_step: OnStep | None = None,
) -> Drawing:
    """``batch_size`` pictures for each entry of the conditioning's batch, or the image's, in that order.

    Picture i draws its noise from a generator seeded ``seed + i``, or ``seed[i]`` where there is one for each, on the
    CPU, so each equals its own single run; words alone start from the same noise on every device. Where the condition
    leaves open in which of K ways it is drawn, that is way seed % K. guidance_scale above
    1 steers away from the negative (arXiv 2207.12598) at twice the work; a distilled model takes it at no cost. None:
    as many steps, or as much guidance, as the model is meant for.
    image: (B, 3, H, W) in 0..1 to draw from, cut to the frame; mask: (B or 1, H, W) in 0..1, 1 where it is drawn anew,
    and elsewhere the image is kept to the pixel; strength: 0..1, the share of the steps that are taken, at least one.
    sigmas: a host's schedule, from high to low, to walk along by Euler's method in place of the model's own steps.
    plan: which shortcuts are taken; its steps and guidance, where it has them, go before those given here.
    on_step(step, total, preview) is called after each step; preview() decodes what there is to RGB (3, h, w) in 0..1,
    and an exception raised there stops the run within a step. Sizes that the model cannot make are rounded, or the
    picture resized, and a notice says so. Denoising or decoding that gives no numbers is done once more in float32.
    Raises ValueError on numbers out of range, a condition of another model's space, a task that the family does not
    have, or a shortcut that it cannot take; FloatingPointError where float32 gives no numbers either;
    OutOfDeviceMemory where they do not fit, with nothing left behind.
    """
    check_space(checkpoint, conditioning)
    schedule = schedule_for(checkpoint, plan, num_inference_steps, guidance_scale)
    check_numbers(schedule.num_inference_steps, schedule.guidance_scale, width, height, batch_size, strength)
    if sigmas is not None:
        check_sigmas(checkpoint, sigmas, image, plan)
        schedule = replace(schedule, num_inference_steps=len(sigmas) - 1)
    frame = frame_for(checkpoint.family, width, height, from_picture=image is not None)
    source, told = source_for(checkpoint, frame, image, mask, strength, schedule.num_inference_steps)
    conditioning, source = together(conditioning, source, batch_size)
    conditioning = in_one_way(conditioning, seeds_of(seed, conditioning.tokens.shape[0]))
    told = conditioning.notices + frame.notices + schedule.notices + told
    task = Task(cache, checkpoint, conditioning, source, frame, seed, schedule, sigmas, image, mask, on_step, told)
    return Drawing(task, plan)


def _drawn_at_once(plan: Callable[P, Drawing]) -> Callable[P, Pictures]:
    @functools.wraps(plan, assigned=("__module__", "__doc__"))
    def generate(*arguments: P.args, **settings: P.kwargs) -> Pictures:
        drawing = plan(*arguments, **settings)
        drawing.denoise()
        return drawing.pictures()

    return generate


generate = _drawn_at_once(planned)


def drawn_in_turn(drawings: Iterable[Drawing], *, beside: bool) -> Iterator[Pictures]:
    """Pictures of each, in order, each planned when the one before it is denoised.

    beside: each is decoded on another thread while the next is denoised; where memory runs out for the two, the first
    is finished before the second is tried again. Nothing stays pinned, whatever ends this.
    """
    before: Drawing | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="duet-decode") as executor:
        try:
            for drawing in drawings:
                denoised = _denoised(drawing, alone=before is None)
                if before is not None:
                    yield before.pictures()
                    before = None
                if not denoised:
                    drawing.denoise()
                if beside:
                    drawing.decode_beside(executor)
                    before = drawing
                else:
                    yield drawing.pictures()
            if before is not None:
                yield before.pictures()
        finally:
            if before is not None:
                before.close()


def _denoised(drawing: Drawing, *, alone: bool) -> bool:
    """False where memory ran out and another has some of it."""
    try:
        drawing.denoise()
    except OutOfDeviceMemory:
        if alone:
            raise
        return False
    return True
