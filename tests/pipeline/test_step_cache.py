"""Steps are taken from the ones before where little would change, each side of guidance by itself, and told truly."""

import gc
import weakref
from collections.abc import Callable
from functools import cache as once
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, ZImageTransformer2DModel
from torch import Tensor

from pipeline.acceleration.step_cache import with_step_cache
from pipeline.acceleration.unet_cache import with_unet_cache
from pipeline.acceleration.work import Work
from pipeline.checkpoints import Checkpoint, open_checkpoint
from pipeline.denoising.diffusers_generation import draw
from pipeline.denoising.latents import decode_latents, generators, noise
from pipeline.denoising.unet_sampler import denoise
from pipeline.fusing.ways import in_one_way
from pipeline.fusion import fuse
from pipeline.model_cache import ModelCache
from pipeline.text_encoder import encode_prompt
from tests.pipeline.family_folders import save_family
from tests.pipeline.test_unet_cache import Asked, four_levels, together

STEPS = 12
CLOSE = 1e-5


class Walk:
    """Steps of a denoiser whose sample moves as Euler's method would have it. told: by the name of each side."""

    def __init__(self, denoiser: Any, shape: tuple[int, ...], *told: dict[str, Any]) -> None:
        self.denoiser, self.told = denoiser, told
        self._start = torch.randn(shape, generator=torch.Generator().manual_seed(1))

    @torch.inference_mode()
    def __call__(self, view: Any, steps: int = STEPS, *sides: int) -> list[Tensor]:
        """What the first of the sides leads to after each step, all of them asked."""
        sides = sides or tuple(range(len(self.told)))
        sample, found = self._start, []
        for step in range(steps):
            timestep = torch.full((sample.shape[0],), 900 - 900 * step // steps)
            said = [self._ask(view, sample, timestep, side) for side in sides]
            sample = sample - said[0] / (2 * steps)
            found.append(sample)
        return found

    def _ask(self, view: Any, sample: Tensor, timestep: Tensor, side: int) -> Tensor:
        return view(sample, timestep=timestep, return_dict=False, **self.told[side])[0]


@pytest.fixture(scope="module")
def walk() -> Callable[[str], Walk]:
    return once(_walk)


def _walk(name: str) -> Walk:
    torch.manual_seed(0)
    if name == "unet":
        words = [{"encoder_hidden_states": torch.randn(1, 5, 16)} for _ in range(2)]
        return Walk(four_levels(), (1, 4, 8, 8), *words)
    if name == "dit":
        dit = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=3, sample_size=8
        )
        return Walk(dit.eval(), (1, 4, 8, 8), *({"class_labels": torch.tensor([kind])} for kind in (3, 1000)))
    flux = FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    grid = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
    words = [
        {"encoder_hidden_states": torch.randn(1, 5, 8), "pooled_projections": torch.randn(1, 8)} | grid
        for _ in range(2)
    ]
    return Walk(flux.eval(), (1, 16, 4), *words)


KINDS = {"unet": 9, "dit": 3, "flux": 4}  # blocks


@pytest.mark.parametrize("name", KINDS)
def test_a_threshold_of_nothing_computes_everything(name: str, walk: Callable[[str], Walk]) -> None:
    asked, work = walk(name), Work()
    exact, found = asked(asked.denoiser), asked(with_step_cache(asked.denoiser, 0, STEPS, work))
    assert all(map(torch.equal, exact, found))
    assert work == Work(2 * STEPS, 0, 2 * STEPS * KINDS[name], 0)


@pytest.mark.parametrize("name", KINDS)
def test_steps_are_passed_over_and_each_is_counted(name: str, walk: Callable[[str], Walk]) -> None:
    asked = walk(name)
    computed = []
    exact = asked(asked.denoiser)
    for threshold in (0.02, 1.0):
        work = Work()
        found = asked(with_step_cache(asked.denoiser, threshold, STEPS, work))
        assert work.steps_computed + work.steps_from_cache == 2 * STEPS
        assert work.blocks_computed + work.blocks_skipped == 2 * STEPS * KINDS[name]
        assert torch.equal(found[0], exact[0])
        computed.append(work.steps_computed)
    assert computed[0] > computed[1] < 2 * STEPS


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_the_first_two_steps_and_the_last_are_computed(name: str, walk: Callable[[str], Walk]) -> None:
    asked = walk(name)
    ran: list[int] = []
    view = with_step_cache(asked.denoiser, 1, STEPS, Work())
    part: Any = view.conv_in if name == "unet" else view.pos_embed
    calls = iter(range(STEPS))
    view.register_forward_pre_hook(lambda *_: ran.append(next(calls)))
    computed: list[int] = []
    part.register_forward_hook(lambda *_: computed.append(ran[-1]))
    asked(view, STEPS, 0)
    assert computed[:2] == [0, 1]
    assert computed[-1] == STEPS - 1
    assert len(computed) < STEPS


