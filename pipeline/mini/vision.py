"""The small model's eye: a CNN that reads style and content from one RGB picture."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

from .catalogue import STYLES
from .loop import Plan, run_stage
from .pictures import PictureSet

THUMBNAIL = 16  # pixels a side of the small picture that the pooled features must be able to redraw


def new_image_encoder() -> ResNetModel:
    config = ResNetConfig(
        num_channels=3,
        embedding_size=64,
        hidden_sizes=[64, 128, 256],
        depths=[1, 1, 1],
        layer_type="basic",
        hidden_act="relu",
    )
    return ResNetModel(config).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def over_background(pixels: np.ndarray | Tensor, background: Tensor | float = 1.0) -> Tensor:
    """Premultiplied (B, H, W, 4) uint8 -> RGB (B, 3, H, W) in 0..1 over a colour (B, 3, 1, 1) or a grey level."""
    rgba = torch.as_tensor(pixels).permute(0, 3, 1, 2).float() / 255
    return rgba[:, :3] + (1 - rgba[:, 3:]) * background


def augment(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Small random shifts and scales of (B, C, H, W), edges continued."""
    count = pictures.shape[0]
    scale = 1 + 0.2 * (torch.rand(count, generator=generator) - 0.5)
    shift = 0.2 * (torch.rand(count, 2, generator=generator) - 0.5)
    affine = torch.zeros(count, 2, 3)
    affine[:, 0, 0] = affine[:, 1, 1] = scale
    affine[:, :, 2] = shift
    grid = F.affine_grid(affine, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


def train_image_encoder(
    work: Path, pictures: PictureSet, encoder: ResNetModel, plan: Plan, batch: int = 64
) -> ResNetModel:
    """Loss: name the style, name the concept, and redraw a thumbnail, all from the pooled features."""
    torch.manual_seed(0)
    rows = pictures.training_rows()
    width = 256
    parts = nn.ModuleDict(
        {
            "image_encoder": encoder,
            "style": nn.Linear(width, len(STYLES)),
            "concept": nn.Linear(width, len(pictures.concepts)),
            "thumbnail": nn.Linear(width, 4 * THUMBNAIL**2),
        }
    )

    def loss_at(step: int) -> dict[str, Tensor]:
        pick = np.random.default_rng(step)
        generator = torch.Generator().manual_seed(step)
        chosen = np.sort(pick.choice(rows, batch, replace=False))
        white = torch.rand(batch, 1, 1, 1, generator=generator) < 0.7
        colour = torch.where(white, torch.ones(()), torch.rand(batch, 3, 1, 1, generator=generator))
        seen = augment(over_background(pictures.pixels[chosen], colour), generator)
        pooled = encoder(normalise(seen)).pooler_output.flatten(1)
        small = F.adaptive_avg_pool2d(
            torch.as_tensor(pictures.pixels[chosen]).permute(0, 3, 1, 2).float() / 255, THUMBNAIL
        )
        return {
            "style": 0.5 * F.cross_entropy(parts["style"](pooled), torch.as_tensor(pictures.style[chosen])),
            "concept": 0.2 * F.cross_entropy(parts["concept"](pooled), torch.as_tensor(pictures.concept[chosen])),
            "thumbnail": 20 * F.mse_loss(parts["thumbnail"](pooled), small.flatten(1)),
        }

    run_stage("vision", work, plan, parts, loss_at)
    return encoder


def normalise(rgb: Tensor) -> Tensor:
    """0..1 -> -1..1, the range that the image encoder was taught in."""
    return (2 * rgb - 1).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def embed_pictures(encoder: ResNetModel, rgb: Tensor) -> Tensor:
    """RGB (N, 3, S, S) in 0..1 -> pooled features (N, 256)."""
    return torch.cat([encoder(normalise(chunk)).pooler_output.flatten(1) for chunk in rgb.split(64)])
