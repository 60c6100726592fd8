"""The four stages on the small model as it ships: real words, real weights, real pictures."""

import pytest
import torch

from pipeline.checkpoints import Checkpoint, open_checkpoint
from pipeline.fusing.ways import in_one_way
from pipeline.fusion import METHODS, fuse
from pipeline.generation import generate
from pipeline.image_encoder import encode_image
from pipeline.model_cache import ModelCache
from pipeline.residency import TorchResidency
from pipeline.text_encoder import LONGEST_PROMPT, encode_prompt

from .devices import FakeDevice
from .folders import PROMPTS, save_stable_diffusion


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(save_stable_diffusion(tmp_path_factory.mktemp("sd") / "tiny-sd"))


def picture(batch: int = 1, seed: int = 0, side: int = 64) -> torch.Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def pooled(warm: ModelCache, shipped: Checkpoint, name: str) -> torch.Tensor:
    found = encode_prompt(warm, shipped, PROMPTS[name]).pooled
    assert found is not None
    return found


def test_chinese_and_english_mean_the_same(warm: ModelCache, shipped: Checkpoint):
    rose_zh, rose_en, truck_zh, truck_en = (
        pooled(warm, shipped, name) for name in ("rose_zh", "rose_en", "truck_zh", "truck_en")
    )
    for same in ((rose_zh, rose_en), (truck_zh, truck_en)):
        assert torch.cosine_similarity(*same) > 0.75
    for other in ((rose_zh, truck_zh), (rose_en, truck_en), (rose_zh, truck_en)):
        assert torch.cosine_similarity(*other) < 0.5


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_any_prompt_is_deterministic_and_finite(warm: ModelCache, shipped: Checkpoint, name: str):
    first, second = (encode_prompt(warm, shipped, PROMPTS[name]) for _ in range(2))
    assert first.tokens.isfinite().all() and first.pooled is not None and first.pooled.isfinite().all()
    assert torch.equal(first.tokens, second.tokens)
    assert first.mask.shape == first.tokens.shape[:2]


def test_a_prompt_of_ten_thousand_characters_is_read_to_its_end(warm: ModelCache, shipped: Checkpoint):
    long = encode_prompt(warm, shipped, "rose " * 1999 + "truck")
    assert int(long.mask.sum()) == 2000
    assert any("windows" in notice for notice in long.notices)


def test_a_prompt_that_is_a_file_is_refused(warm: ModelCache, shipped: Checkpoint):
    with pytest.raises(ValueError, match="at most 20,000 characters, got 20,001"):
        encode_prompt(warm, shipped, "a" * (LONGEST_PROMPT + 1))


def test_unknown_words_are_told(warm: ModelCache, shipped: Checkpoint):
    assert any("not known" in notice for notice in encode_prompt(warm, shipped, PROMPTS["unknown"]).notices)


def test_half_of_an_emoji_is_not_read_and_told(warm: ModelCache, shipped: Checkpoint):
    cut = encode_prompt(warm, shipped, "a \ud83d rose", "\udc39")
    assert any("half of a character" in notice for notice in cut.notices)
    pair = encode_prompt(warm, shipped, "a \ud83c\udf39")
    assert torch.equal(pair.tokens, encode_prompt(warm, shipped, "a \U0001f339").tokens) and not pair.notices


def test_words_that_are_no_numbers_are_told_at_once(shipped: Checkpoint):
    """In whatever they are told: else they would be stored, and another node would be blamed."""
    cache = ModelCache(FakeDevice(), 2**32)
    with shipped.use(cache, "text_encoder") as encoder:
        encoder.text_projection.register_forward_hook(lambda module, given, output: output * torch.inf)
    with pytest.raises(FloatingPointError, match="the text encoder gave values that are no numbers"):
        encode_prompt(cache, shipped, "rose")


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (1, 4, 50, 20), (2, 3, 64, 64), (1, 1, 9, 9)])
def test_pictures_of_any_shape_have_features(warm: ModelCache, shipped: Checkpoint, shape: tuple[int, ...]):
    features = encode_image(warm, shipped, torch.rand(shape))
    side = shipped.family.image_size // 16
    assert features.tokens.shape == (shape[0], side * side, 256) and features.grid == (side, side)
    assert features.pooled.shape == (shape[0], 256)


