"""The scheduler that a plan asks for: real ones, on diffusers' real classes at tiny sizes, drawn with end to end."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache as once
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from pipeline.acceleration.schedules import Schedule, schedule_for
from pipeline.adapters.lora import open_lora
from pipeline.checkpoints import Checkpoint, open_checkpoint
from pipeline.conditioning import FusedConditioning
from pipeline.denoising.diffusers_generation import Source, draw
from pipeline.denoising.latents import channels_of, generators, noise, use_vae
from pipeline.denoising.unet_sampler import denoise
from pipeline.fusion import fuse
from pipeline.model_cache import ModelCache
from pipeline.speed_plan import EXACT, SCHEDULERS, SpeedPlan
from pipeline.text_encoder import encode_prompt
from tests.pipeline.adapter_files import random_factors, save_peft
from tests.pipeline.family_folders import FAMILY_FOLDERS, save_family, unet
from tests.pipeline.folders import edit_index

EPSILON = ("euler", "euler trailing", "dpm++ 2m", "ddim", "lcm", "tcd")
ALWAYS = ("checkpoint", "automatic")
FITS = {name: EPSILON for name in ("sd15", "sd2", "sd_turbo", "sdxl", "pixart_alpha", "pixart_sigma", "kolors")}
FITS |= {"hunyuan_dit": EPSILON, "lcm": ("lcm",), "sana": ("flow match", "dpm++ 2m"), "sana_sprint": ()}
FITS |= {name: ("flow match",) for name in ("sd3", "flux_dev", "flux_schnell", "flux2_klein", "qwen_image", "z_image")}
SIZE = 64


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    root = tmp_path_factory.mktemp("families")

    @once
    def opened(name: str) -> Checkpoint:
        return open_checkpoint(save_family(name, root / name))

    return opened


def schedule(checkpoint: Checkpoint, choice: str, steps: int = 4, guidance: float = 1.0, **dials: Any) -> Schedule:
    return schedule_for(checkpoint, SpeedPlan(scheduler=choice, **dials), steps, guidance)


def words_of(warm: ModelCache, checkpoint: Checkpoint) -> FusedConditioning:
    return fuse(warm, checkpoint, encode_prompt(warm, checkpoint, "a red rose", "a car"), None)


def drawn(
    warm: ModelCache,
    checkpoint: Checkpoint,
    chosen: Schedule,
    source: Source | None = None,
    seed: int = 3,
    batch: int = 1,
    seen: list[float] | None = None,
) -> torch.Tensor:
    """Latents, by the way that the family is drawn. seen: gets the timesteps that the denoiser is called with."""
    words = words_of(warm, checkpoint)
    words = replace(words, negative=None, tokens=words.tokens.repeat(batch, 1, 1), mask=words.mask.repeat(batch, 1))
    name = "unet" if checkpoint.has("unet") else "transformer"
    with use_vae(warm, checkpoint) as vae, checkpoint.use(warm, name) as denoiser, torch.inference_mode():

        def watch(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            if seen is not None:
                seen.append(float((named["timestep"] if "timestep" in named else inputs[1]).flatten()[0]))

        handle = denoiser.register_forward_pre_hook(watch, with_kwargs=True)
        steps: dict[str, Any] = {
            "num_inference_steps": chosen.num_inference_steps,
            "guidance_scale": chosen.guidance_scale,
        }
        try:
            if checkpoint.family.own_sampler and source is None:
                own = generators(seed, batch)
                start = noise((channels_of(vae), SIZE // 8, SIZE // 8), own)
                return denoise(
                    denoiser,
                    chosen.scheduler,
                    start,
                    words,
                    start_noise=0.0,
                    generators=own,
                    on_step=lambda *_: None,
                    **steps,
                )
            return draw(
                checkpoint,
                denoiser,
                vae,
                words,
                scheduler=chosen.scheduler,
                seed=seed,
                width=SIZE,
                height=SIZE,
                source=source,
                on_step=lambda *_: None,
                **steps,
            )
        finally:
            handle.remove()


def assert_each_its_own(checkpoint: Checkpoint, found: dict[str, torch.Tensor]) -> None:
    """By choice, what was drawn. DDIM without noise is Euler's method, written otherwise (arXiv 2010.02502, eq. 13)."""
    alike = {"euler", "ddim"}
    if checkpoint.scheduler().config.get("timestep_spacing") == "trailing":
        alike |= {"euler trailing"}
    for number, one in enumerate(found):
        for other in [*found][:number]:
            near = torch.allclose(found[one], found[other], atol=1e-3)
            assert {one, other} <= alike or not near, (one, other)


