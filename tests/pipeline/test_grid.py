"""Many pictures as one job: each is the picture of the single stages, and no more is computed than is needed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import ImageFont
from torch import Tensor

from pipeline import contact_sheet as sheets
from pipeline import grid as grids
from pipeline.checkpoints import Checkpoint, open_checkpoint
from pipeline.conditioning import Pictures
from pipeline.contact_sheet import contact_sheet
from pipeline.fusion import fuse
from pipeline.generation import generate
from pipeline.grid import draw_grid, draw_variants, read_prompts, read_strengths
from pipeline.image_encoder import encode_image
from pipeline.model_cache import ModelCache
from pipeline.store.embedding_store import EmbeddingStore
from pipeline.text_encoder import encode_prompt

from .folders import save_stable_diffusion

SMALL: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 2}
PROMPTS = ["a red rose", "a blue car", "\u73ab\u7470"]


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(save_stable_diffusion(tmp_path_factory.mktemp("sd") / "tiny-sd"))


def picture() -> Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def shown(pictures: Pictures) -> Tensor:
    """Over white, as the nodes give them: where nothing is opaque the colour below is no part of the picture."""
    return 1 + pictures.alpha * (pictures.pixels - 1)


def test_each_variant_is_its_own_single_run(warm: ModelCache, shipped: Checkpoint):
    condition = fuse(warm, shipped, encode_prompt(warm, shipped, PROMPTS[0]), None)
    seeds = [5, 2**64 - 1, 0, 77, 5]
    singles = [generate(warm, shipped, condition, seed=seed, **SMALL) for seed in seeds]
    expected = torch.cat([shown(single) for single in singles])
    alone = draw_variants(warm, shipped, condition, seeds, at_once=1, **SMALL)
    assert torch.equal(shown(alone), expected), "bit for bit, one at a time"
    for at_once in (2, 5, 64):
        together = draw_variants(warm, shipped, condition, seeds, at_once=at_once, **SMALL)
        assert together.latents is not None
        torch.testing.assert_close(shown(together), expected, atol=1e-5, rtol=0)
        assert together.alpha.shape == (5, 1, 64, 64) and together.latents.shape[0] == 5
        assert together.report.steps_computed == 2 * -(-5 // at_once)
        assert set(together.milliseconds) == {"generation", "decode"}
    assert not torch.allclose(expected[0], expected[1], atol=1e-2)
    assert torch.equal(expected[0], expected[4])


def test_variants_of_stable_diffusion_with_guidance(warm: ModelCache, stable_diffusion: Checkpoint):
    words = encode_prompt(warm, stable_diffusion, "a rose", "a car")
    condition = fuse(warm, stable_diffusion, words, None)
    settings: dict[str, Any] = {**SMALL, "guidance_scale": 3.0}
    singles = [generate(warm, stable_diffusion, condition, seed=seed, **settings) for seed in (1, 2, 3)]
    together = draw_variants(warm, stable_diffusion, condition, [1, 2, 3], at_once=2, **settings)
    torch.testing.assert_close(together.pixels, torch.cat([one.pixels for one in singles]), atol=1e-5, rtol=0)


def test_variants_of_a_picture(warm: ModelCache, stable_diffusion: Checkpoint):
    condition = fuse(warm, stable_diffusion, encode_prompt(warm, stable_diffusion, "a rose"), None)
    settings: dict[str, Any] = {**SMALL, "image": picture(), "strength": 0.5}
    singles = [generate(warm, stable_diffusion, condition, seed=seed, **settings) for seed in (1, 2, 3)]
    together = draw_variants(warm, stable_diffusion, condition, [1, 2, 3], at_once=2, **settings)
    torch.testing.assert_close(together.pixels, torch.cat([one.pixels for one in singles]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("at_once", [1, 4, 64])
def test_each_cell_is_what_the_single_stages_give(warm: ModelCache, shipped: Checkpoint, at_once: int):
    seeds, strengths = [3, 4], [0.0, 0.4, 1.0]
    grid = draw_grid(warm, shipped, PROMPTS, seeds, strengths, image=picture(), at_once=at_once, **SMALL)
    features = encode_image(warm, shipped, picture())
    assert len(grid.cells) == 18 and (grid.columns, len(grid.row_labels)) == (3, 6)
    assert [(cell.prompt, cell.seed, cell.strength) for cell in grid.cells[:4]] == [
        (PROMPTS[0], 3, 0.0),
        (PROMPTS[0], 3, 0.4),
        (PROMPTS[0], 3, 1.0),
        (PROMPTS[0], 4, 0.0),
    ]
    assert grid.row_labels[:3] == ["seed 3: a red rose", "seed 4: a red rose", "seed 3: a blue car"]
    assert grid.column_labels == ["0", "0.4", "1"]
    for cell, drawn in zip(grid.cells, shown(grid.pictures), strict=True):
        assert cell.strength is not None
        words = encode_prompt(warm, shipped, cell.prompt)
        condition = fuse(warm, shipped, words, features, strength=cell.strength)
        single = generate(warm, shipped, condition, seed=cell.seed, **SMALL)
        torch.testing.assert_close(drawn, shown(single)[0], atol=1e-5, rtol=0)


def test_prompts_of_other_lengths_are_drawn_apart(warm: ModelCache, stable_diffusion: Checkpoint):
    """In a family whose condition has a token for each word: two windows do not fit beside one."""
    prompts = ["a rose", "a rose and " * 40, "a car"]
    grid = draw_grid(warm, stable_diffusion, prompts, [1], **SMALL)
    assert (grid.columns, grid.column_labels, grid.row_labels) == (1, ["seed 1"], prompts)
    for cell, drawn in zip(grid.cells, grid.pictures.pixels, strict=True):
        condition = fuse(warm, stable_diffusion, encode_prompt(warm, stable_diffusion, cell.prompt), None)
        single = generate(warm, stable_diffusion, condition, seed=1, **SMALL)
        torch.testing.assert_close(drawn, single.pixels[0], atol=1e-5, rtol=0)
    assert any("windows" in notice for notice in grid.pictures.notices)


def test_each_prompt_and_the_picture_are_read_once(warm: ModelCache, shipped: Checkpoint, monkeypatch):
    calls = {"encode_prompt": 0, "encode_image": 0, "fuse": 0, "planned": 0}
    for name in calls:
        real = getattr(grids, name)

        def counted(*arguments, _name=name, _real=real, **options):
            calls[_name] += 1
            return _real(*arguments, **options)

        monkeypatch.setattr(grids, name, counted)
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    draw_grid(warm, shipped, prompts, [1, 2], [0.2, 0.8], image=picture(), at_once=5, **SMALL)
    assert calls == {"encode_prompt": 2, "encode_image": 1, "fuse": 4, "planned": 3}


def test_what_was_read_before_comes_from_the_store(warm: ModelCache, shipped: Checkpoint, tmp_path: Path):
    store = EmbeddingStore(tmp_path, 2**24)
    options: dict[str, Any] = {"image": picture(), "store": store, **SMALL}
    first = draw_grid(warm, shipped, PROMPTS, [1], [0.5], **options)
    encoders = {shipped.key(name) for name in ("text_encoder", "image_encoder")}
    cold = ModelCache(warm.residency, budget_bytes=2**32)
    used = []
    real = cold.use

    def use(key, build):
        used.append(key)
        return real(key, build)

    cold.use = use  # pyright: ignore[reportAttributeAccessIssue]
    again = draw_grid(cold, shipped, PROMPTS, [1], [0.5], **options)
    assert used and not encoders & set(used)
    assert torch.equal(first.pictures.pixels, again.pictures.pixels)


def test_progress_is_over_the_whole_and_stops_within_a_step(warm: ModelCache, shipped: Checkpoint):
    steps = []
    draw_grid(
        warm, shipped, PROMPTS, [1, 2], at_once=4, on_step=lambda step, total, _: steps.append((step, total)), **SMALL
    )
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]

    def stop(step: int, total: int, preview: object) -> None:
        steps.append((step, total))
        if step == 3:
            raise InterruptedError

    steps.clear()
    with pytest.raises(InterruptedError):
        draw_grid(warm, shipped, PROMPTS, [1, 2], at_once=2, on_step=stop, **SMALL)
    assert steps == [(1, 6), (2, 6), (3, 6)]
    assert not any(entry.pins for entry in warm.stats().entries)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "at least one prompt, got none"),
        ({"strengths": []}, "at least one strength for the picture, got none"),
        ({"strengths": [0.5, 1.5]}, r"strength must be 0 .* got 1\.5"),
        ({"seeds": []}, "expected 1 to 1024 pictures in one job .* got 0"),
        ({"seeds": range(10_000)}, "expected 1 to 1024 pictures in one job .* got 10,000"),
        ({"seeds": range(200), "width": 2048, "height": 2048}, "at most 268,435,456 pixels in one job, got 200"),
        ({"at_once": 0}, "1 to 64 pictures at once, got 0"),
        ({"at_once": 65}, "1 to 64 pictures at once, got 65"),
        ({"image": torch.rand(2, 3, 8, 8)}, "one picture for the whole grid, got 2"),
        ({"image": torch.full((1, 3, 8, 8), torch.nan)}, "NaN or infinity"),
    ],
)
def test_bad_input_is_refused_before_anything_is_drawn(warm: ModelCache, shipped: Checkpoint, changes, message):
    def never(*_: object) -> None:
        raise AssertionError("drawn")

    given: dict[str, Any] = {
        "prompts": ["a rose"],
        "seeds": [1],
        "strengths": [0.5],
        "image": picture(),
        **SMALL,
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        draw_grid(warm, shipped, **given, on_step=never)


def test_a_batch_of_conditions_is_refused(warm: ModelCache, shipped: Checkpoint):
    features = encode_image(warm, shipped, torch.rand(2, 3, 64, 64))
    with pytest.raises(ValueError, match="expected one condition, got a batch of 2"):
        draw_variants(warm, shipped, fuse(warm, shipped, None, features), [1], **SMALL)


@pytest.mark.parametrize("count", [0, 2])
def test_a_batch_of_pictures_to_start_from_is_refused(warm: ModelCache, stable_diffusion: Checkpoint, count: int):
    """As many as are drawn at once would each get one, whichever seed that is."""
    condition = fuse(warm, stable_diffusion, encode_prompt(warm, stable_diffusion, "a rose"), None)
    settings: dict[str, Any] = {**SMALL, "image": torch.rand(count, 3, 64, 64), "strength": 0.5}
    with pytest.raises(ValueError, match=f"expected one picture to start from, got a batch of {count}"):
        draw_variants(warm, stable_diffusion, condition, [1, 2, 3, 4], at_once=2, **settings)


def test_lines_and_numbers_are_read():
    assert read_prompts(" a rose \n\n\t\n\u73ab\u7470\r\nb") == ["a rose", "\u73ab\u7470", "b"]
    assert read_strengths("0, 0.5;1\n.25 0.5") == [0.0, 0.5, 1.0, 0.25]
    assert read_strengths("0\uff0c1\u3001 0.1\uff1b") == [0.0, 1.0, 0.1]
    assert read_strengths("  ") == []
    for wrong in ("a", "0.5, half", "2", "-0.1", "nan", "inf", "0.5.5", "1e9"):
        with pytest.raises(ValueError, match="expected strengths such as"):
            read_strengths(wrong)


# --- the sheet ---


def squares(count: int, side: int = 32) -> Tensor:
    return torch.linspace(0, 0.8, count)[:, None, None, None].expand(count, 3, side, side)


def test_pictures_lie_row_by_row(tmp_path: Path):
    sheet = contact_sheet(squares(5), 3)
    _, _, height, width = sheet.pixels.shape
    assert (height, width, sheet.legend) == (8 + 2 * 40, 8 + 3 * 40, ())
    for number, value in enumerate(torch.linspace(0, 0.8, 5)):
        row, column = divmod(number, 3)
        middle = sheet.pixels[0, :, 8 + 40 * row + 16, 8 + 40 * column + 16]
        assert torch.allclose(middle, value.expand(3), atol=1 / 255)
    assert (sheet.pixels[0, :, 40 + 8 + 16, 80 + 8 + 16] == 1).all(), "nothing where there is no sixth"


def test_labels_are_written_and_what_does_not_fit_is_in_the_legend():
    plain = contact_sheet(squares(4), 2)
    long = "a rose " * 40
    sheet = contact_sheet(squares(4), 2, ["a rose", long], ["0.25", "a strength beyond the cell"])
    assert sheet.legend == (f"row 2: {long}", "column 2: a strength beyond the cell")
    assert sheet.pixels.shape[-1] > plain.pixels.shape[-1] + 100
    left = sheet.pixels[0, 0, :, : sheet.pixels.shape[-1] - plain.pixels.shape[-1]]
    assert (left < 0.5).any(), "something is written there"
    assert sheet.pixels.shape[-1] < plain.pixels.shape[-1] + 260


def test_what_no_font_can_write_is_numbered(monkeypatch):
    rose, nothing = "\u73ab\u7470", "\U000f0000"
    sheet = contact_sheet(squares(2), 1, [nothing, "a rose"])
    assert sheet.legend == (f"row 1: {nothing}",)

    def none(*_: object) -> None:
        raise OSError("cannot open resource")

    monkeypatch.setattr(ImageFont, "truetype", none)
    monkeypatch.setattr(sheets.ImageFont, "load_default", lambda size: REAL_DEFAULT)
    assert contact_sheet(squares(2), 1, [rose, "a rose"]).legend == (f"row 1: {rose}",)


REAL_DEFAULT = ImageFont.load_default(16)


def test_the_sheet_stays_bounded():
    sheet = contact_sheet(torch.rand(1, 3, 4, 4).expand(1024, 3, 4, 4), 1)
    assert sheet.pixels.shape[-2] == 8 + 1024 * 12
    large = contact_sheet(torch.rand(1, 3, 1, 1).expand(100, 3, 600, 500), 50)
    assert max(large.pixels.shape) <= 8192 + 8


def test_labels_must_be_as_many():
    with pytest.raises(ValueError, match="expected 2 row labels, got 1"):
        contact_sheet(squares(4), 2, ["a"])
