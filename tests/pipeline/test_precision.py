"""Which precision a speed plan means on which machine."""

from dataclasses import replace

import pytest
import torch

from pipeline.acceleration import precision as chosen
from pipeline.acceleration.measuring import psnr
from pipeline.checkpoints import Checkpoint, open_checkpoint
from pipeline.conditioning import Pictures
from pipeline.fusion import fuse
from pipeline.generation import generate
from pipeline.model_cache import ModelCache
from pipeline.speed_plan import BALANCED, DTYPES, EXACT, LIGHTNING, SpeedPlan
from pipeline.text_encoder import encode_prompt
from tests.pipeline.family_folders import save_family

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Of a family that is large where its weights are not a test's."""
    return open_checkpoint(save_family("sd15", tmp_path_factory.mktemp("families") / "sd15"))


@pytest.mark.parametrize("tiles", [True, False])
def test_the_fastest_is_half_precision_where_a_cpu_has_tiles_for_it(
    monkeypatch: pytest.MonkeyPatch, large: Checkpoint, shipped: Checkpoint, tiles: bool
):
    monkeypatch.setattr(chosen, "multiplies_by_tiles", lambda: tiles)
    plan = SpeedPlan(dtype="fastest")
    assert chosen.precision(large, plan, CPU) == (torch.bfloat16 if tiles else None)
    assert chosen.precision(large, plan, GPU) is None, "a family knows best what it is meant for on a GPU"
    assert chosen.precision(shipped, plan, CPU) is None, "there it takes longer"
    for name in set(DTYPES) - {"automatic", "fastest"}:
        assert chosen.precision(shipped, SpeedPlan(dtype=name), CPU) == getattr(torch, name)
    assert chosen.precision(large, EXACT, CPU) is None


def test_tiles_are_asked_of_torch():
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    assert chosen.multiplies_by_tiles() == flags.get("amx_bf16", chosen.multiplies_by_tiles())


@pytest.mark.parametrize("tiles", [True, False])
def test_a_preset_draws_by_it_and_says_so(
    monkeypatch: pytest.MonkeyPatch, warm: ModelCache, large: Checkpoint, tiles: bool
):
    monkeypatch.setattr(chosen, "multiplies_by_tiles", lambda: tiles)
    exact = _draw(warm, large, EXACT)
    assert exact.report.dtype == "float32", "who asks for no shortcut gets none"
    made = _draw(warm, large, replace(LIGHTNING, scheduler="checkpoint"))
    assert made.report.dtype == ("bfloat16" if tiles else "float32")
    assert psnr(made.pixels, exact.pixels).mean > 30
    assert tiles or torch.equal(made.pixels, exact.pixels)
    assert BALANCED.dtype == LIGHTNING.dtype and LIGHTNING.exact().dtype == EXACT.dtype


def _draw(cache: ModelCache, checkpoint: Checkpoint, plan: SpeedPlan) -> Pictures:
    words = encode_prompt(cache, checkpoint, "rose")
    return generate(
        cache, checkpoint, fuse(cache, checkpoint, words, None), seed=3, num_inference_steps=4, width=64, height=64,
        plan=plan,
    )  # fmt: skip
