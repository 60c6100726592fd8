"""How a picture joins the words of a model without a fusion network: its tokens beside theirs, or looked at by them."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..checkpoints import LOADING_ERRORS
from ..conditioning import FusedConditioning, ImageFeatures
from ..files.components import check_model, find_weights
from ..files.content import Digests
from ..files.safetensors_files import CheckpointError, check_weights, read_json, shown
from ..files.weights import key_of, read_tensors, shapes_of
from ..model_cache import ModelCache
from ..residency import is_out_of_memory
from .cross_attention import TokenCrossAttention

METHODS = ("concat", "cross-attention")
REDUX, CROSS_ATTENTION = "ReduxImageEncoder", "TokenCrossAttention"
_REDUX_TENSORS = {"redux_up.weight", "redux_up.bias", "redux_down.weight", "redux_down.bias"}


@dataclass(frozen=True)
class TokenAdapter:
    """Trained weights between an image encoder's tokens and a text encoder's. Holds none of them.

    kind: the class; image_width, words_width: channels that it takes and gives; config: of the class.
    """

    name: str
    kind: str
    image_width: int
    words_width: int
    config: dict[str, Any]
    weights: tuple[Path, ...]
    digests: Digests = field(default_factory=Digests, repr=False, compare=False)

    def use(self, cache: ModelCache) -> AbstractContextManager[Any]:
        """On the cache's device, and pinned, while in the block; float32 on a CPU, else float16."""
        dtype = torch.float32 if cache.residency.device.type == "cpu" else torch.float16
        content = self.digests.of_network(self.weights, "", self.kind, self.config)
        return cache.use(key_of(self.weights, self.kind, dtype, content), lambda: self.build(dtype))

    def build(self, dtype: torch.dtype) -> nn.Module:
        """Read the weights to the CPU. Raises CheckpointError if they are not those of the class."""
        from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder

        try:
            with torch.inference_mode(False):
                network: Any = (ReduxImageEncoder if self.kind == REDUX else TokenCrossAttention)(**self.config)
                network.load_state_dict(read_tensors(self.weights))
                return network.to(dtype).eval().requires_grad_(False)
        except (*LOADING_ERRORS, SafetensorError) as error:
            if is_out_of_memory(error) or isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.name}: expected weights of a {self.kind}, got: {str(error)[:300]}") from error


def open_token_adapter(path: Path, digests: Digests | None = None) -> TokenAdapter:
    """A Redux file as ComfyUI's models/style_models hold it, or a folder that diffusers wrote of one of the two kinds.

    digests: what remembers the contents of weights. Raises CheckpointError, naming what was found.
    """
    if path.is_dir():
        config = read_json(path / "config.json")
        weights = tuple(find_weights(path, "diffusion_pytorch_model")[0])
        check_model(path / "config.json", weights)
        kind = config.get("_class_name")
    else:
        check_weights(path)
        config, weights, kind = {}, (path,), REDUX
    shapes = {name: shape for file in weights for name, shape in shapes_of(file).items()}
    if kind == REDUX and shapes.keys() == _REDUX_TENSORS:
        up, down = shapes["redux_up.weight"], shapes["redux_down.weight"]
        told = {"redux_dim": up[-1], "txt_in_features": down[0]}
        return TokenAdapter(path.stem, kind, up[-1], down[0], told, weights, digests or Digests())
    if kind == CROSS_ATTENTION and {"to_q.weight", "to_k.weight"} <= shapes.keys():
        (width, words), image = shapes["to_q.weight"], shapes["to_k.weight"][-1]
        heads = config.get("num_heads", 8)
        if not isinstance(heads, int) or heads < 1 or width % heads:
            raise CheckpointError(f"{path}: expected num_heads that divides {width}, found {shown(heads)}")
        told = {"words_width": words, "image_width": image, "width": width, "num_heads": heads}
        return TokenAdapter(path.name, kind, image, words, told, weights, digests or Digests())
    raise CheckpointError(
        f"{path}: expected Redux's {', '.join(sorted(_REDUX_TENSORS))} or the folder of a {CROSS_ATTENTION}, "
        f"found {shown(kind)} with {shown(sorted(shapes)[:4])}"
    )


