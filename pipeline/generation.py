"""FusedConditioning -> pictures: a few denoising steps, then the decoder, as a speed plan has them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from .acceleration.applied import Applied, Decoders, open_decoders, use_denoiser
from .acceleration.measuring import psnr, ssim
from .acceleration.precision import decoder_precision
from .acceleration.schedules import Schedule, schedule_for
from .acceleration.work import Work
from .checkpoints import Checkpoint, fresh_scheduler
from .conditioning import FusedConditioning, GenerationReport, Pictures
from .denoising.batches import kept_outside, on_device, source_for, together
from .denoising.checks import check_channels, check_numbers, check_sigmas, check_space
from .denoising.diffusers_generation import Source, draw
from .denoising.frame import Frame, frame_for, resized
from .denoising.latents import channels_of, decode_or_tile, generators, noise, preview, seeds_of, use_vae
from .denoising.measures import Meter
from .denoising.nan_guard import NanGuard
from .denoising.unet_sampler import denoise
from .denoising.walks import steps_walked
from .fusing.ways import in_one_way
from .model_cache import ModelCache
from .private_views import pictures_shown
from .residency import OutOfDeviceMemory, is_out_of_memory, place_of
from .speed_plan import EXACT, SpeedPlan

Preview = Callable[[], Tensor]
OnStep = Callable[[int, int, Preview], None]
Drawn = TypeVar("Drawn")


def generate(
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
) -> Pictures:
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
    task = _Task(cache, checkpoint, conditioning, source, frame, seed, schedule, sigmas, image, mask, on_step)
    pictures = _or_out_of_memory(cache, lambda: _pictures(task, plan))
    if isinstance(pictures, str):
        raise OutOfDeviceMemory(
            f"{checkpoint.folder.name}: {conditioning.tokens.shape[0]} of {frame.width}x{frame.height} did not fit "
            f"into memory while they were drawn; choose a smaller size or batch ({pictures})"
        )
    if plan.measure_loss:
        pictures = _compared(pictures, task, plan)
    return replace(pictures, notices=conditioning.notices + frame.notices + schedule.notices + told + pictures.notices)


@dataclass(frozen=True)
class _Task:
    """What is drawn, whatever shortcuts are taken."""

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


def _pictures(task: _Task, plan: SpeedPlan) -> Pictures:
    meter, guard = Meter(task.cache), NanGuard(task.checkpoint.folder.name)
    work, attempts, told = Work(), [], []
    decoders = open_decoders(task.checkpoint, plan)

    def denoised(again: bool) -> tuple[tuple[Tensor, ...], str]:
        attempts.append(Applied(work))
        return _denoised(task, plan.in_float32() if again else plan, decoders, attempts[-1])

    def decoded(again: bool) -> tuple[tuple[Tensor, ...], str]:
        return _decoded(task, latents, plan.in_float32() if again else plan, decoders, told)

    with meter.stage("generation"):
        (latents,) = guard.finite("denoising", denoised)
    with meter.stage("decode"):
        pixels, alpha = guard.finite("decoding", decoded)
    pixels, alpha = resized(pixels, alpha, task.frame)
    if task.image is not None and task.mask is not None:
        pixels = kept_outside(pixels, task.image, task.mask)
    applied = attempts[-1]
    hits, misses = meter.uses()
    report = GenerationReport(
        plan=plan.name,
        shortcuts=(*applied.shortcuts, *([f"decoder {decoders.result.name}"] if decoders.result else [])),
        milliseconds=meter.milliseconds,
        steps_computed=work.steps_computed,
        steps_skipped=work.steps_from_cache,
        blocks_computed=work.blocks_computed,
        blocks_skipped=work.blocks_skipped,
        dtype=applied.precision,
        device=str(task.cache.residency.device),
        cache_hits=hits,
        cache_misses=misses,
        model_bytes=meter.model_bytes(),
        peak_bytes=meter.peak_bytes(),
        retries=tuple(guard.retries),
    )
    # The latents go along for the host's own nodes, which decode, upscale and sample them further.
    latents = latents.float().cpu()
    latents = latents[:, :, 0] if latents.ndim == 5 else latents
    notices = (*applied.notices, *guard.notices, *dict.fromkeys(told))
    return Pictures(pixels, alpha, meter.milliseconds, report, notices, latents)


def _denoised(task: _Task, plan: SpeedPlan, decoders: Decoders, applied: Applied) -> tuple[tuple[Tensor, ...], str]:
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


def _decoded(
    task: _Task, latents: Tensor, plan: SpeedPlan, decoders: Decoders, told: list[str]
) -> tuple[tuple[Tensor, ...], str]:
    """Pixels and alpha on the CPU, and the precision of the decoder that gave them."""
    with decoders.use(task.cache, task.checkpoint, plan) as vae, torch.inference_mode():
        pixels, alpha, tiled = decode_or_tile(vae, latents, task.frame.closes)
        if tiled:
            told.append("decoded in tiles, since the whole did not fit into memory")
        return (pixels, alpha), str(place_of(vae)[1]).removeprefix("torch.")


def _compared(pictures: Pictures, task: _Task, plan: SpeedPlan) -> Pictures:
    """With the loss in its report, and a further stage for what it took to measure."""
    if not plan.takes_shortcuts:
        return replace(pictures, notices=(*pictures.notices, "no loss to measure, since the plan takes no shortcut"))
    meter = Meter(task.cache)
    with meter.stage("comparison"):
        exact = _or_out_of_memory(task.cache, lambda: _pictures(task, plan.exact()))
    if isinstance(exact, str):
        told = f"the loss was not measured, since the exact pictures did not fit into memory ({exact})"
        return replace(pictures, notices=(*pictures.notices, told))
    one, other = (1 + side.alpha * (side.pixels - 1) for side in (pictures, exact))
    spent = {**pictures.milliseconds, **meter.milliseconds}
    report = replace(pictures.report, milliseconds=spent, psnr=psnr(one, other).mean, ssim=ssim(one, other).mean)
    return replace(pictures, milliseconds=spent, report=report)


def _or_out_of_memory(cache: ModelCache, attempt: Callable[[], Drawn]) -> Drawn | str:
    """What it gives, or what was said when memory ran out while drawing; not while loading, which says it better."""
    try:
        return attempt()
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, OutOfDeviceMemory) or not is_out_of_memory(error):
            raise
        said = str(error).partition("\n")[0][:200]
    # Out here, where the frames of the failed attempt are gone, and with them what it had on the device.
    if cache.residency.device.type == "cuda":
        torch.cuda.empty_cache()
    return said
