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
}
