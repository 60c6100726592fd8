"""Tiny decoders: a few convolutions that were taught what a model's own decoder makes of its latents.

TAESD (https://github.com/madebyollin/taesd), in diffusers AutoencoderTiny. Of such a file only the decoder is used.
"""

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ..checkpoints import LOADING_ERRORS, Checkpoint
from ..files.components import check_model, find_weights
from ..files.safetensors_files import CheckpointError, check_weights, read_json, shown
from ..files.weights import read_tensors, shapes_of
from ..model_cache import ModelCache, ModelKey
from ..residency import is_out_of_memory

# What comes before the layers' numbers: as diffusers saves it, as the original repository does, alone or together with
# the encoder, and as a host's VAE file has it. The originals count the clamp of the latents as layer 0.
_DIFFUSERS = "decoder.layers."
_LAYOUTS = {_DIFFUSERS: 0, "taesd_decoder.": 1, "decoder.": 1, "": 1}
_FIRST_OF_ENCODER = ("0.weight", "encoder.0.weight", "taesd_encoder.0.weight", "encoder.layers.0.weight")
# By the names of the published files: which latents they decode, and by what those were scaled.
_PUBLISHED = {
    "taesd": ("Stable Diffusion 1 and 2", 0.18215),
    "taesdxl": ("Stable Diffusion XL", 0.13025),
    "taesd3": ("Stable Diffusion 3", 1.5305),
    "taef1": ("FLUX.1", 0.3611),
}
# Decoders of which a tiny one may take the place: one picture in, nothing to undo but a scale and a shift.
_REPLACEABLE = ("AutoencoderDC", "AutoencoderKL", "AutoencoderTiny")
_MOST_BLOCKS, _MOST_UPSAMPLING = 256, 8
_QUOTED = 300


@dataclass(frozen=True)
class TinyDecoder:
    """A decoder whose files were found whole. Holds no weights.

    config: of AutoencoderTiny; prefix: of its tensors' names; digest: of the weights; latent_channels: of the latents
    that it takes, (B, C, h, w) scaled as the denoiser has them; downscale: pixels a side of one of them.
    """

    path: Path
    config: Mapping[str, Any] = field(repr=False)
    weights: tuple[Path, ...]
    prefix: str
    digest: str
    latent_channels: int
    downscale: int

    @property
    def name(self) -> str:
        return self.path.name

    def use(self, cache: ModelCache, dtype: torch.dtype | None = None) -> AbstractContextManager[Any]:
        """An AutoencoderTiny without its encoder, for ``decode_latents`` and ``preview`` in place of the model's own:
        on the cache's device, and pinned, while in the block. dtype: float32 on a CPU, else float16.
        """
        on_cpu = cache.residency.device.type == "cpu"
        dtype = dtype or (torch.float32 if on_cpu else torch.float16)
        return cache.use(self.key(dtype), lambda: self.build(dtype))

    def key(self, dtype: torch.dtype) -> ModelKey:
        """The files as they lie on disk now. Raises CheckpointError where one is gone."""
        try:
            files = [path.stat() for path in self.weights]
        except OSError as error:
            raise CheckpointError(f"expected {error.filename}, which was there before: {error.strerror}") from error
        size, newest = sum(file.st_size for file in files), max(file.st_mtime_ns for file in files)
        return ModelKey(self.weights[0].resolve(), size, newest, "tiny decoder", dtype)

    def build(self, dtype: torch.dtype) -> nn.Module:
        """Read the weights to the CPU. Raises CheckpointError if they are no longer those that were checked."""
        try:
            with torch.inference_mode(False):
                tensors = read_tensors(self.weights, lambda name: _layer(name, self.prefix) is not None)
                module = _skeleton(self.config)
                named = {_layer(name, self.prefix): tensor.to(dtype) for name, tensor in tensors.items()}
                module.load_state_dict(named, assign=True)
        except (*LOADING_ERRORS, SafetensorError) as error:
            if is_out_of_memory(error) or isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{self.path}: expected weights of a tiny decoder, got: {str(error)[:_QUOTED]}"
            ) from error
        return module.eval().requires_grad_(False)

    def check_fits(self, checkpoint: Checkpoint) -> None:
        """Raises ValueError, naming both, where it decodes other latents than the checkpoint makes."""
        vae = checkpoint.components["vae"]
        config = read_json(vae.config) | dict(vae.options)
        what = f"{checkpoint.folder.name}, a {checkpoint.family.name} model"
        if vae.class_name not in _REPLACEABLE:
            raise ValueError(
                f"{self.name}: expected no tiny decoder for {what}, whose latents its {vae.class_name} reads"
            )
        channels = config.get("latent_channels", 4)
        if channels != self.latent_channels:
            raise ValueError(
                f"{self.name} decodes latents of {self.latent_channels} channels: expected {channels}, as {what}, makes"
            )
        if checkpoint.family.downscale != self.downscale:
            raise ValueError(
                f"{self.name} makes {self.downscale} pixels a side of one latent: expected "
                f"{checkpoint.family.downscale}, as {what}, does"
            )
        published = re.match(r"(taesdxl|taesd3|taesd|taef1)(?![a-z0-9])", self.path.stem.lower())
        if published is None:
            return
        made_for, scale = _PUBLISHED[published[1]]
        if config.get("scaling_factor", scale) != scale:
            raise ValueError(
                f"{self.name} decodes latents of {made_for}, scaled by {scale:g}: expected those of {what}, scaled by "
                f"{config['scaling_factor']:g}"
            )


