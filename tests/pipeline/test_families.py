"""Every family end to end on diffusers' real classes at tiny sizes: words, a picture, and a mask become pictures."""

import json
import shutil
from collections.abc import Callable
from functools import cache as once
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from pipeline.checkpoints import Checkpoint, open_checkpoint
from pipeline.conditioning import FusedConditioning, Pictures
from pipeline.denoising.diffusers_generation import draw
from pipeline.denoising.latents import SMALLEST_TILE, in_tiles
from pipeline.families import FAMILIES
from pipeline.fusion import fuse
from pipeline.generation import generate
from pipeline.model_cache import ModelCache
from pipeline.residency import OutOfDeviceMemory, TorchResidency
from pipeline.text_encoder import encode_prompt

from .devices import FakeDevice
from .family_folders import FAMILY_FOLDERS, save_family
from .folders import PROMPTS, edit_index

FRAME: dict[str, Any] = {"width": 96, "height": 64, "num_inference_steps": 3}
CLOSE = 1e-4
NAMES = list(FAMILY_FOLDERS)
TASKS = {name: FAMILIES[pipeline].tasks for name, (pipeline, _) in FAMILY_FOLDERS.items()}
FROM_PICTURE = [name for name, tasks in TASKS.items() if tasks and tasks.image_to_image]
INPAINT = [name for name, tasks in TASKS.items() if tasks and tasks.inpaint]
WORDS_ONLY = [name for name in NAMES if name not in INPAINT]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    root = tmp_path_factory.mktemp("families")

    @once
    def opened(name: str) -> Checkpoint:
        return open_checkpoint(save_family(name, root / name))

    return opened


def condition(warm: ModelCache, checkpoint: Checkpoint, prompt: str = "a red rose") -> FusedConditioning:
    return fuse(warm, checkpoint, encode_prompt(warm, checkpoint, prompt, "a blue car"), None)


def picture(seed: int = 0) -> torch.Tensor:
    return torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(seed))


def right_half() -> torch.Tensor:
    mask = torch.zeros(1, 64, 96)
    mask[..., 48:] = 1
    return mask


def framed(**changes: Any) -> dict[str, Any]:
    return FRAME | changes


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, atol=CLOSE)


def pins(cache: ModelCache) -> int:
    return sum(entry.pins for entry in cache.stats().entries)


