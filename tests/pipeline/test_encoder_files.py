"""Text encoders in one file: real classes at tiny sizes, known by their headers, and told apart at full size."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pipeline.checkpoints import CheckpointError
from pipeline.files.single_file import CONFIGS
from pipeline.model_cache import ModelCache
from pipeline.text.encoder_files import open_encoder_file
from pipeline.text.text_encoders import encode_text, open_text_encoder
from tests.pipeline.single_files import open_clip

CLIP: dict[str, Any] = {
    "vocab_size": 49408, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 1,
    "max_position_embeddings": 77, "projection_dim": 64, "hidden_act": "quick_gelu",
}  # fmt: skip
QWEN: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rope_theta": 1000000, "rms_norm_eps": 1e-6,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": 32128, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip


def t5(**options: Any) -> Any:
    return transformers.T5EncoderModel(transformers.T5Config(**T5 | options))


MAKE: dict[str, Callable[[], Any]] = {
    "clip-l": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP)),
    "clip-l-projected": lambda: transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**CLIP)),
    "t5": t5,
    "t5-first": lambda: t5(feed_forward_proj="relu"),
    "qwen3": lambda: transformers.Qwen3Model(transformers.Qwen3Config(**QWEN, tie_word_embeddings=True)),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Of each the file, as ComfyUI's models/text_encoders holds it, and the model that it was written from."""
    root = tmp_path_factory.mktemp("text_encoders")
    found = {}
    for seed, (name, make) in enumerate(MAKE.items()):
        torch.manual_seed(seed)
        model = make().eval()
        model.save_pretrained(root / name)
        tensors = load_file(root / name / "model.safetensors")
        if name == "qwen3":
            tensors = {f"model.{key.removeprefix('model.')}": tensor for key, tensor in tensors.items()}
        path = root / f"{name}.safetensors"
        save_file(tensors, path)
        found[name] = path, model
    return found


@pytest.mark.parametrize("name", MAKE)
def test_a_file_says_what_its_own_class_says(warm: ModelCache, files: dict[str, tuple[Path, Any]], name: str):
    path, model = files[name]
    encoder = open_text_encoder(path)
    found = encode_text(warm, encoder, "a red rose")
    ids = encoder.tokenizer()("a red rose", padding="max_length" if name.startswith("clip") else False)["input_ids"]
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    assert torch.allclose(found.tokens, expected.last_hidden_state, atol=1e-5)
    assert found.space.model.startswith(f"{name}.safetensors@")
    if name == "clip-l-projected":
        assert found.pooled is not None and torch.allclose(found.pooled, expected.text_embeds, atol=1e-5)
    first = encode_text(warm, encoder, "a red rose", layer=1)
    assert torch.allclose(first.tokens, expected.hidden_states[1], atol=1e-5)


def test_the_words_are_those_of_the_published_models(files: dict[str, tuple[Path, Any]]):
    assert open_text_encoder(files["clip-l"][0]).tokenizer()("a red rose")["input_ids"] == [
        49406, 320, 736, 3568, 49407,
    ]  # fmt: skip
    assert open_text_encoder(files["t5"][0]).tokenizer()("a red rose")["input_ids"] == [3, 9, 1131, 4659, 1]
    assert open_text_encoder(files["qwen3"][0]).tokenizer()("a red rose")["input_ids"] == [64, 2518, 16009]


def test_a_language_model_speaks_its_template(warm: ModelCache, files: dict[str, tuple[Path, Any]]):
    encoder = open_text_encoder(files["qwen3"][0])
    plain, spoken = (encode_text(warm, encoder, "rose", chat_template=spoken) for spoken in (False, True))
    assert spoken.tokens.shape[1] > plain.tokens.shape[1]


def test_8_bit_floats_are_multiplied_out(warm: ModelCache, files: dict[str, tuple[Path, Any]], tmp_path: Path):
    path, _ = files["t5"]
    tensors = load_file(path)
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    halved = {key: tensor.half() for key, tensor in tensors.items()}
    halved[name] = (tensors[name] / 0.5).to(torch.float8_e4m3fn)
    halved[name.replace(".weight", ".scale_weight")] = torch.tensor(0.5)
    save_file(halved, tmp_path / "t5_fp8.safetensors")
    found = encode_text(warm, open_text_encoder(tmp_path / "t5_fp8.safetensors"), "a red rose")
    assert torch.allclose(found.tokens, encode_text(warm, open_text_encoder(path), "a red rose").tokens, atol=0.1)


def test_open_clip_s_own_names(warm: ModelCache, tmp_path: Path):
    torch.manual_seed(0)
    options = CLIP | {"hidden_size": 1024, "num_attention_heads": 16, "hidden_act": "gelu", "projection_dim": 32}
    model = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**options)).eval()
    model.save_pretrained(tmp_path / "folder")
    tensors = load_file(tmp_path / "folder/model.safetensors")
    save_file(open_clip(tensors, options), tmp_path / "clip_h.safetensors")
    encoder = open_text_encoder(tmp_path / "clip_h.safetensors")
    found = encode_text(warm, encoder, "a red rose")
    tokenizer = encoder.tokenizer()
    assert tokenizer.pad_token == "!"
    with torch.inference_mode():
        ids = tokenizer("a red rose", padding="max_length")["input_ids"]
        expected = model(input_ids=torch.tensor([ids]))
    assert found.pooled is not None and torch.allclose(found.pooled, expected.text_embeds, atol=1e-4)
    assert torch.allclose(found.tokens, expected.last_hidden_state, atol=1e-4)


