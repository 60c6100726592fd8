"""One table of what differs between model families. Everything else treats them alike."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Family:
    """native_size, size_multiple, image_size: pixels; downscale: pixels a side of one latent.

    components: what a folder must hold; fixed_size: makes native_size only, whatever is asked for; pads_to_window:
    trained on prompts padded to the tokenizer's window, so that the padding is part of the prompt; start_noise: how
    much noise covers a condition that is itself a first picture; device_dtype: of weights on a GPU.
    """

    name: str
    native_size: int
    size_multiple: int
    downscale: int
    default_guidance: float
    components: tuple[str, ...]
    fixed_size: bool = False
    pads_to_window: bool = False
    image_size: int = 0
    start_noise: float = 0.0
    device_dtype: torch.dtype = torch.float16


_STABLE_DIFFUSION = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")
_ONE_ENCODER = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
_TWO_ENCODERS = (*_ONE_ENCODER, "tokenizer_2", "text_encoder_2")

# By the _class_name of model_index.json.
FAMILIES: dict[str, Family] = {
    "DuetMiniPipeline": Family(
        name="Duet mini",
        native_size=64,
        size_multiple=8,
        downscale=8,
        default_guidance=1.0,
        components=("tokenizer", "text_encoder", "image_encoder", "fusion", "unet", "vae", "scheduler"),
        fixed_size=True,
        image_size=64,
        start_noise=0.1,
        device_dtype=torch.float32,
    ),
    "StableDiffusionPipeline": Family(
        name="Stable Diffusion",
        native_size=512,
        size_multiple=8,
        downscale=8,
        default_guidance=7.5,
        components=_STABLE_DIFFUSION,
        pads_to_window=True,
    ),
    "StableDiffusionXLPipeline": Family(
        name="Stable Diffusion XL",
        native_size=1024,
        size_multiple=8,
        downscale=8,
        default_guidance=5.0,
        components=(*_STABLE_DIFFUSION, "tokenizer_2", "text_encoder_2"),
        pads_to_window=True,
    ),
    "LatentConsistencyModelPipeline": Family(
        name="Latent Consistency",
        native_size=512,
        size_multiple=8,
        downscale=8,
        default_guidance=8.5,
        components=_STABLE_DIFFUSION,
        pads_to_window=True,
    ),
    "StableDiffusion3Pipeline": Family(
        name="Stable Diffusion 3",
        native_size=1024,
        size_multiple=16,
        downscale=8,
        default_guidance=7.0,
        components=_TWO_ENCODERS,
    ),
    "FluxPipeline": Family(
        name="FLUX.1",
        native_size=1024,
        size_multiple=16,
        downscale=8,
        default_guidance=3.5,
        components=_TWO_ENCODERS,
        device_dtype=torch.bfloat16,
    ),
    "Flux2KleinPipeline": Family(
        name="FLUX.2 klein",
        native_size=1024,
        size_multiple=16,
        downscale=8,
        default_guidance=4.0,
        components=_ONE_ENCODER,
        device_dtype=torch.bfloat16,
    ),
    "QwenImagePipeline": Family(
        name="Qwen-Image",
        native_size=1024,
        size_multiple=16,
        downscale=8,
        default_guidance=4.0,
        components=_ONE_ENCODER,
        device_dtype=torch.bfloat16,
    ),
    "ZImagePipeline": Family(
        name="Z-Image",
        native_size=1024,
        size_multiple=16,
        downscale=8,
        default_guidance=5.0,
        components=_ONE_ENCODER,
        device_dtype=torch.bfloat16,
    ),
    "SanaPipeline": Family(
        name="Sana",
        native_size=1024,
        size_multiple=32,
        downscale=32,
        default_guidance=4.5,
        components=_ONE_ENCODER,
        device_dtype=torch.bfloat16,
    ),
    "SanaSprintPipeline": Family(
        name="Sana-Sprint",
        native_size=1024,
        size_multiple=32,
        downscale=32,
        default_guidance=4.5,
        components=_ONE_ENCODER,
        device_dtype=torch.bfloat16,
    ),
    "PixArtAlphaPipeline": Family(
        name="PixArt-alpha",
        native_size=1024,
        size_multiple=16,
        downscale=8,
        default_guidance=4.5,
        components=_ONE_ENCODER,
    ),
    "PixArtSigmaPipeline": Family(
        name="PixArt-sigma",
        native_size=1024,
        size_multiple=16,
        downscale=8,
        default_guidance=4.5,
        components=_ONE_ENCODER,
    ),
    "KolorsPipeline": Family(
        name="Kolors",
        native_size=1024,
        size_multiple=8,
        downscale=8,
        default_guidance=5.0,
        components=_STABLE_DIFFUSION,
    ),
    "HunyuanDiTPipeline": Family(
        name="HunyuanDiT",
        native_size=1024,
        size_multiple=16,
        downscale=8,
        default_guidance=5.0,
        components=_TWO_ENCODERS,
    ),
}