# --- what fits, and what is refused ---


@pytest.mark.parametrize("name", FAMILY_FOLDERS)
def test_what_fits_draws_and_each_draws_its_own(warm: ModelCache, family: Callable[[str], Checkpoint], name: str):
    checkpoint = family(name)
    found = {choice: drawn(warm, checkpoint, schedule(checkpoint, choice)) for choice in FITS[name]}
    for choice, latents in found.items():
        assert latents.isfinite().all() and latents.std() > 0, choice
    assert_each_its_own(checkpoint, found)
    own = drawn(warm, checkpoint, Schedule(checkpoint.scheduler(), 4, 1.0))
    for choice in ALWAYS:
        assert torch.equal(drawn(warm, checkpoint, schedule(checkpoint, choice)), own), choice


@pytest.mark.parametrize("name", FAMILY_FOLDERS)
def test_what_does_not_fit_is_refused(family: Callable[[str], Checkpoint], name: str):
    checkpoint = family(name)
    refused = [choice for choice in SCHEDULERS if choice not in (*FITS[name], *ALWAYS)]
    for choice in refused:
        with pytest.raises(ValueError, match=rf"^{name}: expected .*; got '{choice.replace('+', '.')}'"):
            schedule(checkpoint, choice)
    assert refused, "no family takes both kinds"


@pytest.mark.parametrize("name", ["sd15", "sdxl", "kolors"])
@pytest.mark.parametrize("masked", [False, True])
def test_pictures_are_drawn_from_with_each(
    warm: ModelCache, family: Callable[[str], Checkpoint], name: str, masked: bool
):
    checkpoint = family(name)
    pixels = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 1, SIZE, SIZE) if masked else None
    found = {
        choice: drawn(warm, checkpoint, schedule(checkpoint, choice), Source(pixels, mask, 0.5))
        for choice in FITS[name]
    }
    assert all(latents.isfinite().all() for latents in found.values())
    assert_each_its_own(checkpoint, found)


def test_ddim_is_eulers_method_written_otherwise(warm: ModelCache, family: Callable[[str], Checkpoint]):
    checkpoint = family("sd2")
    one, other = (drawn(warm, checkpoint, schedule(checkpoint, choice)) for choice in ("euler", "ddim"))
    assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("choice", ["lcm", "tcd", "euler trailing"])
def test_each_picture_of_a_batch_is_that_of_its_own_seed(
    warm: ModelCache, family: Callable[[str], Checkpoint], choice: str
):
    """Those that add noise at every step, too."""
    checkpoint = family("sd15")
    together = drawn(warm, checkpoint, schedule(checkpoint, choice), batch=2)
    alone = drawn(warm, checkpoint, schedule(checkpoint, choice), seed=4)
    assert torch.allclose(together[1:], alone, atol=1e-5) and not torch.allclose(together[:1], alone, atol=1e-2)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize(("choice", "wanted"), [("tcd", 0.3), ("ddim", 0.0)])
def test_each_has_the_noise_that_its_paper_gives_it(
    warm: ModelCache, family: Callable[[str], Checkpoint], name: str, choice: str, wanted: float
):
    """By our own sampler and by diffusers' pipelines, whose own default is none for either."""
    checkpoint = family(name)
    chosen, found = schedule(checkpoint, choice), []
    step = chosen.scheduler.step

    @wraps(step)
    def watched(*arguments: Any, **options: Any) -> Any:
        bound = signature(step).bind(*arguments, **options)
        bound.apply_defaults()
        found.append(bound.arguments["eta"])
        return step(*arguments, **options)

    chosen.scheduler.step = watched
    drawn(warm, checkpoint, chosen)
    assert found == [wanted] * 4


@pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl"])
def test_trailing_euler_starts_at_the_last_timestep(warm: ModelCache, family: Callable[[str], Checkpoint], name: str):
    """At one step nothing else will do: what is asked for at another timestep than that of pure noise is a blur."""
    checkpoint = family(name)
    seen: list[float] = []
    assert drawn(warm, checkpoint, schedule(checkpoint, "euler trailing", 1), seen=seen).isfinite().all()
    assert seen == [999]
    own: list[float] = []
    drawn(warm, checkpoint, schedule(checkpoint, "checkpoint", 1), seen=own)
    assert own[0] < 10  # PNDM, DDIM and leading Euler start there
    four: list[float] = []
    drawn(warm, checkpoint, schedule(checkpoint, "euler trailing", 4), seen=four)
    assert four == [999, 749, 499, 249]


