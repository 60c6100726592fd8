"""Encoders as blocks of their own, on transformers' real classes at tiny sizes."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pipeline.checkpoints import CheckpointError, open_checkpoint
from pipeline.fusion import fuse
from pipeline.language.language_model import open_language_model
from pipeline.model_cache import ModelCache
from pipeline.text.text_encoders import encode_text, open_text_encoder
from pipeline.text_encoder import encode_prompt

from .family_folders import bert, bert_tokenizer, clip, clip_tokenizer, qwen_tokenizer, save_family, t5, t5_tokenizer


def language_model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=272,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    return transformers.LlamaForCausalLM(config)


MAKE: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "clip": (lambda: clip(projection=16), clip_tokenizer),
    "t5": (t5, t5_tokenizer),
    "bert": (bert, bert_tokenizer),
    "llama": (language_model, qwen_tokenizer),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text_encoders")
    torch.manual_seed(0)
    for name, (model, tokenizer) in MAKE.items():
        model().save_pretrained(str(root / name))
        tokenizer().save_pretrained(str(root / name))
    return root


@pytest.mark.parametrize("name", MAKE)
def test_any_encoder_gives_embeddings_of_its_own_space(warm: ModelCache, folders: Path, name: str):
    encoder = open_text_encoder(folders / name)
    red, again, car = (encode_text(warm, encoder, text) for text in ("a red rose", "a red rose", "a car"))
    assert torch.equal(red.tokens, again.tokens) and red.tokens.isfinite().all()
    assert red.mask.shape == red.tokens.shape[:2] and not torch.equal(red.tokens[:, :3], car.tokens[:, :3])
    assert red.space.model.startswith(f"{name}@") and red.space.width == red.tokens.shape[-1]
    assert (red.pooled is not None) == (name == "clip")


@pytest.mark.parametrize("name", MAKE)
def test_the_layer_is_the_one_of_the_class_itself(warm: ModelCache, folders: Path, name: str):
    encoder = open_text_encoder(folders / name)
    with encoder.use(warm) as module:
        layers = module.config.num_hidden_layers
    found = [encode_text(warm, encoder, "a red rose", layer=layer) for layer in range(layers + 1)]
    for one, layer in zip(found, range(-layers - 1, 0), strict=True):
        assert torch.equal(one.tokens, encode_text(warm, encoder, "a red rose", layer=layer).tokens)
    for one, other in pairwise(found):
        assert not torch.equal(one.tokens, other.tokens)
    for layer in (layers + 1, -layers - 2):
        with pytest.raises(ValueError, match=f"layer must be {-layers - 1} to {layers} for {name}, got {layer}"):
            encode_text(warm, encoder, "a red rose", layer=layer)


def test_hidden_states_of_a_language_model_are_its_own(warm: ModelCache, folders: Path):
    encoder = open_text_encoder(folders / "llama")
    ids = torch.tensor([encoder.tokenizer()("a red rose")["input_ids"]])
    with open_language_model(folders / "llama").use(warm) as model, torch.inference_mode():
        expected = model(ids, output_hidden_states=True).hidden_states
        with encoder.use(warm) as same:
            assert same is model  # held once, whoever asks
    for layer in (0, 1, -2, -1):
        assert torch.allclose(encode_text(warm, encoder, "a red rose", layer=layer).tokens, expected[layer], atol=1e-5)


def test_a_chat_template_is_spoken(warm: ModelCache, folders: Path):
    encoder = open_text_encoder(folders / "llama")
    plain, spoken = (encode_text(warm, encoder, "rose", chat_template=spoken) for spoken in (False, True))
    assert spoken.tokens.shape[1] > plain.tokens.shape[1]
    with pytest.raises(ValueError, match="expected a language model with a chat template, got t5 without one"):
        encode_text(warm, open_text_encoder(folders / "t5"), "rose", chat_template=True)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("text", ["", " ", "\0", "\u73ab\u7470", "a red rose " * 150])
def test_odd_and_long_prompts_are_encoded(warm: ModelCache, folders: Path, name: str, text: str):
    found = encode_text(warm, open_text_encoder(folders / name), text)
    assert found.tokens.isfinite().all() and found.mask.shape == found.tokens.shape[:2]
    if len(text) > 1000:
        assert any("windows of" in notice for notice in found.notices)


def test_weights_act_in_clip_and_are_told_elsewhere(warm: ModelCache, folders: Path):
    for name in MAKE:
        weighted, plain = (
            encode_text(warm, open_text_encoder(folders / name), text) for text in ("a (red:1.5) rose", "a red rose")
        )
        assert torch.equal(weighted.tokens, plain.tokens) == (name != "clip")
        assert any("no weighted phrases" in notice for notice in weighted.notices) == (name != "clip")


def test_words_of_another_encoder_are_refused_by_both_names(warm: ModelCache, folders: Path, tmp_path: Path):
    checkpoint = open_checkpoint(save_family("sd15", tmp_path / "sd15"))
    foreign = encode_text(warm, open_text_encoder(folders / "t5"), "a red rose")
    assert encode_prompt(warm, checkpoint, "a red rose").space.width == foreign.space.width
    with pytest.raises(ValueError, match=r"sd15/text_encoder@.*t5@"):
        fuse(warm, checkpoint, foreign, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["EvilModel"]}, "expected as architectures one of .*found .'EvilModel'."),
        ({"architectures": None}, "found None"),
        ({"auto_map": {"AutoModel": "evil.Evil"}}, "found an auto_map to code"),
        ({"d_model": 2**20}, "expected d_model to suit weights up to 128 wide, found 1048576"),
        ({"vocab_size": 10**8}, "expected .* weights, found room for|vocab_size to suit"),
        ({"num_layers": 500}, "expected num_layers to suit weights"),
    ],
)
def test_a_folder_that_asks_for_too_much_is_refused(
    warm: ModelCache, folders: Path, tmp_path: Path, changes: dict[str, Any], said: str
):
    t5().save_pretrained(str(tmp_path))
    t5_tokenizer().save_pretrained(str(tmp_path))
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    held = len(warm.stats().entries)
    with pytest.raises(CheckpointError, match=said):
        encode_text(warm, open_text_encoder(tmp_path), "rose")
    assert len(warm.stats().entries) == held


def test_a_folder_without_a_tokenizer_is_refused(warm: ModelCache, tmp_path: Path):
    clip().save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"expected the words of a CLIPTokenizerFast in .*found none"):
        encode_text(warm, open_text_encoder(tmp_path), "rose")