def test_what_a_mask_hides_is_not_seen(warm: ModelCache, shipped: Checkpoint):
    side = shipped.family.image_size  # another size is resized, and pixels beside the edge are mixed
    mask = torch.zeros(1, side, side)
    mask[:, :, side // 2 :] = 1
    changed = picture(side=side)
    changed[..., : side // 2] = 0
    hidden = encode_image(warm, shipped, picture(side=side), mask), encode_image(warm, shipped, changed, mask)
    seen = encode_image(warm, shipped, picture(side=side)), encode_image(warm, shipped, changed)
    assert torch.equal(hidden[0].pooled, hidden[1].pooled)
    assert not torch.equal(seen[0].pooled, seen[1].pooled)


def test_a_picture_that_is_no_number_is_refused(warm: ModelCache, shipped: Checkpoint):
    broken = picture()
    broken[0, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        encode_image(warm, shipped, broken)


def test_an_imagenet_cnn_gives_features_of_its_own_space(warm: ModelCache, shipped: Checkpoint):
    features = encode_image(warm, shipped, picture(), encoder="efficientnet-lite0")
    assert features.tokens.shape == (1, 49, 1280)
    with pytest.raises(ValueError, match="efficientnet-lite0/imagenet"):
        fuse(warm, shipped, None, features)


@pytest.mark.parametrize("method", METHODS)
def test_the_ends_of_the_dial_are_exactly_one_side_alone(warm: ModelCache, shipped: Checkpoint, method: str):
    words, features = encode_prompt(warm, shipped, "rose"), encode_image(warm, shipped, picture())
    alone = fuse(warm, shipped, words, None), fuse(warm, shipped, None, features)
    for strength, expected in zip((0.0, 1.0), alone, strict=True):
        assert torch.equal(
            fuse(warm, shipped, words, features, method=method, strength=strength).tokens, expected.tokens
        )
    between = fuse(warm, shipped, words, features, method=method, strength=0.5)
    one, other, between = (in_one_way(side, [0]).tokens for side in (*alone, between))
    assert not torch.allclose(between, one) and not torch.allclose(between, other)


def test_an_empty_prompt_leaves_the_picture_alone(warm: ModelCache, shipped: Checkpoint):
    features = encode_image(warm, shipped, picture())
    with_nothing = fuse(warm, shipped, encode_prompt(warm, shipped, "  "), features)
    assert torch.equal(with_nothing.tokens, fuse(warm, shipped, None, features).tokens)


def test_batches_meet_or_are_refused(warm: ModelCache, shipped: Checkpoint):
    words = encode_prompt(warm, shipped, "rose")
    assert fuse(warm, shipped, words, encode_image(warm, shipped, picture(3))).tokens.shape[0] == 3
    two = type(words)(words.tokens.repeat(2, 1, 1), torch.cat([words.pooled] * 2), words.mask.repeat(2, 1), words.space)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="2 prompts and 3 pictures"):
        fuse(warm, shipped, two, encode_image(warm, shipped, picture(3)))


def test_another_models_words_are_refused(warm: ModelCache, shipped: Checkpoint, stable_diffusion: Checkpoint):
    foreign = encode_prompt(warm, stable_diffusion, "a b")
    with pytest.raises(ValueError, match=r"duet-mini/text_encoder.*tiny-sd/text_encoder"):
        fuse(warm, shipped, foreign, None)
    with pytest.raises(ValueError, match=r"tiny-sd/text_encoder.*duet-mini/fusion"):
        generate(warm, stable_diffusion, fuse(warm, shipped, encode_prompt(warm, shipped, "rose"), None), seed=0)


def test_each_picture_of_a_batch_equals_its_own_run(warm: ModelCache, shipped: Checkpoint):
    condition = fuse(warm, shipped, encode_prompt(warm, shipped, "rose"), None)
    batch = generate(warm, shipped, condition, seed=5, width=64, height=64, batch_size=3)
    single = generate(warm, shipped, condition, seed=7, width=64, height=64)
    assert batch.pixels.shape == (3, 3, 64, 64) and batch.alpha.shape == (3, 1, 64, 64)
    assert torch.allclose(batch.pixels[2] * batch.alpha[2], single.pixels[0] * single.alpha[0], atol=1e-4)
    assert not torch.allclose(batch.pixels[0], batch.pixels[1], atol=1e-3)


def test_the_small_model_is_resized_and_says_so(warm: ModelCache, shipped: Checkpoint):
    made = generate(
        warm, shipped, fuse(warm, shipped, encode_prompt(warm, shipped, "rose"), None), seed=0, width=200, height=120
    )
    assert made.pixels.shape == (1, 3, 120, 200)
    assert any("resized to 200x120" in notice for notice in made.notices)
    assert made.alpha[..., :20].amax() == 0  # padded with transparency, not stretched


def test_stable_diffusion_runs_with_guidance(warm: ModelCache, stable_diffusion: Checkpoint):
    words = encode_prompt(warm, stable_diffusion, "a b", "ab")
    assert words.tokens.shape[1] == 77 and words.negative is not None
    condition = fuse(warm, stable_diffusion, words, None)
    steered, plain = (
        generate(
            warm, stable_diffusion, condition, seed=1, num_inference_steps=2, width=66, height=64, guidance_scale=scale
        )
        for scale in (7.5, 1.0)
    )
    assert steered.pixels.shape == (1, 3, 64, 64) and steered.alpha.eq(1).all()
    assert any("66x64 rounded to 64x64" in notice for notice in steered.notices)
    assert not torch.equal(steered.pixels, plain.pixels)


def test_a_model_without_fusion_takes_words_alone(warm: ModelCache, shipped: Checkpoint, stable_diffusion: Checkpoint):
    with pytest.raises(ValueError, match="tiny-sd has no fusion network"):
        fuse(warm, stable_diffusion, None, encode_image(warm, shipped, picture()))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width": 0}, "width must be 16 to 4096, got 0"),
        ({"height": 7}, "height must be 16 to 4096, got 7"),
        ({"width": 100_000}, "width must be 16 to 4096, got 100000"),
        ({"num_inference_steps": 0}, "steps must be 1 to 1000, got 0"),
        ({"batch_size": 65}, "batch size must be 1 to 64, got 65"),
    ],
)
def test_numbers_out_of_range(warm: ModelCache, shipped: Checkpoint, changes: dict[str, int], said: str):
    condition = fuse(warm, shipped, encode_prompt(warm, shipped, "rose"), None)
    with pytest.raises(ValueError, match=said):
        generate(warm, shipped, condition, seed=0, **changes)  # type: ignore[arg-type]


def test_an_interrupt_stops_within_a_step_and_leaves_no_pin(warm: ModelCache, shipped: Checkpoint):
    condition = fuse(warm, shipped, encode_prompt(warm, shipped, "rose"), None)
    before = generate(warm, shipped, condition, seed=3, width=64, height=64)
    steps = []

    def stop(step: int, total: int, preview) -> None:
        steps.append((step, total, preview().shape))
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(warm, shipped, condition, seed=3, on_step=stop)
    side = shipped.family.native_size
    assert steps == [(1, 4, (3, side, side)), (2, 4, (3, side, side))]
    assert not any(entry.pins for entry in warm.stats().entries)
    assert torch.equal(before.pixels, generate(warm, shipped, condition, seed=3, width=64, height=64).pixels)


def test_words_alone_load_no_image_encoder(shipped: Checkpoint):
    cache = ModelCache(TorchResidency("cpu"), 2**32)
    generate(cache, shipped, fuse(cache, shipped, encode_prompt(cache, shipped, "rose"), None), seed=0)
    assert sorted(entry.key.component for entry in cache.stats().entries) == ["fusion", "text_encoder", "unet", "vae"]
