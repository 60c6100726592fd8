"""The parts of a small model on disk: kept whole, read again, and written together as the folder that ships."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn
from transformers import CLIPTextModelWithProjection

from ..checkpoints import own
from ..files.components import Component, find_weights
from ..files.single_file_weights import build
from ..fusing.fusion_network import FusionNetwork

COMPONENTS = {
    "tokenizer": ("transformers", "PreTrainedTokenizerFast"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "image_encoder": ("transformers", "ResNetModel"),
    "fusion": ("duet", "FusionNetwork"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderDC"),
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
}


def keep(folder: Path, part: Any) -> None:
    """There whole or not at all, whatever ends the process."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    part.save_pretrained(partial)
    partial.rename(folder)


def read_part(folder: Path, kind: Any) -> Any:
    """In float32, and no longer lying in the file. Of a model that has shipped some are integers, see ``ship``."""
    library = next(library for library, name in COMPONENTS.values() if name == kind.__name__)
    weights, _ = find_weights(folder, "model" if library == "transformers" else "diffusion_pytorch_model")
    part = build(Component(folder.name, library, kind.__name__, folder / "config.json", tuple(weights)), torch.float32)
    own(part)
    return part


def export(parts: dict[str, Any], tokenizer: Any, scaling_factor: float, target: Path) -> None:
    """Write the diffusers folder; the model card and licences beside it are left alone."""
    target.mkdir(parents=True, exist_ok=True)
    tokenizer.model_max_length = parts["text_encoder"].config.max_position_embeddings
    parts["vae"].register_to_config(scaling_factor=scaling_factor)
    for name, part in parts.items():
        ship(part, target / name)
    tokenizer.save_pretrained(target / "tokenizer")
    FlowMatchEulerDiscreteScheduler().save_pretrained(target / "scheduler")
    index = {
        "_class_name": "DuetMiniPipeline",
        "_diffusers_version": "0.42.1",
        **{k: list(v) for k, v in COMPONENTS.items()},
    }
    (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def ship(part: Any, folder: Path) -> None:
    """Write it in half precision, the part itself too.

    The fusion network and the text encoder hold nine tenths of a small model's weights. Their layers are
    written in 8 bits, each half as large: integers, and a scale of each row, by which the pack multiplies them when
    they are read.
    """
    part.cpu().half()
    for name, layer in part.named_modules():
        if isinstance(layer, (nn.Linear, nn.Embedding)) and _in_integers(part, name):
            _round_rows(layer)
    if isinstance(part, FusionNetwork) and part.memory is not None:
        part.memory.scales = part.memory.scales.to(torch.float8_e5m2)  # which they were rounded to
    part.save_pretrained(folder, safe_serialization=True)
    _forget_origin(folder / "config.json")


def _in_integers(part: Any, layer: str) -> bool:
    if isinstance(part, FusionNetwork):
        return not layer.startswith(("choice.", "reader.", "memory."))
    return isinstance(part, CLIPTextModelWithProjection)


def _round_rows(layer: nn.Linear | nn.Embedding) -> None:
    """Weights become integers of -127 to 127, and ``weight_scale``, (rows, 1), what one of them stands for.

    In squares an even grid errs a seventh as much as floats of 8 bits do, where a row's largest weight is 4.5 of its
    standard deviations, as it is in the fusion network.
    """
    weight = layer.weight.detach().float()
    scale = (weight.abs().amax(dim=1, keepdim=True) / 127).clamp_min(2**-14).half()  # a normal number in 16 bits
    rounded = (weight / scale.float()).round().clamp(-127, 127).to(torch.int8)
    layer.weight = nn.Parameter(rounded, requires_grad=False)
    layer.register_buffer("weight_scale", scale)


def _forget_origin(config: Path) -> None:
    """diffusers notes the folder that a part was read from, which is of no use to anyone else."""
    kept = {key: value for key, value in json.loads(config.read_text("utf-8")).items() if key != "_name_or_path"}
    config.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
