"""IP-Adapter: a denoiser that also hears a picture, by attention of its own beside the words' (arXiv 2308.06721)."""

import importlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..checkpoints import LOADING_ERRORS, Checkpoint
from ..files.components import Component
from ..files.content import Digests
from ..files.safetensors_files import CheckpointError, check_weights, shown
from ..files.weights import key_of, read_tensors
from ..image_preparation import prepare_image
from ..model_cache import ModelCache
from ..private_views import private_view, skeleton
from ..residency import is_out_of_memory
from ..vision.image_encoders import ImageEncoder, open_image_encoder
from .lora_families import UNETS

MOST_SCALE = 3.0
_UNET, _FLUX = "UNet2DConditionModel", "FluxTransformer2DModel"
# As the authors of IP-Adapter name the two parts of a file, and as XLabs does for FLUX.
_PROJECTION, _ATTENTION = ("image_proj.", "ip_adapter_proj_model."), ("ip_adapter.", "double_blocks.")
_RENAMED = {
    "ip_adapter_double_stream_k_proj": "to_k_ip",
    "ip_adapter_double_stream_v_proj": "to_v_ip",
    "processor.": "",
}
_TRANSFORMERS = ("CLIPVisionModelWithProjection", "CLIPVisionModel", "SiglipVisionModel")
_QUOTED = 300


