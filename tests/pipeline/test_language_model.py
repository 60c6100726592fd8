"""Language models on disk: opened without reading weights, built as they were saved, and refused by name."""

import json
import pickle
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from pipeline.files.gguf_files import check_gguf
from pipeline.files.safetensors_files import CheckpointError
from pipeline.language.language_model import CLASSES, GGUF_CLASSES, open_language_model
from pipeline.model_cache import ModelCache
from tests.pipeline.language_models import MERGE, save_llama, smollm2_gguf


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_llama(tmp_path / "llama")


def logits(module: Any) -> torch.Tensor:
    with torch.inference_mode():
        return module(input_ids=torch.arange(40)[None]).logits


# --- folders ---


def test_a_folder_is_built_as_it_was_saved_and_held_once(llama: Path, cache: ModelCache):
    model = open_language_model(llama)
    saved = LlamaForCausalLM.from_pretrained(str(llama))
    for _ in range(2):
        with model.use(cache) as module:
            assert torch.equal(logits(module), logits(saved))
            assert not module.training and not any(parameter.requires_grad for parameter in module.parameters())
            assert not any(parameter.is_inference() for parameter in module.parameters())
    assert (cache.stats().misses, cache.stats().hits) == (1, 1)
    assert model.tokenizer()("a fox").input_ids == [67, 2, 98, 90]
    assert model.tokenizer() is model.tokenizer()


def test_another_class_is_built_too(llama: Path):
    config = GPT2Config(vocab_size=100, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    saved = GPT2LMHeadModel(config).eval()
    saved.save_pretrained(llama)
    assert torch.allclose(logits(open_language_model(llama).build(torch.float32)), logits(saved), atol=1e-6)


def test_every_class_is_one_of_transformers():
    assert [name for name in (*CLASSES, *GGUF_CLASSES.values()) if not hasattr(transformers, name)] == []


def test_what_decides_the_answer_decides_the_identity(llama: Path):
    before = open_language_model(llama).identity
    assert open_language_model(llama).identity == before
    save_llama(llama, seed=1)
    other = open_language_model(llama).identity
    (llama / "chat_template.jinja").write_text("{{ messages }}")
    assert len({before, other, open_language_model(llama).identity}) == 3


def test_of_the_settings_for_generation_only_the_ends_are_taken(llama: Path):
    told = {"num_beams": 10_000, "num_return_sequences": 500, "eos_token_id": [0, 5], "max_length": 10**9}
    (llama / "generation_config.json").write_text(json.dumps(told))
    settings: Any = open_language_model(llama).build(torch.float32)
    assert settings.generation_config.eos_token_id == [0, 5]
    assert settings.generation_config.num_beams in (None, 1)


def edit(folder: Path, name: str = "config.json", **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def put_a_pickle_in_place(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": [1.0] * 1000}))


def rename_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps({"weight": [1.0] * 1000}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "found no such file"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json, of at most"),
        (lambda folder: (folder / "model.safetensors").unlink(), "expected weights at"),
        (put_a_pickle_in_place, "pytorch_model.bin, a Python pickle, which can run code and is never opened"),
        (rename_a_pickle, "a Python pickle. It can run code and is never opened"),
        (lambda folder: edit(folder, auto_map={"AutoModelForCausalLM": "code.Model"}), "an auto_map to code"),
        (lambda folder: edit(folder, "tokenizer_config.json", auto_map={}), "an auto_map to code"),
        (lambda folder: (folder / "custom_generate").mkdir(), "found code in custom_generate"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "an adapter for another model"),
        (lambda folder: edit(folder, architectures=["EvilForCausalLM"]), "found ['EvilForCausalLM']"),
        (lambda folder: edit(folder, architectures=["LlamaForCausalLM"] * 2), "expected as architectures one of"),
        (lambda folder: edit(folder, architectures="LlamaForCausalLM"), "expected as architectures one of"),
        (lambda folder: edit(folder, num_hidden_layers=10**6), "expected num_hidden_layers to suit weights of"),
        (lambda folder: edit(folder, quantization_config={"bits": 4}), "found quantised ones"),
        (lambda folder: edit(folder, _attn_implementation="someone/kernel"), "expected the attention of torch"),
    ],
)
def test_a_folder_that_cannot_be_trusted_is_refused_unread(llama: Path, spoil: Callable[[Path], object], message: str):
    spoil(llama)
    with pytest.raises(CheckpointError, match=re.escape(message)) as refusal:
        open_language_model(llama)
    assert str(llama) in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 2**30, "head_dim": 2**29}, "expected hidden_size to suit weights"),
        ({"vocab_size": 512}, "expected weights of a LlamaForCausalLM"),
        ({"num_hidden_layers": 3}, "is missing"),
        ({"num_attention_heads": "many"}, "expected the configuration of a LlamaForCausalLM"),
    ],
)
def test_a_configuration_of_other_weights_is_refused_and_not_held(
    llama: Path, cache: ModelCache, changes: dict[str, Any], message: str
):
    edit(llama, **changes)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=re.escape(message)), open_language_model(llama).use(cache):
        pytest.fail("it was built")
    assert cache.stats().entries == () and time.perf_counter() - start < 30


def test_a_broken_tokenizer_is_named(llama: Path):
    (llama / "tokenizer.json").write_text('{"model": ' + "[" * 10_000)
    with pytest.raises(CheckpointError, match=re.escape(f"expected a tokenizer in {llama / 'tokenizer.json'}")):
        open_language_model(llama).tokenizer()


def test_nothing_there_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match="found neither"):
        open_language_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="found no such file"):
        open_language_model(tmp_path / "nowhere.gguf")