# --- published sizes, by headers alone ---


def header_of(model_class: Any, config: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in model_class(config).state_dict().items()}


def write_header(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """Such a file, with nothing in it that takes room on disk."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


@pytest.mark.parametrize(
    ("layout", "component"),
    [
        ("sd15", "text_encoder"), ("sd2", "text_encoder"), ("sd3", "text_encoder"), ("sdxl", "text_encoder_2"),
        ("flux", "text_encoder_2"), ("z_image", "text_encoder"), ("flux2_klein_9b", "text_encoder"),
        ("qwen_image", "text_encoder"),
    ],
)  # fmt: skip
def test_the_published_ones_are_what_their_configurations_say(tmp_path: Path, layout: str, component: str):
    told = json.loads((CONFIGS / layout / component / "config.json").read_text())
    model_class: Any = getattr(transformers, told["architectures"][0])
    config_class: Any = model_class.config_class
    shapes = header_of(model_class, config_class.from_dict(told))
    shapes.pop("lm_head.weight", None)  # which the files leave out, since no words are written
    if model_class is transformers.Qwen3Model:
        shapes = {f"model.{name}": shape for name, shape in shapes.items()}
    part, _ = open_encoder_file(write_header(tmp_path / "model.safetensors", shapes))
    read = json.loads(part.config.read_text()) | dict(part.options)
    found_class: Any = getattr(transformers, part.class_name)
    found = found_class.config_class.from_dict(read).to_dict()
    expected = config_class.from_dict(told).to_dict()
    left_out = {"architectures", "projection_dim", "tie_word_embeddings"}
    assert {key: value for key, value in found.items() if key not in left_out} == {
        key: value for key, value in expected.items() if key not in left_out
    }
    assert part.class_name == model_class.__name__ or model_class is transformers.Qwen3ForCausalLM


def umt5() -> dict[str, tuple[int, ...]]:
    return header_of(transformers.UMT5EncoderModel, transformers.UMT5Config(num_layers=2, d_model=16))


def llama() -> dict[str, tuple[int, ...]]:
    return header_of(transformers.LlamaForCausalLM, transformers.LlamaConfig(num_hidden_layers=1, hidden_size=32))


def gemma() -> dict[str, tuple[int, ...]]:
    config = transformers.Gemma3TextConfig(num_hidden_layers=1, hidden_size=32, vocab_size=151936)
    return header_of(transformers.Gemma3ForCausalLM, config)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (umt5, "found UMT5, of 250,112. Others are read from the folder"),
        (llama, "expected a text encoder of CLIP, T5, Qwen 3 .*11 of model, 1 of lm_head.*model.embed_tokens"),
        (gemma, "expected a text encoder of CLIP, T5, Qwen 3"),
        (lambda: {"decoder.conv_in.weight": (4, 4)}, "Its header lists 1 tensors, '1 of decoder'"),
        (lambda: {"a.lora_up.weight": (4, 4)}, "tensors of a LoRA"),
        (dict, "Its header lists 0 tensors"),
        (lambda: header_of(type(t5()), t5(vocab_size=100).config), "expected T5 with its 32,128 words, found 100"),
        (
            lambda: {
                "text_model.embeddings.token_embedding.weight": (500, 8),
                "text_model.embeddings.position_embedding.weight": (77, 8),
                "text_model.encoder.layers.0.mlp.fc1.weight": (8, 8),
            },
            "expected CLIP with its 49,408 words, found 500",
        ),
    ],
)
def test_what_fits_none_is_refused_with_what_was_found(
    tmp_path: Path, shapes: Callable[[], dict[str, tuple[int, ...]]], said: str
):
    path = write_header(tmp_path / "odd.safetensors", shapes())
    with pytest.raises(CheckpointError, match=rf"odd\.safetensors: .*{said}"):
        open_text_encoder(path)


def test_tensors_that_are_missing_leave_nothing_in_the_cache(
    warm: ModelCache, files: dict[str, tuple[Path, Any]], tmp_path: Path
):
    tensors = load_file(files["t5"][0])
    del tensors["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
    save_file(tensors, tmp_path / "t5.safetensors")
    held = len(warm.stats().entries)
    with pytest.raises(CheckpointError, match="expected the weights of a T5EncoderModel; 1 are missing"):
        encode_text(warm, open_text_encoder(tmp_path / "t5.safetensors"), "rose")
    assert len(warm.stats().entries) == held
    (tmp_path / "page.safetensors").write_text("<!doctype html>")
    with pytest.raises(CheckpointError, match="a web page"):
        open_text_encoder(tmp_path / "page.safetensors")
