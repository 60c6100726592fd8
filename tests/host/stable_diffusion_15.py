"""Stable Diffusion 1.5 as a diffusers folder of full size with random weights: the host recognises no smaller one."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tests.rig.host import host_tree

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.6.0",
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
# A fresh network says next to nothing: its outputs are small, and the words hardly count. These factors make the noise
# that it predicts about as large as the noise that it sees, the pictures of full contrast, and the words decisive.
LOUDER = {"noise": 3.0, "words": 6.0, "picture": 1.5}


def save_stable_diffusion_15(folder: Path, seed: int = 0) -> Path:
    """1.05 billion parameters in float16: 2.1 GB on disk."""
    torch.manual_seed(seed)
    save_tokenizer(folder / "tokenizer")
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            bos_token_id=49406,
            eos_token_id=49407,
            projection_dim=768,
        )
    )
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    sizes: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 512,
    }
    vae = AutoencoderKL(**sizes)
    with torch.no_grad():
        make_louder(unet.conv_out, LOUDER["noise"])
        make_louder(vae.decoder.conv_out, LOUDER["picture"])
        for name, module in unet.named_modules():
            if name.endswith("attn2"):
                make_louder(module.to_out[0], LOUDER["words"])
    parts: dict[str, Any] = {"text_encoder": text, "unet": unet, "vae": vae}
    while parts:
        name, part = parts.popitem()
        part.half().save_pretrained(folder / name)
    name_as_published(folder / "text_encoder" / "model.safetensors")
    save_scheduler(folder)
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    return folder


def save_scheduler(folder: Path, **changes: Any) -> None:
    """The betas of Stable Diffusion with Euler's method. changes: of the scheduler's configuration."""
    EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **changes
    ).save_pretrained(folder / "scheduler")


def name_as_published(weights: Path) -> None:
    """Transformers 5 leaves out a prefix that every published folder has, and by which the host knows the encoder."""
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})


def make_louder(layer: nn.Linear | nn.Conv2d, factor: float) -> None:
    layer.weight.mul_(factor)


def save_tokenizer(folder: Path) -> None:
    """CLIP's own words, which the host carries. It sets no length for them."""
    source = host_tree() / "comfy" / "sd1_tokenizer"
    folder.mkdir(parents=True)
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        shutil.copy(source / name, folder)
    CLIPTokenizer.from_pretrained(str(source), model_max_length=77).save_pretrained(str(folder))
