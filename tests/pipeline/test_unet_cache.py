"""Between its whole steps a UNet runs its outermost layers alone, on what the deep ones gave, whatever lies over it."""

import gc
import weakref
from collections.abc import Callable
from functools import cache as once
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from pipeline.acceleration.unet_cache import whole_steps, with_unet_cache
from pipeline.acceleration.work import Work
from pipeline.adapters.ip_adapter import open_ip_adapter, show_picture
from pipeline.adapters.lora import open_lora
from pipeline.checkpoints import Checkpoint, open_checkpoint
from pipeline.mini import MODEL_FOLDER
from pipeline.model_cache import ModelCache
from pipeline.private_views import pictures_shown
from pipeline.vision.image_encoders import open_image_encoder
from tests.pipeline.adapter_files import random_factors, save_peft
from tests.pipeline.family_folders import save_family
from tests.pipeline.ip_adapter_files import adapter_tensors, save_adapter, save_encoder

FAMILIES = ["sd15", "sd2", "sdxl"]
CLOSE = 1e-5


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    root = tmp_path_factory.mktemp("families")

    @once
    def opened(name: str) -> Checkpoint:
        return open_checkpoint(MODEL_FOLDER if name == "mini" else save_family(name, root / name))

    return opened


@pytest.fixture(scope="module")
def unet(family: Callable[[str], Checkpoint]) -> Callable[[str], Any]:
    return once(lambda name: family(name).build("unet").eval())


def four_levels() -> Any:
    """All of Stable Diffusion 1.5's blocks and layers, a few channels of each."""
    torch.manual_seed(0)
    sizes = (8, 16, 16, 16)
    made: Any = UNet2DConditionModel(
        block_out_channels=sizes, attention_head_dim=2, norm_num_groups=4, cross_attention_dim=16
    )
    return made.eval()


class Asked:
    """What a UNet is told at each step. seed: of the words; batch: pictures; size: latents a side."""

    def __init__(self, unet: Any, seed: int = 0, batch: int = 1, size: tuple[int, int] = (8, 8)) -> None:
        source = torch.Generator().manual_seed(seed)
        self._sample = torch.randn(1, unet.config.in_channels, *size, generator=torch.Generator().manual_seed(9))
        self._sample = self._sample.expand(batch, -1, -1, -1)
        self.told: dict[str, Any] = {
            "encoder_hidden_states": torch.randn(batch, 7, unet.config.cross_attention_dim, generator=source)
        }
        if unet.config.addition_embed_type == "text_time":
            width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
            self.told["added_cond_kwargs"] = {
                "text_embeds": torch.randn(batch, width, generator=source),
                "time_ids": torch.ones(batch, 6),
            }

    def sample(self, step: int) -> Tensor:
        return self._sample * (1 - step / 20)

    @torch.inference_mode()
    def __call__(self, unet: Any, step: int, timestep: Tensor | None = None) -> Tensor:
        timestep = torch.tensor(981 - 60 * step) if timestep is None else timestep
        return unet(self.sample(step), timestep, return_dict=False, **self.told)[0]


def together(one: Asked, other: Asked) -> Asked:
    """Both sides of guidance as one doubled batch."""
    both = object.__new__(Asked)
    both._sample = torch.cat([one._sample, other._sample])

    def joined(left: Any, right: Any) -> Any:
        if isinstance(left, dict):
            return {name: joined(left[name], right[name]) for name in left}
        return torch.cat([left, right])

    both.told = joined(one.told, other.told)
    return both


@pytest.mark.parametrize("name", [*FAMILIES, "mini"])
def test_an_interval_of_one_changes_no_bit(name: str, unet: Callable[[str], Any]) -> None:
    exact, asked, work = unet(name), Asked(unet(name)), Work()
    view = with_unet_cache(exact, 1, 6, work)
    for step in range(6):
        assert torch.equal(asked(view, step), asked(exact, step))
    blocks = 2 * len(exact.down_blocks) + 1
    assert work == Work(6, 0, 6 * blocks, 0)


@pytest.mark.parametrize("name", [*FAMILIES, "mini"])
def test_whole_steps_are_exact_and_the_others_differ(name: str, unet: Callable[[str], Any]) -> None:
    exact, asked, work = unet(name), Asked(unet(name)), Work()
    view = with_unet_cache(exact, 3, 9, work)
    whole = whole_steps(9, 3)
    for step in range(9):
        assert torch.equal(asked(view, step), asked(exact, step)) == (step in whole)
    assert (work.steps_computed, work.steps_from_cache) == (3, 6)
    up_and_down = 2 * len(exact.down_blocks)
    assert work.blocks_skipped == 6 * up_and_down, "all but the last up block"
    assert work.blocks_computed == 3 * (up_and_down + 1) + 6


