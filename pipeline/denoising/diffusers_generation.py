"""Drawing by diffusers' own pipelines: from words, from a picture, and within a mask."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import Checkpoint
from ..conditioning import FusedConditioning
from .diffusers_pipelines import assemble
from .latents import channels_of, encode_pixels, generators, noise

Look = Callable[[int, int, Callable[[], Tensor]], None]  # step, total, and what gives the latents so far


@dataclass(frozen=True)
class Source:
    """What is drawn from. pixels: (B, 3, H, W) in 0..1; mask: (B, 1, H, W), 1 where it is drawn anew, or None.

    strength: 0..1, how much of the noise is laid over the pixels, and so how many of the steps are taken.
    """

    pixels: Tensor
    mask: Tensor | None
    strength: float


def draw(
    checkpoint: Checkpoint,
    denoiser: Any,
    vae: Any,
    conditioning: FusedConditioning,
    *,
    scheduler: Any = None,
    seed: int | Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    width: int,
    height: int,
    source: Source | None,
    image_embeds: tuple[list[Tensor], list[Tensor]] | None = None,
    on_step: Look,
) -> Tensor:
    """Latents as ``decode_latents`` takes them, one for each entry of the condition and of the source.

    Picture i draws everything from a generator seeded ``seed + i`` or ``seed[i]``. scheduler: None for the model's own.
    image_embeds: of pictures that IP-Adapters show, one tensor for each of them, and in place of them. Raises
    ValueError where diffusers cannot draw so.
    """
    family = checkpoint.family
    name = "unet" if checkpoint.has("unet") else "transformer"
    parts = {name: denoiser, "vae": vae, "scheduler": scheduler or checkpoint.scheduler()}
    pipeline = assemble(checkpoint, _class_for(checkpoint, source), parts)
    accepted = inspect.signature(type(pipeline).__call__).parameters
    own = generators(seed, conditioning.tokens.shape[0])
    arguments: dict[str, Any] = {
        "height": height,
        "width": width,
        "num_inference_steps": num_inference_steps,
        "generator": own,
        "output_type": "latent",
        "return_dict": False,
        "use_resolution_binning": False,  # the sizes that are asked for, not the nearest that were trained
        "max_sequence_length": next(iter(family.windows.values()), None),
        "callback_steps": 1,
        "negative_prompt": None,  # some have an empty one by default, which the embeddings stand for
    }
    by_step = inspect.signature(pipeline.scheduler.step).parameters
    if "eta" in by_step:  # the pipelines would set TCD's to 0, which takes away the noise that it lives by
        arguments["eta"] = by_step["eta"].default
    if num_inference_steps != 2:
        arguments["intermediate_timesteps"] = None  # of Sana-Sprint, which has one for two steps only
    arguments = {name: value for name, value in arguments.items() if name in accepted}
    arguments |= _guidance(checkpoint, conditioning, guidance_scale, denoiser)
    if image_embeds is not None:
        arguments |= _shown(image_embeds, "negative_prompt_embeds" in arguments, accepted)
    if source is None:
        arguments["latents"] = _start(pipeline, vae, family.latents, (height, width), own).to(
            denoiser.device, denoiser.dtype
        )
    else:
        arguments |= _source(pipeline, vae, denoiser, family.encodes_apart, source, accepted)
        arguments["strength"] = _strength(family.strength_steps, source.strength, num_inference_steps, pipeline)

    def look(step: int, latents: Tensor) -> None:
        total = getattr(pipeline, "_num_timesteps", None) or num_inference_steps
        scale = pipeline.scheduler.config.get("sigma_data", 1.0)  # Sana-Sprint has them on this scale until the end
        on_step(step + 1, total, lambda: _unpacked(pipeline, vae, family.latents, latents / scale, height, width))

    def at_step_end(_: Any, step: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        look(step, values["latents"])
        return values

    if "callback_on_step_end" in accepted:
        arguments["callback_on_step_end"] = at_step_end
    else:
        arguments["callback"] = lambda step, _, latents: look(step, latents)
    latents = pipeline(**arguments)[0]
    # FLUX.2 unpacks and rescales what it gives, though not what it shows at each step.
    return latents if family.latents == "patched" else _unpacked(pipeline, vae, family.latents, latents, height, width)


def _class_for(checkpoint: Checkpoint, source: Source | None) -> str:
    family, tasks = checkpoint.family, checkpoint.family.tasks
    assert tasks is not None, "a family that the pack draws itself"
    if source is None:
        return tasks.text_to_image
    task, found = ("image-to-image", tasks.image_to_image) if source.mask is None else ("inpainting", tasks.inpaint)
    if found is None:
        raise ValueError(f"expected words alone for {family.name}, since diffusers has no {task} of it; got a picture")
    return found


def _guidance(checkpoint: Checkpoint, conditioning: FusedConditioning, scale: float, denoiser: Any) -> dict[str, Any]:
    """The scale and the embeddings, by the names that the family's call has for them."""
    family, away = checkpoint.family, conditioning.negative
    steers = family.takes_negative and scale > 1 and away is not None
    if family.guidance == "negative":
        found: dict[str, Any] = {"guidance_scale": scale if steers else 1.0}
    elif family.guidance == "from_zero":
        found = {"guidance_scale": scale - 1 if steers else 0.0}
    else:
        found = {"true_cfg_scale" if family.guidance == "true_cfg_scale" else "guidance_scale": scale}
    sides = [("", conditioning)]
    if steers and away is not None:
        sides.append(("negative_", away))
    for prefix, side in sides:
        for path, name in family.arguments.items():
            found[prefix + name] = _told(side, path, denoiser, family.listed)
    return found