@pytest.mark.parametrize("name", KINDS)
def test_sides_of_guidance_stay_apart(name: str, walk: Callable[[str], Walk]) -> None:
    """One side is led the same way whether the other is asked between its steps or not."""
    asked = walk(name)
    alone = asked(with_step_cache(asked.denoiser, 0.3, STEPS, Work()), STEPS, 0)
    work = Work()
    both = asked(with_step_cache(asked.denoiser, 0.3, STEPS, work), STEPS, 0, 1)
    assert all(map(torch.equal, alone, both))
    assert work.steps_from_cache > 0
    swapped = asked(with_step_cache(asked.denoiser, 0.3, STEPS, Work()), STEPS, 1, 0)
    assert not torch.equal(swapped[-1], both[-1])


def test_one_doubled_batch_is_computed_as_one() -> None:
    exact = four_levels()
    doubled = together(Asked(exact, seed=1), Asked(exact, seed=2))
    work = Work()
    view = with_step_cache(exact, 1, 6, work)
    for step in range(6):
        assert doubled(view, step).shape[0] == 2
    assert work.steps_computed + work.steps_from_cache == 6
    assert work.steps_from_cache > 0


@pytest.mark.parametrize("name", KINDS)
def test_a_second_run_of_a_view_is_as_the_first(name: str, walk: Callable[[str], Walk]) -> None:
    asked = walk(name)
    view = with_step_cache(asked.denoiser, 0.5, STEPS, Work())
    assert all(map(torch.equal, asked(view), asked(view)))


@pytest.mark.parametrize("name", KINDS)
def test_the_module_in_the_cache_stays_as_it_was(name: str, walk: Callable[[str], Walk]) -> None:
    asked = walk(name)
    before = asked(asked.denoiser)
    names = [set(vars(part)) for part in asked.denoiser.modules()]
    asked(with_step_cache(asked.denoiser, 1, STEPS, Work()))
    assert [set(vars(part)) for part in asked.denoiser.modules()] == names
    assert all(map(torch.equal, asked(asked.denoiser), before))
    assert not getattr(asked.denoiser, "is_cache_enabled", False)


def test_what_is_given_may_be_changed_in_place() -> None:
    exact = four_levels()
    asked = Asked(exact)
    given = []
    view = with_step_cache(exact, 1, 6, Work())
    for step in range(5):
        said = asked(view, step)
        given.append(said.clone())
        with torch.inference_mode():
            said.zero_()
    assert torch.equal(given[2], given[1]), "it should come from the cache"
    assert given[2].abs().max() > 0


def test_nothing_is_held_after_the_last_step() -> None:
    exact = four_levels()
    asked = Asked(exact)
    view = with_step_cache(exact, 1, 6, Work())
    alive: list[weakref.ref[Tensor]] = []
    kept = Tensor.clone

    def noted(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = kept(tensor, *args, **kwargs)
        alive.append(weakref.ref(copy))
        return copy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "clone", noted)
        for step in range(6):
            asked(view, step)
            if step == 1:
                assert any(one() is not None for one in alive)
    gc.collect()
    assert alive and all(one() is None for one in alive)


def test_output_types_stay() -> None:
    exact = four_levels()
    view = with_step_cache(exact, 1, 6, Work())
    kinds = set()
    with torch.inference_mode():
        words = torch.zeros(1, 5, 16)
        for step in range(6):
            kinds.add(type(view(torch.ones(1, 4, 8, 8), 900 - step, encoder_hidden_states=words)))
    assert len(kinds) == 1
    assert next(iter(kinds)).__name__ == "UNet2DConditionOutput"


