"""Refining a condition towards a picture: real weights, real pictures, and a judge that took no part."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from pipeline.checkpoints import Checkpoint, open_checkpoint
from pipeline.conditioning import FusedConditioning, ImageFeatures
from pipeline.curves import draw_curve
from pipeline.fusion import fuse
from pipeline.generation import generate
from pipeline.image_encoder import encode_image
from pipeline.model_cache import ModelCache
from pipeline.refinement import _descend, _Point, refine
from pipeline.text_encoder import encode_prompt

from .folders import save_stable_diffusion

PAIRS = [("rose", "style"), ("truck", "ink"), ("cat", "sunset"), ("house", "leaf")]
# The independent network tells little of the plain shapes drawn here, so it is asked about the one real drawing.
WORDS = ("rose", "truck", "cat", "house", "apple", "dog", "fish", "rocket")


def drawn(name: str) -> torch.Tensor:
    """RGB over white (1, 3, 64, 64): the demo's style picture, or one drawn here."""
    if name == "style":
        image = Image.open(Path(__file__).parents[1] / "rig" / "style.png").convert("RGBA").resize((64, 64))
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    else:
        image = Image.new("RGB", (64, 64), "white")
        draw = ImageDraw.Draw(image)
        if name == "ink":
            draw.ellipse((8, 8, 56, 56), outline="black", width=7)
            draw.rectangle((26, 26, 38, 38), fill="black")
        elif name == "sunset":
            draw.rectangle((2, 2, 62, 40), fill=(250, 140, 60))
            draw.rectangle((2, 40, 62, 62), fill=(40, 60, 140))
            draw.ellipse((20, 18, 44, 42), fill=(255, 225, 90))
        else:
            draw.ellipse((12, 6, 52, 58), fill=(90, 170, 70))
            draw.line((32, 10, 32, 62), fill=(40, 100, 40), width=3)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float()[None] / 255


def start(warm: ModelCache, shipped: Checkpoint, word: str, picture: str) -> tuple[FusedConditioning, ImageFeatures]:
    features = encode_image(warm, shipped, drawn(picture))
    return fuse(warm, shipped, encode_prompt(warm, shipped, word), features), features


def judged(warm: ModelCache, shipped: Checkpoint, pixels: torch.Tensor) -> torch.Tensor:
    return encode_image(warm, shipped, pixels, encoder="efficientnet-lite0").pooled


