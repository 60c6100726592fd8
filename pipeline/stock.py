"""Between Duet's values and those of a host's own nodes: conditions, picture features, latents.

A host's LATENT is what a VAE decodes. A denoiser sees it scaled: by ``scaling_factor`` and ``shift_factor``, or to mean
0 and deviation 1 by channel. Duet's latents, as diffusers', are the scaled ones.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .checkpoints import Checkpoint
from .conditioning import ImageFeatures, PromptEmbeds, Space
from .denoising.latents import (
    channels_of,
    decode_or_tile,
    encode_pixels,
    for_decoder,
    for_denoiser,
    in_tiles,
    use_vae,
)
from .denoising.nan_guard import NanGuard
from .files.safetensors_files import read_json
from .model_cache import ModelCache

# The settings of a denoiser that say how wide its condition is, by the name of its class's argument.
# The outermost layer first: some project the words to a width of their own before they listen.
_WIDTHS = ("encoder_hid_dim", "caption_channels", "cap_feat_dim", "joint_attention_dim", "cross_attention_dim")
MOST_TOKENS = 4  # times those of the longer side of a condition


def prompt_embeds_from(
    checkpoint: Checkpoint,
    tokens: Tensor,
    pooled: Tensor | None,
    mask: Tensor | None = None,
    *,
    space: Space | None = None,
    notices: tuple[str, ...] = (),
) -> PromptEmbeds:
    """A condition that another program made, for ``checkpoint``. tokens: (B, L, D); pooled: (B, P); mask: (B, L).

    space: where the condition is known to live; else the checkpoint's own encoders are taken to have made it, and its
    widths must be those that the denoiser listens to. Raises ValueError naming both where they are not.
    """
    name = _name(checkpoint)
    if tokens.ndim != 3:
        raise ValueError(f"expected a condition of shape (B, L, D), got one of {tuple(tokens.shape)}")
    if space is None and checkpoint.has("fusion"):
        raise ValueError(
            f"expected words of its own encoder for {name}, got a condition {tokens.shape[-1]} wide of another"
        )
    if space is None:
        expected, width = condition_width(checkpoint), tokens.shape[-1]
        if expected is not None and width != expected:
            raise ValueError(f"expected a condition {expected} wide for {name}, got one {width} wide, another model's")
        space = Space(checkpoint.identity_of("text_encoder"), "CONDITIONING", width)
    pooled_width = _pooled_width(checkpoint)
    if pooled_width is not None and (pooled is None or pooled.shape[-1] != pooled_width):
        got = "none" if pooled is None else f"one {pooled.shape[-1]} wide"
        raise ValueError(f"expected a pooled condition {pooled_width} wide for {name}, got {got}")
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    if mask.shape != tokens.shape[:2]:
        raise ValueError(f"expected a mask for {tuple(tokens.shape[:2])} tokens, got one for {tuple(mask.shape)}")
    return PromptEmbeds(tokens, pooled, mask, space, notices=notices)


def against(wanted: PromptEmbeds, unwanted: PromptEmbeds) -> PromptEmbeds:
    """Both sides of guidance, of one length, which most pipelines ask for.

    To cross-attention, tokens that come several times are what they are once. So ComfyUI's samplers repeat them too,
    as far as that is worth its time; lengths that are further apart stay, as do those of which a part is masked.
    """
    lengths = wanted.tokens.shape[1], unwanted.tokens.shape[1]
    together = math.lcm(*lengths)
    if min(lengths) and together <= MOST_TOKENS * max(lengths) and wanted.mask.all() and unwanted.mask.all():
        wanted, unwanted = (_repeated(side, together // side.tokens.shape[1]) for side in (wanted, unwanted))
    return replace(wanted, negative=unwanted, notices=wanted.notices + unwanted.notices)


def _repeated(side: PromptEmbeds, times: int) -> PromptEmbeds:
    return replace(side, tokens=side.tokens.repeat(1, times, 1), mask=side.mask.repeat(1, times))


def condition_width(checkpoint: Checkpoint) -> int | None:
    """How wide the tokens are that the denoiser listens to; None where its configuration does not say."""
    config = _config(checkpoint, "transformer" if checkpoint.has("transformer") else "unet")
    width = next((config[key] for key in _WIDTHS if config.get(key)), None)
    width = width[0] if isinstance(width, Sequence) and not isinstance(width, str) and width else width
    return width if isinstance(width, int) else None


def _pooled_width(checkpoint: Checkpoint) -> int | None:
    if "pooled" not in checkpoint.family.arguments:
        return None
    if checkpoint.has("transformer"):
        return _config(checkpoint, "transformer").get("pooled_projection_dim")
    config = _config(checkpoint, "unet")
    # It hears the pooled words and six embedded numbers: sizes and crops (arXiv 2307.01952, section 2.2).
    return config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]


def image_features_from(tokens: Tensor, pooled: Tensor, encoder: str, layer: str) -> ImageFeatures:
    """Features that another program's vision transformer made. tokens: (B, N, D); pooled: (B, P).

    N is h*w, or one more where a class token comes first, which is left out. Raises ValueError for any other N.
    pooled may be (B, N, P), as ComfyUI gives it of a SigLIP, which it reads without its pooling head: the mean counts.
    """
    pooled = pooled.mean(dim=1) if pooled.ndim == 3 and pooled.shape[1] else pooled
    if tokens.ndim != 3 or pooled.ndim != 2 or pooled.shape[0] != tokens.shape[0]:
        raise ValueError(
            f"expected features of shape (B, N, D) and (B, P), got {tuple(tokens.shape)} and {tuple(pooled.shape)}"
        )
    count = tokens.shape[1]
    for extra in (0, 1):
        side = math.isqrt(max(count - extra, 0))
        if side and side * side == count - extra:
            return ImageFeatures(tokens[:, extra:], pooled, (side, side), Space(encoder, layer, tokens.shape[-1]))
    raise ValueError(f"expected the features of a square picture, with or without a class token, got {count} of them")


def to_host_latents(checkpoint: Checkpoint, latents: Tensor) -> Tensor | None:
    """Those of ``Pictures``, (B, C, h, w) -> as the VAE decodes them, (B, C, 1, h, w) for a VAE of videos.

    None where the host has them in a form of its own: FLUX.2's, patched two by two and normalised.
    """
    if checkpoint.components["vae"].class_name == "AutoencoderKLFlux2":
        return None
    # Its weights may have made way, and need not come back for this.
    vae = SimpleNamespace(config=checkpoint.config("vae"))
    return for_decoder(vae, latents.unsqueeze(2) if _is_of_videos(vae) else latents)


def decode_host_latents(
    cache: ModelCache, checkpoint: Checkpoint, latents: Tensor, *, tiled: bool = False
) -> tuple[Tensor, Tensor]:
    """A host's latents -> RGB (B, 3, H, W), not premultiplied, and alpha (B, 1, H, W), both in 0..1 and on the CPU.

    tiled: piece by piece, which needs less memory and leaves faint seams; out of memory, it is tried once by itself.
    Raises ValueError for latents of another shape, FloatingPointError where they give no numbers in float32 either.
    """

    def decoded(vae: Any) -> tuple[Tensor, ...]:
        channels, sides = channels_of(vae), 5 if _is_of_videos(vae) else 4
        if latents.ndim != sides or latents.shape[1] != channels:
            raise ValueError(
                f"expected latents of {channels} channels in {sides} dimensions for {_name(checkpoint)}, "
                f"got {tuple(latents.shape)}"
            )
        decoder = in_tiles(vae, max(latents.shape[-2:])) if tiled else vae
        return decode_or_tile(decoder, for_denoiser(vae, latents), make_room=cache.residency.make_room)[:2]

    pixels, alpha = _in_numbers(cache, checkpoint, "decoding", decoded)
    return pixels, alpha


def encode_for_host(cache: ModelCache, checkpoint: Checkpoint, pixels: Tensor, *, tiled: bool = False) -> Tensor:
    """RGB (B, 3, H, W) in 0..1 -> a host's latents, the mode of the VAE's distribution.

    Sides are cut to multiples of the VAE's own, equally at both ends. tiled: as in ``decode_host_latents``. Raises
    ValueError for pictures too small, FloatingPointError where they give no numbers in float32 either.
    """
    step = checkpoint.family.downscale
    if pixels.ndim != 4 or pixels.shape[1] != 3 or min(pixels.shape[-2:]) < step:
        raise ValueError(f"expected pictures (B, 3, H, W) of at least {step}x{step}, got {tuple(pixels.shape)}")
    height, width = (side // step * step for side in pixels.shape[-2:])
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    pixels = pixels[..., top : top + height, left : left + width]

    def encoded(vae: Any) -> tuple[Tensor, ...]:
        opaque = vae.config.get("in_channels") == 4  # the small model's
        seen = torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1) if opaque else pixels
        encoder = in_tiles(vae, max(height, width) // step) if tiled else vae
        latents = encode_pixels(encoder, seen.unsqueeze(2) if _is_of_videos(vae) else seen)
        return (for_decoder(vae, latents).float().cpu(),)

    (latents,) = _in_numbers(cache, checkpoint, "encoding", encoded)
    return latents


def _in_numbers(
    cache: ModelCache, checkpoint: Checkpoint, stage: str, work: Callable[[Any], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """What ``work`` makes with the VAE, in float32 where half precision overflows."""

    def attempt(whole: bool) -> tuple[tuple[Tensor, ...], str]:
        with use_vae(cache, checkpoint, torch.float32 if whole else None) as vae, torch.inference_mode():
            return work(vae), str(vae.dtype).removeprefix("torch.")

    return NanGuard(checkpoint.folder.name).finite(stage, attempt)


def _is_of_videos(vae: Any) -> bool:
    return "z_dim" in vae.config


def _name(checkpoint: Checkpoint) -> str:
    return f"{checkpoint.folder.name} ({checkpoint.family.name})"


def _config(checkpoint: Checkpoint, component: str) -> dict[str, Any]:
    return read_json(checkpoint.components[component].config)