def test_a_step_in_between_is_the_last_layer_on_what_lay_below_it() -> None:
    exact = four_levels()
    asked = Asked(exact)
    last: Any = exact.up_blocks[-1]
    seen: list[Tensor] = []
    handle = last.resnets[-1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    asked(exact, 0)
    handle.remove()
    view = with_unet_cache(exact, 5, 5, Work())
    asked(view, 0)
    with torch.inference_mode():
        sample, words = asked.sample(1), asked.told["encoder_hidden_states"]
        time = exact.time_embedding(exact.get_time_embed(sample, torch.tensor(921)))
        first = exact.conv_in(sample)
        deep = seen[0][:, : -first.shape[1]]
        hidden = last.attentions[-1](last.resnets[-1](torch.cat([deep, first], dim=1), time), words, return_dict=False)[
            0
        ]
        expected = exact.conv_out(exact.conv_act(exact.conv_norm_out(hidden)))
    assert torch.equal(asked(view, 1), expected)


@pytest.mark.parametrize("size", [(8, 8), (9, 14)], ids=["even", "of no multiple"])
@pytest.mark.parametrize("depth", range(1, 13))
def test_at_any_depth_a_step_told_the_same_says_the_same(depth: int, size: tuple[int, int]) -> None:
    exact = four_levels()
    asked, work = Asked(exact, size=size), Work()
    view = with_unet_cache(exact, 5, 5, work, depth=depth)
    first = asked(view, 0)
    assert torch.equal(asked(view, 0, torch.tensor(981)), first)
    assert torch.equal(first, asked(exact, 0))
    assert (work.steps_computed, work.steps_from_cache) == (1, 1)
    assert not torch.equal(asked(view, 3), asked(exact, 3)), "nothing was passed over"


@pytest.mark.parametrize("name", FAMILIES)
def test_both_sides_of_guidance_stay_apart_in_calls_and_in_one_batch(name: str, unet: Callable[[str], Any]) -> None:
    exact = unet(name)
    sides = [Asked(exact, seed=1), Asked(exact, seed=2)]
    alone = [with_unet_cache(exact, 3, 6, Work()) for _ in sides]
    work = Work()
    shared, doubled = with_unet_cache(exact, 3, 6, work), with_unet_cache(exact, 3, 6, Work())
    for step in range(6):
        expected = [asked(view, step) for asked, view in zip(sides, alone, strict=True)]
        order = (0, 1) if step % 2 else (1, 0)
        for side in order:
            assert torch.equal(sides[side](shared, step), expected[side])
        found = together(*sides)(doubled, step)
        assert torch.allclose(found, torch.cat(expected), atol=CLOSE)
    assert (work.steps_computed, work.steps_from_cache) == (4, 8)


def test_sides_that_are_told_the_same_take_one_step_together(unet: Callable[[str], Any]) -> None:
    exact, asked, work = unet("sd15"), Asked(unet("sd15")), Work()
    view = with_unet_cache(exact, 3, 6, work)
    for step in range(6):
        timestep = torch.tensor(981 - 60 * step)
        first, second = asked(view, step, timestep), asked(view, step, timestep)
        assert torch.equal(first, second)
    assert (work.steps_computed, work.steps_from_cache) == (4, 8)


def test_words_are_known_by_value_where_they_are_made_anew(unet: Callable[[str], Any]) -> None:
    exact, work = unet("sd15"), Work()
    view = with_unet_cache(exact, 3, 6, work)
    for step in range(6):
        Asked(exact, seed=1)(view, step)
    assert (work.steps_computed, work.steps_from_cache) == (2, 4)


def test_what_is_remembered_goes_with_the_last_step_and_the_next_run_is_as_the_first(
    unet: Callable[[str], Any],
) -> None:
    exact, asked, work = unet("sd15"), Asked(unet("sd15")), Work()
    view = with_unet_cache(exact, 3, 6, work)
    alive: list[weakref.ref[Tensor]] = []
    gives: Any = view.up_blocks[-1].attentions[-2]

    def note(_: Any, __: Any, given: Any) -> None:
        alive.append(weakref.ref(given[0] if isinstance(given, tuple) else given))

    gives.register_forward_hook(note)
    first = []
    for step in range(6):
        first.append(asked(view, step))
        assert (alive[-1]() is None) == (step == 5)
    assert [torch.equal(asked(view, step), first[step]) for step in range(6)] == [True] * 6
    assert (work.steps_computed, work.steps_from_cache) == (4, 8)


def test_the_module_in_the_cache_stays_as_it_was(unet: Callable[[str], Any]) -> None:
    exact, asked = unet("sd15"), Asked(unet("sd15"))
    names = {name for part in exact.modules() for name in vars(part)}
    before = asked(exact, 1)
    view = with_unet_cache(exact, 2, 6, Work())
    asked(view, 0)
    asked(view, 1)
    assert {name for part in exact.modules() for name in vars(part)} == names
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in exact.modules())
    assert torch.equal(asked(exact, 1), before)
    assert next(view.parameters()) is next(exact.parameters())
    del view
    gc.collect()