def likeness(
    warm: ModelCache, shipped: Checkpoint, condition: FusedConditioning, features: ImageFeatures, picture: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of what is drawn to a picture, by the model's own encoder and by the independent network: both (B,)."""
    made = generate(warm, shipped, condition, seed=1, width=128, height=128)  # its own size
    pixels = made.pixels * made.alpha + 1 - made.alpha
    own = torch.cosine_similarity(encode_image(warm, shipped, pixels).pooled, features.pooled)
    return own, torch.cosine_similarity(judged(warm, shipped, pixels), judged(warm, shipped, drawn(picture)))


@pytest.mark.parametrize(("word", "picture"), PAIRS)
def test_the_loss_falls_and_the_likeness_grows(warm: ModelCache, shipped: Checkpoint, word: str, picture: str):
    condition, features = start(warm, shipped, word, picture)
    found = refine(warm, shipped, condition, features, seconds=600)
    assert len(found.losses) == 21 and found.losses[-1] < 0.7 * found.losses[0]
    assert found.similarity[1] > found.similarity[0] and found.moved <= 0.5 + 1e-5
    (before, _), (after, _) = (
        likeness(warm, shipped, one, features, picture) for one in (condition, found.conditioning)
    )
    assert float(after - before) > 0.02


def test_an_independent_network_sees_the_likeness_grow(warm: ModelCache, shipped: Checkpoint):
    features = encode_image(warm, shipped, drawn("style"))
    words = [encode_prompt(warm, shipped, word) for word in WORDS]
    together = replace(words[0], pooled=torch.cat([each.pooled for each in words if each.pooled is not None]))
    condition = fuse(warm, shipped, together, features)
    found = refine(warm, shipped, condition, features, seconds=600).conditioning
    before, after = (likeness(warm, shipped, one, features, "style") for one in (condition, found))
    assert float((after[0] - before[0]).min()) > 0.02 and float((after[1] - before[1]).mean()) > 0.01


def test_it_works_inside_inference_mode_and_leaves_no_gradient(warm: ModelCache, shipped: Checkpoint):
    with torch.inference_mode():
        condition, features = start(warm, shipped, "rose", "ink")
        assert condition.tokens.is_inference()
        found = refine(warm, shipped, condition, features, num_steps=3)
    outside = refine(warm, shipped, *start(warm, shipped, "rose", "ink"), num_steps=3)
    assert torch.equal(found.conditioning.tokens, outside.conditioning.tokens)
    assert not found.conditioning.tokens.requires_grad
    for component in ("vae", "image_encoder"):
        with shipped.use(warm, component) as module:
            assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("radius", [0.0, 0.05, 0.3])
def test_it_stays_within_the_ball(warm: ModelCache, shipped: Checkpoint, radius: float):
    condition, features = start(warm, shipped, "rose", "ink")
    found = refine(warm, shipped, condition, features, radius=radius, num_steps=12)
    away = (found.conditioning.tokens - condition.tokens).norm() / condition.tokens.norm()
    assert away <= radius * (1 + 1e-5) and math.isclose(found.moved, away.item(), abs_tol=1e-5)
    if radius == 0:
        assert torch.equal(found.conditioning.tokens, condition.tokens)
    else:
        assert away > 0.5 * radius and found.losses[-1] < found.losses[0]


def test_style_statistics_are_followed_where_they_are_given(warm: ModelCache, shipped: Checkpoint):
    condition, features = start(warm, shipped, "rose", "ink")
    with_style = encode_image(warm, shipped, drawn("ink"), gram=True)
    plain, styled = (refine(warm, shipped, condition, seen, num_steps=6) for seen in (features, with_style))
    assert styled.losses[-1] < styled.losses[0]
    assert not torch.allclose(plain.conditioning.tokens, styled.conditioning.tokens, atol=1e-3)


def test_each_of_a_batch_is_refined_by_itself(warm: ModelCache, shipped: Checkpoint):
    pictures = torch.cat([drawn("ink"), drawn("sunset")])
    condition, _ = start(warm, shipped, "rose", "ink")
    both = encode_image(warm, shipped, pictures)
    together = refine(warm, shipped, condition, both, num_steps=3)
    assert together.conditioning.tokens.shape[0] == together.conditioning.mask.shape[0] == 2
    for number in range(2):
        single = encode_image(warm, shipped, pictures[number : number + 1])
        alone = refine(warm, shipped, condition, single, num_steps=3).conditioning.tokens
        # A batch adds up in another order, and where a ReLU stands at zero that turns a slope a little.
        apart = (together.conditioning.tokens[number] - alone[0]).norm()
        assert apart < 0.1 * (alone[0] - condition.tokens[0]).norm()


def bowl(centre: torch.Tensor) -> Callable[[torch.Tensor], _Point]:
    """A loss whose one minimum is known."""

    def at(tokens: torch.Tensor) -> _Point:
        loss = (tokens - centre).square().sum(dim=(1, 2))
        return _Point(loss, 1 - loss, torch.zeros(len(tokens), 3, 8, 8))

    return at


def test_a_known_minimum_is_found_or_approached_as_far_as_the_ball_goes():
    start = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    aim = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))
    aim = aim * (start.norm(dim=(1, 2)) / aim.norm(dim=(1, 2)))[:, None, None]
    for share, expected in ((0.3, 0.3), (0.9, 0.5)):
        best, losses, _, done = _descend(bowl(start + share * aim), start, 0.5, 60, math.inf, None)
        assert done == 60 and losses[-1] < 0.6 * losses[0]
        assert torch.allclose(best, start + expected * aim, atol=0.05)


