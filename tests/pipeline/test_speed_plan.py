"""What a speed plan does to a run, what it refuses, and what the run's report says."""

import gc
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from pipeline.acceleration import cpu_convolutions
from pipeline.checkpoints import Checkpoint, open_checkpoint
from pipeline.conditioning import FusedConditioning, Pictures
from pipeline.fusion import fuse
from pipeline.generation import generate
from pipeline.model_cache import ModelCache
from pipeline.speed_plan import BALANCED, EXACT, LIGHTNING, PRESETS, SpeedPlan
from pipeline.text_encoder import encode_prompt

from .family_folders import save_family

SIZE: dict[str, Any] = {"width": 32, "height": 32}
UNET, STEP = SpeedPlan(name="custom", unet_cache=3), SpeedPlan(name="custom", step_cache=1.0)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    root = tmp_path_factory.mktemp("families")
    opened: dict[str, Checkpoint] = {}

    def find(name: str) -> Checkpoint:
        if name not in opened:
            opened[name] = open_checkpoint(save_family(name, root / name))
        return opened[name]

    return find


def condition(cache: ModelCache, checkpoint: Checkpoint) -> FusedConditioning:
    return fuse(cache, checkpoint, encode_prompt(cache, checkpoint, "a red rose", "blue"), None)


def draw(cache: ModelCache, checkpoint: Checkpoint, plan: SpeedPlan | None = None, **options: Any) -> Pictures:
    chosen = {} if plan is None else {"plan": plan}
    return generate(cache, checkpoint, condition(cache, checkpoint), **{"seed": 3, **SIZE, **chosen, **options})