def test_a_named_scheduler_has_the_checkpoints_own_noise(family: Callable[[str], Checkpoint]):
    for name in ("sd15", "sd2", "kolors", "hunyuan_dit", "pixart_alpha"):
        checkpoint = family(name)
        own = checkpoint.scheduler()
        for choice in EPSILON:
            made = schedule(checkpoint, choice).scheduler
            assert torch.allclose(made.alphas_cumprod, own.alphas_cumprod), (name, choice)
            assert made.config.prediction_type == own.config.get("prediction_type", "epsilon")
            if choice in ("ddim", "lcm", "tcd"):
                assert not made.config.clip_sample  # latents are no pixels


def test_each_run_has_one_of_its_own(family: Callable[[str], Checkpoint]):
    for choice in (*ALWAYS, "euler"):
        one, other = (schedule(family("sdxl"), choice).scheduler for _ in range(2))
        assert one is not other


def test_diffusers_has_nothing_to_say_of_it(family: Callable[[str], Checkpoint], caplog: pytest.LogCaptureFixture):
    logging.getLogger("diffusers").propagate = True
    with caplog.at_level(logging.WARNING):
        for name, fitting in FITS.items():
            for choice in (*ALWAYS, *fitting):
                schedule(family(name), choice)
    assert [record.getMessage() for record in caplog.records] == []


@pytest.mark.parametrize("choice", ["lcm", "tcd"])
def test_more_steps_than_a_walk_has_are_refused(family: Callable[[str], Checkpoint], choice: str):
    assert schedule(family("sd15"), choice, 50).num_inference_steps == 50
    with pytest.raises(ValueError, match=r"^sd15: expected at most 50 steps, .* got 51"):
        schedule(family("sd15"), choice, 51)


# --- the small model ---


def test_the_small_model_walks_as_it_was_taught(warm: ModelCache, shipped: Checkpoint):
    for choice in (*ALWAYS, "flow match"):
        found = schedule(shipped, choice, 2, 3.0)
        assert type(found.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
        assert dict(found.scheduler.config) == dict(shipped.scheduler().config)
        assert (found.num_inference_steps, found.guidance_scale, found.notices) == (2, 3.0, ())
    for choice in EPSILON:
        with pytest.raises(ValueError, match=r"expected its own scheduler, .* in equal steps; got"):
            schedule(shipped, choice)
    with pytest.raises(ValueError, match="expected no shift for Duet mini"):
        schedule(shipped, "flow match", shift=3.0)


# --- steps, guidance and shift ---


def test_the_plan_goes_before_the_caller(family: Callable[[str], Checkpoint]):
    found = schedule(family("sd15"), "checkpoint", 20, 7.5, num_inference_steps=3, guidance_scale=2.0)
    assert (found.num_inference_steps, found.guidance_scale) == (3, 2.0)
    found = schedule(family("sd15"), "checkpoint", 20, 7.5)
    assert (found.num_inference_steps, found.guidance_scale, found.notices) == (20, 7.5, ())
    assert type(found.scheduler).__name__ == "PNDMScheduler"


@pytest.mark.parametrize("name", ["sd3", "flux_dev", "flux_schnell", "flux2_klein", "qwen_image", "z_image", "sana"])
def test_a_shift_moves_the_sigmas(warm: ModelCache, family: Callable[[str], Checkpoint], name: str):
    checkpoint = family(name)
    found = {}
    for choice in (*ALWAYS, *FITS[name]):
        for shift in (1.5, 6.0):
            chosen = schedule(checkpoint, choice, shift=shift)
            found[choice, shift] = drawn(warm, checkpoint, chosen)
            assert found[choice, shift].isfinite().all()
            assert chosen.scheduler.config.get("flow_shift", chosen.scheduler.config.get("shift")) == shift
        assert not torch.allclose(found[choice, 1.5], found[choice, 6.0], atol=1e-4)
        assert torch.equal(found[choice, 6.0], found[ALWAYS[0], 6.0]) or (name, choice) == ("sana", "flow match")


def test_the_shift_is_that_of_the_paper(family: Callable[[str], Checkpoint]):
    """Where it followed the picture's size, it stays the same for every size."""
    scheduler = schedule(family("flux_dev"), "flow match", shift=3.0).scheduler
    for mu in (0.5, 1.15):  # what its pipeline tells of small and large pictures
        scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=mu)
        wanted = [3 * sigma / (1 + 2 * sigma) for sigma in (1.0, 0.75, 0.5, 0.25)]
        assert scheduler.sigmas.tolist() == pytest.approx([*wanted, 0.0], abs=1e-6)


