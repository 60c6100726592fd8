"""FusedConditioning -> pictures: a few denoising steps, then the decoder."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from .adapters.private_views import pictures_shown
from .checkpoints import Checkpoint
from .conditioning import FusedConditioning, Pictures
from .denoising.batches import kept_outside, on_device, source_for, together
from .denoising.checks import check_channels, check_numbers, check_sigmas, check_space
from .denoising.diffusers_generation import Source, draw
from .denoising.frame import Frame, frame_for, resized
from .denoising.latents import channels_of, decode_or_tile, generators, noise, preview, use_vae
from .denoising.unet_sampler import denoise
from .model_cache import ModelCache
from .residency import OutOfDeviceMemory, is_out_of_memory

Preview = Callable[[], Tensor]
OnStep = Callable[[int, int, Preview], None]
Drawn = TypeVar("Drawn")


def generate(
    cache: ModelCache,
    checkpoint: Checkpoint,
    conditioning: FusedConditioning,
    *,
    seed: int | Sequence[int],
    num_inference_steps: int = 4,
    guidance_scale: float = 1.0,
    width: int = 512,
    height: int = 512,
    batch_size: int = 1,
    image: Tensor | None = None,
    mask: Tensor | None = None,
    strength: float = 1.0,
    sigmas: Sequence[float] | None = None,
    on_step: OnStep | None = None,
) -> Pictures:
    """``batch_size`` pictures for each entry of the conditioning's batch, or the image's, in that order.

    Picture i draws its noise from a generator seeded ``seed + i``, or ``seed[i]`` where there is one for each, on the
    CPU, so each equals its own single run; words alone start from the same noise on every device. guidance_scale above
    1 steers away from the negative (arXiv 2207.12598) at twice the work; a distilled model takes it at no cost.
    image: (B, 3, H, W) in 0..1 to draw from, cut to the frame; mask: (B or 1, H, W) in 0..1, 1 where it is drawn anew,
    and elsewhere the image is kept to the pixel; strength: 0..1, the share of the steps that are taken, at least one.
    sigmas: a host's schedule, from high to low, to walk along by Euler's method in place of the model's own steps.
    on_step(step, total, preview) is called after each step; preview() decodes what there is to RGB (3, h, w) in 0..1,
    and an exception raised there stops the run within a step. Sizes that the model cannot make are rounded, or the
    picture resized, and a notice says so. Raises ValueError on numbers out of range, a condition of another model's
    space, or a task that the family does not have; FloatingPointError where the model gives no numbers;
    OutOfDeviceMemory where they do not fit, with nothing left behind.
    """
    check_numbers(num_inference_steps, guidance_scale, width, height, batch_size, strength)
    check_space(checkpoint, conditioning)
    if sigmas is not None:
        check_sigmas(checkpoint, sigmas, image)
        num_inference_steps = len(sigmas) - 1
    frame = frame_for(checkpoint.family, width, height, from_picture=image is not None)
    source, told = source_for(checkpoint, frame, image, mask, strength, num_inference_steps)
    conditioning, source = together(conditioning, source, batch_size)

    def attempt() -> tuple[Pictures, Tensor]:
        started = time.perf_counter()
        latents = _draw(
            cache, checkpoint, conditioning, source, frame, seed, num_inference_steps, guidance_scale, sigmas, on_step
        )
        denoised = time.perf_counter()
        pixels, alpha, told_too = _decode(cache, checkpoint, latents)
        spent = {"generation": 1000 * (denoised - started), "decode": 1000 * (time.perf_counter() - denoised)}
        return Pictures(pixels, alpha, spent, conditioning.notices + frame.notices + told + told_too), latents

    drawn = _or_out_of_memory(attempt)
    if isinstance(drawn, str):
        # Out here, where the frames of the failed attempt are gone, and with them what it had on the device.
        if cache.residency.device.type == "cuda":
            torch.cuda.empty_cache()
        raise OutOfDeviceMemory(
            f"{checkpoint.folder.name}: {conditioning.tokens.shape[0]} of {frame.width}x{frame.height} did not fit "
            f"into memory while they were drawn; choose a smaller size or batch ({drawn})"
        )
    pictures, latents = drawn
    pixels, alpha = resized(pictures.pixels, pictures.alpha, frame)
    if image is not None and mask is not None:
        pixels = kept_outside(pixels, image, mask)
    # The latents go along for the host's own nodes, which decode, upscale and sample them further.
    latents = latents.float().cpu()
    latents = latents[:, :, 0] if latents.ndim == 5 else latents
    return replace(pictures, pixels=pixels, alpha=alpha, latents=latents)


def _draw(
    cache: ModelCache,
    checkpoint: Checkpoint,
    conditioning: FusedConditioning,
    source: Source | None,
    frame: Frame,
    seed: int | Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    sigmas: Sequence[float] | None,
    on_step: OnStep | None,
) -> Tensor:
    family = checkpoint.family
    name = "unet" if checkpoint.has("unet") else "transformer"
    with use_vae(cache, checkpoint) as vae, checkpoint.use(cache, name) as denoiser, torch.inference_mode():

        def look(step: int, total: int, latents: Callable[[], Tensor]) -> None:
            if on_step is not None:
                on_step(step, total, lambda: preview(vae, latents()))

        shown = pictures_shown(checkpoint.adapters, name, denoiser, conditioning.tokens.shape[0])
        if name == "unet" and family.tasks is not None:
            check_channels(checkpoint, denoiser, source)
        if family.own_sampler and source is None:
            sources = generators(seed, conditioning.tokens.shape[0])
            shape = (channels_of(vae), frame.height // family.downscale, frame.width // family.downscale)
            latents = denoise(
                denoiser,
                checkpoint.scheduler(),
                noise(shape, sources).to(denoiser.device, denoiser.dtype),
                on_device(conditioning, denoiser),
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                start_noise=family.start_noise,
                generators=sources,
                sigmas=sigmas,
                image_embeds=shown,
                on_step=lambda step, total, now: look(step, total, lambda: now),
            )
        else:
            latents = draw(
                checkpoint,
                denoiser,
                vae,
                conditioning,
                seed=seed,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                width=frame.width,
                height=frame.height,
                source=source,
                image_embeds=shown,
                on_step=look,
            )
    if not torch.isfinite(latents).all():
        raise FloatingPointError(
            f"{checkpoint.folder.name}: denoising gave values that are no numbers; no picture was made"
        )
    return latents


def _decode(cache: ModelCache, checkpoint: Checkpoint, latents: Tensor) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Pixels and alpha on the CPU. Half precision that overflows is tried once more in float32."""
    with use_vae(cache, checkpoint) as vae, torch.inference_mode():
        pixels, alpha, tiled = decode_or_tile(vae, latents)
        full = vae.dtype == torch.float32
    if not full and not torch.isfinite(pixels).all():
        with use_vae(cache, checkpoint, torch.float32) as vae, torch.inference_mode():
            pixels, alpha, tiled = decode_or_tile(vae, latents)
    if not torch.isfinite(pixels).all():
        raise FloatingPointError(
            f"{checkpoint.folder.name}: decoding gave values that are no numbers; no picture was made"
        )
    return pixels, alpha, ("decoded in tiles, since the whole did not fit into memory",) if tiled else ()


def _or_out_of_memory(attempt: Callable[[], Drawn]) -> Drawn | str:
    """What it gives, or what was said when memory ran out while drawing; not while loading, which says it better."""
    try:
        return attempt()
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, OutOfDeviceMemory) or not is_out_of_memory(error):
            raise
        return str(error).partition("\n")[0][:200]