# --- GGUF ---


def save_gguf(path: Path, folder: Path, **changes: int) -> Path:
    """The Llama of ``folder`` as llama.cpp's converter writes it. changes: numbers of its header."""
    saved = LlamaForCausalLM.from_pretrained(str(folder))
    tokenizer = open_language_model(folder).tokenizer()
    numbers = {
        "context_length": 4096,
        "embedding_length": 32,
        "block_count": 2,
        "feed_forward_length": 32,
        "head_count": 2,
        "head_count_kv": 2,
        "vocab_size": saved.config.vocab_size,
    }
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    for name, number in (numbers | changes).items():
        writer.add_uint32(f"llama.attention.{name}" if name.startswith("head") else f"llama.{name}", number)
    writer.add_layer_norm_rms_eps(saved.config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([word for word, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])])
    writer.add_token_merges([" ".join(MERGE)])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in saved.state_dict().items():
        values = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:  # llama.cpp turns pairs of neighbours, transformers halves
            values = values.reshape(2, 2, values.shape[0] // 4, -1).swapaxes(1, 2).reshape(values.shape)
        stem = name.removesuffix(".weight")
        writer.add_tensor(f"{names.get_name(stem)}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_built_as_the_folder_it_came_from(llama: Path, tmp_path: Path, cache: ModelCache):
    model = open_language_model(save_gguf(tmp_path / "tiny.gguf", llama))
    with model.use(cache) as module:
        assert torch.allclose(logits(module), logits(LlamaForCausalLM.from_pretrained(str(llama))), atol=1e-5)
    assert model.tokenizer()("fox").input_ids == open_language_model(llama).tokenizer()("fox").input_ids


def test_a_gguf_header_that_asks_for_more_than_the_file_is_refused_unbuilt(llama: Path, tmp_path: Path):
    path = save_gguf(tmp_path / "huge.gguf", llama, feed_forward_length=2**31 - 1)
    with pytest.raises(CheckpointError, match="weights, found room for"):
        open_language_model(path).build(torch.float32)


def test_smollm2_is_told_by_its_header_at_once():
    start = time.perf_counter()
    found = check_gguf(smollm2_gguf())
    assert (found.architecture, found.tensors, found.weights) == ("llama", 272, 134_515_008)
    assert open_language_model(smollm2_gguf()).class_name == "LlamaForCausalLM"
    assert time.perf_counter() - start < 10


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def header(tensors: int, pairs: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + rest


ARCHITECTURE = string(b"general.architecture") + struct.pack("<I", 8) + string(b"llama")
TENSOR = string(b"w") + struct.pack("<IQIQ", 1, 4, 0, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected 4 bytes for the magic"),
        (b"PK\x03\x04 something else", "found a file that starts with b'PK"),
        (b"GGUF", "expected 4 bytes for the version"),
        (header(0, 1, ARCHITECTURE, version=3 << 24), "expected version 2 or 3, found version 50331648"),
        (header(0, 2**60, b"x" * 27), "key-value pairs that fit into the 27 bytes left"),
        (header(2**60, 1, ARCHITECTURE), "tensors that fit into"),
        (header(0, 1, struct.pack("<Q", 2**60) + bytes(9)), "expected at most 65,535 bytes of a key"),
        (header(0, 1, string(b"k") + struct.pack("<I", 77)), "a known type for 'k', found number 77"),
        (
            header(0, 1, string(b"k") + struct.pack("<IIQ", 9, 0, 2**40) + b"x" * 40),
            "values of 'k' that fit into the 40 bytes left",
        ),
        (header(0, 1, string(b"k") + struct.pack("<IIQ", 9, 9, 1) + b"x" * 40), "a known type for 'k', found number 9"),
        (header(0, 1, string(b"k") + struct.pack("<IIQ", 9, 0, 5_000_000) + bytes(5_000_000)), "at most 4,000,000"),
        (header(0, 1, string(b"k") + struct.pack("<I", 8) + struct.pack("<Q", 2**62)), "bytes of 'k'"),
        (header(0, 0), "expected a general.architecture, found none"),
        (header(1, 1, ARCHITECTURE + string(b"w") + struct.pack("<I", 9) + bytes(99)), "at most 4 dimensions of 'w'"),
        (header(1, 1, ARCHITECTURE + string(b"w") + struct.pack("<IQIQ", 1, 2**50, 0, 0)), "the bytes of"),
        (header(1, 1, ARCHITECTURE + string(b"w") + struct.pack("<IQIQ", 1, 4, 0, 2**40)), "inside the file of"),
        (header(0, 1, ARCHITECTURE.replace(b"llama", b"mamba")), "found 'mamba'"),
    ],
)
def test_a_gguf_file_that_is_none_is_refused_soon(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=re.escape(message)) as refusal:
        open_language_model(path)
    assert str(path) in str(refusal.value) and time.perf_counter() - start < 2


@pytest.mark.parametrize("kept", [100, 1_000_000, 50_000_000])
def test_a_truncated_gguf_file_is_refused(tmp_path: Path, kept: int):
    path = tmp_path / "cut.gguf"
    with open(smollm2_gguf(), "rb") as whole:
        path.write_bytes(whole.read(kept))
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        open_language_model(path).build(torch.float32)


def test_tensors_in_the_way_of_each_other_are_refused(tmp_path: Path):
    path = tmp_path / "bare.gguf"
    path.write_bytes(header(2, 1, ARCHITECTURE + TENSOR + TENSOR) + bytes(64))
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        open_language_model(path).build(torch.float32)