@pytest.mark.parametrize("name", NAMES)
def test_words_become_pictures(warm: ModelCache, family: Callable[[str], Checkpoint], name: str):
    checkpoint = family(name)
    words, steps = condition(warm, checkpoint), []

    def on_step(step: int, total: int, preview: Callable[[], torch.Tensor]) -> None:
        steps.append((step, total))
        assert preview().shape == (3, 64, 96)

    batch = generate(warm, checkpoint, words, seed=5, batch_size=2, guidance_scale=3.0, on_step=on_step, **FRAME)
    single = generate(warm, checkpoint, words, seed=6, guidance_scale=3.0, **FRAME)
    assert batch.pixels.shape == (2, 3, 64, 96) and batch.alpha.eq(1).all()
    assert steps == [(number + 1, len(steps)) for number in range(len(steps))] and len(steps) >= 3
    assert same(batch.pixels[1], single.pixels[0])
    assert not same(batch.pixels[0], batch.pixels[1])
    other = generate(warm, checkpoint, condition(warm, checkpoint, "a blue car"), seed=6, guidance_scale=3.0, **FRAME)
    assert not torch.allclose(other.pixels, single.pixels, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_guidance_reaches_the_model(warm: ModelCache, family: Callable[[str], Checkpoint], name: str):
    checkpoint = family(name)
    words = condition(warm, checkpoint)
    plain, steered = (
        generate(warm, checkpoint, words, seed=5, guidance_scale=scale, **FRAME).pixels for scale in (1.0, 6.0)
    )
    if name == "flux_schnell":  # distilled without it
        assert torch.equal(plain, steered)
    else:
        assert not torch.allclose(plain, steered, atol=1e-6)
    assert (words.negative is not None) == checkpoint.family.takes_negative


@pytest.mark.parametrize("name", FROM_PICTURE)
def test_a_picture_becomes_another(warm: ModelCache, family: Callable[[str], Checkpoint], name: str):
    checkpoint = family(name)
    words, steps = condition(warm, checkpoint), []
    options: dict[str, Any] = {"image": picture(), "strength": 0.7, "guidance_scale": 3.0, **FRAME}
    batch = generate(
        warm, checkpoint, words, seed=5, batch_size=2, on_step=lambda step, total, _: steps.append(total), **options
    )
    single = generate(warm, checkpoint, words, seed=6, **options)
    assert batch.pixels.shape == (2, 3, 64, 96)
    assert len(steps) == (3 if name in ("lcm", "sd15") else 2) and set(steps) == {len(steps)}
    assert same(batch.pixels[1], single.pixels[0]) and not same(batch.pixels[0], batch.pixels[1])
    other = generate(warm, checkpoint, words, seed=6, **framed(**options | {"image": picture(1)}))
    assert not same(other.pixels, single.pixels)


@pytest.mark.parametrize("name", INPAINT)
def test_only_what_the_mask_covers_is_drawn_anew(warm: ModelCache, family: Callable[[str], Checkpoint], name: str):
    checkpoint = family(name)
    options: dict[str, Any] = {"image": picture(), "mask": right_half(), "strength": 1.0, **FRAME}
    words = condition(warm, checkpoint)
    batch = generate(warm, checkpoint, words, seed=5, batch_size=2, **options)
    single = generate(warm, checkpoint, words, seed=6, **options)
    assert same(batch.pixels[1], single.pixels[0])
    assert torch.equal(batch.pixels[..., :48], picture().expand(2, -1, -1, -1)[..., :48])
    assert not same(batch.pixels[..., 48:], picture()[..., 48:])
    assert not same(batch.pixels[0], batch.pixels[1])


def test_a_mask_of_other_proportions_speaks_for_all_of_its_picture(
    warm: ModelCache, family: Callable[[str], Checkpoint]
):
    """The frame cuts both alike, and what was marked at the cut side is marked still."""
    checkpoint, wide = family("sd15"), torch.rand(1, 3, 64, 192, generator=torch.Generator().manual_seed(3))
    square = torch.zeros(1, 64, 64)
    square[..., :24] = 1
    drawn = generate(warm, checkpoint, condition(warm, checkpoint), seed=0, image=wide, mask=square, **FRAME)
    kept = (drawn.pixels == wide[..., 48:144]).all(dim=1).all(dim=-2)[0]
    assert kept[28:].all() and not kept[:20].any()


@pytest.mark.parametrize("name", WORDS_ONLY)
def test_a_task_that_diffusers_has_not_is_refused(warm: ModelCache, family: Callable[[str], Checkpoint], name: str):
    checkpoint = family(name)
    words = condition(warm, checkpoint)
    if name not in FROM_PICTURE:
        with pytest.raises(ValueError, match=f"{checkpoint.family.name}, since diffusers has no image-to-image"):
            generate(warm, checkpoint, words, seed=0, image=picture(), **FRAME)
    with pytest.raises(ValueError, match=f"{checkpoint.family.name}, since diffusers has no inpainting"):
        generate(warm, checkpoint, words, seed=0, image=picture(), mask=right_half(), **FRAME)
    assert pins(warm) == 0


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupt_in_the_first_step_leaves_nothing(
    warm: ModelCache, family: Callable[[str], Checkpoint], name: str
):
    checkpoint = family(name)
    words = condition(warm, checkpoint)
    before = generate(warm, checkpoint, words, seed=3, **FRAME)

    def stop(step: int, total: int, preview: object) -> None:
        assert step == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(warm, checkpoint, words, seed=3, on_step=stop, **FRAME)
    assert pins(warm) == 0
    assert torch.equal(before.pixels, generate(warm, checkpoint, words, seed=3, **FRAME).pixels)


# --- text ---

LONG = "a red rose and a blue car, " * 60


@pytest.mark.parametrize("name", NAMES)
def test_a_long_prompt_is_joined_or_what_is_dropped_is_quoted(
    warm: ModelCache, family: Callable[[str], Checkpoint], name: str
):
    checkpoint = family(name)
    short, long = (encode_prompt(warm, checkpoint, text) for text in ("a red rose", LONG))
    joins = checkpoint.family.joins_windows or checkpoint.family.pads_to_window
    assert (long.tokens.shape[1] > 2 * short.tokens.shape[1]) == joins or name in ("qwen_image", "z_image")
    assert any(("windows of" if joins else "not heard by it: '") in notice for notice in long.notices)
    if long.negative is not None and name not in ("qwen_image", "z_image"):
        assert long.negative.tokens.shape == long.tokens.shape
    assert not any("windows" in notice or "heard" in notice for notice in short.notices)


@pytest.mark.parametrize("name", NAMES)
def test_any_prompt_is_encoded(warm: ModelCache, family: Callable[[str], Checkpoint], name: str):
    checkpoint = family(name)
    for text in (*PROMPTS.values(), "\0", "\n\n", "()[]:1.2"):
        found = encode_prompt(warm, checkpoint, text)
        assert found.tokens.isfinite().all() and found.mask.shape == found.tokens.shape[:2], text
    first, again = (encode_prompt(warm, checkpoint, PROMPTS["emoji"]) for _ in range(2))
    assert torch.equal(first.tokens, again.tokens)
    for brackets in ("(" * 10_000, "(" * 9_999 + ")" * 9_999):
        with pytest.raises(ValueError, match="at most 32 brackets open at once, got more at character 33"):
            encode_prompt(warm, checkpoint, brackets)
    with pytest.raises(ValueError, match="at most 20,000 characters, got 20,001"):
        encode_prompt(warm, checkpoint, "a" * 20_001)


def test_words_that_t5_does_not_know_are_told(warm: ModelCache, family: Callable[[str], Checkpoint]):
    for name in ("flux_dev", "sd3", "pixart_alpha"):
        notices = encode_prompt(warm, family(name), f"a {PROMPTS['rose_zh']} rose").notices
        assert any("not known to the tokenizer" in notice and PROMPTS["rose_zh"][0] in notice for notice in notices)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "pixart_sigma", "kolors", "sana"])
