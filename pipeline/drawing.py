"""One run, in its two halves: latents by the denoiser, then pixels by the decoder, at once or beside the next run."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .acceleration.applied import Applied, Decoders, open_decoders, use_denoiser
from .acceleration.measuring import psnr, ssim
from .acceleration.precision import decoder_precision
from .acceleration.schedules import Schedule
from .acceleration.work import Work
from .checkpoints import Checkpoint, fresh_scheduler
from .conditioning import FusedConditioning, GenerationReport, Pictures
from .denoising.batches import kept_outside, on_device
from .denoising.checks import check_channels
from .denoising.diffusers_generation import Source, draw
from .denoising.frame import Frame, resized
from .denoising.latents import channels_of, decode_or_tile, generators, noise, preview, use_vae
from .denoising.measures import Meter
from .denoising.nan_guard import NanGuard
from .denoising.unet_sampler import denoise
from .denoising.walks import steps_walked
from .model_cache import ModelCache
from .private_views import pictures_shown, private_view
from .residency import OutOfDeviceMemory, is_out_of_memory, place_of
from .speed_plan import SpeedPlan

Preview = Callable[[], Tensor]
OnStep = Callable[[int, int, Preview], None]
Drawn = TypeVar("Drawn")
Decoded = tuple[tuple[Tensor, ...], str]


class DidNotFit(OutOfDeviceMemory):
    """Memory ran out while drawing, not while loading. said: how the allocator put it."""

    def __init__(self, told: str, said: str) -> None:
        super().__init__(f"{told} ({said})")
        self.said = said


@dataclass(frozen=True)
class Task:
    """What is drawn, whatever shortcuts are taken. told: notices of how it was understood."""

    cache: ModelCache
    checkpoint: Checkpoint
    conditioning: FusedConditioning
    source: Source | None
    frame: Frame
    seed: int | Sequence[int]
    schedule: Schedule
    sigmas: Sequence[float] | None
    image: Tensor | None
    mask: Tensor | None
    on_step: OnStep | None
    told: tuple[str, ...] = ()


class Drawing:
    """A task to be drawn once: ``denoise``, then ``pictures``; between them, where another follows, ``decode_beside``.

    From ``decode_beside`` on the decoder is pinned, until ``pictures`` or ``close``. Models are brought and released on
    the thread that calls these; the executor's only computes, as hosts want it. All raise as ``generate`` says.
    """

    def __init__(self, task: Task, plan: SpeedPlan) -> None:
        self._task, self._plan = task, plan
        self._meter, self._guard = Meter(task.cache), NanGuard(task.checkpoint.folder.name)
        self._work, self._attempts = Work(), []
        self._told: list[str] = []
        self._decoders = open_decoders(task.checkpoint, plan)
        self._beside: Future[Decoded] | None = None
        self._uses: tuple[int, int] | None = None
        self._peak: int | None = None
        self._held = ExitStack()

    def denoise(self) -> None:
        def denoised(again: bool) -> Decoded:
            self._attempts.append(Applied(self._work))
            plan = self._plan.in_float32() if again else self._plan
            return _denoised(self._task, plan, self._decoders, self._attempts[-1])

        self._work, self._attempts = Work(), []
        with self._meter.stage("generation"):
            (self._latents,) = self._fitting(lambda: self._guard.finite("denoising", denoised))

    def decode_beside(self, executor: Executor) -> None:
        """Begin to decode on another thread. What fails there is done again by ``pictures``, which tells of it."""
        decoder = self._held.enter_context(self._decoders.use(self._task.cache, self._task.checkpoint, self._plan))
        if "z_dim" in getattr(decoder, "config", ()):  # one of films, which keeps what it is about to need on itself
            decoder = private_view(decoder)
        # Now, since the next run's uses and its new maximum of memory are none of this one's.
        self._uses, self._peak = self._meter.uses(), self._meter.peak_bytes()
        self._beside = executor.submit(self._decoded_beside, decoder)

    def pictures(self) -> Pictures:
        """Decoded, with what the run has cost."""
        pictures = self._pictures()
        pictures = self._compared(pictures) if self._plan.measure_loss else pictures
        return replace(pictures, notices=self._task.told + pictures.notices)

    def close(self) -> None:
        """Where no pictures are wanted any more."""
        if self._beside is not None:
            self._beside.exception()  # waits, since the decoder is in use until then
        self._held.close()

    def _pictures(self) -> Pictures:
        beside, self._beside = self._beside, None
        if beside is not None and _ran_out_of_memory(beside):
            beside = None  # what was denoised meanwhile has left its memory by now: once more, alone
        self._held.close()

        def decoded(again: bool) -> Decoded:
            if beside is not None and not again:
                return beside.result()
            plan = self._plan.in_float32() if again else self._plan
            with (
                self._meter.stage("decode"),
                self._decoders.use(self._task.cache, self._task.checkpoint, plan) as decoder,
            ):
                return self._decoded(decoder, self._task.cache.residency.make_room)

        pixels, alpha = self._fitting(lambda: self._guard.finite("decoding", decoded))
        pixels, alpha = resized(pixels, alpha, self._task.frame)
        if self._task.image is not None and self._task.mask is not None:
            pixels = kept_outside(pixels, self._task.image, self._task.mask)
        # The latents go along for the host's own nodes, which decode, upscale and sample them further.
        latents = self._latents.float().cpu()
        latents = latents[:, :, 0] if latents.ndim == 5 else latents
        notices = (*self._attempts[-1].notices, *self._guard.notices, *dict.fromkeys(self._told))
        return Pictures(pixels, alpha, self._meter.milliseconds, self._report(), notices, latents)

    def _decoded_beside(self, decoder: Any) -> Decoded:
        with self._meter.stage("decode"):
            return self._decoded(decoder)

    def _decoded(self, decoder: Any, make_room: Callable[[], int] | None = None) -> Decoded:
        """Pixels and alpha on the CPU, and the precision of the decoder that gave them."""
        with torch.inference_mode():
            pixels, alpha, tiled = decode_or_tile(decoder, self._latents, self._task.frame.closes, make_room)
        if tiled:
            self._told.append("decoded in tiles, since the whole did not fit into memory")
        return (pixels, alpha), str(place_of(decoder)[1]).removeprefix("torch.")

    def _report(self) -> GenerationReport:
        applied, work, meter = self._attempts[-1], self._work, self._meter
        hits, misses = self._uses or meter.uses()
        peaks = [peak for peak in (self._peak, meter.peak_bytes()) if peak is not None]
        return GenerationReport(
            plan=self._plan.name,
            shortcuts=(
                *applied.shortcuts,
                *([f"decoder {self._decoders.result.name}"] if self._decoders.result else []),
            ),
            milliseconds=meter.milliseconds,
            steps_computed=work.steps_computed,
            steps_skipped=work.steps_from_cache,
            blocks_computed=work.blocks_computed,
            blocks_skipped=work.blocks_skipped,
            dtype=applied.precision,
            device=str(self._task.cache.residency.device),
            cache_hits=hits,
            cache_misses=misses,
            model_bytes=meter.model_bytes(),
            peak_bytes=max(peaks, default=None),
            retries=tuple(self._guard.retries),
        )

    def _fitting(self, attempt: Callable[[], Drawn]) -> Drawn:
        drawn = _or_out_of_memory(self._task.cache, attempt)
        if isinstance(drawn, str):
            task = self._task
            raise DidNotFit(
                f"{task.checkpoint.folder.name}: {task.conditioning.tokens.shape[0]} of "
                f"{task.frame.width}x{task.frame.height} did not fit into memory while they were drawn; choose a "
                "smaller size or batch",
                drawn,
            )
        return drawn

    def _compared(self, pictures: Pictures) -> Pictures:
        """With the loss in its report, and a further stage for what it took to measure."""
        if not self._plan.takes_shortcuts:
            told = "no loss to measure, since the plan takes no shortcut"
            return replace(pictures, notices=(*pictures.notices, told))
        meter = Meter(self._task.cache)
        try:
            with meter.stage("comparison"):
                exact = Drawing(self._task, self._plan.exact())
                exact.denoise()
                other = exact._pictures()
        except DidNotFit as error:
            told = f"the loss was not measured, since the exact pictures did not fit into memory ({error.said})"
            return replace(pictures, notices=(*pictures.notices, told))
        one, other = (1 + side.alpha * (side.pixels - 1) for side in (pictures, other))
        spent = {**pictures.milliseconds, **meter.milliseconds}
        report = replace(pictures.report, milliseconds=spent, psnr=psnr(one, other).mean, ssim=ssim(one, other).mean)
        return replace(pictures, milliseconds=spent, report=report)


def _denoised(task: Task, plan: SpeedPlan, decoders: Decoders, applied: Applied) -> tuple[tuple[Tensor, ...], str]:
    """Latents, and the precision of the denoiser that gave them."""
    cache, checkpoint, conditioning = task.cache, task.checkpoint, task.conditioning
    family, frame, source, schedule = checkpoint.family, task.frame, task.source, task.schedule
    name = "unet" if checkpoint.has("unet") else "transformer"
    scheduler = fresh_scheduler(schedule.scheduler)  # since it counts its steps
    steps = schedule.num_inference_steps
    if task.sigmas is None and (plan.unet_cache > 1 or plan.step_cache > 0):
        steps = steps_walked(scheduler, steps, family, source)
    with (
        use_vae(cache, checkpoint, decoder_precision(checkpoint, plan, cache.residency.device)) as vae,
        decoders.use_for_looks(cache, vae) as looks,
        use_denoiser(cache, checkpoint, name, plan, steps, applied) as denoiser,
        torch.inference_mode(),
    ):

        def look(step: int, total: int, latents: Callable[[], Tensor]) -> None:
            if task.on_step is not None:
                task.on_step(step, total, lambda: preview(looks, latents()))

        shown = pictures_shown(checkpoint.adapters, name, denoiser, conditioning.tokens.shape[0])
        if name == "unet" and family.tasks is not None:
            check_channels(checkpoint, denoiser, source)
        if family.own_sampler and source is None:
            sources = generators(task.seed, conditioning.tokens.shape[0])
            shape = (channels_of(vae), frame.height // family.downscale, frame.width // family.downscale)
            latents = denoise(
                denoiser,
                scheduler,
                noise(shape, sources).to(*place_of(denoiser)),
                on_device(conditioning, denoiser),
                num_inference_steps=schedule.num_inference_steps,
                guidance_scale=schedule.guidance_scale,
                start_noise=family.start_noise,
                generators=sources,
                sigmas=task.sigmas,
                image_embeds=shown,
                closes=frame.closes,
                on_step=lambda step, total, now: look(step, total, lambda: now),
            )
        else:
            latents = draw(
                checkpoint,
                denoiser,
                vae,
                conditioning,
                scheduler=scheduler,
                seed=task.seed,
                num_inference_steps=schedule.num_inference_steps,
                guidance_scale=schedule.guidance_scale,
                width=frame.width,
                height=frame.height,
                source=source,
                image_embeds=shown,
                on_step=look,
            )
        return (latents,), applied.precision


def _ran_out_of_memory(decoding: Future[Decoded]) -> bool:
    error = decoding.exception()  # waits
    return isinstance(error, RuntimeError | MemoryError) and is_out_of_memory(error)


def _or_out_of_memory(cache: ModelCache, attempt: Callable[[], Drawn]) -> Drawn | str:
    """What it gives, or what was said when memory ran out while drawing; not while loading, which says it better.

    Once, what lies on the device and is not in use makes way, which may be models of another pack, and it tries again.
    """
    said = ""
    for last in (False, True):
        try:
            return attempt()
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, OutOfDeviceMemory) or not is_out_of_memory(error):
                raise
            said = str(error).partition("\n")[0][:200]
        # Out here, where the frames of the failed attempt are gone, and with them what it had on the device.
        if cache.residency.device.type == "cuda":
            torch.cuda.empty_cache()
        if last or not cache.residency.make_room():
            break
    return said
