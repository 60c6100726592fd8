"""LoRA files in the layouts that users have, with random factors for the layers of a real module."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoints import Checkpoint, open_checkpoint

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
RANK = 2


def random_factors(module: torch.nn.Module, wanted: Callable[[str], bool], seed: int = 0) -> Factors:
    """(down, up) for every Linear and Conv2d whose name is wanted, strong enough to be seen in the picture."""
    source = torch.Generator().manual_seed(seed)
    found = {}
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.Linear | torch.nn.Conv2d) and wanted(name):
            shape = tuple(part.weight.shape)
            down = torch.randn(RANK, *shape[1:], generator=source) / part.weight[0].numel() ** 0.5
            up = torch.randn(shape[0], RANK, *(1 for _ in shape[2:]), generator=source)
            found[name] = down, up
    assert found
    return found


def save_peft(path: Path, factors: dict[str, Factors], **metadata: str) -> Path:
    """As diffusers' save_lora_weights writes it. factors: by component."""
    tensors = {}
    for component, layers in factors.items():
        for name, (down, up) in layers.items():
            tensors[f"{component}.{name}.lora_A.weight"] = down
            tensors[f"{component}.{name}.lora_B.weight"] = up
    save_file(tensors, path, metadata or None)
    return path


def save_kohya(path: Path, factors: dict[str, Factors], alpha: float) -> Path:
    """As Kohya's sd-scripts writes it. factors: by prefix, such as lora_unet."""
    tensors = {}
    for prefix, layers in factors.items():
        for name, (down, up) in layers.items():
            stem = f"{prefix}_{name.replace('.', '_')}"
            tensors[f"{stem}.lora_down.weight"] = down
            tensors[f"{stem}.lora_up.weight"] = up
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


def merged(checkpoint: Checkpoint, folder: Path, factors: dict[str, Factors], scale: float) -> Checkpoint:
    """The same model with the product of the factors added to its weights: what a LoRA is to amount to."""
    shutil.copytree(checkpoint.folder, folder)
    for component, layers in factors.items():
        path = folder / component / checkpoint.components[component].weights[0].name
        weights: dict[str, Any] = load_file(path)
        for name, (down, up) in layers.items():
            key = f"{name}.weight"
            weights[key] = weights[key] + scale * (up.flatten(1) @ down.flatten(1)).reshape(weights[key].shape)
        save_file(weights, path, {"format": "pt"})
    return open_checkpoint(folder)
