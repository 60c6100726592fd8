"""Words leave open in which of several ways they are drawn; the seed chooses, the same for every method and batch."""

import pytest
import torch

from pipeline.checkpoints import Checkpoint
from pipeline.conditioning import FusedConditioning, Pictures
from pipeline.fusing.ways import in_one_way, ways_of
from pipeline.fusion import METHODS, fuse
from pipeline.generation import generate
from pipeline.image_encoder import encode_image
from pipeline.mini.examples import WAYS
from pipeline.model_cache import ModelCache
from pipeline.refinement import refine
from pipeline.text_encoder import encode_prompt

SEEN = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def words(warm: ModelCache, shipped: Checkpoint) -> FusedConditioning:
    return fuse(warm, shipped, encode_prompt(warm, shipped, "a beautiful rose"), None)


def draw(warm: ModelCache, shipped: Checkpoint, condition: FusedConditioning, seed: int, count: int = 1) -> Pictures:
    side = shipped.family.native_size
    return generate(
        warm, shipped, condition, seed=seed, num_inference_steps=1, width=side, height=side, batch_size=count
    )  # fmt: skip


def over_white(made: Pictures) -> torch.Tensor:
    return made.pixels * made.alpha + 1 - made.alpha


def test_the_seed_chooses_among_as_many_pictures_as_there_are_ways(
    words: FusedConditioning, warm: ModelCache, shipped: Checkpoint
):
    ways = ways_of(words)
    assert ways == len(WAYS)
    drawn = [over_white(draw(warm, shipped, words, seed)) for seed in range(2 * ways)]

    def apart(one: int, other: int) -> float:
        return float((drawn[one] - drawn[other]).abs().mean())

    for one in range(ways):
        assert apart(one, one + ways) < min(apart(one, other) for other in range(ways) if other != one), one
    batch = over_white(draw(warm, shipped, words, 3, count=4))
    for number in range(4):
        assert torch.allclose(batch[number], drawn[3 + number][0], atol=1e-4)


def test_the_more_the_picture_says_the_less_is_left_open(warm: ModelCache, shipped: Checkpoint):
    prompt, features = encode_prompt(warm, shipped, "a red rose"), encode_image(warm, shipped, SEEN)
    alone = fuse(warm, shipped, prompt, None)
    for method in METHODS:
        for strength in (0.0, 0.2, 0.5, 0.8, 1.0):
            fused = fuse(warm, shipped, prompt, features, method=method, strength=strength)
            decided = strength == 1 or (method == "concat" and strength >= 0.5)
            assert ways_of(fused) == (1 if decided else len(WAYS)), (method, strength)
            assert fused.mask.shape == fused.tokens.shape[:2]
            if strength == 0:
                assert torch.equal(fused.tokens, alone.tokens)
            if strength == 1:
                assert torch.equal(fused.tokens, fuse(warm, shipped, None, features).tokens)
    assert ways_of(fuse(warm, shipped, prompt, features)) == 1


def test_only_what_the_dial_looks_at_is_fused(warm: ModelCache, shipped: Checkpoint):
    prompt, features = encode_prompt(warm, shipped, "a red rose"), encode_image(warm, shipped, SEEN)
    asked: list[int] = []  # inputs that go through the network
    with shipped.use(warm, "fusion") as network:
        hook = network.entry.register_forward_pre_hook(lambda _, given: asked.append(given[0][..., 0].numel()))
    try:
        for strength, wanted in {0.0: len(WAYS), 0.2: len(WAYS) + 1, 0.5: 1, 0.8: 2, 1.0: 1}.items():
            asked.clear()
            fuse(warm, shipped, prompt, features, strength=strength)
            assert sum(asked) == wanted, strength
    finally:
        hook.remove()


def test_a_condition_in_one_way_is_what_that_seed_would_take(
    words: FusedConditioning, warm: ModelCache, shipped: Checkpoint
):
    chosen = in_one_way(words, [2])
    assert ways_of(chosen) == 1 and chosen.mask.shape == chosen.tokens.shape[:2]
    assert torch.equal(chosen.tokens, words.tokens.chunk(len(WAYS), dim=1)[2])
    assert torch.equal(in_one_way(words, [2 + len(WAYS)]).tokens, chosen.tokens)
    assert torch.equal(draw(warm, shipped, chosen, 2).pixels, draw(warm, shipped, words, 2).pixels)


def test_a_negative_is_drawn_in_the_way_of_its_picture(warm: ModelCache, shipped: Checkpoint):
    prompt = encode_prompt(warm, shipped, "a red rose", "a truck")
    fused = in_one_way(fuse(warm, shipped, prompt, None), [1])
    assert fused.negative is not None and fused.negative.tokens.shape == fused.tokens.shape
    away = fuse(warm, shipped, encode_prompt(warm, shipped, "a truck"), None)
    assert torch.equal(fused.negative.tokens, in_one_way(away, [1]).tokens)


def test_refine_goes_on_from_the_first_way_alone(words: FusedConditioning, warm: ModelCache, shipped: Checkpoint):
    refined = refine(warm, shipped, words, encode_image(warm, shipped, SEEN), num_steps=1).conditioning
    assert ways_of(refined) == 1 and refined.mask.shape == refined.tokens.shape[:2]