def test_a_long_prompt_is_drawn(warm: ModelCache, family: Callable[[str], Checkpoint], name: str):
    checkpoint = family(name)
    drawn = generate(warm, checkpoint, condition(warm, checkpoint, LONG), seed=0, guidance_scale=3.0, **FRAME)
    assert drawn.pixels.shape == (1, 3, 64, 96)


def test_a_weight_is_a_share_of_the_way_from_nothing(warm: ModelCache, family: Callable[[str], Checkpoint]):
    checkpoint = family("sd15")
    nothing, plain, none, twice = (
        encode_prompt(warm, checkpoint, text).tokens for text in ("", "red", "(red:0)", "(red:2)")
    )
    assert same(none[:, 1:4], nothing[:, 1:4])  # a letter is a token here
    assert same(twice[:, 1:4], nothing[:, 1:4] + 2 * (plain[:, 1:4] - nothing[:, 1:4]))
    assert same(twice[:, 4:], plain[:, 4:]) and not same(twice, plain)
    assert torch.equal(encode_prompt(warm, checkpoint, "(red:1.0)").tokens, plain)


def test_escaped_brackets_are_heard(warm: ModelCache, family: Callable[[str], Checkpoint]):
    checkpoint = family("sd15")
    escaped, plain = (encode_prompt(warm, checkpoint, text).tokens for text in (r"\(red\)", "red"))
    assert not torch.equal(escaped, plain)


@pytest.mark.parametrize("name", [name for name in NAMES if not FAMILIES[FAMILY_FOLDERS[name][0]].pads_to_window])
def test_an_encoder_without_weights_says_so(warm: ModelCache, family: Callable[[str], Checkpoint], name: str):
    checkpoint = family(name)
    weighted, plain = (encode_prompt(warm, checkpoint, text) for text in ("a (red:1.3) rose", "a red rose"))
    assert torch.equal(weighted.tokens, plain.tokens)
    assert any("no weighted phrases" in notice for notice in weighted.notices) and not plain.notices