@dataclass(frozen=True)
class IPAdapterFile:
    """A file that fits a checkpoint. Holds no weights.

    denoiser: the component's name, and part: itself; image_width: channels of what it hears of a picture; hears_tokens:
    all tokens of the image encoder's last layer but one, as "Plus" does, instead of its one embedding.
    """

    path: Path
    digest: str
    denoiser: str
    part: Component
    image_width: int
    hears_tokens: bool
    digests: Digests = field(default_factory=Digests, repr=False, compare=False)

    def use(self, cache: ModelCache, dtype: torch.dtype) -> AbstractContextManager[Any]:
        """On the cache's device, and pinned, while in the block: one copy, whatever the picture and the scale."""
        kind = f"IP-Adapter for a {self.part.class_name}"
        content = self.digests.of_network((self.path,), "", kind, {})
        return cache.use(key_of((self.path,), kind, dtype, content), lambda: self.build(dtype))

    def build(self, dtype: torch.dtype) -> "IPAdapterNetwork":
        """Read the file to the CPU. Raises CheckpointError if it is no longer the one that was checked."""
        if check_weights(self.path).digest != self.digest:
            raise CheckpointError(f"{self.path.name} was replaced since it was chosen: run the workflow once more")
        try:
            with torch.inference_mode(False):
                return self._network(*_parts(read_tensors((self.path,))), dtype)
        except (*LOADING_ERRORS, SafetensorError) as error:
            if is_out_of_memory(error) or isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{self.path.name}: expected an IP-Adapter as its authors lay it out, got: "
                f"{type(error).__name__} {str(error)[:_QUOTED]}"
            ) from error

    def _network(
        self, projection: dict[str, Tensor], attention: dict[str, Tensor], dtype: torch.dtype
    ) -> "IPAdapterNetwork":
        """By the converters of diffusers, which are methods of the denoiser's class but ask it for these only."""
        bare = skeleton(self.part)
        asked = SimpleNamespace(
            attn_processors=bare.attn_processors,
            config=bare.config,
            inner_dim=getattr(bare, "inner_dim", None),
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        state = {"image_proj": projection, "ip_adapter": attention}
        processors = type(bare)._convert_ip_adapter_attn_to_diffusers(asked, [state], low_cpu_mem_usage=False)
        projector = type(bare)._convert_ip_adapter_image_proj_to_diffusers(asked, projection, low_cpu_mem_usage=False)
        kept = {name: processors[name] for name in _listening(bare)}
        network = IPAdapterNetwork(projector, kept)
        return network.to(dtype).eval().requires_grad_(False)


@dataclass(frozen=True)
class IPAdapter:
    """A file together with what the image encoder says of the pictures that are to be listened to.

    scale: 0 is the model without it, 1 as it was trained. image_embeds, negative: (1, n, D) or (1, n, L, D) of n
    pictures, and of none.
    """

    file: IPAdapterFile
    scale: float
    image_embeds: Tensor = field(repr=False, compare=False)
    negative: Tensor = field(repr=False, compare=False)

    @property
    def identity(self) -> tuple[object, ...]:
        return ("IP-Adapter", self.file.digest, self.scale, self.image_embeds)

    def acts_on(self, component: str) -> bool:
        return self.scale != 0 and component == self.file.denoiser

    def shown(self) -> tuple[Tensor, Tensor] | None:
        return self.image_embeds, self.negative

    def use(self, cache: ModelCache, dtype: torch.dtype) -> AbstractContextManager[Any]:
        return self.file.use(cache, dtype)

    def lay_over(self, component: str, view: Any, weights: "IPAdapterNetwork") -> None:
        """Beside other IP-Adapters that lie on the view already."""
        multiple = importlib.import_module("diffusers.models.embeddings").MultiIPAdapterImageProjection
        processors = dict(view.attn_processors)
        for name, processor in zip(weights.names, weights.processors, strict=True):
            laid: Any = private_view(processor)
            earlier: Any = processors[name]
            laid.scale = [self.scale]
            if hasattr(earlier, "to_k_ip"):
                laid.scale = [*earlier.scale, self.scale]
                laid.num_tokens = [*getattr(earlier, "num_tokens", ()), *getattr(laid, "num_tokens", ())]
                laid.to_k_ip = nn.ModuleList([*earlier.to_k_ip, *laid.to_k_ip])
                laid.to_v_ip = nn.ModuleList([*earlier.to_v_ip, *laid.to_v_ip])
            processors[name] = laid
        view.set_attn_processor(processors)
        before: Any = getattr(view, "encoder_hid_proj", None)
        projections = [weights.projection]
        if isinstance(before, multiple):
            projections = [*before.image_projection_layers, *projections]
        elif before is not None and view.config.encoder_hid_dim_type == "text_proj":
            view.text_encoder_hid_proj = before  # of Kolors, which projects the words there
        view.encoder_hid_proj = multiple(projections)
        view.register_to_config(encoder_hid_dim_type="ip_image_proj")


class IPAdapterNetwork(nn.Module):
    """The weights of one file. projection: image embeds -> tokens; processors: of each attention layer by its name."""

    def __init__(self, projection: nn.Module, processors: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.projection = projection
        self.names = tuple(processors)
        self.processors = nn.ModuleList(processors.values())


def open_ip_adapter(checkpoint: Checkpoint, path: Path) -> IPAdapterFile:
    """Check a file against a checkpoint, by its header alone. For Stable Diffusion, SDXL, Kolors and FLUX.1.

    Raises CheckpointError for a file that was made for another family, naming both, and for kinds that need more than
    an image encoder, such as Face ID.
    """
    denoiser = "unet" if checkpoint.has("unet") else "transformer"
    part = checkpoint.components[denoiser]
    if checkpoint.family.tasks is None or part.class_name not in (_UNET, _FLUX):
        raise CheckpointError(
            f"{path.name}: expected no IP-Adapter for {checkpoint.family.name}; there are some for Stable Diffusion, "
            "SDXL, Kolors and FLUX.1"
        )
    file = check_weights(path)
    projection, attention = _parts({name: entry.shape for name, entry in file.entries.items()})
    if not projection or not attention:
        raise CheckpointError(
            f"{path.name}: expected an IP-Adapter's tensors, {_PROJECTION[0]}* and {_ATTENTION[0]}*, found "
            f"{shown(sorted(file.entries)[:3])}"
        )
    _check_family(checkpoint, path, part, attention)
    width, hears_tokens = _hears(path, projection, attention)
    return IPAdapterFile(path, file.digest, denoiser, part, width, hears_tokens, checkpoint.digests)


def show_picture(
    cache: ModelCache,
    checkpoint: Checkpoint,
    file: IPAdapterFile,
    encoder: ImageEncoder | None,
    pixels: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> Checkpoint:
    """The checkpoint, listening to the pictures besides the words. pixels: (B, 3 or 4, H, W) in 0..1, all at once.

    mask: (B or 1, H, W), 1 where the picture counts; the encoder sees white elsewhere. encoder: None is the
    checkpoint's own. scale: 0 to 3. Raises ValueError for an encoder of another width than the adapter hears,
    FloatingPointError where the encoder gives no numbers in float32 either.
    """
    if not 0 <= scale <= MOST_SCALE:
        raise ValueError(f"scale must be 0 (without the picture) to {MOST_SCALE:g}, got {scale}")
    if encoder is None:
        if not checkpoint.has("image_encoder"):
            raise ValueError(
                f"expected an image encoder for {file.path.name}, since {checkpoint.folder.name} has none of its own"
            )
        encoder = open_image_encoder(checkpoint.components["image_encoder"].folder, checkpoint.digests)
    _check_encoder(file, encoder)
    prepared = prepare_image(pixels, mask, size=encoder.size, fit="pad")
    seen = prepared.pixels * prepared.mask[:, None] + 1 - prepared.mask[:, None]
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (encoder.mean, encoder.std))
    values = (seen - mean.to(seen)) / std.to(seen)
    for dtype in (None, torch.float32):  # some overflow in half precision
        embeds, negative = _looked(cache, encoder, values, file.hears_tokens, dtype)
        if embeds.isfinite().all() and negative.isfinite().all():
            return checkpoint.with_adapter(IPAdapter(file, scale, embeds[None], negative[None]))
    raise FloatingPointError(f"{encoder.identity}: the image encoder gave values that are no numbers")


def _looked(
    cache: ModelCache, encoder: ImageEncoder, values: Tensor, tokens: bool, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """What the adapter hears of the pictures and of none. dtype: None is the encoder's own."""
    with encoder.use(cache, dtype) as network, torch.inference_mode():
        values = values.to(next(network.parameters()))
        if tokens:
            # What it hears of no picture is the middle of all values, as it was trained.
            output = network(torch.cat([values, torch.zeros_like(values[:1])]), output_hidden_states=True)
            states = output.hidden_states[-2].cpu()
            return states[:-1], states[-1:].expand_as(states[:-1])
        output = network(values)
        found = getattr(output, "image_embeds", None)
        embeds = (output.pooler_output if found is None else found).cpu()
        return embeds, torch.zeros_like(embeds)


def _parts(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the projection and of the attention, by the names that diffusers' converters know."""
    projection, attention = {}, {}
    for name, value in values.items():
        rest = name.partition(".")[2]
        if name.startswith(_PROJECTION):
            projection[rest] = value
        elif name.startswith(_ATTENTION):
            for old, new in _RENAMED.items():
                rest = rest.replace(old, new)
            attention[rest] = value
    return projection, attention


def _listening(bare: Any) -> list[str]:
    """The names of the attention layers that hear what is asked for, in the order in which a file numbers them."""
    names = list(bare.attn_processors)
    if type(bare).__name__ == _FLUX:
        return [name for name in names if not name.startswith("single_")]
    return [name for name in names if not name.endswith("attn1.processor")]


def _check_family(
    checkpoint: Checkpoint, path: Path, part: Component, attention: Mapping[str, tuple[int, ...]]
) -> None:
    """Each layer's keys must go from the width of the model's words to that of its own layer."""
    bare = skeleton(part)
    wanted = []
    for name in _listening(bare):
        module = bare.get_submodule(name.removesuffix(".processor"))
        heard = module.add_k_proj if part.class_name == _FLUX else module.to_k
        words = bare.config.joint_attention_dim if part.class_name == _FLUX else heard.weight.shape[1]
        wanted.append((heard.weight.shape[0], words))
    layers = {int(number): shape for key, shape in attention.items() if (number := _number(key)) is not None}
    found = [tuple(layers[number]) for number in sorted(layers)]
    is_flux = any(key.endswith("to_k_ip.bias") for key in attention)
    if found == wanted and is_flux == (part.class_name == _FLUX):
        return
    made = "FLUX.1" if is_flux else UNETS.get(found[0][-1] if found else 0, "Stable Diffusion")
    told = [f"{layers[0][-1]} wide in {len(layers)} layers" if layers else "nothing" for layers in (found, wanted)]
    raise CheckpointError(
        f"{path.name} is an IP-Adapter of {made}, for words {told[0]}: expected one of {checkpoint.family.name}, for "
        f"words {told[1]} as in {checkpoint.folder.name}"
    )


def _number(key: str) -> str | None:
    number, _, rest = key.partition(".")
    return number if rest == "to_k_ip.weight" and number.isdecimal() and len(number) < 5 else None


def _hears(
    path: Path, projection: Mapping[str, tuple[int, ...]], attention: Mapping[str, tuple[int, ...]]
) -> tuple[int, bool]:
    """The width of the image encoder's output, and whether it is all of its tokens."""
    if not any("_lora." in key for key in attention):
        for name, side, hears_tokens in (
            ("proj.weight", -1, False),
            ("proj_in.weight", -1, True),  # "Plus"
            ("proj.3.weight", 0, True),  # "Full Face", whose tokens are as many as the picture's
        ):
            if name in projection and "perceiver_resampler.proj_in.weight" not in projection:
                shape = projection["proj.0.weight" if name == "proj.3.weight" else name]
                return shape[side], hears_tokens
    raise CheckpointError(
        f"{path.name}: expected an IP-Adapter that hears an image encoder, such as ip-adapter or ip-adapter-plus; "
        f"found {shown(sorted(projection)[:3])}, as Face ID has it, which hears a measured face"
    )


def _check_encoder(file: IPAdapterFile, encoder: ImageEncoder) -> None:
    if encoder.kind not in _TRANSFORMERS:
        raise ValueError(f"expected CLIP's or SigLIP's image encoder for {file.path.name}, got {encoder.name}")
    hidden = encoder.config.get("hidden_size", 768)
    projects = encoder.kind == "CLIPVisionModelWithProjection" and not file.hears_tokens
    width = encoder.config.get("projection_dim", 512) if projects else hidden
    if width != file.image_width:
        what = "tokens" if file.hears_tokens else "an embedding"
        raise ValueError(
            f"{file.path.name} hears {what} {file.image_width} wide: expected the image encoder that it was trained "
            f"with, got {encoder.name}, whose are {width} wide"
        )
