"""A LoRA (arXiv 2106.09685) or one of its kin: small matrices that change a model's layers while it is in use."""

import importlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..checkpoints import Checkpoint
from ..files.components import Component
from ..files.content import Digests
from ..files.safetensors_files import CheckpointError, check_weights, read_json
from ..files.weights import key_of, read_tensors
from ..model_cache import ModelCache
from ..private_views import skeleton
from ..residency import is_out_of_memory
from .lora_families import MadeFor, made_for
from .lora_files import FLAT, Layer, layers_of, refuse_other_methods, stand_ins
from .weight_changes import DORA, WeightChange, lengths_by_row, matrix

MOST_STRENGTH = 20.0
_SETTINGS = "lora_adapter_metadata"  # under which diffusers writes ranks and alphas, as JSON, into the file's metadata
_LARGEST_SETTINGS = 2**20
_QUOTED = 300
# What the converters of diffusers raise on a layout that they do not know.
_UNKNOWN_LAYOUT = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Lora:
    """A LoRA that fits a checkpoint. Holds no weights.

    digest: of the file; targets: by component, the layers of the file and the modules that they are added to;
    strength: what they are multiplied by; settings, pipeline, layers_per_block: how the file's names are read.
    """

    path: Path
    digest: str
    strength: float
    targets: Mapping[str, Mapping[str, str]]
    components: tuple[str, ...]
    denoiser: str
    pipeline: str
    layers_per_block: int
    settings: Mapping[str, Any]
    notices: tuple[str, ...] = ()
    digests: Digests = field(default_factory=Digests, repr=False, compare=False)

    @property
    def identity(self) -> tuple[object, ...]:
        content = self.digests.of_network((self.path,), "", self.pipeline, self.settings)
        return ("lora", content.digest, self.layers_per_block, self.strength)

    def acts_on(self, component: str) -> bool:
        return self.strength != 0 and component in self.targets

    def shown(self) -> None:
        return None

    def use(self, cache: ModelCache, dtype: torch.dtype) -> AbstractContextManager[Any]:
        """On the cache's device, and pinned, while in the block: one copy, whatever the strength and the prompt."""
        layout = f"LoRA for {self.pipeline}, {self.layers_per_block} layers a block"
        # What the file says of ranks and alphas decides too, and lies in its notes.
        content = self.digests.of_network((self.path,), "", layout, self.settings)
        return cache.use(key_of((self.path,), layout, dtype, content), lambda: self.build(dtype))

    def build(self, dtype: torch.dtype) -> "LoraNetwork":
        """Read the file to the CPU. Raises CheckpointError if it is no longer the one that was checked."""
        if check_weights(self.path).digest != self.digest:
            raise CheckpointError(f"{self.path.name} was replaced since it was chosen: run the workflow once more")
        try:
            with torch.inference_mode(False):
                return LoraNetwork(self._layers(read_tensors((self.path,)))[0], dtype)
        except (*_UNKNOWN_LAYOUT, SafetensorError) as error:
            if is_out_of_memory(error) or isinstance(error, CheckpointError):
                raise
            raise _unknown_layout(self.path, error) from error

    def lay_over(self, component: str, view: nn.Module, weights: "LoraNetwork") -> None:
        targets = self.targets[component]
        for (of, path), change in zip(weights.places, weights.changes, strict=True):
            if of == component and path in targets:
                assert isinstance(change, WeightChange)
                change.lay_over(view.get_submodule(targets[path]), self.strength)

    def _layers(self, tensors: Mapping[str, Tensor]) -> tuple[list[Layer], list[str]]:
        return layers_of(
            self.path.name,
            tensors,
            self.settings,
            pipeline=getattr(importlib.import_module("diffusers"), self.pipeline),
            layers_per_block=self.layers_per_block,
            denoiser=self.denoiser,
            components=self.components,
        )


class LoraNetwork(nn.Module):
    """What a whole file changes, as one model in the cache. places: component and path of each change."""

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype) -> None:
        super().__init__()
        self.places = tuple((one.component, one.path) for one in layers)
        self.changes = nn.ModuleList(WeightChange(one.parts, one.scale, dtype) for one in layers)


