"""IP-Adapter files in their authors' layout, with random weights for a tiny denoiser, and an image encoder for them."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

Tensors = dict[str, torch.Tensor]
HIDDEN, PROJECTED = 16, 24  # channels of the encoder's tokens and of its one embedding


def save_encoder(folder: Path, *, projection: int = PROJECTED, hidden: int = HIDDEN, projects: bool = True) -> Path:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=projection,
    )
    (CLIPVisionModelWithProjection if projects else CLIPVisionModel)(config).save_pretrained(str(folder))
    return folder


def adapter_tensors(denoiser: Any, seed: int = 0, *, plus: bool = False) -> Tensors:
    """ "image_proj." and "ip_adapter." for a UNet or a FLUX transformer, each layer strong enough to be seen."""
    source = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=source) / shape[-1] ** 0.5

    is_flux = hasattr(denoiser, "single_transformer_blocks")
    names = [name.removesuffix(".processor") for name in denoiser.attn_processors]
    listening = [name for name in names if not (name.startswith("single_") or name.endswith("attn1"))]
    layers = [denoiser.get_submodule(name) for name in listening]
    width = denoiser.config.joint_attention_dim if is_flux else layers[0].to_k.weight.shape[1]
    found = {f"image_proj.{name}": tensor for name, tensor in (_plus if plus else _plain)(random, width).items()}
    for number, layer in enumerate(layers):
        stem = f"ip_adapter.{number if is_flux else 2 * number + 1}"
        for side in ("to_k_ip", "to_v_ip"):
            found[f"{stem}.{side}.weight"] = 3 * random(layer.to_k.weight.shape[0], width)
            if is_flux:
                found[f"{stem}.{side}.bias"] = random(layer.to_k.weight.shape[0])
    return found


def save_adapter(path: Path, tensors: Tensors) -> Path:
    save_file(tensors, path)
    return path


def split(tensors: Tensors) -> dict[str, Tensors]:
    """As diffusers' own loader takes it."""
    return {
        part: {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}
        for part in ("image_proj", "ip_adapter")
    }


def _plain(random: Any, width: int) -> Tensors:
    return {
        "proj.weight": random(4 * width, PROJECTED),
        "proj.bias": random(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }


def _plus(random: Any, width: int, inner: int = 64) -> Tensors:
    found = {
        "latents": random(1, 8, inner),
        "proj_in.weight": random(inner, HIDDEN),
        "proj_in.bias": random(inner),
        "proj_out.weight": random(width, inner),
        "proj_out.bias": random(width),
        "norm_out.weight": torch.ones(width),
        "norm_out.bias": torch.zeros(width),
    }
    for number in range(4):
        attention, forward = f"layers.{number}.0", f"layers.{number}.1"
        for norm in (f"{attention}.norm1", f"{attention}.norm2", f"{forward}.0"):
            found |= {f"{norm}.weight": torch.ones(inner), f"{norm}.bias": torch.zeros(inner)}
        found |= {
            f"{attention}.to_q.weight": random(inner, inner),
            f"{attention}.to_kv.weight": random(2 * inner, inner),
            f"{attention}.to_out.weight": random(inner, inner),
            f"{forward}.1.weight": random(4 * inner, inner),
            f"{forward}.3.weight": random(inner, 4 * inner),
        }
    return found