def test_sdxl_hears_zeros_where_nothing_is_asked_for(warm: ModelCache, tmp_path: Path):
    folder = save_family("sdxl", tmp_path / "xl")
    for forced in (True, False):
        edit_index(folder, force_zeros_for_empty_prompt=forced)
        empty = encode_prompt(warm, open_checkpoint(folder), "rose").negative
        assert empty is not None and empty.pooled is not None
        assert (not empty.tokens.any() and not empty.pooled.any()) == forced


def test_stable_diffusion_3_does_without_its_largest_encoder(warm: ModelCache, tmp_path: Path):
    folder = save_family("sd3", tmp_path / "sd3")
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / part)
    edit_index(folder, text_encoder_3=[None, None], tokenizer_3=[None, None])
    checkpoint = open_checkpoint(folder)
    words = condition(warm, checkpoint)
    assert words.tokens.shape == (1, 77 + 256, 32) and not words.tokens[:, 77:].any()
    assert generate(warm, checkpoint, words, seed=0, **FRAME).pixels.shape == (1, 3, 64, 96)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_an_inpainting_model_wants_a_picture_and_a_mask(warm: ModelCache, tmp_path: Path, name: str):
    folder = save_family(name, tmp_path / name)
    config = json.loads((folder / "unet" / "config.json").read_text())
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel.from_config(config | {"in_channels": 9})
    unet.save_pretrained(str(folder / "unet"))
    checkpoint = open_checkpoint(folder)
    words = condition(warm, checkpoint)
    for given, said in (({}, "words alone"), ({"image": picture()}, "a picture alone")):
        with pytest.raises(ValueError, match=f"whose denoiser has 5 channels for them; got {said}"):
            generate(warm, checkpoint, words, seed=0, **framed(**given))
    first, other = (
        generate(warm, checkpoint, words, seed=0, **framed(image=picture(seed), mask=right_half())).pixels[..., 48:]
        for seed in (0, 1)
    )
    assert not same(first, other)  # the denoiser sees what is around the hole


def test_a_distilled_klein_has_no_guidance(warm: ModelCache, tmp_path: Path):
    folder = save_family("flux2_klein", tmp_path / "klein")
    for distilled in (True, False):
        edit_index(folder, is_distilled=distilled)
        checkpoint = open_checkpoint(folder)
        words = condition(warm, checkpoint)
        plain, steered = (
            generate(warm, checkpoint, words, seed=5, guidance_scale=scale, **FRAME).pixels for scale in (1.0, 6.0)
        )
        assert torch.equal(plain, steered) == distilled


# --- the precision of a GPU, on a device that only counts ---


@pytest.mark.parametrize(
    "name", ["sd15", "sdxl", "kolors", "sd3", "flux_dev", "flux2_klein", "z_image", "sana_sprint", "hunyuan_dit"]
)
def test_half_precision_draws_and_stays_as_it_was(family: Callable[[str], Checkpoint], name: str):
    checkpoint, cache = family(name), ModelCache(FakeDevice(), 2**32)
    words = condition(cache, checkpoint)
    half = checkpoint.family.device_dtype
    assert words.tokens.dtype == half != torch.float32
    options: list[dict[str, Any]] = [{}]
    options += [{"image": picture()}] if name in FROM_PICTURE else []
    options += [{"image": picture(), "mask": right_half()}] if name in INPAINT else []
    for given in options:
        drawn = generate(cache, checkpoint, words, seed=0, guidance_scale=3.0, **framed(**given))
        assert drawn.pixels.dtype == torch.float32 and drawn.pixels.isfinite().all() and drawn.pixels.std() > 0.01
    for component in ("vae", "unet" if checkpoint.has("unet") else "transformer"):
        expected = checkpoint.family.vae_dtype or half if component == "vae" else half
        with checkpoint.use(cache, component, expected) as module:
            assert module.dtype == expected  # a pipeline may not change what the cache lends
    assert len(cache.stats().entries) == len({entry.key.component for entry in cache.stats().entries})


