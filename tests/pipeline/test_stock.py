"""What comes from a host's own nodes, and what goes to them, for every family at its tiny size."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoints import Checkpoint, open_checkpoint
from pipeline.conditioning import PromptEmbeds, Space
from pipeline.fusion import fuse
from pipeline.generation import generate
from pipeline.model_cache import ModelCache
from pipeline.stock import (
    against,
    condition_width,
    decode_host_latents,
    encode_for_host,
    image_features_from,
    prompt_embeds_from,
    to_host_latents,
)
from pipeline.text_encoder import encode_prompt

from .devices import FakeDevice
from .family_folders import FAMILY_FOLDERS, save_family


@pytest.fixture(scope="module", params=FAMILY_FOLDERS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(save_family(request.param, tmp_path_factory.mktemp(request.param) / request.param))


def picture(batch: int = 1, height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def test_what_a_family_says_is_as_wide_as_what_it_hears(cache: ModelCache, family: Checkpoint):
    said = encode_prompt(cache, family, "rose")
    assert condition_width(family) == said.tokens.shape[-1]
    heard = prompt_embeds_from(family, said.tokens, said.pooled, said.mask)
    assert torch.equal(heard.tokens, said.tokens) and torch.equal(heard.mask, said.mask)
    assert heard.space.model == said.space.model


def test_a_condition_of_another_width_is_refused_naming_both(family: Checkpoint):
    width = condition_width(family)
    assert width is not None
    with pytest.raises(
        ValueError, match=f"expected a condition {width} wide for {family.folder.name}.* {width + 8} wide"
    ):
        prompt_embeds_from(family, torch.zeros(1, 4, width + 8), None)


def test_pooled_words_are_asked_for_where_the_denoiser_hears_them(cache: ModelCache, family: Checkpoint):
    pooled = encode_prompt(cache, family, "rose").pooled
    tokens = torch.zeros(1, 4, condition_width(family) or 1)
    if {"pooled"} & set(family.family.arguments):
        assert pooled is not None
        for wrong, said in ((None, "got none"), (torch.zeros(1, pooled.shape[-1] + 1), "got one")):
            with pytest.raises(ValueError, match=f"pooled condition {pooled.shape[-1]} wide.*{said}"):
                prompt_embeds_from(family, tokens, wrong)
    else:
        assert prompt_embeds_from(family, tokens, None).pooled is None


def test_latents_of_the_host_come_back_as_they_went(cache: ModelCache, family: Checkpoint):
    with family.use(cache, "vae") as vae:
        config = dict(vae.config)
    known = family.config("vae")
    assert {name: config[name] for name in known} == {name: value for name, value in known.items()}
    encoded = encode_for_host(cache, family, picture(batch=2))
    pixels, alpha = decode_host_latents(cache, family, encoded)
    assert pixels.shape == (2, 3, 64, 64) and alpha.shape == (2, 1, 64, 64)
    assert pixels.min() >= 0 and pixels.max() <= 1
    tiled, _ = decode_host_latents(cache, family, encoded, tiled=True)
    assert tiled.shape == pixels.shape and tiled.isfinite().all()
    scaled = torch.randn(1, encoded.shape[1], 4, 4, generator=torch.Generator().manual_seed(1))
    given = to_host_latents(family, scaled)
    if family.components["vae"].class_name == "AutoencoderKLFlux2":
        assert given is None
        return
    assert given is not None and given.ndim == encoded.ndim
    given = given.reshape(scaled.shape)
    if config.get("latents_mean") is None:
        factor, shift = config["scaling_factor"], config.get("shift_factor") or 0.0
        torch.testing.assert_close((given - shift) * factor, scaled)
    else:
        torch.testing.assert_close(given[0, 1], scaled[0, 1] * config["latents_std"][1] + config["latents_mean"][1])


def test_a_picture_is_cut_to_whole_latents_at_both_ends(cache: ModelCache, family: Checkpoint):
    step = family.family.downscale
    wide = picture(width=64 + step)
    ends = wide[..., step // 2 - 1 : 64 + step // 2 - 1]
    odd = wide[..., : 64 + step - 2]
    torch.testing.assert_close(encode_for_host(cache, family, odd), encode_for_host(cache, family, ends))
    with pytest.raises(ValueError, match=f"at least {step}x{step}"):
        encode_for_host(cache, family, picture(height=step - 1))


def test_latents_of_another_vae_are_refused(cache: ModelCache, family: Checkpoint):
    with pytest.raises(ValueError, match=f"expected latents of .* channels .* for {family.folder.name}"):
        decode_host_latents(cache, family, torch.zeros(1, 3, 4, 4))
    with family.use(cache, "vae") as vae:
        assert not vae.use_tiling, "left as it was"


def test_a_model_with_a_fusion_network_hears_its_own_words_alone(warm: ModelCache, shipped: Checkpoint):
    said = encode_prompt(warm, shipped, "rose")
    with pytest.raises(ValueError, match=r"its own encoder for duet-mini .*768 wide"):
        prompt_embeds_from(shipped, torch.zeros(1, 77, 768), None)
    known = prompt_embeds_from(shipped, said.tokens, said.pooled, said.mask, space=said.space)
    assert known.space == said.space


def test_transparent_pictures_go_both_ways(warm: ModelCache, shipped: Checkpoint):
    latents = encode_for_host(warm, shipped, picture())
    pixels, alpha = decode_host_latents(warm, shipped, latents)
    assert alpha.mean() > 0.9, "an opaque picture stays opaque"
    assert (pixels - picture()).abs().mean() < 0.3


@pytest.mark.parametrize(("count", "side"), [(257, 16), (256, 16), (1, 1), (730, 27)])
def test_features_lie_on_a_square_without_the_class_token(count: int, side: int):
    tokens = torch.arange(count).view(1, count, 1).float()
    features = image_features_from(tokens, torch.zeros(1, 4), "vit", "last_hidden_state")
    assert features.grid == (side, side)
    assert torch.equal(features.tokens, tokens[:, count - side * side :])
    assert str(features.space) == str(features.space).strip() and features.space.model == "vit"


def test_of_a_siglip_without_its_head_the_mean_counts():
    """ComfyUI gives its tokens for what is pooled too."""
    tokens = torch.rand(2, 729, 8, generator=torch.Generator().manual_seed(0))
    features = image_features_from(tokens, tokens, "sigclip", "last_hidden_state")
    assert features.grid == (27, 27) and torch.equal(features.tokens, tokens)
    torch.testing.assert_close(features.pooled, tokens.mean(dim=1))


@pytest.mark.parametrize("count", [0, 3, 255])
def test_features_that_make_no_square_are_refused(count: int):
    with pytest.raises(ValueError, match=f"square picture.*got {count}"):
        image_features_from(torch.zeros(1, count, 8), torch.zeros(1, 4), "vit", "last_hidden_state")


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_sides_of_two_lengths_are_drawn_with_guidance_as_of_one(cache: ModelCache, tmp_path: Path, name: str):
    """As CLIP Text Encode gives them of a prompt that needs two windows."""
    checkpoint = open_checkpoint(save_family(name, tmp_path / name))
    from_picture: dict[str, Any] = {"image": picture(), "strength": 0.5}
    source = from_picture if name == "sd15" else {}  # whose words are drawn by a sampler that needs no one length

    def side(prompt: str) -> PromptEmbeds:
        said = encode_prompt(cache, checkpoint, prompt)
        return prompt_embeds_from(checkpoint, said.tokens, said.pooled)

    def drawn(words: PromptEmbeds) -> torch.Tensor:
        frame: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0, "width": 64, "height": 64}
        return generate(cache, checkpoint, fuse(cache, checkpoint, words, None), seed=1, **frame, **source).pixels

    long, short = side("rose " * 20), side("blue")
    assert long.tokens.shape[1] == 2 * short.tokens.shape[1]
    both = against(long, short)
    assert both.negative is not None and both.negative.tokens.shape == both.tokens.shape == long.tokens.shape
    twice = replace(short, tokens=torch.cat([short.tokens] * 2, dim=1), mask=torch.cat([short.mask] * 2, dim=1))
    assert torch.equal(drawn(both), drawn(replace(long, negative=twice)))
    alone = drawn(replace(short, negative=short))
    torch.testing.assert_close(drawn(against(replace(twice, pooled=short.pooled), short)), alone, atol=1e-4, rtol=0)


def test_sides_far_apart_or_masked_stay_as_they_are():
    def side(length: int, counted: int) -> PromptEmbeds:
        mask = torch.arange(length)[None] < counted
        return PromptEmbeds(torch.rand(1, length, 8), None, mask, Space("model", "layer", 8))

    for wanted, unwanted in ((side(13, 13), side(7, 7)), (side(8, 6), side(4, 4)), (side(8, 8), side(0, 0))):
        both = against(wanted, unwanted)
        assert both.negative is unwanted and both.tokens is wanted.tokens


def spoil_half(module: torch.nn.Module, given: object, output: torch.Tensor) -> torch.Tensor:
    return output * torch.nan if output.dtype == torch.float16 else output


def test_a_lent_vae_that_overflows_in_half_precision_works_once_more(cache: ModelCache, tiny: Checkpoint):
    there = ModelCache(FakeDevice(), 2**32)
    for layer in ("encoder", "decoder"):
        with tiny.use(there, "vae") as vae:
            assert vae.dtype == torch.float16
            getattr(vae, layer).conv_in.register_forward_hook(spoil_half)
    latents = encode_for_host(there, tiny, picture())
    torch.testing.assert_close(latents, encode_for_host(cache, tiny, picture()))
    pixels, _ = decode_host_latents(there, tiny, latents)
    torch.testing.assert_close(pixels, decode_host_latents(cache, tiny, latents)[0])
    with pytest.raises(FloatingPointError, match="tiny: decoding gave values that are no numbers, in float16 and once"):
        decode_host_latents(there, tiny, latents * torch.nan)
    with pytest.raises(FloatingPointError, match="tiny: encoding gave values that are no numbers, in float16 and once"):
        encode_for_host(there, tiny, picture() * torch.nan)
    assert not any(entry.pins for entry in there.stats().entries)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(save_family("sd15", tmp_path_factory.mktemp("along") / "tiny"))


@pytest.mark.parametrize("sigmas", [(14.6146, 3.0, 0.5, 0.0), (2.5, 0.7, 0.0)], ids=["from the top", "from below"])
def test_generate_walks_along_the_sigmas_of_a_host(cache: ModelCache, tiny: Checkpoint, sigmas: tuple[float, ...]):
    """Against the method written out: x += (next - sigma) * noise, for a denoiser that sees variance 1."""
    words = fuse(cache, tiny, encode_prompt(cache, tiny, "rose"), None)
    drawn = generate(cache, tiny, words, seed=3, width=64, height=64, sigmas=sigmas).latents
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, dim=0)
    table = ((1 - kept) / kept).sqrt()
    assert drawn is not None
    latents = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(3))
    latents *= (1 + sigmas[0] ** 2) ** 0.5 if sigmas[0] > 14 else sigmas[0]
    with tiny.use(cache, "unet") as unet, torch.inference_mode():
        for sigma, following in pairwise(sigmas):
            timestep = (table.log() - torch.tensor(sigma).log()).abs().argmin()
            seen = latents / (1 + sigma**2) ** 0.5
            predicted = unet(seen, timestep, encoder_hidden_states=words.tokens, return_dict=False)[0]
            latents = latents + (following - sigma) * predicted
    torch.testing.assert_close(drawn, latents, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sigmas", [(), (1.0,), (1.0, 2.0), (1.0, 1.0, 0.0), (float("inf"), 0.0), (1.0, float("nan"))])
def test_sigmas_that_do_not_fall_are_refused(cache: ModelCache, tiny: Checkpoint, sigmas: tuple[float, ...]):
    words = fuse(cache, tiny, encode_prompt(cache, tiny, "rose"), None)
    with pytest.raises(ValueError, match=f"falling sigmas, got {len(sigmas)}"):
        generate(cache, tiny, words, seed=3, width=64, height=64, sigmas=sigmas)


def test_sigmas_are_for_models_that_a_host_samples_so(warm: ModelCache, shipped: Checkpoint):
    words = fuse(warm, shipped, encode_prompt(warm, shipped, "rose"), None)
    with pytest.raises(ValueError, match="no sigmas for Duet mini"):
        generate(warm, shipped, words, seed=3, width=64, height=64, sigmas=(1.0, 0.0))