def test_it_lies_over_a_unet_cache() -> None:
    exact, work = four_levels(), Work()
    asked = Asked(exact)
    view = with_step_cache(with_unet_cache(exact, 1, 6, Work()), 0, 6, work)
    assert all(torch.equal(asked(view, step), asked(exact, step)) for step in range(6))
    assert work.steps_computed == 6


@pytest.mark.parametrize(
    ("threshold", "steps", "said"),
    [
        (-0.1, 20, "0 to 1, got -0.1"),
        (1.5, 20, "0 to 1, got 1.5"),
        (float("nan"), 20, "0 to 1, got nan"),
        (0.1, 2, "3 steps or more for a step cache"),
    ],
)
def test_numbers_that_cannot_be_are_refused(threshold: float, steps: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        with_step_cache(four_levels(), threshold, steps, Work())


def test_a_denoiser_that_is_told_lists_is_refused() -> None:
    small = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[16, 16, 16],
    )  # fmt: skip
    with pytest.raises(ValueError, match="got ZImageTransformer2DModel, which is told"):
        with_step_cache(small, 0.1, 20, Work())


def test_a_controlnet_is_refused() -> None:
    exact = four_levels()
    asked = Asked(exact)
    asked.told["mid_block_additional_residual"] = torch.zeros(1, 16, 1, 1)
    with pytest.raises(ValueError, match="no ControlNet"):
        asked(with_step_cache(exact, 0.1, 20, Work()), 0)


@pytest.mark.parametrize("name", ["flux_dev", "flux2_klein", "qwen_image", "sd3"])
def test_through_the_pipelines_of_diffusers(name: str, tmp_path: Path, cache: ModelCache) -> None:
    """Those that tell diffusers' cache which side they ask for, those that do not, and those that it does not fit."""
    checkpoint = open_checkpoint(save_family(name, tmp_path / name))
    words = fuse(cache, checkpoint, encode_prompt(cache, checkpoint, "a red rose", "a car"), None)
    found = []
    for threshold in (None, 0.0, 0.9):
        work = Work()
        with checkpoint.use(cache, "transformer") as exact, checkpoint.use(cache, "vae") as vae, torch.inference_mode():
            view = exact if threshold is None else with_step_cache(exact, threshold, 6, work)
            options: dict[str, Any] = {"seed": 1, "num_inference_steps": 6, "guidance_scale": 3.0}
            options |= {"width": 64, "height": 64, "source": None, "on_step": lambda *_: None}
            found.append(draw(checkpoint, view, vae, words, **options))
    assert torch.equal(found[0], found[1])
    with checkpoint.use(cache, "transformer") as exact:
        assert not any("forward" in vars(part) for part in exact.modules())
    assert torch.isfinite(found[2]).all()
    assert not torch.equal(found[0], found[2])
    assert work.steps_from_cache > 0


@pytest.mark.parametrize(("steps", "threshold", "most"), [(4, 0.2, 2.7), (16, 0.02, 5)])
def test_the_small_model_draws_the_same_with_fewer_steps(
    steps: int, threshold: float, most: float, shipped: Checkpoint, warm: ModelCache
) -> None:
    """Its trained weights: 34 dB over white, on the mean of four prompts."""
    likeness, computed, side = [], 0, shipped.family.native_size // shipped.family.downscale
    for number, prompt in enumerate(("a red rose", "rocket", "octopus", "racing car")):
        words = in_one_way(fuse(warm, shipped, encode_prompt(warm, shipped, prompt), None), [number])
        pictures = []
        for threshold_now in (0.0, threshold):
            with shipped.use(warm, "unet") as unet, shipped.use(warm, "vae") as vae, torch.inference_mode():
                work, own = Work(), generators(number, 1)
                latents = denoise(
                    with_step_cache(unet, threshold_now, steps, work),
                    shipped.scheduler(),
                    noise((16, side, side), own),
                    words,
                    num_inference_steps=steps,
                    guidance_scale=1.0,
                    start_noise=shipped.family.start_noise,
                    generators=own,
                    on_step=lambda *_: None,
                )
                pixels, alpha = decode_latents(vae, latents)
                pictures.append(pixels * alpha + 1 - alpha)
        likeness.append(-10 * torch.log10((pictures[0] - pictures[1]).square().mean()).item())
        computed += work.steps_computed
    assert sum(likeness) / len(likeness) > 34
    assert computed / len(likeness) <= most