def test_a_decoder_that_overflows_in_half_precision_is_tried_in_full(tmp_path: Path):
    folder = save_family("sd15", tmp_path / "sd15")
    decoder: Any = AutoencoderKL.from_pretrained(str(folder / "vae"))
    with torch.no_grad():
        decoder.decoder.conv_in.weight *= 1e6  # inf as float16; what comes after it is normalised
    decoder.save_pretrained(str(folder / "vae"))
    checkpoint, cache = open_checkpoint(folder), ModelCache(FakeDevice(), 2**32)
    assert generate(cache, checkpoint, condition(cache, checkpoint), seed=0, **FRAME).pixels.isfinite().all()
    used = {entry.key.dtype for entry in cache.stats().entries if entry.key.component == "vae"}
    assert used == {torch.float16, torch.float32}


# --- what goes wrong ---


def test_our_sampler_is_the_pipeline_of_diffusers(warm: ModelCache, family: Callable[[str], Checkpoint]):
    for name in ("sd15", "sd2", "sd_turbo"):
        checkpoint = family(name)
        words = condition(warm, checkpoint)
        ours = generate(warm, checkpoint, words, seed=5, guidance_scale=4.0, **FRAME).latents
        with checkpoint.use(warm, "unet") as unet, checkpoint.use(warm, "vae") as vae, torch.inference_mode():
            theirs = draw(
                checkpoint,
                unet,
                vae,
                words,
                seed=5,
                guidance_scale=4.0,
                source=None,
                on_step=lambda step, total, latents: None,
                **FRAME,
            )
        assert ours is not None and same(ours, theirs)


def run_out_of_memory(largest: int) -> Callable[..., None]:
    """A hook before a real module: it raises as a device does, for inputs of more than ``largest`` a side."""

    def hook(module: torch.nn.Module, values: tuple[torch.Tensor, ...]) -> None:
        if max(values[0].shape[-2:]) > largest:
            raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    return hook


def test_out_of_memory_in_decoding_is_tried_once_in_tiles(warm: ModelCache, family: Callable[[str], Checkpoint]):
    checkpoint = family("sd15")
    words = condition(warm, checkpoint)
    with checkpoint.use(warm, "vae") as vae:
        tile = vae.tile_latent_min_size
        hook = vae.decoder.register_forward_pre_hook(run_out_of_memory(tile))
    try:
        drawn = generate(warm, checkpoint, words, seed=0, batch_size=2, **FRAME)
        assert drawn.pixels.shape == (2, 3, 64, 96)
        assert any("in tiles" in notice for notice in drawn.notices) and not vae.use_tiling
        hook.remove()
        hook = vae.decoder.register_forward_pre_hook(run_out_of_memory(0))
        with pytest.raises(OutOfDeviceMemory, match="1 of 96x64 did not fit into memory while they were drawn"):
            generate(warm, checkpoint, words, seed=0, **FRAME)
        assert not vae.use_tiling and pins(warm) == 0
    finally:
        hook.remove()
    assert not any("in tiles" in notice for notice in generate(warm, checkpoint, words, seed=0, **FRAME).notices)