def test_flow_matching_for_sana_keeps_its_shift(family: Callable[[str], Checkpoint]):
    assert schedule(family("sana"), "flow match").scheduler.config.shift == 3.0


@pytest.mark.parametrize(("name", "choices"), [("sd15", (*ALWAYS, *EPSILON)), ("sana_sprint", ALWAYS)])
def test_a_shift_of_what_has_none_is_refused(family: Callable[[str], Checkpoint], name: str, choices: tuple[str, ...]):
    for choice in choices:
        with pytest.raises(ValueError, match=rf"^{name}: expected no shift, .* got 3$"):
            schedule(family(name), choice, shift=3.0)


# --- what the checkpoint is ---


def test_a_latent_consistency_model_is_told_by_its_network(family: Callable[[str], Checkpoint]):
    found = schedule(family("lcm"), "automatic", guidance=8.5)
    assert type(found.scheduler).__name__ == "LCMScheduler" and found.guidance_scale == 8.5  # a number it hears
    assert found.notices == (
        "lcm is taken for a distilled model, and walked by LCMScheduler: its UNet takes guidance as an input "
        "(time_cond_proj_dim)",
    )


def test_turbo_is_told_by_its_trailing_steps(warm: ModelCache, family: Callable[[str], Checkpoint]):
    found = schedule(family("sd_turbo"), "automatic", 1, 7.5)
    assert found.scheduler.config.timestep_spacing == "trailing" and found.guidance_scale == 1.0
    assert "trailing Euler steps" in found.notices[0]
    assert found.notices[1] == "guidance is off (1 in place of 7.5): sd_turbo was distilled without it"
    seen: list[float] = []
    drawn(warm, family("sd_turbo"), found, seen=seen)
    assert seen == [999]


def changed(tmp_path: Path, name: str, **parts: Any) -> Checkpoint:
    """A family's folder with other components of diffusers in it."""
    folder = save_family(name, tmp_path / name)
    for component, part in parts.items():
        part.save_pretrained(folder / component)
        edit_index(folder, **{component: ["diffusers", type(part).__name__]})
    return open_checkpoint(folder)


