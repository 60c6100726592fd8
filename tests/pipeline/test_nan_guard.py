"""Half precision that overflows: done once more in float32 and told, or the stage is named; never a black picture."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoints import Checkpoint, open_checkpoint
from pipeline.conditioning import FusedConditioning
from pipeline.fusion import fuse
from pipeline.generation import generate
from pipeline.model_cache import ModelCache
from pipeline.speed_plan import SpeedPlan
from pipeline.text_encoder import encode_prompt

from .family_folders import save_family

HALF, FULL = SpeedPlan(name="half", dtype="float16"), SpeedPlan(name="full", dtype="float32")
# PNDM, the scheduler of the folder, takes its second step twice.
FRAME: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 2.0, "width": 32, "height": 32}
ONCE_MORE = "gave values that are no numbers in float16, and was done again in float32"


def spoilt(folder: Path, component: str, factor: float, *layers: str) -> Checkpoint:
    """Stable Diffusion at tiny sizes, with some weights times ``factor``."""
    save_family("sd15", folder)
    path = folder / component / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for layer in layers:
        tensors[layer] = tensors[layer] * factor
    save_file(tensors, path, metadata={"format": "pt"})
    return open_checkpoint(folder)


def condition(cache: ModelCache, checkpoint: Checkpoint) -> FusedConditioning:
    return fuse(cache, checkpoint, encode_prompt(cache, checkpoint, "a red rose", "blue"), None)


def test_a_denoiser_that_overflows_gives_the_picture_of_float32(
    cache: ModelCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    checkpoint = spoilt(tmp_path / "loud", "unet", 3e5, "conv_in.weight")
    words = condition(cache, checkpoint)
    steps: list[int] = []
    with caplog.at_level(logging.WARNING):
        half = generate(
            cache,
            checkpoint,
            words,
            seed=4,
            batch_size=2,
            plan=HALF,
            on_step=lambda step, *_: steps.append(step),
            **FRAME,
        )
    full = generate(cache, checkpoint, words, seed=4, batch_size=2, plan=FULL, **FRAME)
    assert half.latents is not None and full.latents is not None
    assert torch.equal(half.latents, full.latents), "the same seeds, the same steps"
    assert half.pixels.isfinite().all() and half.pixels.std() > 0
    assert half.report.retries == ("denoising",) and half.report.dtype == "float32"
    assert f"denoising {ONCE_MORE}" in half.notices
    assert steps == [1, 2, 3] * 2 and half.report.steps_computed == 2 * full.report.steps_computed
    assert "loud: denoising gave values that are no numbers in float16; once more in float32" in caplog.text
    assert full.report.retries == () and full.notices == ()
    held = {(entry.key.component, entry.key.dtype) for entry in cache.stats().entries}
    assert {("unet", torch.float16), ("unet", torch.float32)} <= held, "each precision is an entry of its own"
    assert not any(entry.pins for entry in cache.stats().entries)


@pytest.mark.parametrize(
    "layers",
    [
        ("decoder.conv_in.weight",),  # which the next norm makes NaN of
        ("decoder.conv_out.weight", "decoder.conv_out.bias"),  # infinite: clamped, it would pass for black and white
    ],
    ids=["NaN", "infinite"],
)
def test_a_decoder_that_overflows_is_done_again(cache: ModelCache, tmp_path: Path, layers: tuple[str, ...]):
    checkpoint = spoilt(tmp_path / "bright", "vae", 3e5, *layers)
    words = condition(cache, checkpoint)
    half = generate(cache, checkpoint, words, seed=4, plan=HALF, **FRAME)
    assert half.report.retries == ("decoding",) and half.report.dtype == "float16"
    assert f"decoding {ONCE_MORE}" in half.notices
    assert half.pixels.isfinite().all()
    assert half.latents is not None and half.latents.isfinite().all()


def test_half_precision_that_does_not_overflow_is_left_alone(cache: ModelCache, tmp_path: Path):
    checkpoint = open_checkpoint(save_family("sd15", tmp_path / "calm"))
    half = generate(cache, checkpoint, condition(cache, checkpoint), seed=4, plan=HALF, **FRAME)
    assert half.report.retries == () and half.notices == () and half.report.dtype == "float16"
    assert {entry.key.dtype for entry in cache.stats().entries if entry.key.component in ("unet", "vae")} == {
        torch.float16
    }


@pytest.mark.parametrize(
    ("component", "layer", "stage"),
    [("unet", "conv_in.weight", "denoising"), ("vae", "decoder.conv_in.weight", "decoding")],
)
@pytest.mark.parametrize(
    ("plan", "told"), [(HALF, ", in float16 and once more in float32"), (FULL, "")], ids=["half", "full"]
)
def test_what_float32_cannot_hold_either_is_an_error_by_name(
    cache: ModelCache, tmp_path: Path, component: str, layer: str, stage: str, plan: SpeedPlan, told: str
):
    checkpoint = spoilt(tmp_path / "broken", component, float("nan"), layer)
    words = condition(cache, checkpoint)
    steps: list[int] = []
    with pytest.raises(FloatingPointError) as raised:
        generate(cache, checkpoint, words, seed=4, plan=plan, on_step=lambda step, *_: steps.append(step), **FRAME)
    assert str(raised.value) == f"broken: {stage} gave values that are no numbers{told}; no picture was made"
    attempts = 2 if stage == "denoising" and plan is HALF else 1
    assert steps == [1, 2, 3] * attempts, "once more, and only where it can help"
    assert not any(entry.pins for entry in cache.stats().entries)
    dtypes = {entry.key.dtype for entry in cache.stats().entries if entry.key.component == component}
    assert dtypes == ({torch.float16, torch.float32} if plan is HALF else {torch.float32})


def test_a_picture_that_overflows_while_it_is_encoded_is_encoded_again(cache: ModelCache, tmp_path: Path):
    checkpoint = spoilt(tmp_path / "glare", "vae", 3e5, "encoder.conv_in.weight")
    words = condition(cache, checkpoint)
    source = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    half, full = (
        generate(cache, checkpoint, words, seed=4, plan=plan, image=source, strength=0.7, **FRAME)
        for plan in (HALF, FULL)
    )
    assert half.report.retries == ("denoising",)
    assert half.latents is not None and full.latents is not None and torch.equal(half.latents, full.latents)