@pytest.mark.parametrize("name", FAMILIES)
def test_with_a_lora(name: str, family: Callable[[str], Checkpoint], tmp_path: Path, cache: ModelCache) -> None:
    checkpoint = family(name)
    factors = random_factors(checkpoint.build("unet"), lambda layer: "attn" in layer, 0)
    path = save_peft(tmp_path / "lora.safetensors", {"unet": factors})
    laid = checkpoint.with_adapter(open_lora(checkpoint, path, 1.0))
    with checkpoint.use(cache, "unet") as plain, laid.use(cache, "unet") as adapted:
        asked = Asked(plain)
        view = with_unet_cache(adapted, 3, 6, Work())
        said = asked(adapted, 0)
        assert not torch.allclose(said, asked(plain, 0), atol=1e-3)
        assert torch.equal(asked(view, 0), said)
        assert torch.equal(asked(view, 0, torch.tensor(981)), said)
        assert torch.equal(asked(adapted, 0), said)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_with_an_ip_adapter(name: str, family: Callable[[str], Checkpoint], tmp_path: Path, cache: ModelCache) -> None:
    checkpoint = family(name)
    file = open_ip_adapter(
        checkpoint, save_adapter(tmp_path / "ip.safetensors", adapter_tensors(checkpoint.build("unet")))
    )
    eye = open_image_encoder(save_encoder(tmp_path / "clip"))
    picture = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    shown = show_picture(cache, checkpoint, file, eye, picture, scale=1.0)
    with shown.use(cache, "unet") as adapted:
        pictures = pictures_shown(shown.adapters, "unet", adapted, 1)
        assert pictures is not None
        sides = [Asked(adapted), Asked(adapted)]  # the same words, so that the pictures alone tell them apart
        for asked, embeds in zip(sides, pictures, strict=True):
            asked.told["added_cond_kwargs"] = asked.told.get("added_cond_kwargs", {}) | {"image_embeds": embeds}
        work = Work()
        view = with_unet_cache(adapted, 5, 5, work)
        said = [asked(adapted, 0) for asked in sides]
        assert not torch.allclose(said[0], said[1], atol=1e-3)
        for _ in range(2):  # whole, then from the cache
            for asked, expected in zip(sides, said, strict=True):
                assert torch.equal(asked(view, 0, torch.tensor(981)), expected)
        assert (work.steps_computed, work.steps_from_cache) == (2, 2)


@pytest.mark.parametrize(
    ("steps", "interval", "options", "said"),
    [
        (4, 2, {}, "5 steps or more for a UNet cache"),
        (1, 3, {}, "5 steps or more for a UNet cache"),
        (20, 0, {}, "1 or more steps, got 0"),
        (20, 3, {"depth": 0}, "1 to 12 skip connections, got 0"),
        (20, 3, {"depth": 13}, "1 to 12 skip connections, got 13"),
        (20, 3, {"power": 0.5}, "1 or more, got 0.5"),
        (20, 3, {"power": float("nan")}, "1 or more, got nan"),
    ],
)
def test_numbers_that_cannot_be_are_refused(steps: int, interval: int, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        with_unet_cache(four_levels(), interval, steps, Work(), **options)


def test_few_steps_are_taken_where_all_are_computed() -> None:
    exact = four_levels()
    assert torch.equal(Asked(exact)(with_unet_cache(exact, 1, 1, Work()), 0), Asked(exact)(exact, 0))


def test_other_blocks_and_other_models_are_refused(family: Callable[[str], Checkpoint]) -> None:
    small: Any = {"block_out_channels": (8, 8), "norm_num_groups": 4, "attention_head_dim": 2, "cross_attention_dim": 8}
    blocks: Any = ("SimpleCrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "UpBlock2D")
    other = UNet2DConditionModel(down_block_types=blocks[0], up_block_types=blocks[1], **small)
    with pytest.raises(ValueError, match="got SimpleCrossAttnDownBlock2D"):
        with_unet_cache(other, 3, 20, Work())
    with pytest.raises(ValueError, match="expected a UNet2DConditionModel for a UNet cache, got FluxTransformer2D"):
        with_unet_cache(family("flux_dev").build("transformer"), 3, 20, Work())


def test_a_controlnet_is_refused() -> None:
    exact = four_levels()
    asked = Asked(exact)
    view = with_unet_cache(exact, 3, 6, Work())
    asked.told["mid_block_additional_residual"] = torch.zeros(1, 16, 1, 1)
    with pytest.raises(ValueError, match="no ControlNet"):
        asked(view, 0)


@pytest.mark.parametrize("power", [1.0, 1.4, 2.0, 5.0])
def test_as_many_steps_are_whole_as_even_intervals_have(power: float) -> None:
    for steps in (1, 5, 16, 50, 51):
        for interval in (1, 2, 3, 7, 60):
            found = whole_steps(steps, interval, power)
            assert len(found) == -(-steps // interval)
            assert 0 in found and max(found) < steps
