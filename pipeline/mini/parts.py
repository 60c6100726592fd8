"""The parts of a small model on disk: kept whole, read again, and written together as the folder that ships."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from ..files.components import Component
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
    """In float32."""
    if kind is FusionNetwork:  # of a model that has shipped each layer lies in integers, see ``ship``
        weights = folder / "diffusion_pytorch_model.safetensors"
        return build(Component(folder.name, "duet", "FusionNetwork", folder / "config.json", (weights,)), torch.float32)
    return kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True).float()


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

    Four fifths of a small model's weights are the fusion network's layers. They are written in 8 bits, each half as
    large: integers, and a scale of each row, by which the pack multiplies them when they are read.
    """
    part.cpu().half()
    if isinstance(part, FusionNetwork):
        for name, layer in part.named_modules():
            if isinstance(layer, nn.Linear) and not name.startswith(("choice.", "reader.")):
                _round_rows(layer)
    part.save_pretrained(folder, safe_serialization=True)
    _forget_origin(folder / "config.json")


def _round_rows(layer: nn.Linear) -> None:
    """Weights become integers of -127 to 127, and ``weight_scale``, (rows, 1), what one of them stands for.

    In squares an even grid errs a seventh as much as floats of 8 bits do, where a row's largest weight is 4.5 of its
    standard deviations, as it is here.
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
