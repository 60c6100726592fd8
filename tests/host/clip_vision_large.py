"""CLIP's image encoder ViT-L/14 as one file of full size with random weights: the host recognises no smaller one."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection


def save_clip_vision_large(path: Path, seed: int = 0) -> Path:
    """304 million parameters in float16, named as published: 0.6 GB."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        projection_dim=768,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    )
    tensors = {
        name if name.startswith("visual_projection") else f"vision_model.{name.removeprefix('vision_model.')}": tensor
        for name, tensor in CLIPVisionModelWithProjection(config).half().state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"format": "pt"})
    return path
