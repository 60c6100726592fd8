"""The fusion network's two pictures: what words and style mean together, and beside it what the words mean alone."""

import pytest
import torch

from pipeline.checkpoints import Checkpoint, open_checkpoint
from pipeline.fusing.fusion_network import FusionNetwork
from pipeline.fusion import METHODS, fuse
from pipeline.generation import generate
from pipeline.image_encoder import encode_image
from pipeline.model_cache import ModelCache
from pipeline.refinement import refine
from pipeline.text_encoder import encode_prompt

from .folders import save_mini

PICTURE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=[True, False], ids=["two pictures", "one"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(save_mini(tmp_path_factory.mktemp("beside") / "tiny", words_beside=request.param))


def network(words_beside: bool) -> FusionNetwork:
    torch.manual_seed(0)
    return FusionNetwork(
        text_width=8, image_width=6, width=16, hidden=16, grid=2, channels=3, ways=4, words_beside=words_beside
    ).eval()


@torch.no_grad()
def test_the_second_picture_is_what_the_words_mean_alone():
    words, picture = torch.randn(5, 8), torch.randn(5, 6)
    one, two = network(False), network(True)
    both = two(words, picture)
    torch.testing.assert_close(both[..., :3], one(words, picture))
    torch.testing.assert_close(both[..., 3:], one(words, None)[:, :4])  # of four ways the first
    for given in ((words, None), (None, picture), (None, None)):
        alone = two(*given)
        assert torch.equal(alone[..., :3], alone[..., 3:])
        torch.testing.assert_close(alone[..., :3], one(*given))


@pytest.mark.parametrize("method", METHODS)
def test_it_draws_by_every_method_and_the_dial_has_the_same_ends(small: Checkpoint, warm: ModelCache, method: str):
    prompt, features = encode_prompt(warm, small, "a red rose"), encode_image(warm, small, PICTURE)
    dial = [fuse(warm, small, prompt, features, method=method, strength=strength) for strength in (0.0, 0.3, 1.0)]
    words, picture = fuse(warm, small, prompt, None), fuse(warm, small, None, features)
    assert torch.equal(dial[0].tokens, words.tokens) and torch.equal(dial[2].tokens, picture.tokens)
    for condition in dial:
        made = generate(warm, small, condition, seed=1, num_inference_steps=2, width=64, height=64)
        assert torch.isfinite(made.pixels).all() and made.pixels.shape[1] == 3


def test_refining_moves_the_first_picture_alone(small: Checkpoint, warm: ModelCache):
    prompt, features = encode_prompt(warm, small, "a red rose"), encode_image(warm, small, PICTURE)
    condition = fuse(warm, small, prompt, features)
    refined = refine(warm, small, condition, features, num_steps=5, radius=0.5).conditioning
    assert refined.tokens.shape == condition.tokens.shape and refined.space == condition.space
    assert not torch.equal(refined.tokens[..., :16], condition.tokens[..., :16])
    assert torch.equal(refined.tokens[..., 16:], condition.tokens[..., 16:])