@pytest.mark.parametrize(
    ("dials", "said"),
    [
        ({"num_inference_steps": 0}, "steps of a speed plan must be 1 to 1000, got 0"),
        ({"num_inference_steps": 1001}, "must be 1 to 1000, got 1001"),
        ({"guidance_scale": -0.1}, "guidance scale of a speed plan must be 0 to 100, got -0.1"),
        ({"guidance_scale": math.nan}, "must be 0 to 100, got nan"),
        ({"shift": 0.0}, "shift of a speed plan must be 0.01 to 100, got 0"),
        ({"shift": math.inf}, "must be 0.01 to 100, got inf"),
        ({"step_cache": 1.01}, "step cache of a speed plan must be 0 to 1, got 1.01"),
        ({"unet_cache": 0}, "UNet cache of a speed plan must be 1 to 100, got 0"),
        ({"scheduler": "fastest"}, "scheduler of a speed plan must be one of checkpoint, .*; got 'fastest'"),
        ({"compile": "x" * 999}, "compile of a speed plan must be one of off, regions, cuda graphs; got 'x{80}'"),
        ({"quantisation": "int4"}, "quantisation of a speed plan must be one of off, int8"),
        ({"dtype": "float64"}, "dtype of a speed plan must be one of automatic, fastest, float32"),
        ({"memory_format": ""}, "memory format of a speed plan must be one of contiguous, channels_last; got ''"),
        ({"where_it_fits": ("steps",)}, "left out where it does not fit of a speed plan must be one of step_cache"),
        ({"step_cache": 0.2, "unet_cache": 2}, "a step cache or a UNet cache.*got both, 0.2 and every 2 steps"),
        ({"quantisation": "int8", "memory_format": "channels_last"}, "got both, int8 and channels_last"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(dials: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        SpeedPlan(**dials)


def test_the_exact_plan_of_any_other_keeps_the_walk_and_drops_the_shortcuts():
    dials: dict[str, Any] = {"num_inference_steps": 7, "guidance_scale": 2.0, "scheduler": "euler", "shift": None}
    quick = SpeedPlan("custom", **dials, unet_cache=2, dtype="float16", measure_loss=True)
    assert quick.exact() == SpeedPlan("exact", **dials)
    assert quick.takes_shortcuts and not replace(quick.exact(), name="custom", measure_loss=True).takes_shortcuts
    assert [plan.takes_shortcuts for plan in PRESETS.values()] == [True, True, False]


@pytest.mark.parametrize("plan", [UNET, replace(STEP, step_cache=0.5)], ids=["UNet cache", "step cache"])
def test_steps_are_skipped_and_counted(warm: ModelCache, shipped: Checkpoint, plan: SpeedPlan):
    exact = draw(warm, shipped, num_inference_steps=9)
    quick = draw(warm, shipped, plan, num_inference_steps=9)
    assert (exact.report.steps_computed, exact.report.steps_skipped) == (9, 0)
    assert quick.report.steps_computed + quick.report.steps_skipped == 9
    assert quick.report.steps_skipped > 0 and quick.report.blocks_skipped > 0
    assert not torch.equal(quick.pixels, exact.pixels)
    assert torch.equal(draw(warm, shipped, num_inference_steps=9).pixels, exact.pixels), "nothing of it is left"


def test_the_plans_numbers_go_before_the_callers(warm: ModelCache, family: Callable[[str], Checkpoint]):
    plan = SpeedPlan("custom", num_inference_steps=3, guidance_scale=3.0, scheduler="euler")
    steps: list[tuple[int, int]] = []
    planned = draw(
        warm, family("sd15"), plan, num_inference_steps=8, on_step=lambda step, total, _: steps.append((step, total))
    )
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert planned.report.steps_computed == 6, "both sides of guidance"
    by_hand = draw(warm, family("sd15"), SpeedPlan(scheduler="euler"), num_inference_steps=3, guidance_scale=3.0)
    assert torch.equal(planned.pixels, by_hand.pixels)
    own = draw(warm, family("sd15"), num_inference_steps=3, guidance_scale=3.0)
    assert not torch.equal(planned.pixels, own.pixels)


@pytest.mark.parametrize(
    ("name", "plan", "said"),
    [
        ("flux_dev", SpeedPlan(scheduler="lcm"), "flux_dev: expected 'flow match', since FLUX.1 is a model of flow"),
        ("flux_dev", UNET, "UNet"),
        ("flux_dev", SpeedPlan(memory_format="channels_last"), "expected a UNet .* got the transformer of flux_dev"),
        ("sd15", SpeedPlan(shift=3.0), "sd15: expected no shift"),
        ("sd15", replace(UNET, num_inference_steps=4), "expected 5 steps or more for a UNet cache, .* got 4"),
        ("sd15", replace(STEP, num_inference_steps=2), "expected 3 steps or more for a step cache.*got 2"),
        ("sd15", SpeedPlan(compile="cuda graphs"), "expected an NVIDIA GPU for CUDA graphs, got cpu"),
        ("sd15", SpeedPlan(quantisation="float8"), "expected an NVIDIA GPU of capability 8.9"),
    ],
)
def test_a_dial_that_does_not_fit_the_model_is_refused(
    warm: ModelCache, family: Callable[[str], Checkpoint], name: str, plan: SpeedPlan, said: str
):
    with pytest.raises(ValueError, match=said):
        draw(warm, family(name), plan, num_inference_steps=6)
    assert not any(entry.pins for entry in warm.stats().entries)


def test_the_small_model_takes_no_plan_of_stable_diffusion(warm: ModelCache, shipped: Checkpoint):
    with pytest.raises(ValueError, match="duet-mini: expected its own scheduler"):
        draw(warm, shipped, SpeedPlan(scheduler="dpm++ 2m", guidance_scale=7.5, num_inference_steps=20))


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
@pytest.mark.parametrize("name", ["sd15", "sd_turbo", "lcm", "sdxl", "flux_dev", "sana_sprint"])
def test_a_preset_fits_every_family(
    warm: ModelCache, family: Callable[[str], Checkpoint], name: str, preset: SpeedPlan
):
    made = draw(warm, family(name), preset, num_inference_steps=2, guidance_scale=2.0)
    assert made.pixels.isfinite().all() and made.report.plan == preset.name
    assert (preset is BALANCED) == any("left out: expected" in notice for notice in made.notices), made.notices


def test_a_preset_takes_the_cache_that_fits(warm: ModelCache, shipped: Checkpoint, family: Callable[[str], Checkpoint]):
    for checkpoint, cache in ((shipped, "UNet cache, every 3 steps"), (family("flux_dev"), "step cache, up to 0.1")):
        made = draw(warm, checkpoint, BALANCED, num_inference_steps=6)
        assert made.report.shortcuts == (cache,)
        assert not any("left out" in notice for notice in made.notices)


@pytest.mark.parametrize("scheduler", ["euler", "euler trailing", "dpm++ 2m", "ddim", "lcm", "tcd"])
def test_a_picture_is_drawn_from_by_any_scheduler(
    warm: ModelCache, family: Callable[[str], Checkpoint], scheduler: str
):
    plan = SpeedPlan("custom", num_inference_steps=12, scheduler=scheduler, unet_cache=2)
    source = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 32, 32)
    mask[..., 16:] = 1
    made = draw(warm, family("sd15"), plan, image=source, mask=mask, strength=0.5)
    assert (made.report.steps_computed, made.report.steps_skipped) == (3, 3), "half of the twelve"
    assert torch.equal(made.pixels[..., :16], source[..., :16])


@pytest.mark.parametrize("plan", [UNET, STEP], ids=["UNet cache", "step cache"])
def test_each_picture_of_a_batch_equals_its_own_run(
    warm: ModelCache, family: Callable[[str], Checkpoint], plan: SpeedPlan
):
    options: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 3.0}
    batch = draw(warm, family("sd15"), plan, batch_size=2, seed=[8, 5], **options)
    alone = draw(warm, family("sd15"), plan, seed=5, **options)
    assert torch.allclose(batch.pixels[1], alone.pixels[0], atol=1e-4)


def test_sigmas_take_a_cache_but_no_other_walk(warm: ModelCache, family: Callable[[str], Checkpoint]):
    sigmas = [14.6, 8.0, 4.0, 2.0, 1.0, 0.4, 0.0]
    made = draw(warm, family("sd15"), UNET, sigmas=sigmas)
    assert (made.report.steps_computed, made.report.steps_skipped) == (2, 4)
    for plan, said in (
        (SpeedPlan(scheduler="euler", num_inference_steps=4), "steps 4, scheduler euler"),
        (BALANCED, "scheduler automatic"),
    ):
        with pytest.raises(ValueError, match=f"expected 7 sigmas .* got both: {said}"):
            draw(warm, family("sd15"), plan, sigmas=sigmas)


@pytest.mark.parametrize("name", ["sd15", "flux_dev"])
def test_an_interrupt_in_the_middle_leaves_nothing(warm: ModelCache, family: Callable[[str], Checkpoint], name: str):
    plan = STEP if name == "flux_dev" else UNET
    before = draw(warm, family(name), plan, num_inference_steps=6)

    def stop(step: int, *_: Any) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(warm, family(name), plan, num_inference_steps=6, on_step=stop)
    assert not any(entry.pins for entry in warm.stats().entries)
    assert torch.equal(draw(warm, family(name), plan, num_inference_steps=6).pixels, before.pixels)


@pytest.mark.parametrize(
    "plan", [UNET, STEP, SpeedPlan(compile="regions")], ids=["UNet cache", "step cache", "compile"]
)
def test_what_lies_on_a_model_does_not_keep_its_weights(
    cache: ModelCache, family: Callable[[str], Checkpoint], plan: SpeedPlan, monkeypatch: pytest.MonkeyPatch
):
    checkpoint = family("sd15")
    summed: list[weakref.ref[torch.Tensor]] = []
    monkeypatch.setattr(cpu_convolutions, "_FEWEST_DOUBLED", 1)
    monkeypatch.setattr(cpu_convolutions, "_FEWEST_PIXELS", 1)

    def quarters(weight: torch.Tensor) -> list[torch.Tensor]:
        found = added_up(weight)
        summed.extend(map(weakref.ref, found))
        return found

    added_up = cpu_convolutions.quarters
    monkeypatch.setattr(cpu_convolutions, "quarters", quarters)
    gc.collect()
    gc.disable()  # a circle would only be found by it
    try:
        draw(cache, checkpoint, plan, num_inference_steps=6)
        with checkpoint.use(cache, "unet") as unet:
            weights = [weakref.ref(parameter) for parameter in unet.parameters()]
        del unet
        cache.unload()
        assert [weight for weight in (*weights, *summed) if weight() is not None] == []
        assert summed or plan.compile != "off"
    finally:
        gc.enable()


def test_a_tiny_decoder_makes_the_result_or_the_previews(
    warm: ModelCache, family: Callable[[str], Checkpoint], tmp_path: Path
):
    torch.manual_seed(0)
    folder = tmp_path / "tiny"
    diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_decoder_blocks=(1, 1, 1, 1)
    ).save_pretrained(str(folder))
    looks: list[torch.Tensor] = []

    def look(_: int, __: int, preview: Callable[[], torch.Tensor]) -> None:
        looks.append(preview())

    plain, shown, made = (
        draw(warm, family("sd15"), plan, num_inference_steps=1, on_step=look)
        for plan in (EXACT, SpeedPlan(preview=folder), SpeedPlan(decoder=folder))
    )
    assert torch.equal(plain.pixels, shown.pixels) and plain.report.shortcuts == shown.report.shortcuts == ()
    assert not torch.equal(plain.pixels, made.pixels) and made.report.shortcuts == ("decoder tiny",)
    steps = len(looks) // 3
    assert not torch.equal(looks[0], looks[steps]) and torch.equal(looks[steps], looks[2 * steps])
    with pytest.raises(ValueError, match="tiny decodes latents of 4 channels: expected"):
        draw(warm, family("sd3"), SpeedPlan(decoder=folder), num_inference_steps=1)


@pytest.mark.parametrize(
    ("plan", "dtype"),
    [
        (SpeedPlan(memory_format="channels_last"), "float32"),
        (SpeedPlan(quantisation="int8"), "int8 and float32"),
        (SpeedPlan(dtype="bfloat16"), "bfloat16"),
    ],
)
def test_other_weights_are_entries_of_their_own(
    cache: ModelCache, family: Callable[[str], Checkpoint], plan: SpeedPlan, dtype: str
):
    if plan.quantisation != "off":
        pytest.importorskip("torchao")
    exact = draw(cache, family("sd15"), num_inference_steps=1)
    held = len(cache.stats().entries)
    made = draw(cache, family("sd15"), plan, num_inference_steps=1)
    assert made.report.dtype == dtype and len(cache.stats().entries) > held
    assert torch.allclose(made.pixels, exact.pixels, atol=0.05)
    assert torch.equal(draw(cache, family("sd15"), num_inference_steps=1).pixels, exact.pixels)


def test_compiled_blocks_give_the_same_picture(warm: ModelCache, family: Callable[[str], Checkpoint]):
    exact = draw(warm, family("sd15"), num_inference_steps=2)
    made = draw(warm, family("sd15"), SpeedPlan(compile="regions"), num_inference_steps=2)
    assert torch.allclose(made.pixels, exact.pixels, atol=1e-4)
    assert made.report.steps_computed == exact.report.steps_computed
    assert "compiled, regions" in made.report.shortcuts or any("not compiled" in notice for notice in made.notices)
    assert LIGHTNING.compile == "off", "a first run that takes minutes is nothing to choose for others"