@pytest.mark.parametrize("name", ["sd15", "flux2_klein", "qwen_image", "sana"])
def test_tiles_are_smaller_than_what_did_not_fit(warm: ModelCache, family: Callable[[str], Checkpoint], name: str):
    """Of the size too that the VAE was trained on, which diffusers' own tiles leave whole."""
    checkpoint = family(name)
    with checkpoint.use(warm, "vae") as vae:
        view = in_tiles(vae, 128)
        assert view.use_tiling and not vae.use_tiling
        size = getattr(vae, "tile_latent_min_size", None)
        if size is None:
            assert view.tile_sample_min_width <= 512
            return
        view.tile_latent_min_size = vae.tile_latent_min_size = 128  # as of a VAE that was trained on large pictures
        view = in_tiles(vae, 128)
        vae.tile_latent_min_size = size
        assert (view.tile_latent_min_size, in_tiles(vae, 8).tile_latent_min_size) == (64, min(size, SMALLEST_TILE))
        assert view.tile_sample_min_size == 64 * checkpoint.config("vae")["sample_size"] // size
        latents = torch.randn(1, view.config.latent_channels, 128, 96, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            whole, tiled = (seen.decode(latents, return_dict=False)[0] for seen in (vae, view))
        assert whole.shape == tiled.shape and 0 < (whole - tiled).abs().mean() < 0.2 * whole.std()


def test_a_batch_that_does_not_fit_is_decoded_one_by_one(warm: ModelCache, family: Callable[[str], Checkpoint]):
    checkpoint = family("sd15")
    words = condition(warm, checkpoint)
    expected = generate(warm, checkpoint, words, seed=0, batch_size=2, **FRAME)

    def one_at_a_time(module: torch.nn.Module, values: tuple[torch.Tensor, ...]) -> None:
        if len(values[0]) > 1:
            raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    with checkpoint.use(warm, "vae") as vae:
        hook = vae.decoder.register_forward_pre_hook(one_at_a_time)
    try:
        drawn = generate(warm, checkpoint, words, seed=0, batch_size=2, **FRAME)
    finally:
        hook.remove()
    assert same(drawn.pixels, expected.pixels) and not any("in tiles" in notice for notice in drawn.notices)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_models_that_lie_idle_make_room_before_anything_is_given_up(tmp_path: Path, part: str):
    checkpoint, residency = open_checkpoint(save_family("sd15", tmp_path / "sd15")), FakeDevice()
    cache = ModelCache(residency, 2**32)
    words = condition(cache, checkpoint)
    expected = generate(cache, checkpoint, words, seed=0, **FRAME)
    idle = residency.adopt(torch.nn.Linear(64, 64), "of another pack")
    residency.acquire(idle)
    residency.release(idle)

    def while_it_is_there(module: torch.nn.Module, values: tuple[torch.Tensor, ...]) -> None:
        if idle.on_device:
            raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    with checkpoint.use(cache, part, torch.float16 if part == "unet" else None) as module:
        (module if part == "unet" else module.decoder).register_forward_pre_hook(while_it_is_there)
    drawn = generate(cache, checkpoint, words, seed=0, **FRAME)
    assert not idle.on_device
    assert torch.equal(drawn.pixels, expected.pixels) and pins(cache) == 0
    assert not any("in tiles" in notice for notice in drawn.notices)


@pytest.mark.parametrize("name", ["sd15", "flux_dev", "sana"])
def test_out_of_memory_in_denoising_is_said_and_passes(
    warm: ModelCache, family: Callable[[str], Checkpoint], name: str
):
    checkpoint = family(name)
    words = condition(warm, checkpoint)
    before = generate(warm, checkpoint, words, seed=0, **FRAME)
    with checkpoint.use(warm, "unet" if checkpoint.has("unet") else "transformer") as denoiser:
        first = next(module for module in denoiser.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear))
        hook = first.register_forward_pre_hook(run_out_of_memory(0))
    with pytest.raises(OutOfDeviceMemory, match=r"did not fit into memory.*tried to allocate 9 GiB"):
        generate(warm, checkpoint, words, seed=0, **FRAME)
    hook.remove()
    assert pins(warm) == 0
    assert torch.equal(generate(warm, checkpoint, words, seed=0, **FRAME).pixels, before.pixels)