def join_tokens(
    cache: ModelCache,
    words: FusedConditioning,
    image: ImageFeatures,
    *,
    method: str,
    strength: float,
    adapter: TokenAdapter | None = None,
) -> FusedConditioning:
    """strength: 0 is exactly the words, 1 the picture as strong as it comes.

    "concat": the picture's tokens follow the words', cat(embed, feature), as FLUX.1 Redux has it; scaled by strength.
    They must be as wide as the words', or an adapter must make them so. The negative prompt gets as many tokens of
    zeros, which do not count, as IP-Adapter has it.
    "cross-attention": every word looks at the picture; without trained weights exactly the words, and a notice says so.
    Raises ValueError where widths or batches do not fit, naming both.
    """
    if method not in METHODS:
        raise ValueError(f"expected method {' or '.join(METHODS)} for a model without a fusion network, got {method!r}")
    kind = REDUX if method == "concat" else CROSS_ATTENTION
    if adapter is not None and adapter.kind != kind:
        raise ValueError(f"method {method} takes the weights of a {kind}, got {adapter.name}, a {adapter.kind}")
    _check_widths(words, image, adapter)
    if method == "concat" and adapter is None and image.space.width != words.space.width:
        raise ValueError(
            f"expected picture tokens as wide as the words, or projection weights between the two; got {image.space} "
            f"for {words.space}"
        )
    if strength == 0:
        return words
    tokens, picture, weight = _same_batch(words.tokens, image)
    if method == "cross-attention":
        if adapter is None:
            told = "cross-attention was given no trained weights, and untrained it leaves the words as they are"
            return replace(words, notices=(*words.notices, told))
        with adapter.use(cache) as network, torch.inference_mode():
            place = next(network.parameters())
            joined = network(tokens.to(place), picture.to(place), weight, strength).to(words.tokens)
        mask = words.mask.expand(joined.shape[0], -1)
        return replace(words, tokens=joined, pooled=_as_many(words.pooled, joined.shape[0]), mask=mask)
    if adapter is not None:
        with adapter.use(cache) as network, torch.inference_mode():
            picture = network(picture.to(next(network.parameters()))).image_embeds
    return _beside(words, tokens, strength * picture.to(words.tokens), weight)


def _check_widths(words: FusedConditioning, image: ImageFeatures, adapter: TokenAdapter | None) -> None:
    if adapter is None:
        return
    for side, space, width in (
        ("picture", image.space, adapter.image_width),
        ("words'", words.space, adapter.words_width),
    ):
        if space.width != width:
            raise ValueError(f"{adapter.name} expects {side} tokens {width} wide, got {space}")


def _same_batch(words: Tensor, image: ImageFeatures) -> tuple[Tensor, Tensor, Tensor | None]:
    sizes = words.shape[0], image.tokens.shape[0]
    if 1 not in sizes and sizes[0] != sizes[1]:
        raise ValueError(
            f"expected batches of one size, or one of them of size 1, got {sizes[0]} prompts and {sizes[1]} pictures"
        )
    picture = _as_many(image.tokens, max(sizes)).to(words.device)
    weight = None if image.weight is None else _as_many(image.weight, max(sizes)).to(words.device)
    return _as_many(words, max(sizes)), picture, weight


def _as_many(value: Any, count: int) -> Any:
    return value if value is None or value.shape[0] == count else value.expand(count, *value.shape[1:])


def _beside(words: FusedConditioning, tokens: Tensor, picture: Tensor, weight: Tensor | None) -> FusedConditioning:
    counts = torch.ones(picture.shape[:2], dtype=torch.bool, device=words.mask.device)
    if weight is not None:
        # Left out where none of the pictures counts them: not every denoiser reads the mask.
        kept = (weight > 0).any(dim=0)
        picture, weight = picture[:, kept] * weight[:, kept, None].to(picture), weight[:, kept]
        counts = (weight > 0).to(words.mask.device)
    batch = tokens.shape[0]
    negative = words.negative
    if negative is not None:
        nothing = negative.tokens.new_zeros(negative.tokens.shape[0], picture.shape[1], picture.shape[2])
        negative = replace(
            negative,
            tokens=torch.cat([negative.tokens, nothing], dim=1),
            mask=torch.cat([negative.mask, torch.zeros(nothing.shape[:2]).to(negative.mask)], dim=1),
        )
    return replace(
        words,
        tokens=torch.cat([tokens, picture], dim=1),
        pooled=_as_many(words.pooled, batch),
        mask=torch.cat([_as_many(words.mask, batch), counts], dim=1),
        negative=negative,
    )