def test_the_best_point_of_each_entry_is_kept():
    start = torch.ones(2, 4, 3)
    centre = torch.stack([start[0] + 1e-3, start[1] + 0.2])
    best, losses, _, _ = _descend(bowl(centre), start, 0.5, 2, math.inf, None)
    assert torch.equal(best[0], start[0]), "every stride went beyond"
    assert (best[1] - centre[1]).norm() < (start[1] - centre[1]).norm() and len(losses) == 3


def test_the_time_is_kept_and_told(warm: ModelCache, shipped: Checkpoint):
    condition, features = start(warm, shipped, "rose", "ink")
    began = time.perf_counter()
    found = refine(warm, shipped, condition, features, num_steps=500, seconds=0.0)
    assert time.perf_counter() - began < 30 and len(found.losses) == 2
    assert any("refined 1 of 500 steps" in notice for notice in found.conditioning.notices)


def test_progress_and_an_interrupt_within_a_step(warm: ModelCache, shipped: Checkpoint):
    condition, features = start(warm, shipped, "rose", "ink")
    told = []

    def stop(step: int, total: int, loss: float, preview) -> None:
        picture = preview()
        told.append((step, total, tuple(picture.shape), 0 <= picture.amin() <= picture.amax() <= 1, loss > 0))
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refine(warm, shipped, condition, features, on_step=stop)
    side = shipped.family.native_size
    assert told == [(1, 20, (3, side, side), True, True), (2, 20, (3, side, side), True, True)]
    assert not any(entry.pins for entry in warm.stats().entries)


def test_what_does_not_fit_is_refused_by_name(warm: ModelCache, shipped: Checkpoint, tmp_path: Path):
    condition, features = start(warm, shipped, "rose", "ink")
    for name, value in (("radius", 2.1), ("radius", -0.1), ("num_steps", 0), ("num_steps", 501), ("seconds", -1.0)):
        with pytest.raises(ValueError, match=f"{name.removeprefix('num_')} must be .* got {value}"):
            refine(warm, shipped, condition, features, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="radius must be 0 to 2, got nan"):
        refine(warm, shipped, condition, features, radius=math.nan)
    with pytest.raises(ValueError, match=r"pooler_output of duet-mini.*hidden_states\[1\]"):
        refine(warm, shipped, condition, encode_image(warm, shipped, drawn("ink"), layer=1))
    with pytest.raises(ValueError, match=r"expected pooler_output of duet-mini.*efficientnet-lite0"):
        refine(warm, shipped, condition, encode_image(warm, shipped, drawn("ink"), encoder="efficientnet-lite0"))
    other = open_checkpoint(save_stable_diffusion(tmp_path / "tiny-sd"))
    with pytest.raises(ValueError, match=r"fusion network and an image encoder.*tiny-sd is none"):
        refine(warm, other, condition, features)
    foreign = fuse(warm, other, encode_prompt(warm, other, "a b"), None)
    with pytest.raises(ValueError, match=r"expected a condition of duet-mini/fusion.*tiny-sd"):
        refine(warm, shipped, foreign, features)
    three = encode_image(warm, shipped, torch.cat([drawn("ink")] * 3))
    two = replace(condition, tokens=condition.tokens.repeat(2, 1, 1), mask=condition.mask.repeat(2, 1))
    with pytest.raises(ValueError, match="2 conditions and 3 pictures"):
        refine(warm, shipped, two, three)
    with pytest.raises(FloatingPointError, match="no number"):
        refine(warm, shipped, replace(condition, tokens=condition.tokens * math.nan), features)


def test_a_curve_is_drawn_from_high_left_to_low_right():
    curve = draw_curve([1.0, 0.5, 0.1])
    assert curve.shape == (1, 3, 120, 320)
    red = ((curve[0, 0] > 0.6) & (curve[0, 1] < 0.4)).float()
    rows = [red[:, column].argmax().item() for column in (10, 160, 310)]
    assert rows[0] < rows[1] < rows[2] and red[:, 10].any() and red[:, 310].any()
    assert draw_curve([0.0]).shape == curve.shape
    with pytest.raises(ValueError, match="one number or more"):
        draw_curve([1.0, math.nan])