def open_lora(checkpoint: Checkpoint, path: Path, strength: float) -> Lora:
    """Check a file against a checkpoint, by its header alone.

    strength: -20 to 20; 0 leaves the model as it is. Layouts: those of diffusers, PEFT and Kohya, and what else
    diffusers converts for the family; forms: see ``weight_changes``. Raises CheckpointError for a file that was made
    for another family, naming both, for one of which no layer is found in the checkpoint, and for other methods. Where
    some are found, a notice tells how many.
    """
    if not -MOST_STRENGTH <= strength <= MOST_STRENGTH:
        raise ValueError(f"strength must be {-MOST_STRENGTH:g} to {MOST_STRENGTH:g}, got {strength}")
    if checkpoint.family.tasks is None:
        raise CheckpointError(f"{path.name}: expected no LoRA for {checkpoint.family.name}, for which none is made")
    file = check_weights(path)
    shapes = {name: entry.shape for name, entry in file.entries.items()}
    refuse_other_methods(path.name, shapes)
    denoiser = "unet" if checkpoint.has("unet") else "transformer"
    part = checkpoint.components[denoiser]
    config = read_json(part.config) | dict(part.options)
    try:
        made = made_for(shapes)
    except _UNKNOWN_LAYOUT as error:
        raise _unknown_layout(path, error) from error
    _check_family(checkpoint, path, made, part, config)
    per_block = config.get("layers_per_block", 2)
    lora = Lora(
        path,
        file.digest,
        strength,
        {},
        tuple(name for name, component in checkpoint.components.items() if component.weights),
        denoiser,
        checkpoint.family.tasks.text_to_image,
        per_block if isinstance(per_block, int) else 2,
        _settings(path),
        digests=checkpoint.digests,
    )
    try:
        layers, left = lora._layers(stand_ins(shapes))
    except _UNKNOWN_LAYOUT as error:
        if isinstance(error, CheckpointError):
            raise
        raise _unknown_layout(path, error) from error
    targets, missing = _targets(checkpoint, path, layers)
    missing += left
    found = sum(len(layers) for layers in targets.values())
    if not found:
        raise CheckpointError(
            f"{path.name}: expected layers of {checkpoint.folder.name}, a {checkpoint.family.name} model, found none "
            f"among its {len(shapes)} tensors, the first being {next(iter(shapes), 'no tensor')}"
        )
    told = ()
    if missing:
        told = (f"{path.name}: {found} of {found + len(missing)} layers are in the model, {missing[0]} is not",)
    return replace(lora, targets=targets, notices=told)


def _targets(
    checkpoint: Checkpoint, path: Path, layers: Sequence[Layer]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """By component, the layers of the file with the module of each; and those that the model does not have."""
    found: dict[str, dict[str, str]] = {}
    missing: list[str] = []
    skeletons: dict[str, dict[str, nn.Module]] = {}
    dotted: dict[tuple[str, str], str] = {}
    for one in layers:
        if one.component not in skeletons:
            skeletons[one.component] = dict(skeleton(checkpoint.components[one.component]).named_modules())
            dotted |= {(one.component, FLAT + name.replace(".", "_")): name for name in skeletons[one.component]}
        modules = skeletons[one.component]
        place = dotted.get((one.component, one.path), one.path)
        # CLIP's layers are found with or without this name before them, by the version of transformers.
        names = (place, place.removeprefix("text_model."), f"text_model.{place}")
        name = next((name for name in names if isinstance(modules.get(name), nn.Linear | nn.Conv2d)), None)
        if name is None:
            missing.append(f"{one.component}.{one.path}")
            continue
        _check_size(checkpoint, path, one, modules[name])
        found.setdefault(one.component, {})[one.path] = name
    return found, missing


def _check_size(checkpoint: Checkpoint, path: Path, layer: Layer, module: nn.Module) -> None:
    weight = module.weight
    assert isinstance(weight, Tensor)
    try:
        rows, columns = matrix({name: part.to("meta") for name, part in layer.parts.items()}).shape
        said = f"{columns} to {rows}"
    except (KeyError, RuntimeError, ValueError) as error:
        rows, columns, said = 0, 0, f"parts that do not belong together ({_quoted(error)})"
    if (rows, columns) != (weight.shape[0], weight[0].numel()):
        raise CheckpointError(
            f"{path.name} was made for another model: expected {layer.path} from {weight[0].numel()} to "
            f"{weight.shape[0]} values, as in {checkpoint.folder.name}, a {checkpoint.family.name} model; found {said}"
        )
    lengths = layer.parts.get(DORA)
    if lengths is None:
        return
    by_row = lengths_by_row(lengths, weight.shape[0])
    if lengths.numel() != weight.shape[0 if by_row else 1]:
        raise CheckpointError(
            f"{path.name}: expected a length for each of {weight.shape[0]} rows or {weight.shape[1]} columns of "
            f"{layer.path}, found {lengths.numel()}"
        )


def _check_family(
    checkpoint: Checkpoint, path: Path, made: MadeFor | None, part: Component, config: Mapping[str, Any]
) -> None:
    if made is None:
        return
    width = config.get("cross_attention_dim") if part.class_name == "UNet2DConditionModel" else None
    fits = not (isinstance(width, int) and made.width) or width == made.width
    if part.class_name in made.denoisers and fits:
        return
    widths = [f", cross-attention {side} wide" if side else "" for side in (made.width, width)]
    raise CheckpointError(
        f"{path.name} is a LoRA of {made.name}{widths[0]}: expected one of {checkpoint.family.name}{widths[1]}, for "
        f"{checkpoint.folder.name}"
    )


def _settings(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(_SETTINGS, "")
    try:
        found = json.loads(text) if 0 < len(text) < _LARGEST_SETTINGS else {}
    except (ValueError, RecursionError):
        found = {}
    return found if isinstance(found, dict) else {}


def _unknown_layout(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"{path.name}: expected a LoRA as diffusers, PEFT or Kohya lay it out, got: {_quoted(error)}"
    )


def _quoted(error: BaseException) -> str:
    return f"{type(error).__name__} {str(error).strip()[:_QUOTED]}"
