"""What may differ between model families; ``families`` is the table of what does."""

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
