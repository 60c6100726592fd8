"""Draw the picture sheet: ``python -m pipeline.mini.sheet docs/mini-sheet.png``.

Each row of the sheet is a style picture and each column a prompt of sheet.json; the first row is words alone.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checkpoints import open_checkpoint
from ..fusion import fuse
from ..generation import generate
from ..image_encoder import encode_image
from ..mini import MODEL_FOLDER
from ..model_cache import ModelCache
from ..residency import TorchResidency
from ..text_encoder import encode_prompt
from .catalogue import STYLES
from .pictures import PictureSet, load_pictures
from .vision import over_background

CELL = 96


def style_picture(pictures: PictureSet, style: str, label: str) -> Tensor:
    """RGB (1, 3, S, S) of the concept with this English name."""
    concept = next(number for number, entry in enumerate(pictures.concepts) if entry.label["en"] == label)
    row = np.flatnonzero((pictures.concept == concept) & (pictures.style == STYLES.index(style)))[0]
    return over_background(pictures.pixels[[row]])


def draw_sheet(pictures: PictureSet, folder: Path, steps: int) -> Image.Image:
    plan = json.loads(Path(__file__).with_name("sheet.json").read_text("utf-8"))
    cache = ModelCache(TorchResidency(torch.device("cpu"), 2**32), 2**32)
    checkpoint = open_checkpoint(folder)
    size = checkpoint.family.native_size
    shown = [None, *(style_picture(pictures, *chosen) for chosen in plan["styles"].items())]
    bands = []
    for half in (plan["prompts"][:12], plan["prompts"][12:]):
        for style in shown:
            features = encode_image(cache, checkpoint, style) if style is not None else None
            row = [style if style is not None else torch.ones(1, 3, size, size)]
            for prompt in half:
                condition = fuse(cache, checkpoint, encode_prompt(cache, checkpoint, prompt), features)
                made = generate(
                    cache, checkpoint, condition, seed=0, num_inference_steps=steps, width=size, height=size
                )
                row.append(made.pixels * made.alpha + 1 - made.alpha)
            bands.append(torch.cat(row, dim=3)[0])
    sheet = (torch.cat(bands, dim=1).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    return Image.fromarray(sheet).resize((13 * CELL, len(bands) * CELL), Image.Resampling.LANCZOS)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--work", type=Path, default=Path(".cache/mini"))
    parser.add_argument("--steps", type=int, default=1)
    chosen = parser.parse_args(arguments)
    size = open_checkpoint(chosen.model).family.native_size
    draw_sheet(load_pictures(chosen.work, size), chosen.model, chosen.steps).save(chosen.target)


if __name__ == "__main__":
    main()