def open_tiny_decoder(path: Path) -> TinyDecoder:
    """Check a diffusers folder of an AutoencoderTiny, or a .safetensors file such as taesd_decoder.safetensors.

    Only the JSON and the headers are read. Raises CheckpointError, naming the file.
    """
    if path.is_dir():
        config_path = path / "config.json"
        config = read_json(config_path)
        if config.get("_class_name") != "AutoencoderTiny":
            raise CheckpointError(
                f"{config_path}: expected an AutoencoderTiny, found {shown(config.get('_class_name'))}"
            )
        weights, _ = find_weights(path, "diffusion_pytorch_model")
        digest = check_model(config_path, weights)
        shapes = {name: shape for each in weights for name, shape in shapes_of(each).items()}
        return _opened(path, config, tuple(weights), _DIFFUSERS, digest, shapes)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: expected a tiny decoder's folder or a .safetensors file")
    digest = check_weights(path).digest
    shapes = shapes_of(path)
    for prefix, offset in _LAYOUTS.items():
        if f"{prefix}{offset}.weight" in shapes and f"{prefix}{offset + 2}.conv.0.weight" in shapes:
            return _opened(path, _config_of_header(path, shapes, prefix), (path,), prefix, digest, shapes)
    if any(name in shapes for name in _FIRST_OF_ENCODER):
        raise CheckpointError(
            f"{path}: expected a tiny decoder, found an encoder alone. The decoder is a file of its own, such as "
            f"{path.name.replace('encoder', 'decoder')}"
        )
    raise CheckpointError(
        f"{path}: expected the tensors of a tiny decoder, 1.weight and 3.conv.0.weight or decoder.layers.0.weight, "
        f"found {shown(sorted(shapes)[:3])}"
    )


def _opened(
    path: Path,
    config: dict[str, Any],
    weights: tuple[Path, ...],
    prefix: str,
    digest: str,
    shapes: Mapping[str, tuple[int, ...]],
) -> TinyDecoder:
    blocks = config.get("num_decoder_blocks", (3, 3, 3, 1))
    whole = isinstance(blocks, list | tuple) and all(type(count) is int and count >= 0 for count in blocks)
    if not whole or not blocks or len(blocks) + sum(blocks) > min(_MOST_BLOCKS, len(shapes)):
        raise CheckpointError(
            f"{path}: expected num_decoder_blocks to suit {len(shapes)} tensors, found {shown(blocks)}"
        )
    factor = config.get("upsampling_scaling_factor", 2)
    if type(factor) is not int or not 1 <= factor <= _MOST_UPSAMPLING:
        raise CheckpointError(
            f"{path}: expected upsampling_scaling_factor 1 to {_MOST_UPSAMPLING}, found {shown(factor)}"
        )
    try:
        skeleton = _skeleton(config)
        channels, pixels = skeleton.config.latent_channels, skeleton.config.out_channels
    except LOADING_ERRORS as error:
        raise CheckpointError(
            f"{path}: expected the configuration of an AutoencoderTiny, got: {str(error)[:_QUOTED]}"
        ) from error
    if pixels not in (3, 4):
        raise CheckpointError(f"{path}: expected out_channels 3, or 4 with alpha, found {shown(pixels)}")
    found = {layer: shape for name, shape in shapes.items() if (layer := _layer(name, prefix)) is not None}
    wanted = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    lacking = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if lacking:
        first = lacking[0]
        raise CheckpointError(
            f"{path}: expected the layers of an AutoencoderTiny's decoder; {len(lacking)} are missing, too many or of "
            f"another shape, the first being {first}: expected {wanted.get(first)}, found {found.get(first)}"
        )
    return TinyDecoder(path, config, weights, prefix, digest, channels, factor ** (len(blocks) - 1))


def _layer(name: str, prefix: str) -> str | None:
    """The name in AutoencoderTiny of a decoder's tensor; None for what is no part of it."""
    number, _, rest = name.removeprefix(prefix).partition(".")
    if not name.startswith(prefix) or not number.isdecimal() or len(number) > 4:
        return None
    return f"{_DIFFUSERS}{int(number) - _LAYOUTS[prefix]}.{rest}"


def _config_of_header(path: Path, shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, Any]:
    """As far as the tensors tell it: a stage ends with a convolution after its blocks."""
    layers = {
        layer.removeprefix(_DIFFUSERS): shape for name, shape in shapes.items() if (layer := _layer(name, prefix))
    }
    numbers = sorted({int(layer.partition(".")[0]) for layer in layers})
    blocks, count = [], 0
    for number in numbers[1:]:
        if f"{number}.conv.0.weight" in layers:
            count += 1
        else:
            blocks.append(count)
            count = 0
    first, last = layers["0.weight"], layers.get(f"{numbers[-1]}.weight", ())
    if len(first) != 4 or len(last) != 4:
        raise CheckpointError(
            f"{path}: expected a decoder that begins and ends with a convolution, found {first}, {last}"
        )
    return {
        "latent_channels": first[1],
        "out_channels": last[0],
        "num_decoder_blocks": blocks,
        "decoder_block_out_channels": [first[0]] * len(blocks),
    }


def _skeleton(config: Mapping[str, Any]) -> Any:
    """Without weights, and without an encoder, which it could never be asked for."""
    from diffusers import AutoencoderTiny

    told = dict(config) | {"num_encoder_blocks": (0,), "encoder_block_out_channels": (1,)}
    told.pop("block_out_channels", None)  # written by diffusers on saving, and no parameter of it
    with torch.device("meta"):
        module: Any = AutoencoderTiny.from_config(told)
    del module.encoder
    return module
