"""Ways for words and a picture to meet: over the sphere, by attention, and side by side in models without a network."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from safetensors.torch import load_file, save_file

from pipeline.checkpoints import Checkpoint, CheckpointError, open_checkpoint
from pipeline.conditioning import FusedConditioning, ImageFeatures, Space
from pipeline.fusing.cross_attention import TokenCrossAttention
from pipeline.fusing.token_fusion import join_tokens, open_token_adapter
from pipeline.fusion import fuse, slerp
from pipeline.generation import generate
from pipeline.image_encoder import encode_image
from pipeline.model_cache import ModelCache
from pipeline.text_encoder import encode_prompt
from pipeline.vision.image_encoders import open_image_encoder

from .folders import save_stable_diffusion

WORDS_WIDTH, IMAGE_WIDTH = 32, 16  # of the tiny Stable Diffusion, and of the tiny image encoder


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(save_stable_diffusion(tmp_path_factory.mktemp("sd") / "tiny-sd"))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    ReduxImageEncoder(redux_dim=IMAGE_WIDTH, txt_in_features=WORDS_WIDTH).save_pretrained(root / "redux")
    save_file(load_file(root / "redux" / "diffusion_pytorch_model.safetensors"), root / "redux.safetensors")
    attention = TokenCrossAttention(WORDS_WIDTH, IMAGE_WIDTH, width=16, num_heads=2)
    attention.save_pretrained(root / "untrained")
    torch.nn.init.normal_(attention.to_out.weight)
    attention.save_pretrained(root / "attention")
    return root


@pytest.fixture(scope="module")
def clip_vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip_vision") / "tiny"
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": IMAGE_WIDTH, "intermediate_size": 16, "num_attention_heads": 2}
    config = transformers.SiglipVisionConfig(**sizes, num_hidden_layers=2, image_size=28, patch_size=14)
    transformers.SiglipVisionModel(config).save_pretrained(folder)
    return folder


def picture(batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, 28, 28, generator=torch.Generator().manual_seed(0))


def features(width: int = IMAGE_WIDTH, batch: int = 1, **options: Any) -> ImageFeatures:
    tokens = torch.randn(batch, 4, width, generator=torch.Generator().manual_seed(1))
    return ImageFeatures(tokens, tokens.mean(dim=1), (2, 2), Space("some-encoder", "last", width), **options)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_slerp_is_exact_at_both_ends_and_for_parallel_vectors():
    start, end = random(3, 5, 7), random(3, 5, 7, seed=1)
    assert torch.equal(slerp(start, end, 0), start) and torch.equal(slerp(start, end, 1), end)
    for share in (1e-6, 0.3, 0.5, 1 - 1e-6):
        assert torch.equal(slerp(start, start, share), start)
        assert torch.allclose(slerp(start, 3 * start, share), (1 + 2 * share) * start, rtol=1e-5, atol=1e-6)
        zero = torch.zeros_like(start)
        assert torch.allclose(slerp(zero, end, share), share * end, atol=1e-6)
        assert slerp(start, -start, share).isfinite().all()
    assert torch.allclose(slerp(start, -start, 0.25), 0.5 * start, atol=1e-5)


def test_slerp_turns_by_an_even_angle_and_keeps_the_length():
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for share in (0.25, 0.5, 0.75):
        angle = share * math.pi / 2
        assert torch.allclose(slerp(one, other, share), torch.tensor([math.cos(angle), math.sin(angle)]), atol=1e-6)
    start, end = random(50, 16), random(50, 16, seed=1)
    lengths = slerp(start, end, 0.5).norm(dim=-1)
    assert torch.allclose(lengths, (start.norm(dim=-1) + end.norm(dim=-1)) / 2, rtol=1e-5)
    assert (torch.lerp(start, end, 0.5).norm(dim=-1) < lengths).all(), "the straight line cuts the sphere's corner"


@pytest.mark.parametrize("degrees", [1e-3, 1e-2, 0.1, 179.9])
def test_slerp_is_steady_where_the_circle_degenerates(degrees: float):
    angle = math.radians(degrees)
    turned = slerp(torch.tensor([1.0, 0.0]), torch.tensor([math.cos(angle), math.sin(angle)]), 0.5)
    assert torch.allclose(turned, torch.tensor([math.cos(angle / 2), math.sin(angle / 2)]), atol=1e-3)


def test_spherical_keeps_what_weighted_washes_out(warm: ModelCache, shipped: Checkpoint):
    words = encode_prompt(warm, shipped, "rose")
    image = encode_image(warm, shipped, torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    straight, round_ = (
        fuse(warm, shipped, words, image, method=method).tokens.norm(dim=-1) for method in ("weighted", "spherical")
    )
    assert (round_ >= straight - 1e-5).all() and round_.mean() > 1.02 * straight.mean()


def test_untrained_attention_gives_exactly_the_words_and_learns():
    torch.manual_seed(0)
    network = TokenCrossAttention(12, 10, width=16, num_heads=4)
    words, image = random(8, 5, 12), random(8, 6, 10, seed=1)
    assert torch.equal(network(words, image), words)
    wanted = words + image.mean(dim=1, keepdim=True) @ random(10, 12, seed=2)
    optimiser = torch.optim.Adam(network.parameters(), 0.01)
    losses = []
    for _ in range(200):
        loss = (network(words, image) - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert torch.equal(network(words, image, strength=0.0), words)
    once, twice = (network(words, image, strength=strength) - words for strength in (0.5, 1.0))
    assert torch.allclose(2 * once, twice, atol=1e-5)


def test_attention_counts_a_token_by_its_weight():
    torch.manual_seed(0)
    network = TokenCrossAttention(12, 10, width=16, num_heads=4)
    torch.nn.init.normal_(network.to_out.weight)
    words, image = random(2, 5, 12), random(2, 6, 10, seed=1)
    weight = torch.tensor([[1.0, 1, 1, 0, 0, 0]]).expand(2, -1)
    assert torch.allclose(network(words, image, weight), network(words, image[:, :3]), atol=1e-5)
    twice = torch.cat([image, image[:, :1]], dim=1)
    halves = torch.tensor([[0.5, 1, 1, 1, 1, 1, 0.5]]).expand(2, -1)
    assert torch.allclose(network(words, twice, halves), network(words, image), atol=1e-5)


def test_a_picture_s_tokens_follow_the_words(
    warm: ModelCache, stable_diffusion: Checkpoint, clip_vision: Path, adapters: Path
):
    words = encode_prompt(warm, stable_diffusion, "a b", "ab")
    image = encode_image(warm, stable_diffusion, picture(2), encoder=open_image_encoder(clip_vision))
    alone = fuse(warm, stable_diffusion, words, None)
    for name in ("redux", "redux.safetensors"):
        adapter = open_token_adapter(adapters / name)
        joined = fuse(warm, stable_diffusion, words, image, strength=1.0, adapter=adapter)
        assert joined.tokens.shape == (2, 77 + 4, WORDS_WIDTH) and joined.mask.shape == (2, 81)
        assert torch.equal(joined.tokens[:, :77], words.tokens.expand(2, -1, -1))
        with torch.inference_mode():
            network = ReduxImageEncoder.from_pretrained(adapters / "redux")
            assert torch.allclose(joined.tokens[:, 77:], network(image.tokens).image_embeds, atol=1e-6)
        half = fuse(warm, stable_diffusion, words, image, strength=0.5, adapter=adapter)
        assert torch.allclose(half.tokens[:, 77:], 0.5 * joined.tokens[:, 77:], atol=1e-6)
        nothing = fuse(warm, stable_diffusion, words, image, strength=0.0, adapter=adapter)
        assert torch.equal(nothing.tokens, alone.tokens)
        assert joined.negative is not None and joined.negative.tokens.shape == (1, 81, WORDS_WIDTH)
        assert not joined.negative.mask[:, 77:].any() and not joined.negative.tokens[:, 77:].any()
        run: dict[str, Any] = {"seed": 1, "num_inference_steps": 2, "width": 64, "height": 64, "guidance_scale": 7.5}
        with_picture = generate(warm, stable_diffusion, joined, **run)
        assert with_picture.pixels.shape == (2, 3, 64, 64)
        assert not torch.equal(with_picture.pixels[:1], generate(warm, stable_diffusion, alone, **run).pixels)


def test_tokens_as_wide_as_the_words_need_no_adapter(warm: ModelCache, stable_diffusion: Checkpoint):
    words = encode_prompt(warm, stable_diffusion, "a b")
    image = features(WORDS_WIDTH)
    joined = fuse(warm, stable_diffusion, words, image, strength=1.0)
    assert torch.equal(joined.tokens[:, 77:], image.tokens)
    narrow = features(IMAGE_WIDTH)
    with pytest.raises(ValueError, match=r"some-encoder · last · 16 wide for tiny-sd/text_encoder.* 32 wide"):
        fuse(warm, stable_diffusion, words, narrow)


def test_only_the_tokens_of_the_region_join(warm: ModelCache, stable_diffusion: Checkpoint):
    words = encode_prompt(warm, stable_diffusion, "a b")
    image = features(WORDS_WIDTH, weight=torch.tensor([[1.0, 0.0, 0.5, 0.0]]))
    joined = fuse(warm, stable_diffusion, words, image, strength=1.0)
    assert torch.equal(joined.tokens[0, 77:], torch.stack([image.tokens[0, 0], 0.5 * image.tokens[0, 2]]))
    assert joined.mask[0, 77:].tolist() == [True, True]
    two = features(WORDS_WIDTH, batch=2, weight=torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]))
    both = fuse(warm, stable_diffusion, words, two, strength=1.0)
    assert both.mask[:, 77:].tolist() == [[True, False], [False, True]]


def test_words_look_at_the_picture(warm: ModelCache, stable_diffusion: Checkpoint, adapters: Path):
    words = encode_prompt(warm, stable_diffusion, "a b", "ab")
    alone, image = fuse(warm, stable_diffusion, words, None), features()
    options: dict[str, Any] = {"method": "cross-attention", "strength": 1.0}
    untrained = fuse(
        warm, stable_diffusion, words, image, **options, adapter=open_token_adapter(adapters / "untrained")
    )
    assert torch.equal(untrained.tokens, alone.tokens)
    trained = open_token_adapter(adapters / "attention")
    looked = fuse(warm, stable_diffusion, words, image, **options, adapter=trained)
    assert looked.tokens.shape == alone.tokens.shape and not torch.allclose(looked.tokens, alone.tokens, atol=1e-2)
    assert looked.negative is not None and alone.negative is not None
    assert torch.equal(looked.negative.tokens, alone.negative.tokens)
    still = fuse(warm, stable_diffusion, words, image, method="cross-attention", strength=0.0, adapter=trained)
    assert torch.equal(still.tokens, alone.tokens)
    assert fuse(warm, stable_diffusion, words, features(batch=3), **options, adapter=trained).tokens.shape[0] == 3


def test_attention_without_weights_leaves_the_words_and_says_so(warm: ModelCache, stable_diffusion: Checkpoint):
    words = encode_prompt(warm, stable_diffusion, "a b")
    fused = fuse(warm, stable_diffusion, words, features(), method="cross-attention", strength=1.0)
    assert torch.equal(fused.tokens, words.tokens)
    assert any("no trained weights" in notice for notice in fused.notices)


def test_what_does_not_fit_is_refused_by_name(
    warm: ModelCache, shipped: Checkpoint, stable_diffusion: Checkpoint, adapters: Path
):
    words = encode_prompt(warm, stable_diffusion, "a b")
    redux = open_token_adapter(adapters / "redux")
    for method in ("weighted", "spherical", "gated"):
        with pytest.raises(ValueError, match=f"concat or cross-attention for a model without .*got '{method}'"):
            fuse(warm, stable_diffusion, words, features(), method=method)
    with pytest.raises(ValueError, match="takes the weights of a TokenCrossAttention, got redux, a ReduxImageEncoder"):
        fuse(warm, stable_diffusion, words, features(), method="cross-attention", adapter=redux)
    with pytest.raises(ValueError, match=r"redux expects picture tokens 16 wide, got some-encoder .* 20 wide"):
        fuse(warm, stable_diffusion, words, features(20), adapter=redux)
    with pytest.raises(ValueError, match=r"redux expects words' tokens 32 wide, got other .* 48 wide"):
        other = FusedConditioning(
            random(1, 7, 48), None, torch.ones(1, 7, dtype=torch.bool), Space("other", "last_hidden_state", 48)
        )
        join_tokens(warm, other, features(), method="concat", strength=1.0, adapter=redux)
    two = type(words)(words.tokens.repeat(2, 1, 1), words.pooled, words.mask.repeat(2, 1), words.space)
    with pytest.raises(ValueError, match="2 prompts and 3 pictures"):
        fuse(warm, stable_diffusion, two, features(WORDS_WIDTH, batch=3))
    with pytest.raises(ValueError, match="tiny-sd has no fusion network; got image features alone"):
        fuse(warm, stable_diffusion, None, features())
    rose = encode_prompt(warm, shipped, "rose")
    with pytest.raises(ValueError, match=r"has a fusion network: expected concat, .* got method cross-attention"):
        fuse(warm, shipped, rose, None, method="cross-attention")
    with pytest.raises(ValueError, match=r"has a fusion network: .* got redux, the weights of a ReduxImageEncoder"):
        fuse(warm, shipped, rose, None, adapter=redux)


def test_bad_weights_are_refused_by_name(adapters: Path, tmp_path: Path, cache: ModelCache):
    odd = tmp_path / "odd.safetensors"
    save_file({"redux_up.weight": torch.zeros(4, 4)}, odd)
    with pytest.raises(CheckpointError, match=r"odd.*expected Redux's redux_down\.bias.*found"):
        open_token_adapter(odd)
    odd.write_bytes(b"version https://git-lfs.github.com/spec/v1\nsize 129063232\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer for 129,063,232 bytes"):
        open_token_adapter(odd)
    folder = tmp_path / "attention"
    folder.mkdir()
    config = json.loads((adapters / "attention" / "config.json").read_text())
    weights = load_file(adapters / "attention" / "diffusion_pytorch_model.safetensors")
    save_file(
        {key: weights[key] for key in weights if key != "to_v.weight"}, folder / "diffusion_pytorch_model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config))
    broken = open_token_adapter(folder)
    with pytest.raises(
        CheckpointError, match=r"attention: expected weights of a TokenCrossAttention, got: (?s:.*)to_v\.weight"
    ):
        broken.use(cache).__enter__()
    assert cache.stats().entries == ()
    (folder / "config.json").write_text(json.dumps(config | {"num_heads": 5}))
    with pytest.raises(CheckpointError, match="num_heads that divides 16, found 5"):
        open_token_adapter(folder)
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "Other"}))
    with pytest.raises(CheckpointError, match="found 'Other'"):
        open_token_adapter(folder)
