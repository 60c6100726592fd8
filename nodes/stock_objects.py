"""A Duet model's text encoder and VAE in the form that the host's own nodes expect of a CLIP and a VAE.

They hold the name of the model only, never weights: each use draws from the shared cache.
"""

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..pipeline.checkpoints import Checkpoint
from ..pipeline.conditioning import FusedConditioning, PromptEmbeds, Space
from ..pipeline.stock import against, decode_host_latents, encode_for_host, prompt_embeds_from, to_host_latents
from ..pipeline.text_encoder import encode_prompt
from .host import ExecutionBlocker, model_cache  # pyright: ignore[reportAttributeAccessIssue]  # the host is no package
from .images import over_white, to_image

SPACE = "duet_space"  # the entry of a CONDITIONING that says where it lives

# Entries that limit or change what a CONDITIONING says in ways that only the host's own samplers follow.
_NOT_FOLLOWED = (
    "area", "strength", "mask", "control", "gligen", "hooks", "start_percent", "end_percent", "timestep_start",
    "timestep_end", "concat_latent_image", "unclip_conditioning", "reference_latents",
)  # fmt: skip
_HEARD = ("pooled_output", "attention_mask", SPACE)

Conditioning = list[list[Any]]  # the host's: [[tokens (B, L, D), {"pooled_output": (B, P) or None, ...}], ...]


@dataclass(frozen=True)
class Text:
    """What ``DuetClip.tokenize`` gives: the encoder cuts it into tokens itself."""

    text: str

    def __getitem__(self, name: str) -> NoReturn:
        raise ValueError(f"Duet's text encoder takes one prompt for all its parts, and none for {name!r} alone")


class DuetClip:
    """What CLIP Text Encode asks of a CLIP, answered by a Duet model's text encoder."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def tokenize(self, text: str, return_word_ids: bool = False, **options: Any) -> Text:
        if options:
            raise ValueError(f"Duet's text encoder takes a prompt alone, not {', '.join(options)}")
        return Text(text)

    def encode_from_tokens_scheduled(
        self, tokens: Text, unprojected: bool = False, add_dict: dict[str, Any] | None = None, show_pbar: bool = True
    ) -> Conditioning:
        (entry,) = to_conditioning(encode_prompt(model_cache(), self.checkpoint, tokens.text))
        return [[entry[0], entry[1] | (add_dict or {})]]

    def encode_from_tokens(self, tokens: Text, return_pooled: bool = False, return_dict: bool = False) -> Any:
        ((cond, entries),) = self.encode_from_tokens_scheduled(tokens)
        if return_dict:
            return {"cond": cond, **entries}
        return (cond, entries["pooled_output"]) if return_pooled else cond

    def encode(self, text: str) -> Tensor:
        return self.encode_from_tokens(self.tokenize(text))

    def clone(self) -> "DuetClip":
        return DuetClip(self.checkpoint)

    def get_ram_usage(self) -> int:
        return 0  # the cache counts the weights

    def clip_layer(self, layer: int) -> NoReturn:
        raise ValueError(f"Duet's text encoder gives the layer that its model was trained on, not layer {layer}")

    def add_patches(self, *_: Any, **__: Any) -> NoReturn:
        raise ValueError("Duet's text encoder takes no patches of the host, such as LoRA's")

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"this CLIP is Duet's text encoder, which encodes prompts and has no {name!r}")


class DuetVae:
    """What VAE Decode, VAE Encode and their tiled kin ask of a VAE, answered by a Duet model's VAE.

    Pictures come as IMAGE, RGB; those of a model that draws transparency are laid over white.
    """

    latent_dim = 2

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.downscale_ratio = self.upscale_ratio = checkpoint.family.downscale
        self.output_device = torch.device("cpu")

    def decode(self, samples: Tensor, vae_options: dict[str, Any] | None = None) -> Tensor:
        return self._decode(samples, tiled=False)

    def decode_tiled(self, samples: Tensor, **_: Any) -> Tensor:
        return self._decode(samples, tiled=True)

    def encode(self, pixels: Tensor) -> Tensor:
        return encode_for_host(model_cache(), self.checkpoint, pixels[..., :3].movedim(-1, 1))

    def encode_tiled(self, pixels: Tensor, **_: Any) -> Tensor:
        return encode_for_host(model_cache(), self.checkpoint, pixels[..., :3].movedim(-1, 1), tiled=True)

    def spacial_compression_decode(self) -> int:  # the host's spelling
        return self.upscale_ratio

    def spacial_compression_encode(self) -> int:
        return self.downscale_ratio

    def temporal_compression_decode(self) -> None:
        return None

    def throw_exception_if_invalid(self) -> None:
        pass

    def get_ram_usage(self) -> int:
        return 0  # the cache counts the weights

    def _decode(self, samples: Tensor, tiled: bool) -> Tensor:
        pixels, alpha = decode_host_latents(model_cache(), self.checkpoint, samples, tiled=tiled)
        return to_image(over_white(pixels, alpha))

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"this VAE is Duet's, which decodes and encodes pictures and has no {name!r}")


def to_latent(checkpoint: Checkpoint, latents: Tensor | None) -> dict[str, Tensor] | ExecutionBlocker:
    """Those of a picture as the host's LATENT. Where the host knows none, nodes that ask for it say so."""
    samples = None if latents is None else to_host_latents(checkpoint, latents)
    if samples is None:
        return ExecutionBlocker(f"{checkpoint.family.name} has no latents that the host's own nodes know")
    return {"samples": samples}


