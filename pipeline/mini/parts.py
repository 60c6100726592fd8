"""The parts of a small model on disk: kept whole, read again, and written together as the folder that ships."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

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
    large, which adds 0.0022 of the latents' variance to its error.
    """
    part.cpu().half()
    if isinstance(part, FusionNetwork):
        for name, layer in part.named_modules():
            if isinstance(layer, nn.Linear) and not name.startswith(("choice.", "reader.")):
                layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)
    part.save_pretrained(folder, safe_serialization=True)
    _forget_origin(folder / "config.json")


def _forget_origin(config: Path) -> None:
    """diffusers notes the folder that a part was read from, which is of no use to anyone else."""
    kept = {key: value for key, value in json.loads(config.read_text("utf-8")).items() if key != "_name_or_path"}
    config.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
