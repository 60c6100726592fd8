"""Image encoders that lie on disk by themselves: what each is, how it wants to be shown a picture, how it is read.

A folder with config.json and safetensors, as transformers and timm write it, or one safetensors file that its header
tells apart, as ComfyUI's models/clip_vision holds them.
"""

import math
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..checkpoints import LOADING_ERRORS, building
from ..files.components import check_model, either, find_weights
from ..files.content import Content, Digests
from ..files.safetensors_files import CheckpointError, check_weights, read_json, shown
from ..files.weights import key_of, read_tensors, shapes_of
from ..model_cache import ModelCache, ModelKey
from ..residency import is_out_of_memory

Triple = tuple[float, float, float]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF: Triple = (0.5, 0.5, 0.5)

# By model_type of config.json: the class, and what it subtracts and divides by.
_KINDS: dict[str, tuple[str, Triple, Triple]] = {
    "clip_vision_model": ("CLIPVisionModel", CLIP_MEAN, CLIP_STD),  # arXiv 2103.00020
    "siglip_vision_model": ("SiglipVisionModel", HALF, HALF),  # arXiv 2303.15343
    "dinov2": ("Dinov2Model", IMAGENET_MEAN, IMAGENET_STD),  # arXiv 2304.07193
    "dinov2_with_registers": ("Dinov2WithRegistersModel", IMAGENET_MEAN, IMAGENET_STD),  # arXiv 2309.16588
    "convnext": ("ConvNextModel", IMAGENET_MEAN, IMAGENET_STD),  # arXiv 2201.03545
    "resnet": ("ResNetModel", IMAGENET_MEAN, IMAGENET_STD),  # arXiv 1512.03385
}
_WITH_TEXT = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}  # whose vision_config we take
_ANY_SIZE = 224  # pixels a side, for those that take pictures of any size
_QUOTED = 300
_HEADS = {1152: 16, 1280: 16, 1664: 16}  # by width; the rest have 64 channels a head, and no header says how many


@dataclass(frozen=True)
class ImageEncoder:
    """An encoder whose files were found whole. Holds no weights.

    name: of the folder or file; kind: the class in transformers, or "timm"; config: of that class, or timm's;
    size: pixels a side; mean, std: per channel, of pixels in 0..1; digest: of the weights.
    """

    name: str
    kind: str
    config: Mapping[str, Any]
    weights: tuple[Path, ...]
    size: int
    mean: Triple
    std: Triple
    digest: str
    digests: Digests = field(default_factory=Digests, repr=False, compare=False)

    @property
    def identity(self) -> str:
        """For ``Space.model``: which weights made the features."""
        return f"{self.name}@{self.digest[:8]}"

    @property
    def patch(self) -> int:
        """Pixels a side of one token of a vision transformer."""
        return int(self.config.get("patch_size", 1))

    def use(self, cache: ModelCache, dtype: torch.dtype | None = None) -> AbstractContextManager[Any]:
        """On the cache's device, and pinned, while in the block. dtype: float32 on a CPU, else float16."""
        on_cpu = cache.residency.device.type == "cpu"
        dtype = dtype or (torch.float32 if on_cpu else torch.float16)
        return cache.use(self.key(dtype), lambda: self.build(dtype))

    def key(self, dtype: torch.dtype) -> ModelKey:
        return key_of(self.weights, self.kind, dtype, self.content())

    def content(self) -> Content:
        """What it is, as it lies on disk now, whatever it is called."""
        library = "" if self.kind == "timm" else "transformers"
        return self.digests.of_network(self.weights, library, self.kind, self.config)

    def told(self) -> object:
        """All that decides what it sees, as the store of embeddings takes it."""
        return [self.name, self.kind, self.digest, self.content().digest, self.size, self.mean, self.std]

    def build(self, dtype: torch.dtype) -> nn.Module:
        """Read the weights to the CPU. Raises CheckpointError if they are not those of the class."""
        try:
            with torch.inference_mode(False):
                build = _build_timm if self.kind == "timm" else _build_transformers
                return build(self, read_tensors(self.weights, _is_of_pictures), dtype).eval().requires_grad_(False)
        except (*LOADING_ERRORS, SafetensorError) as error:
            if is_out_of_memory(error) or isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{self.name}: expected weights of a {self.kind}, got: {str(error)[:_QUOTED]}"
            ) from error


def open_image_encoder(path: Path, digests: Digests | None = None) -> ImageEncoder:
    """Check a folder, or a single .safetensors file, by its JSON and headers. Raises CheckpointError, naming it.

    digests: what remembers the contents of weights, so that they are not read again to be told apart.
    """
    return replace(_open(path), digests=digests or Digests())