BETAS: Any = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize(
    ("scheduler", "distilled"),
    [
        (diffusers.LCMScheduler(**BETAS), True),
        (diffusers.TCDScheduler(**BETAS), True),
        (diffusers.EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing"), True),
        (diffusers.EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="leading"), False),
        (diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing", prediction_type="v_prediction"), False),
        (diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing", rescale_betas_zero_snr=True), False),
        (diffusers.DDIMScheduler(**BETAS, timestep_spacing="trailing"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_scheduler_in_the_folder_tells(tmp_path: Path, scheduler: Any, distilled: bool):
    checkpoint = changed(tmp_path, "sd15", scheduler=scheduler)
    found = schedule(checkpoint, "automatic", 4, 5.0)
    assert dict(found.scheduler.config) == dict(checkpoint.scheduler().config)
    assert found.guidance_scale == (1.0 if distilled else 5.0) and bool(found.notices) == distilled


def test_a_network_with_guidance_as_an_input_tells_in_any_family(warm: ModelCache, tmp_path: Path):
    added: Any = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "use_linear_projection": True}
    network = unet(64, time_cond_proj_dim=32, projection_class_embeddings_input_dim=16 + 6 * 8, **added)
    checkpoint = changed(tmp_path, "sdxl", unet=network)
    found = schedule(checkpoint, "automatic", 4, 8.0)
    assert type(found.scheduler).__name__ == "LCMScheduler" and found.guidance_scale == 8.0
    assert drawn(warm, checkpoint, found).isfinite().all()


def test_what_says_that_it_is_distilled_has_no_guidance(tmp_path: Path, family: Callable[[str], Checkpoint]):
    folder = save_family("flux2_klein", tmp_path / "klein")
    edit_index(folder, is_distilled=True)
    assert schedule(open_checkpoint(folder), "automatic", guidance=4.0).guidance_scale == 1.0
    assert schedule(family("flux2_klein"), "automatic", guidance=4.0).guidance_scale == 4.0


LORAS = {
    "lcm-lora-sdv1-5": ("LCMScheduler", None, 1.0),
    "TCD-SD15-LoRA": ("TCDScheduler", None, 1.0),
    "sdxl_lightning_4step_lora": ("EulerDiscreteScheduler", "trailing", 1.0),
    "SDXL-Lightning": ("EulerDiscreteScheduler", "trailing", 1.0),
    "Hyper-SD15-8steps-lora": ("DDIMScheduler", "trailing", 1.0),
    "Hyper-SD15-8steps-CFG-lora": ("DDIMScheduler", "trailing", 6.0),
    "Hyper-SD15-1step-lora": ("TCDScheduler", None, 1.0),
    "dmd2_4step_lora": ("LCMScheduler", None, 1.0),
    "sd_turbo_lora": ("EulerDiscreteScheduler", "trailing", 1.0),
    "lightning-in-a-storm": ("PNDMScheduler", "leading", 6.0),
    "turbo-charged-car": ("PNDMScheduler", "leading", 6.0),
    "hyper-realistic-skin": ("PNDMScheduler", "leading", 6.0),
    "welcome": ("PNDMScheduler", "leading", 6.0),  # holds "lcm" in the middle
}


def with_lora(checkpoint: Checkpoint, path: Path, strength: float = 1.0, **metadata: str) -> Checkpoint:
    name = "unet" if checkpoint.has("unet") else "transformer"
    factors = random_factors(checkpoint.build(name), lambda layer: "attn" in layer or "attention" in layer)
    return checkpoint.with_adapter(open_lora(checkpoint, save_peft(path, {name: factors}, **metadata), strength))


@pytest.mark.parametrize("title", LORAS)
@pytest.mark.parametrize("by", ["name", "metadata"])
def test_a_lora_tells_what_it_was_distilled_for(
    warm: ModelCache, family: Callable[[str], Checkpoint], tmp_path: Path, title: str, by: str
):
    wanted, spacing, guidance = LORAS[title]
    path = tmp_path / f"{title if by == 'name' else 'weights'}.safetensors"
    metadata: dict[str, Any] = {"modelspec.title": title} if by == "metadata" else {}
    checkpoint = with_lora(family("sd15"), path, **metadata)
    found = schedule(checkpoint, "automatic", 4, 6.0)
    assert type(found.scheduler).__name__ == wanted and found.guidance_scale == guidance
    assert spacing is None or found.scheduler.config.timestep_spacing == spacing
    assert drawn(warm, checkpoint, found).isfinite().all()
    told = " ".join(found.notices)
    if wanted == "PNDMScheduler":
        assert told == ""
    else:
        assert path.name in told and ("a name alone" in told) == (by == "name")
        assert ("made for 8 steps, drawn in 4" in told) == ("8steps" in title)


def test_a_lora_that_does_nothing_tells_nothing(family: Callable[[str], Checkpoint], tmp_path: Path):
    checkpoint = with_lora(family("sd15"), tmp_path / "lcm-lora.safetensors", strength=0.0)
    found = schedule(checkpoint, "automatic", 4, 6.0)
    assert type(found.scheduler).__name__ == "PNDMScheduler" and (found.guidance_scale, found.notices) == (6.0, ())


def test_facts_go_before_names_and_the_last_lora_before_the_first(family: Callable[[str], Checkpoint], tmp_path: Path):
    named = with_lora(family("sd15"), tmp_path / "lcm-lora.safetensors")
    titled = with_lora(named, tmp_path / "two.safetensors", ss_output_name="TCD-SD15-LoRA")
    for checkpoint in (titled, replace(titled, adapters=titled.adapters[::-1])):
        assert type(schedule(checkpoint, "automatic").scheduler).__name__ == "TCDScheduler"
    again = with_lora(named, tmp_path / "sd-lightning-4step.safetensors")
    assert type(schedule(again, "automatic").scheduler).__name__ == "EulerDiscreteScheduler"
    turbo = with_lora(family("sd_turbo"), tmp_path / "tcd.safetensors")
    assert schedule(turbo, "automatic").scheduler.config.timestep_spacing == "trailing"


def test_the_lora_of_qwen_sets_one_shift_for_all_sizes(
    warm: ModelCache, family: Callable[[str], Checkpoint], tmp_path: Path
):
    checkpoint = with_lora(family("qwen_image"), tmp_path / "Qwen-Image-Lightning-8steps-V2.0.safetensors")
    found = schedule(checkpoint, "automatic", 8, 4.0)
    config = found.scheduler.config
    assert (config.shift, config.use_dynamic_shifting, config.shift_terminal) == (3.0, False, None)
    assert found.guidance_scale == 1.0 and drawn(warm, checkpoint, found).isfinite().all()
    by_hand = schedule(checkpoint, "automatic", 8, shift=2.0).scheduler.config
    assert by_hand.shift == 2.0


def test_a_name_is_the_last_resort(warm: ModelCache, tmp_path: Path):
    checkpoint = open_checkpoint(save_family("sdxl", tmp_path / "dreamXL_turboDPMSDE"))
    found = schedule(checkpoint, "automatic", 4, 7.0)
    assert found.scheduler.config.timestep_spacing == "trailing" and found.guidance_scale == 1.0
    assert "it is called so (turbo); that is a name alone, so choose the scheduler by hand" in found.notices[0]
    exact = schedule(checkpoint, "checkpoint", 4, 7.0)
    assert exact.scheduler.config.timestep_spacing == "leading" and exact.guidance_scale == 7.0


def test_one_step_lightning_predicts_the_picture(warm: ModelCache, tmp_path: Path):
    checkpoint = open_checkpoint(save_family("sdxl", tmp_path / "sdxl_lightning_1step_x0"))
    found = schedule(checkpoint, "automatic", 1)
    assert found.scheduler.config.prediction_type == "sample"
    assert drawn(warm, checkpoint, found).isfinite().all()


def test_guidance_by_hand_stays_and_is_warned_of(family: Callable[[str], Checkpoint]):
    found = schedule(family("sd_turbo"), "automatic", guidance_scale=2.0)
    assert found.guidance_scale == 2.0
    assert "distilled without guidance" in found.notices[-1] and "2 takes twice the time" in found.notices[-1]
    assert schedule(family("sd_turbo"), "euler trailing", guidance=7.5).guidance_scale == 1.0


def test_a_consistency_walk_of_what_was_not_distilled_is_warned_of(family: Callable[[str], Checkpoint], tmp_path: Path):
    assert "nothing says so of sd15" in schedule(family("sd15"), "lcm").notices[0]
    assert schedule(with_lora(family("sd15"), tmp_path / "lcm-lora.safetensors"), "lcm").notices == ()


@pytest.mark.parametrize(
    ("name", "steps", "guidance"),
    [("sd15", 25, 7.5), ("sd_turbo", 4, 1.0), ("lcm", 4, 8.5), ("flux_dev", 20, 3.5), ("flux_schnell", 4, 1.0)],
)
def test_what_nobody_says_is_what_the_model_is_meant_for(
    family: Callable[[str], Checkpoint], name: str, steps: int, guidance: float
):
    for plan in (EXACT, SpeedPlan(scheduler="automatic")):
        found = schedule_for(family(name), plan, None, None)
        assert (found.num_inference_steps, found.guidance_scale) == (steps, guidance)
    said = schedule_for(family(name), EXACT, 7, 2.0)
    assert (said.num_inference_steps, said.guidance_scale) == (7, 2.0)
    assert schedule_for(family(name), SpeedPlan(num_inference_steps=3), None, 2.0).num_inference_steps == 3


def test_a_lora_of_few_steps_leaves_a_network_the_guidance_that_it_takes(
    family: Callable[[str], Checkpoint], tmp_path: Path
):
    plain = family("flux_dev")
    factors = random_factors(plain.build("transformer"), lambda name: name.endswith("to_q"))
    path = save_peft(tmp_path / "Hyper-FLUX.1-dev-8steps-lora.safetensors", {"transformer": factors})
    quick = plain.with_adapter(open_lora(plain, path, 0.125))
    for plan in (EXACT, SpeedPlan(scheduler="automatic")):
        found = schedule_for(quick, plan, None, None)
        assert (found.num_inference_steps, found.guidance_scale) == (8, 3.5)
