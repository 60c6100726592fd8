"""FusedConditioning -> pictures: a few denoising steps, then the decoder."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from .adapters.private_views import pictures_shown
from .checkpoints import Checkpoint
from .conditioning import FusedConditioning, Pictures
from .denoising.diffusers_generation import Source, draw
from .denoising.frame import Frame, frame_for, resized
from .denoising.latents import channels_of, decode_or_tile, generators, noise, preview, use_vae
from .denoising.unet_sampler import denoise
from .model_cache import ModelCache
from .residency import OutOfDeviceMemory, is_out_of_memory
from .vision.resizing import fit_to

SMALLEST_SIDE, LARGEST_SIDE, LARGEST_BATCH = 16, 4096, 64
MOST_STEPS = 1000

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
    _check_numbers(num_inference_steps, guidance_scale, width, height, batch_size, strength)
    _check_space(checkpoint, conditioning)
    if sigmas is not None:
        _check_sigmas(checkpoint, sigmas, image)
        num_inference_steps = len(sigmas) - 1
    frame = frame_for(checkpoint.family, width, height, from_picture=image is not None)
    source, told = _source(checkpoint, frame, image, mask, strength, num_inference_steps)
    conditioning, source = _together(conditioning, source, batch_size)

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
        pixels = _kept_outside(pixels, image, mask)
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
            _check_channels(checkpoint, denoiser, source)
        if family.own_sampler and source is None:
            sources = generators(seed, conditioning.tokens.shape[0])
            shape = (channels_of(vae), frame.height // family.downscale, frame.width // family.downscale)
            latents = denoise(
                denoiser,
                checkpoint.scheduler(),
                noise(shape, sources).to(denoiser.device, denoiser.dtype),
                _on(conditioning, denoiser),
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


def _kept_outside(pixels: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """The image where the mask is 0, to the pixel; (B, 3, H, W)."""
    height, width = pixels.shape[-2:]
    kept, anew = (fit_to(_unit(side), width, height, "crop") for side in (image, mask.unsqueeze(1)))
    kept, anew = (side.repeat_interleave(pixels.shape[0] // side.shape[0], dim=0) for side in (kept, anew))
    return kept + anew * (pixels - kept)


def _unit(side: Tensor) -> Tensor:
    return side.float().cpu().clamp(0, 1)


def _together(
    conditioning: FusedConditioning, source: Source | None, batch_size: int
) -> tuple[FusedConditioning, Source | None]:
    """Both with one entry for each picture."""
    words = conditioning.tokens.shape[0]
    pictures = source.pixels.shape[0] if source is not None else 1
    if 1 not in (words, pictures) and words != pictures:
        raise ValueError(
            f"expected as many pictures as conditions, or one of either, got {pictures} pictures and {words} conditions"
        )
    entries = max(words, pictures)
    if source is not None:
        mask = _each(source.mask, entries, batch_size) if source.mask is not None else None
        source = replace(source, pixels=_each(source.pixels, entries, batch_size), mask=mask)
    return _repeated(conditioning, entries, batch_size), source


def _repeated(conditioning: FusedConditioning, entries: int, times: int) -> FusedConditioning:
    return replace(
        conditioning,
        tokens=_each(conditioning.tokens, entries, times),
        pooled=_each(conditioning.pooled, entries, times) if conditioning.pooled is not None else None,
        mask=_each(conditioning.mask, entries, times),
        negative=_repeated(conditioning.negative, entries, times) if conditioning.negative is not None else None,
        second=_repeated(conditioning.second, entries, times) if conditioning.second is not None else None,
    )


def _each(side: Tensor, entries: int, times: int) -> Tensor:
    return side.expand(entries, *side.shape[1:]).repeat_interleave(times, dim=0)


def _on(conditioning: FusedConditioning, denoiser: Any) -> FusedConditioning:
    negative = _on(conditioning.negative, denoiser) if conditioning.negative is not None else None
    return replace(conditioning, tokens=conditioning.tokens.to(denoiser.device, denoiser.dtype), negative=negative)


def _source(
    checkpoint: Checkpoint, frame: Frame, image: Tensor | None, mask: Tensor | None, strength: float, steps: int
) -> tuple[Source | None, tuple[str, ...]]:
    """The picture and the mask within the frame, and a strength of at least one step."""
    if image is None:
        if mask is not None:
            raise ValueError("expected a picture for the mask, got a mask alone")
        return None, ()
    family = checkpoint.family
    if family.tasks is None:
        raise ValueError(
            f"expected words or a fused condition for {family.name}, which draws from no picture; got one. Let Image "
            "features and Fuse read it"
        )
    if image.ndim != 4 or image.shape[1] != 3:
        raise ValueError(f"expected a picture of shape (B, 3, H, W), got {tuple(image.shape)}")
    if not torch.isfinite(image).all() or (mask is not None and not torch.isfinite(mask).all()):
        raise ValueError("expected a picture and a mask of numbers, found NaN or infinity")
    pixels = fit_to(_unit(image), frame.width, frame.height, "crop")
    if mask is not None:
        if mask.ndim != 3 or mask.shape[0] not in (1, image.shape[0]):
            raise ValueError(f"expected a mask of shape ({image.shape[0]} or 1, H, W), got {tuple(mask.shape)}")
        mask = fit_to(_unit(mask.unsqueeze(1)), frame.width, frame.height, "crop")
    told = f"denoise {strength:g} of {steps} steps is less than half of one; one is taken"
    return Source(pixels, mask, strength), (told,) if round(strength * steps) == 0 else ()


def _check_sigmas(checkpoint: Checkpoint, sigmas: Sequence[float], image: Tensor | None) -> None:
    """For the host's schedules, which its own samplers of Stable Diffusion walk along."""
    if not checkpoint.family.own_sampler or checkpoint.has("fusion"):
        raise ValueError(f"expected no sigmas for {checkpoint.family.name}, which has steps of its own, got some")
    if image is not None:
        raise ValueError("expected sigmas to draw along or an image to draw from, got both")
    falling = all(high > low >= 0 for high, low in pairwise(sigmas))
    if not 2 <= len(sigmas) <= MOST_STEPS + 1 or not falling or not math.isfinite(sigmas[0]):
        quoted = ", ".join(f"{sigma:g}" for sigma in sigmas[:6])
        raise ValueError(f"expected 2 to {MOST_STEPS + 1} falling sigmas, got {len(sigmas)}: {quoted}")


def _check_channels(checkpoint: Checkpoint, unet: Any, source: Source | None) -> None:
    extra = unet.config.in_channels - unet.config.out_channels
    if extra and (source is None or source.mask is None):
        raise ValueError(
            f"expected a picture and a mask for {checkpoint.folder.name}, whose denoiser has {extra} channels for "
            f"them; got {'words' if source is None else 'a picture'} alone"
        )


def _check_numbers(
    steps: int, guidance_scale: float, width: int, height: int, batch_size: int, strength: float
) -> None:
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


def _check_space(checkpoint: Checkpoint, conditioning: FusedConditioning) -> None:
    expected = checkpoint.identity_of("fusion" if checkpoint.has("fusion") else "text_encoder")
    if conditioning.space.model != expected:
        raise ValueError(f"expected a condition of {expected}, got one of {conditioning.space}")