def to_conditioning(condition: PromptEmbeds | FusedConditioning) -> Conditioning:
    """One side of a condition as the host's samplers hear it. Its Space goes along, for the way back."""
    entries: dict[str, Any] = {"pooled_output": _plain(condition.pooled), SPACE: condition.space}
    if not condition.mask.all():
        entries["attention_mask"] = condition.mask.long().cpu()
    return [[_plain(condition.tokens), entries]]


def to_conditionings(condition: PromptEmbeds | FusedConditioning, model: Any) -> tuple[Conditioning, Conditioning]:
    """Positive and negative. Where there is no negative it is all zeros, as ConditioningZeroOut makes one.

    model: the host's MODEL that is to hear it, or None. Raises ValueError where it cannot.
    """
    if getattr(condition, "grid", None) is not None:
        raise ValueError(
            f"expected a condition of words, got one of {condition.space}, a first picture that no sampler of the host "
            "knows how to start from; Generate draws it"
        )
    if condition.second is not None:
        raise ValueError(f"expected a condition of one width, got one of two encoders apart, as {condition.space} is")
    expected, width = _width_heard(model), condition.tokens.shape[-1]
    if expected is not None and expected != width:
        name = type(model.model).__name__
        raise ValueError(f"expected a condition {expected} wide for the MODEL ({name}), got one of {condition.space}")
    positive = to_conditioning(condition)
    if condition.negative is not None:
        return positive, to_conditioning(condition.negative)
    ((tokens, entries),) = positive
    pooled = entries["pooled_output"]
    silent = entries | {"pooled_output": None if pooled is None else torch.zeros_like(pooled)}
    return positive, [[torch.zeros_like(tokens), silent]]


def from_conditionings(
    checkpoint: Checkpoint, positive: Conditioning, negative: Conditioning | None = None
) -> PromptEmbeds:
    """Raises ValueError for a condition that is another model's, or that says more than words for the whole picture."""
    wanted = _one_side(checkpoint, positive, "positive")
    return wanted if negative is None else against(wanted, _one_side(checkpoint, negative, "negative"))


def _one_side(checkpoint: Checkpoint, conditioning: Conditioning, name: str) -> PromptEmbeds:
    if len(conditioning) != 1:
        raise ValueError(
            f"expected one {name} condition for the whole picture, got {len(conditioning)} side by side; "
            "ConditioningConcat and ConditioningAverage make one of two"
        )
    ((tokens, entries),) = conditioning
    limits = [key for key in _NOT_FOLLOWED if entries.get(key) is not None and (key, entries[key]) != ("strength", 1.0)]
    if limits:
        raise ValueError(f"expected a {name} condition for the whole picture and every step, got one with {limits[0]}")
    others = sorted(key for key in entries if key not in (*_HEARD, *_NOT_FOLLOWED))
    told = (f"the {name} condition also says {', '.join(others)}, which Generate does not hear",) if others else ()
    return prompt_embeds_from(
        checkpoint,
        tokens,
        entries.get("pooled_output"),
        _as_large_as(tokens, entries.get("attention_mask")),
        space=entries[SPACE] if isinstance(entries.get(SPACE), Space) else None,
        notices=told,
    )


def _as_large_as(tokens: Tensor, mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.reshape(-1, mask.shape[-1]).expand(tokens.shape[0], -1)


def _width_heard(model: Any) -> int | None:
    """How wide a condition the host's MODEL listens to; None where its configuration does not say."""
    config = getattr(getattr(getattr(model, "model", None), "model_config", None), "unet_config", None) or {}
    embedder = config.get("context_embedder_config") or {}
    return config.get("context_dim") or config.get("context_in_dim") or embedder.get("params", {}).get("in_features")


def _plain(tensor: Tensor | None) -> Tensor | None:
    """As the host's own encoders give it."""
    return None if tensor is None else tensor.float().cpu()
