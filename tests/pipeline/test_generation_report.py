"""What the report of a run says of time, models, memory and loss."""

import math
from dataclasses import replace
from mmap import PAGESIZE, mmap
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoints import Checkpoint, open_checkpoint
from pipeline.generation import generate
from pipeline.model_cache import ModelCache
from pipeline.speed_plan import BALANCED, SpeedPlan

from .family_folders import save_family
from .test_speed_plan import SIZE, condition, draw


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(save_family("sd15", tmp_path_factory.mktemp("families") / "sd15"))


def test_the_report_says_what_was_used(cache: ModelCache, sd15: Checkpoint):
    checkpoint = sd15
    words = condition(cache, checkpoint)
    first, second = (generate(cache, checkpoint, words, seed=1, num_inference_steps=2, **SIZE).report for _ in range(2))
    assert (first.plan, first.dtype, first.device, first.retries, first.psnr) == ("exact", "float32", "cpu", (), None)
    assert (first.cache_misses, second.cache_misses) == (2, 0) and second.cache_hits == 3
    held = {entry.key.component: entry.bytes for entry in cache.stats().entries}
    assert first.model_bytes == second.model_bytes == held["unet"] + held["vae"]
    assert list(first.milliseconds) == ["generation", "decode"] and all(
        spent > 0 for spent in first.milliseconds.values()
    )
    assert first.peak_bytes is None or first.peak_bytes >= 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process's largest size")
def test_peak_memory_is_what_the_process_grew_by(cache: ModelCache, sd15: Checkpoint):
    small, large = 2**25, 2**28
    peaks = []
    for size in (small, large):

        def take(*_: Any, size: int = size) -> None:
            # Pages of its own: a tensor may be laid into what earlier tests gave back to the allocator.
            with mmap(-1, size) as block:
                block[::PAGESIZE] = bytes(size // PAGESIZE)

        peaks.append(draw(cache, sd15, num_inference_steps=1, on_step=take).report.peak_bytes)
    if None in peaks:
        pytest.skip("this kernel does not begin its maximum anew")
    assert peaks[1] - peaks[0] == pytest.approx(large - small, rel=0.2)


def test_the_loss_is_measured_against_the_exact_run(warm: ModelCache, shipped: Checkpoint):
    quick = draw(warm, shipped, replace(BALANCED, measure_loss=True), num_inference_steps=9)
    exact = draw(warm, shipped, num_inference_steps=9)
    one, other = (1 + side.alpha.double() * (side.pixels.double() - 1) for side in (quick, exact))
    # Above 100 dB rounding to float32, in which the report counts, is some thousandths of the error.
    assert quick.report.psnr == pytest.approx(-10 * math.log10((one - other).square().mean()), abs=0.02)
    assert quick.report.ssim is not None and 0.5 < quick.report.ssim < 1
    assert "comparison" in quick.milliseconds and (quick.report.steps_computed, quick.report.steps_skipped) == (3, 6)


def test_where_there_is_no_shortcut_there_is_no_loss(warm: ModelCache, shipped: Checkpoint):
    made = draw(warm, shipped, SpeedPlan("custom", num_inference_steps=1, measure_loss=True))
    assert made.report.psnr is None and "comparison" not in made.milliseconds
    assert "no loss to measure, since the plan takes no shortcut" in made.notices