def _shown(image_embeds: tuple[list[Tensor], list[Tensor]], steers: bool, accepted: Any) -> dict[str, Any]:
    """The first entry of each, since the pipelines repeat it for the batch."""
    shown, hidden = ([one[:1] for one in side] for side in image_embeds)
    if "negative_ip_adapter_image_embeds" in accepted:
        return {"ip_adapter_image_embeds": shown, "negative_ip_adapter_image_embeds": hidden}
    both = [torch.cat(pair) for pair in zip(hidden, shown, strict=True)] if steers else shown
    return {"ip_adapter_image_embeds": both}


def _told(conditioning: FusedConditioning, path: str, denoiser: Any, listed: bool) -> Tensor | list[Tensor]:
    said, _, name = path.rpartition(".")
    side = conditioning.second if said else conditioning
    value = getattr(side, name) if side is not None else None
    if side is None or value is None:
        raise ValueError(f"expected a condition with {path}, got one of {conditioning.space} without")
    if name == "mask":
        return value.long().to(denoiser.device)
    value = value.to(denoiser.device, denoiser.dtype)
    return [row[mask] for row, mask in zip(value, side.mask.to(value.device), strict=True)] if listed else value


def _start(pipeline: Any, vae: Any, layout: str, size: tuple[int, int], own: list[torch.Generator]) -> Tensor:
    """Noise as the pipeline's ``latents`` are laid out: plain (B, C, h, w), packed, or patched two by two."""
    channels, factor = channels_of(vae), pipeline.vae_scale_factor
    height, width = (side // factor for side in size)
    if layout == "patched":
        return noise((4 * channels, height // 2, width // 2), own)
    drawn = noise((channels, height, width), own)
    return pipeline._pack_latents(drawn, len(own), channels, height, width) if layout == "packed" else drawn


def _unpacked(pipeline: Any, vae: Any, layout: str, latents: Tensor, height: int, width: int) -> Tensor:
    if layout == "packed":
        return pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)
    if layout == "patched":
        factor = 2 * pipeline.vae_scale_factor
        latents = latents.transpose(1, 2).unflatten(2, (height // factor, width // factor))
        mean, variance = (side.view(1, -1, 1, 1).to(latents) for side in (vae.bn.running_mean, vae.bn.running_var))
        return pipeline._unpatchify_latents(latents * (variance + vae.config.batch_norm_eps).sqrt() + mean)
    return latents


def _source(
    pipeline: Any, vae: Any, denoiser: Any, encodes_apart: bool, source: Source, accepted: Any
) -> dict[str, Any]:
    found: dict[str, Any] = {"image": source.pixels}
    mask = source.mask
    if mask is None and "mask_image" in accepted:
        mask = torch.ones_like(source.pixels[:, :1])
    if mask is not None:
        found["mask_image"] = mask
    if encodes_apart:
        # Its pipelines would change the decoder's precision, which is the cache's to choose, and change it back.
        found["image"] = encode_pixels(vae, source.pixels).to(denoiser.device, denoiser.dtype)
        if mask is not None:
            kept = source.pixels * (mask < 0.5) + 0.5 * (mask >= 0.5)
            found["masked_image_latents"] = encode_pixels(vae, kept).to(denoiser.device, denoiser.dtype)
    return found


def _strength(steps_of: str, strength: float, steps: int, pipeline: Any) -> float:
    """The strength by which the pipeline takes the nearest whole number of steps, at least one.

    Without it, 0.7 of three steps would be two in some families, and in others three from nothing but noise.
    """
    if steps_of == "all":
        least = (steps + 0.01) / pipeline.scheduler.config.original_inference_steps
        return min(1.0, max(strength, least))
    taken = max(1, round(strength * steps))
    return 1.0 if taken == steps else (taken + (0.01 if steps_of == "down" else -0.01)) / steps
