"""One table of what differs between model families. Everything else treats them alike."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Tasks:
    """The diffusers pipelines, by class name, that draw for each task; None where diffusers has none."""

    text_to_image: str
    image_to_image: str | None = None
    inpaint: str | None = None


@dataclass(frozen=True)
class Family:
    """native_size, size_multiple, image_size: pixels; downscale: pixels a side of one latent; default_steps,
    default_guidance: where nobody says any, of a model that was not distilled further; few_steps: of one that was, and
    does not say for how many.

    components: what a folder must hold; fixed_size: makes native_size only, whatever is asked for; panoramas: or twice
    as wide, where that is asked for; pads_to_window: CLIP, trained on prompts padded to the tokenizer's window, so that
    the padding is part of the prompt, and hearing weighted phrases; clip_layer: which of its hidden states is heard, 0
    being the last one, normalised.
    start_noise: how much noise covers a condition that is itself a first picture; device_dtype, vae_dtype: of weights
    on a GPU, the second where the decoder overflows in the first.

    tasks: None for a model that the pack draws itself. encoded: what the pipeline's ``encode_prompt`` returns, in its
    order, None for what is not needed; empty where our own windows of CLIP are used. arguments: by which names its call
    takes them; what is steered away from has the same names after ``negative_``. windows: the longest prompt, in
    tokens, by tokenizer component; the first is the one that hears most. joins_windows: the denoiser listens to any
    number of those tokens; chat_template: "thinking" or "answering" where the prompt is said to the encoder
    as a user says it to a chat model that is to do so.
    listed: the call takes a list of (L, D), the tokens that count of each prompt. latents: how the call takes and shows
    them: "plain" (B, C, h, w), "packed" or "patched" two by two; encodes_apart: a picture is given as latents;
    strength_steps: whether the strength's share of the steps is cut ("down") or filled ("up") to a whole number, or all
    are taken from that share of the noise ("all"); largest_source: pixels of the largest picture that is drawn from, 0
    for no limit; own_sampler: words alone are drawn by ``unet_sampler``.
    guidance: how ``guidance_scale`` reaches the model. "negative": steering away from a negative prompt (arXiv
    2207.12598); "true_cfg_scale": the same under this name; "from_zero": the same, 0 being plain where we say 1;
    "embedded": an input of a distilled network, which hears no negative prompt.
    """

    name: str
    native_size: int
    size_multiple: int
    downscale: int
    default_steps: int
    default_guidance: float
    components: tuple[str, ...]
    few_steps: int = 4
    fixed_size: bool = False
    panoramas: bool = False
    pads_to_window: bool = False
    clip_layer: int = 0
    image_size: int = 0
    start_noise: float = 0.0
    device_dtype: torch.dtype = torch.float16
    vae_dtype: torch.dtype | None = None
    tasks: Tasks | None = None
    encoded: tuple[str | None, ...] = ()
    arguments: Mapping[str, str] = field(default_factory=lambda: {"tokens": "prompt_embeds"})
    windows: Mapping[str, int] = field(default_factory=dict)
    joins_windows: bool = False
    chat_template: str = ""
    listed: bool = False
    latents: str = "plain"
    encodes_apart: bool = False
    largest_source: int = 0
    strength_steps: str = "down"
    own_sampler: bool = False
    guidance: str = "negative"

    @property
    def takes_negative(self) -> bool:
        return self.guidance != "embedded"


_STABLE_DIFFUSION = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")
_ONE_ENCODER = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
_TWO_ENCODERS = (*_ONE_ENCODER, "tokenizer_2", "text_encoder_2")
_POOLED = {"tokens": "prompt_embeds", "pooled": "pooled_prompt_embeds"}
_MASKED = {"tokens": "prompt_embeds", "mask": "prompt_attention_mask"}

# By the _class_name of model_index.json.
FAMILIES: dict[str, Family] = {
    "DuetMiniPipeline": Family(
        name="Duet mini",
        native_size=128,
        size_multiple=8,
        downscale=8,
        default_steps=1,
        default_guidance=1.0,
        components=("tokenizer", "text_encoder", "image_encoder", "fusion", "unet", "vae", "scheduler"),
        fixed_size=True,
        panoramas=True,
        image_size=96,
        start_noise=0.1,
        device_dtype=torch.float32,
        own_sampler=True,
    ),
    "StableDiffusionPipeline": Family(
        name="Stable Diffusion",
        native_size=512,
        size_multiple=8,
        downscale=8,
        default_steps=25,
        default_guidance=7.5,
        components=_STABLE_DIFFUSION,
        pads_to_window=True,
        tasks=Tasks("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
        own_sampler=True,
    ),
    "StableDiffusionXLPipeline": Family(
        name="Stable Diffusion XL",
        native_size=1024,
        size_multiple=8,
        downscale=8,
        default_steps=25,
        default_guidance=5.0,
        components=(*_STABLE_DIFFUSION, "tokenizer_2", "text_encoder_2"),
        pads_to_window=True,
        clip_layer=-2,
        vae_dtype=torch.float32,
        encodes_apart=True,
        tasks=Tasks(
            "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"
        ),
        arguments=_POOLED,
    ),
    "LatentConsistencyModelPipeline": Family(
        name="Latent Consistency",
        native_size=512,
        size_multiple=8,
        downscale=8,
        default_steps=4,
        default_guidance=8.5,
        components=_STABLE_DIFFUSION,
        pads_to_window=True,
        tasks=Tasks("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline"),
        strength_steps="all",
        guidance="embedded",
    ),
    "StableDiffusion3Pipeline": Family(
        name="Stable Diffusion 3",
        native_size=1024,
        size_multiple=16,
        downscale=8,
        default_steps=28,
        default_guidance=7.0,
        components=_TWO_ENCODERS,
        tasks=Tasks("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
        strength_steps="up",
        encoded=("tokens", None, "pooled"),
        arguments=_POOLED,
        windows={"tokenizer_3": 256, "tokenizer": 77, "tokenizer_2": 77},
        joins_windows=True,
    ),
    "FluxPipeline": Family(
        name="FLUX.1",
        native_size=1024,
        size_multiple=16,
        downscale=8,
        default_steps=20,
        default_guidance=3.5,
        components=_TWO_ENCODERS,
        device_dtype=torch.bfloat16,
        tasks=Tasks("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"),
        strength_steps="up",
        encoded=("tokens", "pooled"),
        arguments=_POOLED,
        windows={"tokenizer_2": 512, "tokenizer": 77},
        latents="packed",
        joins_windows=True,
        guidance="embedded",
    ),
    "Flux2KleinPipeline": Family(
        name="FLUX.2 klein",
        native_size=1024,
        size_multiple=16,
        downscale=8,
        default_steps=28,
        default_guidance=4.0,
        components=_ONE_ENCODER,
        device_dtype=torch.bfloat16,
        # Its picture-to-picture pipeline is the inpainting one, with everything to be painted.
        tasks=Tasks("Flux2KleinPipeline", "Flux2KleinInpaintPipeline", "Flux2KleinInpaintPipeline"),
        strength_steps="up",
        encoded=("tokens",),
        windows={"tokenizer": 512},
        latents="patched",
        largest_source=1024 * 1024,
        chat_template="answering",
    ),
    "QwenImagePipeline": Family(
        name="Qwen-Image",
        native_size=1024,
        size_multiple=16,
        downscale=8,
        default_steps=30,
        default_guidance=4.0,
        components=_ONE_ENCODER,
        device_dtype=torch.bfloat16,
        tasks=Tasks("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
        strength_steps="up",
        encoded=("tokens", "mask"),
        arguments={"tokens": "prompt_embeds", "mask": "prompt_embeds_mask"},
        windows={"tokenizer": 1024},
        latents="packed",
        guidance="true_cfg_scale",
    ),
    "ZImagePipeline": Family(
        name="Z-Image",
        native_size=1024,
        size_multiple=16,
        downscale=8,
        default_steps=30,
        few_steps=8,
        default_guidance=5.0,
        components=_ONE_ENCODER,
        device_dtype=torch.bfloat16,
        tasks=Tasks("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
        strength_steps="up",
        encoded=("tokens",),
        windows={"tokenizer": 512},
        listed=True,
        chat_template="thinking",
        guidance="from_zero",
    ),
    "SanaPipeline": Family(
        name="Sana",
        native_size=1024,
        size_multiple=32,
        downscale=32,
        default_steps=20,
        default_guidance=4.5,
        components=_ONE_ENCODER,
        device_dtype=torch.bfloat16,
        tasks=Tasks("SanaPipeline"),
        encoded=("tokens", "mask"),
        arguments=_MASKED,
        windows={"tokenizer": 300},
        joins_windows=True,
    ),
    "SanaSprintPipeline": Family(
        name="Sana-Sprint",
        native_size=1024,
        size_multiple=32,
        downscale=32,
        default_steps=2,
        default_guidance=4.5,
        components=_ONE_ENCODER,
        device_dtype=torch.bfloat16,
        tasks=Tasks("SanaSprintPipeline", "SanaSprintImg2ImgPipeline"),
        strength_steps="up",
        encoded=("tokens", "mask"),
        arguments=_MASKED,
        windows={"tokenizer": 300},
        joins_windows=True,
        guidance="embedded",
    ),
    "PixArtAlphaPipeline": Family(
        name="PixArt-alpha",
        native_size=1024,
        size_multiple=16,
        downscale=8,
        default_steps=20,
        default_guidance=4.5,
        components=_ONE_ENCODER,
        tasks=Tasks("PixArtAlphaPipeline"),
        encoded=("tokens", "mask"),
        arguments=_MASKED,
        windows={"tokenizer": 120},
        joins_windows=True,
    ),
    "PixArtSigmaPipeline": Family(
        name="PixArt-sigma",
        native_size=1024,
        size_multiple=16,
        downscale=8,
        default_steps=20,
        default_guidance=4.5,
        components=_ONE_ENCODER,
        tasks=Tasks("PixArtSigmaPipeline"),
        encoded=("tokens", "mask"),
        arguments=_MASKED,
        windows={"tokenizer": 300},
        joins_windows=True,
    ),
    "KolorsPipeline": Family(
        name="Kolors",
        native_size=1024,
        size_multiple=8,
        downscale=8,
        default_steps=25,
        default_guidance=5.0,
        components=_STABLE_DIFFUSION,
        vae_dtype=torch.float32,
        encodes_apart=True,
        # Its denoiser is called as SDXL's is, and Kolors' own picture-to-picture pipeline (diffusers 0.42) loses the
        # pooled embeddings that it is given.
        tasks=Tasks("KolorsPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
        encoded=("tokens", None, "pooled"),
        arguments=_POOLED,
        windows={"tokenizer": 256},
        joins_windows=True,
    ),
    "HunyuanDiTPipeline": Family(
        name="HunyuanDiT",
        native_size=1024,
        size_multiple=16,
        downscale=8,
        default_steps=25,
        default_guidance=5.0,
        components=_TWO_ENCODERS,
        tasks=Tasks("HunyuanDiTPipeline"),
        encoded=("tokens", None, "mask"),
        arguments={
            **_MASKED,
            "second.tokens": "prompt_embeds_2",
            "second.mask": "prompt_attention_mask_2",
        },
        windows={"tokenizer_2": 256, "tokenizer": 77},
    ),
}