def test_latents_that_are_no_numbers_make_no_picture(cache: ModelCache, tmp_path: Path):
    # A cache of its own: in the session's, whoever has the same weights would be lent the spoilt ones.
    checkpoint = open_checkpoint(save_family("flux_schnell", tmp_path / "broken"))
    words = condition(cache, checkpoint)
    with checkpoint.use(cache, "transformer") as denoiser, torch.no_grad():
        denoiser.proj_out.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="broken: denoising gave values that are no numbers"):
        generate(cache, checkpoint, words, seed=0, **FRAME)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strength": 1.5}, "denoise must be 0 to 1, got 1.5"),
        ({"mask": right_half()}, "expected a picture for the mask, got a mask alone"),
        ({"image": torch.rand(0, 3, 64, 96)}, r"expected a picture of shape \(B, 3, H, W\), got \(0, 3, 64, 96\)"),
        ({"image": torch.rand(3, 64, 96)}, r"expected a picture of shape \(B, 3, H, W\), got \(3, 64, 96\)"),
        ({"image": picture() * torch.nan}, "found NaN or infinity"),
        ({"image": picture(), "mask": torch.ones(3, 64, 96)}, r"a mask of shape \(1 or 1, H, W\), got \(3, 64, 96\)"),
        ({"width": 0}, "width must be 16 to 4096, got 0"),
    ],
)
def test_bad_input_is_refused_before_anything_is_read(
    warm: ModelCache, family: Callable[[str], Checkpoint], options: dict[str, Any], said: str
):
    checkpoint = family("sd15")
    empty = ModelCache(TorchResidency("cpu"), 2**30)
    with pytest.raises(ValueError, match=said):
        generate(empty, checkpoint, condition(warm, checkpoint), seed=0, **framed(**options))
    assert empty.stats().entries == ()


def test_pictures_and_conditions_meet_or_are_refused(warm: ModelCache, family: Callable[[str], Checkpoint]):
    checkpoint = family("sd15")
    words = condition(warm, checkpoint)
    three = torch.cat([picture(seed) for seed in range(3)])

    def drawn(image: torch.Tensor, seed: int) -> Pictures:
        return generate(warm, checkpoint, words, seed=seed, image=image, strength=0.7, **FRAME)

    assert same(drawn(three, 4).pixels[2], drawn(three[2:], 6).pixels[0])
    pair = FusedConditioning(words.tokens.repeat(2, 1, 1), None, words.mask.repeat(2, 1), words.space)
    with pytest.raises(ValueError, match="got 3 pictures and 2 conditions"):
        generate(warm, checkpoint, pair, seed=0, image=three, **FRAME)


def test_a_little_strength_is_one_step(warm: ModelCache, family: Callable[[str], Checkpoint]):
    for name in ("sd_turbo", "flux_dev", "sana_sprint"):
        checkpoint, steps = family(name), []
        drawn = generate(
            warm,
            checkpoint,
            condition(warm, checkpoint),
            seed=0,
            image=picture(),
            strength=0.0,
            on_step=lambda step, total, _, steps=steps: steps.append(total),
            **FRAME,
        )
        assert steps == [1] and any("one is taken" in notice for notice in drawn.notices), name


def test_sizes_of_a_family_are_rounded_and_told(warm: ModelCache, family: Callable[[str], Checkpoint]):
    checkpoint = family("sana")
    drawn = generate(warm, checkpoint, condition(warm, checkpoint), seed=0, **framed(width=100, height=60))
    assert drawn.pixels.shape == (1, 3, 64, 96)
    assert any("100x60 rounded to 96x64, multiples of 32" in notice for notice in drawn.notices)


def test_the_table_says_what_is_tested():
    table = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    heads = next(line for line in table.splitlines() if line.startswith("| family"))
    first = table[table.index(heads) :].partition("\n\n")[0]  # others follow
    rows = [line.strip("| ").split(" | ") for line in first.splitlines() if "`[" in line]
    for test in (
        test_words_become_pictures,
        test_a_picture_becomes_another,
        test_only_what_the_mask_covers_is_drawn_anew,
    ):
        assert f"`{test.__name__}`" in heads
    cases = {row[1].strip("`[]"): row for row in rows}
    assert cases.keys() == set(NAMES)
    for name, row in cases.items():
        told = [cell if cell == "no pipeline" else cell.strip("`[]") for cell in row[1:4]]
        assert told == [name, *(name if name in there else "no pipeline" for there in (FROM_PICTURE, INPAINT))]
