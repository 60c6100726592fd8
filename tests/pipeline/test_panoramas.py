"""Panoramas: twice as wide as high where a model has them, and closing."""

from dataclasses import replace

import pytest
import torch

from pipeline.checkpoints import Checkpoint
from pipeline.conditioning import Pictures
from pipeline.denoising.latents import decode_latents
from pipeline.denoising.panorama import continued, cut, meeting
from pipeline.denoising.unet_sampler import stretched
from pipeline.fusion import fuse
from pipeline.generation import generate
from pipeline.model_cache import ModelCache
from pipeline.text_encoder import encode_prompt


def test_what_is_continued_goes_on_with_the_other_end():
    row = torch.arange(12.0).view(1, 1, 1, 12)
    beside = continued(row)
    assert beside.flatten().tolist() == [*range(6, 12), *range(12), *range(6)]
    assert torch.equal(cut(beside), row)
    assert torch.equal(cut(beside.repeat_interleave(8, dim=-1), 8), row.repeat_interleave(8, dim=-1))


def test_the_ends_of_a_mean_picture_go_to_one_another():
    grid = torch.tensor([0.0, 0, 0, 2, 4, 4])
    assert meeting(grid).tolist() == [1, 0.5, 0, 2, 3.5, 3]
    assert torch.equal(meeting(torch.ones(2, 3, 8)), torch.ones(2, 3, 8))


def test_a_mean_picture_is_stretched_by_whole_times():
    grid = torch.arange(4.0).view(1, 1, 1, 4)
    assert torch.equal(stretched(grid, 8), meeting(grid).repeat_interleave(2, dim=-1))
    assert torch.equal(stretched(grid, 4), grid)
    with pytest.raises(ValueError, match="whole times 4 columns, got 6"):
        stretched(grid, 6)


def test_a_turned_panorama_is_decoded_as_the_same_one_turned(shipped: Checkpoint, warm: ModelCache):
    latents = torch.randn(1, 16, 8, 16, generator=torch.Generator().manual_seed(0))
    with shipped.use(warm, "vae") as vae, torch.inference_mode():

        def apart(closes: bool) -> float:
            (one, _), (other, _) = (decode_latents(vae, side, closes) for side in (latents, latents.roll(8, -1)))
            return float((one - other.roll(-64, -1)).abs().max())

        assert decode_latents(vae, latents, True)[0].shape == (1, 3, 64, 128)
        assert apart(True) < 0.05 < 0.3 < apart(False)


@pytest.mark.parametrize("times", [1, 4])
def test_generate_draws_one_where_the_model_has_them(shipped: Checkpoint, warm: ModelCache, times: int):
    words = fuse(warm, shipped, encode_prompt(warm, shipped, "a rose"), None)
    side = shipped.family.native_size
    wide = replace(shipped, family=replace(shipped.family, panoramas=True))

    def draw(checkpoint: Checkpoint) -> Pictures:
        width, height = 2 * side * times, side * times
        return generate(warm, checkpoint, words, seed=1, num_inference_steps=1, width=width, height=height)

    drawn = draw(wide)
    assert drawn.pixels.shape == (1, 3, side * times, 2 * side * times)
    assert drawn.latents is not None and drawn.latents.shape[-2:] == (side // 8, side // 4)
    assert any("panorama" in notice for notice in drawn.notices) == (times > 1)
    square = replace(shipped, family=replace(shipped.family, panoramas=False))
    plain = draw(square)
    assert plain.latents is not None and plain.latents.shape[-2:] == (side // 8, side // 8)