def _open(path: Path) -> ImageEncoder:
    if path.is_dir():
        config_path = path / "config.json"
        config = read_json(config_path)
        weights, _ = find_weights(path, "model")
        digest = check_model(config_path, weights)
        if "architecture" in config:
            return _open_timm(path, config, tuple(weights), digest)
        return _opened(path, config, tuple(weights), digest, _preprocessing(path))
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: expected an image encoder's folder or a .safetensors file")
    digest = check_weights(path).digest
    return _opened(path, _config_of_header(path, shapes_of(path)), (path,), digest, {})


def _opened(
    path: Path, config: dict[str, Any], weights: tuple[Path, ...], digest: str, preprocessing: dict[str, Any]
) -> ImageEncoder:
    kind = config.get("model_type")
    if kind in _WITH_TEXT and isinstance(config.get("vision_config"), dict):
        config, kind = config["vision_config"], _WITH_TEXT[kind]
    if kind not in _KINDS:
        raise CheckpointError(
            f"{path}: expected model_type {either([*_KINDS, *_WITH_TEXT])}, or timm's architecture; found {shown(kind)}"
        )
    class_name, mean, std = _KINDS[kind]
    if class_name == "CLIPVisionModel" and _has_projection(weights):
        class_name = "CLIPVisionModelWithProjection"
    size = config.get("image_size", _ANY_SIZE)
    if kind not in ("clip_vision_model", "siglip_vision_model"):  # the rest take any size: as they were evaluated
        size = preprocessing.get("size", min(size, _ANY_SIZE) if isinstance(size, int) else _ANY_SIZE)
    patch = config.get("patch_size", 1)
    if not all(isinstance(number, int) and 1 <= number <= 4096 for number in (size, patch)) or size < patch:
        raise CheckpointError(f"{path}: expected an image_size of 1 to 4096 pixels, found {shown(size)} by {patch}")
    size = size // patch * patch if kind.startswith("dinov2") else size  # its patches must fill the picture
    mean, std = preprocessing.get("mean", mean), preprocessing.get("std", std)
    name = path.stem if path.is_file() else path.name
    return ImageEncoder(name, class_name, config, weights, size, mean, std, digest)


def _has_projection(weights: tuple[Path, ...]) -> bool:
    return any(name.endswith("visual_projection.weight") for path in weights for name in shapes_of(path))


def _open_timm(path: Path, config: dict[str, Any], weights: tuple[Path, ...], digest: str) -> ImageEncoder:
    name, told = config["architecture"], config.get("pretrained_cfg")
    # A name with a colon or a slash would be looked for on the network.
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9_]{1,80}", name):
        raise CheckpointError(f"{path}: expected the name of a timm architecture, found {shown(name)}")
    told = told if isinstance(told, dict) else {}
    shape = told.get("input_size")
    side = shape[-1] if isinstance(shape, list) and shape and isinstance(shape[-1], int) else _ANY_SIZE
    mean, std = _triple(path, told.get("mean", IMAGENET_MEAN)), _triple(path, told.get("std", IMAGENET_STD))
    return ImageEncoder(path.name, "timm", {"architecture": name}, weights, side, mean, std, digest)


def _preprocessing(folder: Path) -> dict[str, Any]:
    """Of preprocessor_config.json, where there is one: size, mean, std."""
    path = folder / "preprocessor_config.json"
    if not path.exists():
        return {}
    told, found = read_json(path), {}
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if theirs in told:
            found[ours] = _triple(path, told[theirs])
    size = told.get("crop_size", told.get("size"))
    size = size.get("height", size.get("shortest_edge")) if isinstance(size, dict) else size
    return found | ({"size": size} if isinstance(size, int) else {})


def _triple(path: Path, value: Any) -> Triple:
    whole = isinstance(value, list | tuple) and len(value) == 3
    if not whole or not all(isinstance(number, int | float) and math.isfinite(number) for number in value):
        raise CheckpointError(f"{path}: expected a mean and a std of three numbers, found {shown(value)}")
    red, green, blue = map(float, value)
    return red, green, blue


def _is_of_pictures(name: str) -> bool:
    return not name.startswith(("text_model.", "text_projection.", "logit_"))


def _build_transformers(encoder: ImageEncoder, tensors: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    import transformers

    model_class = getattr(transformers, encoder.kind)
    config = model_class.config_class.from_dict(dict(encoder.config))
    _check_size(encoder, lambda: model_class(config), tensors)
    with building:
        module, report = model_class.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, with the tensor's name
            dtype=dtype,
        )
    lacking = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if lacking:
        raise CheckpointError(
            f"{encoder.name}: expected the weights of a {encoder.kind}; {len(lacking)} are missing or of another "
            f"shape, the first being {lacking[0]}"
        )
    return module


