"""The small model's eye: a CNN that reads style and content from one RGB picture."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

from ..vision.resizing import fit_to
from .catalogue import STYLES
from .loop import Plan, device, run_stage, seeded
from .scenes.scene_set import FACTS
from .training_set import TrainingSet, counts_of
from .words import facts_loss

SEEN = 96  # pixels a side that a picture is seen at, as in the family's table
THUMBNAIL = 16  # pixels a side of the small picture that the pooled features must be able to redraw
WIDTH = 256


def new_image_encoder() -> ResNetModel:
    config = ResNetConfig(
        num_channels=3,
        embedding_size=64,
        hidden_sizes=[64, 128, WIDTH],
        depths=[1, 1, 1],
        layer_type="basic",
        hidden_act="relu",
    )
    return ResNetModel(config).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def over_background(pixels: np.ndarray | Tensor, background: Tensor | float = 1.0) -> Tensor:
    """Premultiplied (B, H, W, 4) uint8 -> RGB (B, 3, H, W) in 0..1 over a colour (B, 3, 1, 1) or a grey level."""
    rgba = torch.as_tensor(pixels).permute(0, 3, 1, 2).float() / 255
    return (rgba[:, :3] + (1 - rgba[:, 3:]) * background).clamp(0, 1)


def framed(rgb: Tensor) -> Tensor:
    """(B, 3, H, W) as the pipeline shows it to the eye: (B, 3, SEEN, SEEN), what is not square between white bars."""
    return fit_to(rgb, SEEN, SEEN, "pad", fill=1.0)


def augment(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Small random shifts and scales of (B, C, H, W), edges continued."""
    count, place = pictures.shape[0], pictures.device
    scale = 1 + 0.2 * (torch.rand(count, generator=generator, device=place) - 0.5)
    shift = 0.2 * (torch.rand(count, 2, generator=generator, device=place) - 0.5)
    affine = torch.zeros(count, 2, 3, device=place)
    affine[:, 0, 0] = affine[:, 1, 1] = scale
    affine[:, :, 2] = shift
    grid = F.affine_grid(affine, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


def train_image_encoder(work: Path, pictures: TrainingSet, encoder: ResNetModel, plan: Plan) -> ResNetModel:
    """Loss: name style and concept, or the facts of a scene, and redraw a thumbnail, all from the pooled features."""
    torch.manual_seed(0)
    rows = pictures.training_rows()
    counts = counts_of(plan.batch)
    scene_facts = torch.from_numpy(np.concatenate([scene.facts for scene in pictures.scenes])).to(device())
    parts = nn.ModuleDict(
        {
            "image_encoder": encoder,
            "style": nn.Linear(WIDTH, len(STYLES)),
            "concept": nn.Linear(WIDTH, len(pictures.emoji.concepts)),
            "facts": nn.Linear(WIDTH, sum(FACTS.values())),
            "thumbnail": nn.Linear(WIDTH, 4 * THUMBNAIL**2),
        }
    )

    def loss_at(step: int) -> dict[str, Tensor]:
        pick = np.random.default_rng(step)
        generator = seeded(step)
        chosen = [np.sort(pick.choice(some, count, replace=False)) for some, count in zip(rows, counts, strict=True)]
        seen, small = [], []
        for some in chosen:
            pixels = pictures.pixels_of(some)
            white = torch.rand(len(some), 1, 1, 1, generator=generator, device=device()) < 0.7
            colour = torch.rand(len(some), 3, 1, 1, generator=generator, device=device()).masked_fill(white, 1.0)
            seen.append(augment(framed(over_background(pixels, colour)), generator))
            rgba = pixels.permute(0, 3, 1, 2).float() / 255
            small.append(F.adaptive_avg_pool2d(rgba, THUMBNAIL).flatten(1))
        pooled = encoder(normalise(torch.cat(seen))).pooler_output.flatten(1)
        drawn, scenes = pooled[: counts[0]], pooled[counts[0] :]
        style, concept = (
            torch.as_tensor(labels[chosen[0]]).to(pooled.device)
            for labels in (pictures.emoji.style, pictures.emoji.concept)
        )
        facts = scene_facts[torch.from_numpy(np.concatenate(chosen[1:]) - pictures.starts[1])]
        return {
            "style": F.cross_entropy(parts["style"](drawn), style),
            "concept": 0.2 * F.cross_entropy(parts["concept"](drawn), concept),
            "facts": 0.2 * facts_loss(parts["facts"](scenes), facts),
            "thumbnail": 20 * F.mse_loss(parts["thumbnail"](pooled).float(), torch.cat(small)),
        }

    run_stage("vision", work, plan, parts, loss_at)
    return encoder


def normalise(rgb: Tensor) -> Tensor:
    """0..1 -> -1..1, the range that the image encoder was taught in."""
    return (2 * rgb - 1).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def embed_pictures(encoder: ResNetModel, rgb: Tensor) -> Tensor:
    """RGB (N, 3, SEEN, SEEN) in 0..1 -> pooled features (N, 256)."""
    return torch.cat([encoder(normalise(chunk.to(device()))).pooler_output.flatten(1) for chunk in rgb.split(64)])
