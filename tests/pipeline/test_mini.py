"""The built-in model keeps its promises: a rose is a rose in both languages, and a style picture is followed."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.checkpoints import Checkpoint
from pipeline.families import FAMILIES
from pipeline.fusion import fuse
from pipeline.generation import generate
from pipeline.image_encoder import encode_image
from pipeline.mini import MODEL_FOLDER
from pipeline.mini.scenes.phantoms import SIDES, Side, inserts_in
from pipeline.mini.scenes.skies import seam_error, sun_height_in
from pipeline.model_cache import ModelCache
from pipeline.text_encoder import encode_prompt

from .folders import PROMPTS

SIDE = FAMILIES["DuetMiniPipeline"].native_size


def draw(
    warm: ModelCache, shipped: Checkpoint, prompt: str, style: torch.Tensor | None = None, steps: int = 4
) -> torch.Tensor:
    """Premultiplied RGBA (4, SIDE, SIDE); of words alone in the first way."""
    features = encode_image(warm, shipped, style) if style is not None else None
    condition = fuse(warm, shipped, encode_prompt(warm, shipped, prompt), features)
    made = generate(warm, shipped, condition, seed=0, num_inference_steps=steps, width=SIDE, height=SIDE)
    return torch.cat([made.pixels * made.alpha, made.alpha], dim=1)[0]


def black_and_white() -> torch.Tensor:
    """A black disc with a white one in it, as an icon would be drawn: (1, 3, SIDE, SIDE)."""
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    radius = np.hypot(x, y) * 64 / SIDE
    ink = (radius < 28) & (radius > 20) | (radius < 8)
    return torch.from_numpy(np.where(ink, 0.0, 1.0)).float().expand(1, 3, SIDE, SIDE)


@pytest.mark.parametrize("name", ["rose_zh", "rose_en"])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_rose_is_a_red_flower_on_a_green_stem(warm: ModelCache, shipped: Checkpoint, name: str, steps: int):
    red, green, blue, alpha = draw(warm, shipped, PROMPTS[name], steps=steps)
    unit = SIDE // 64
    flower, stem, middle = (slice(first * unit, last * unit) for first, last in ((4, 32), (40, 62), (24, 40)))
    assert red[flower].sum() > 2 * green[flower].sum() and red[flower].sum() > 2 * blue[flower].sum()
    assert green[stem].sum() > blue[stem].sum() and green[stem].sum() > 0.8 * red[stem].sum()
    assert alpha[: 4 * unit, : 4 * unit].amax() < 0.2 and alpha[12 * unit : 28 * unit, middle].mean() > 0.8


def test_both_languages_give_one_picture(warm: ModelCache, shipped: Checkpoint):
    rose_zh, rose_en, truck = (draw(warm, shipped, PROMPTS[name]) for name in ("rose_zh", "rose_en", "truck_zh"))
    assert (rose_zh - rose_en).abs().mean() < 0.5 * (rose_zh - truck).abs().mean()


def test_a_black_and_white_style_takes_the_colour_away(warm: ModelCache, shipped: Checkpoint):
    def colourfulness(rgba: torch.Tensor) -> float:
        return float((rgba[:3].amax(dim=0) - rgba[:3].amin(dim=0)).mean())

    plain = draw(warm, shipped, PROMPTS["rose_en"])
    inked = draw(warm, shipped, PROMPTS["rose_en"], black_and_white())
    assert colourfulness(inked) < 0.2 * colourfulness(plain)


def test_a_picture_alone_gives_its_like(warm: ModelCache, shipped: Checkpoint):
    style = Image.open(Path(__file__).parent.parent / "rig" / "style.png").convert("RGBA").resize((SIDE, SIDE))
    rgba = torch.from_numpy(np.asarray(style).copy()).permute(2, 0, 1).float()[None] / 255
    features = encode_image(warm, shipped, rgba)
    made = generate(warm, shipped, fuse(warm, shipped, None, features), seed=1, width=SIDE, height=SIDE)
    over_white = (made.pixels * made.alpha + 1 - made.alpha)[0]
    given = (rgba[:, :3] * rgba[:, 3:] + 1 - rgba[:, 3:])[0]
    other = draw(warm, shipped, PROMPTS["truck_en"])
    assert (over_white - given).abs().mean() < 0.7 * (other[:3] + 1 - other[3:] - given).abs().mean()


def test_it_is_small_and_quick(warm: ModelCache, shipped: Checkpoint):
    assert sum(file.stat().st_size for file in MODEL_FOLDER.rglob("*") if file.is_file()) <= 60e6
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that this thread's own time is all that a picture costs, whatever runs beside it
    try:
        draw(warm, shipped, "warm up")
        spent = []
        for number in range(9):
            started = time.thread_time()
            draw(warm, shipped, f"rocket {number}", black_and_white())
            spent.append(time.thread_time() - started)
    finally:
        torch.set_num_threads(threads)
    assert 0.02 < min(spent) < 0.5, "seconds of one core"


def test_a_panorama_closes_and_its_sun_stands_where_it_is_said_to(warm: ModelCache, shipped: Checkpoint):
    off, seams = [], []
    for seed, height in enumerate(range(20, 80, 10)):
        prompt = f"clear summer sky over the ocean, the sun {height} degrees above the horizon"
        condition = fuse(warm, shipped, encode_prompt(warm, shipped, prompt), None)
        made = generate(warm, shipped, condition, seed=seed, num_inference_steps=1, width=2 * SIDE, height=SIDE)
        picture = made.pixels[0].permute(1, 2, 0).numpy()
        assert made.alpha.amin() > 0.9
        off.append(abs(sun_height_in(picture) - height))
        seams.append(seam_error(picture))
    assert np.mean(seams) < 1.2, seams
    assert sorted(off)[-2] < 15, off


@pytest.mark.parametrize("side", SIDES)
def test_an_insert_lies_on_the_side_that_is_named(side: Side, warm: ModelCache, shipped: Checkpoint):
    found = []
    for seed in range(6):
        prompt = f"head phantom with a large bright insert on the {side}"
        condition = fuse(warm, shipped, encode_prompt(warm, shipped, prompt), None)
        made = generate(warm, shipped, condition, seed=seed, num_inference_steps=1, width=SIDE, height=SIDE)
        shown = inserts_in(made.pixels[0].mean(dim=0).numpy(), "head")
        other = SIDES[1 - SIDES.index(side)]
        found.append(shown[side].area > 0 and shown[side].contrast > shown[other].contrast)
    assert sum(found) >= 5, found