def _build_timm(encoder: ImageEncoder, tensors: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise CheckpointError(f"{encoder.name}: needs a package that is not installed: pip install timm") from None
    name = encoder.config["architecture"]
    if not timm.is_model(name):
        raise CheckpointError(f"{encoder.name}: expected a timm architecture, found {shown(name)}")
    _check_size(encoder, lambda: timm.create_model(name, pretrained=False, num_classes=0), tensors)
    network = timm.create_model(name, pretrained=False, num_classes=0)
    wanted = network.state_dict()
    lacking = sorted(key for key in wanted if key not in tensors or tensors[key].shape != wanted[key].shape)
    if lacking:
        raise CheckpointError(
            f"{encoder.name}: expected the weights of timm's {name}; {len(lacking)} are missing or of another shape, "
            f"the first being {lacking[0]}"
        )
    network.load_state_dict({key: tensors[key] for key in wanted})
    return network.to(dtype)


def _check_size(encoder: ImageEncoder, make: Any, tensors: dict[str, Tensor]) -> None:
    """Refuse a configuration that would take far more memory than the weights that came with it."""
    with torch.device("meta"):
        wanted = sum(parameter.numel() for parameter in make().parameters())
    found = sum(tensor.numel() for tensor in tensors.values())
    if wanted > 1.5 * found + 10_000:
        raise CheckpointError(f"{encoder.name}: expected weights of {wanted:,} values, found {found:,}")


def _config_of_header(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The configuration that a file's tensors tell, as far as they do; the rest as the published models have it."""
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in shapes) else ""
    shapes = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    patches = shapes.get("embeddings.patch_embedding.weight")
    places = shapes.get("embeddings.position_embedding.weight")
    if patches and places and "encoder.layers.0.mlp.fc1.weight" in shapes:
        return _config_of_clip(shapes, patches, places)
    patches = shapes.get("embeddings.patch_embeddings.projection.weight")
    places = shapes.get("embeddings.position_embeddings")
    if patches and places and "encoder.layer.0.layer_scale1.lambda1" in shapes:
        return _config_of_dinov2(shapes, patches, places)
    raise CheckpointError(
        f"{path}: expected the tensors of CLIP's, SigLIP's or DINOv2's image encoder as transformers names them, found "
        f"{shown(sorted(shapes)[:3])} and others. A folder with its config.json may hold other kinds"
    )


def _config_of_clip(
    shapes: dict[str, tuple[int, ...]], patches: tuple[int, ...], places: tuple[int, ...]
) -> dict[str, Any]:
    is_clip = "embeddings.class_embedding" in shapes
    width, patch, side = patches[0], patches[-1], math.isqrt(places[0] - is_clip)
    config: dict[str, Any] = {
        "model_type": "clip_vision_model" if is_clip else "siglip_vision_model",
        "hidden_size": width,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count(shapes, r"encoder\.layers\.(\d+)\."),
        "num_attention_heads": _HEADS.get(width, max(1, width // 64)),
        "patch_size": patch,
        # SigLIP so400m was taught on 384 pixels, of which its 27 patches of 14 leave six out.
        "image_size": 384 if (patch, side) == (14, 27) else patch * side,
    }
    if is_clip:
        # OpenAI's own activation up to ViT-L; the larger ones are of OpenCLIP, which has the usual one.
        config["hidden_act"] = "quick_gelu" if width <= 1024 else "gelu"
        if "visual_projection.weight" in shapes:
            config["projection_dim"] = shapes["visual_projection.weight"][0]
    else:
        config["vision_use_head"] = "head.probe" in shapes
    return config


def _config_of_dinov2(
    shapes: dict[str, tuple[int, ...]], patches: tuple[int, ...], places: tuple[int, ...]
) -> dict[str, Any]:
    width, patch = patches[0], patches[-1]
    registers = shapes.get("embeddings.register_tokens")
    ratio = shapes.get("encoder.layer.0.mlp.fc1.weight", (4 * width,))[0] / width
    return {
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": width,
        "num_hidden_layers": _count(shapes, r"encoder\.layer\.(\d+)\."),
        "num_attention_heads": max(1, width // 64),
        "mlp_ratio": int(ratio) if ratio == int(ratio) else ratio,
        "patch_size": patch,
        "image_size": patch * math.isqrt(places[1] - 1),
        "use_swiglu_ffn": "encoder.layer.0.mlp.weights_in.weight" in shapes,
        **({"num_register_tokens": registers[1]} if registers else {}),
    }


def _count(shapes: Mapping[str, Any], pattern: str) -> int:
    return 1 + max(int(match[1]) for name in shapes if (match := re.match(pattern, name)))
