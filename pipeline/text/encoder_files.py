"""A text encoder in one .safetensors file, as ComfyUI's models/text_encoders holds them: what it is, by its header.

The header tells the sizes; what it does not tell, and the words, are those of the published models, in ``configs``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files.components import Component
from ..files.safetensors_files import CheckpointError, TensorEntry, WeightsFile, check_weights, read_json
from ..files.single_file import CONFIGS, in_words

Entries = Mapping[str, TensorEntry]

_CLIP_VOCABULARY, _T5_VOCABULARY, _QWEN_VOCABULARIES = 49408, 32128, (151936, 152064)
_OPENAI_WIDTH = 768  # up to which CLIP has OpenAI's own activation
_HEAD = 64  # channels of a head of CLIP's
_PICTURES = ("visual.", "model.visual.")
_FOLDER = "Others are read from the folder that transformers saves, with config.json and a tokenizer"


def open_encoder_file(path: Path) -> tuple[Component, Component]:
    """The encoder in a file, and the tokenizer that ships with the pack.

    Known are CLIP, in transformers' and OpenCLIP's names, T5, Qwen 3 and Qwen 2.5 VL, of any size. Raises
    CheckpointError that says what was found in the header.
    """
    file = check_weights(path)
    for known in (_clip, _open_clip, _t5, _qwen):
        found = known(file)
        if found is not None:
            config, class_name, form, options, words, word_options = found
            told = CONFIGS / config / "config.json"
            shared = CONFIGS / "tokenizers" / words / "tokenizer_config.json"
            encoder = Component(
                path.stem, "transformers", class_name, told, (path,), digest=file.digest, form=form, options=options
            )
            tokenizer = {"clip": "CLIPTokenizerFast", "t5": "T5TokenizerFast", "qwen": "Qwen2TokenizerFast"}[words]
            return encoder, Component("tokenizer", "transformers", tokenizer, shared, options=word_options)
    raise CheckpointError(
        f"{path}: expected a text encoder of CLIP, T5, Qwen 3 or Qwen 2.5 VL in one file. {in_words(file)}. {_FOLDER}"
    )


# config, class, form, options, tokenizer, its options
_Found = tuple[str, str, str, dict[str, Any], str, dict[str, Any]]


def _clip(file: WeightsFile) -> _Found | None:
    entries = file.entries
    start = "text_model." if "text_model.embeddings.token_embedding.weight" in entries else ""
    words = _shape(entries, f"{start}embeddings.token_embedding.weight")
    places = _shape(entries, f"{start}embeddings.position_embedding.weight")
    inner = _shape(entries, f"{start}encoder.layers.0.mlp.fc1.weight")
    if not words or not places or not inner:
        return None
    projection = _shape(entries, "text_projection.weight")
    return _as_clip(file, "clip", words, places[0], inner[0], _count(entries, f"{start}encoder.layers."), projection)


def _open_clip(file: WeightsFile) -> _Found | None:
    entries = file.entries
    words, places = _shape(entries, "token_embedding.weight"), _shape(entries, "positional_embedding")
    inner = _shape(entries, "transformer.resblocks.0.mlp.c_fc.weight")
    if not words or not places or not inner:
        return None
    projection = _shape(entries, "text_projection")  # laid the other way round
    layers = _count(entries, "transformer.resblocks.")
    return _as_clip(file, "open_clip", words, places[0], inner[0], layers, projection and projection[::-1])


def _as_clip(
    file: WeightsFile,
    form: str,
    words: tuple[int, ...],
    places: int,
    inner: int,
    layers: int,
    projection: tuple[int, ...] | None,
) -> _Found:
    _check_vocabulary(file, "CLIP", words[0], (_CLIP_VOCABULARY,))
    width = words[-1]
    options = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // _HEAD),
        "max_position_embeddings": places,
        "projection_dim": projection[0] if projection else width,
    }
    class_name = "CLIPTextModelWithProjection" if projection else "CLIPTextModel"
    if width <= _OPENAI_WIDTH:
        return "sd15/text_encoder", class_name, form, options, "clip", {}
    return "sdxl/text_encoder_2", class_name, form, options, "clip", {"pad_token": "!"}  # OpenCLIP's


def _t5(file: WeightsFile) -> _Found | None:
    entries = file.entries
    name = "shared.weight" if "shared.weight" in entries else "encoder.embed_tokens.weight"
    words, places = _shape(entries, name), _shape(entries, _bias(0))
    query = _shape(entries, "encoder.block.0.layer.0.SelfAttention.q.weight")
    gated = _shape(entries, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight")
    inner = gated or _shape(entries, "encoder.block.0.layer.1.DenseReluDense.wi.weight")
    if not words or not places or not query or not inner:
        return None
    if _bias(1) in entries:
        raise CheckpointError(
            f"{file.path}: expected an encoder whose words ship with the pack, found UMT5, of {words[0]:,}. {_FOLDER}"
        )
    _check_vocabulary(file, "T5", words[0], (_T5_VOCABULARY,))
    buckets, heads = places
    options = {
        "d_model": words[-1],
        "d_ff": inner[0],
        "d_kv": query[0] // heads,
        "num_heads": heads,
        "num_layers": _count(entries, "encoder.block."),
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
    }
    options["num_decoder_layers"] = options["num_layers"]
    return "flux/text_encoder_2", "T5EncoderModel", "as_is", options, "t5", {"model_max_length": 512}


def _bias(block: int) -> str:
    """T5 has it in the first block alone, UMT5 in each."""
    return f"encoder.block.{block}.layer.0.SelfAttention.relative_attention_bias.weight"


def _qwen(file: WeightsFile) -> _Found | None:
    entries = file.entries
    places = ("model.", "model.language_model.")
    start = next((start for start in places if f"{start}embed_tokens.weight" in entries), "")
    layer = f"{start}layers.0."
    words, inner = _shape(entries, f"{start}embed_tokens.weight"), _shape(entries, f"{layer}mlp.gate_proj.weight")
    query, key = (_shape(entries, f"{layer}self_attn.{name}_proj.weight") for name in ("q", "k"))
    # Gemma has norms of its own around its layers, and Llama neither these norms nor these biases.
    norm, bias = _shape(entries, f"{layer}self_attn.q_norm.weight"), _shape(entries, f"{layer}self_attn.q_proj.bias")
    other = f"{layer}pre_feedforward_layernorm.weight" in entries
    if other or not words or not inner or not query or not key or words[0] not in _QWEN_VOCABULARIES:
        return None
    sizes: dict[str, Any] = {
        "vocab_size": words[0],
        "hidden_size": words[-1],
        "intermediate_size": inner[0],
        "num_hidden_layers": _count(entries, f"{start}layers."),
        "tie_word_embeddings": "lm_head.weight" not in entries,
    }
    sizes["max_window_layers"] = sizes["num_hidden_layers"]
    if norm:
        sizes |= {"head_dim": norm[0], "num_attention_heads": query[0] // norm[0]}
        sizes["num_key_value_heads"] = key[0] // norm[0]
        return "z_image/text_encoder", "Qwen3Model", "as_is", sizes, "qwen", {}
    if bias and any(name.startswith(_PICTURES) for name in entries):
        config = read_json(CONFIGS / "qwen_image/text_encoder/config.json")
        head = config["text_config"]["hidden_size"] // config["text_config"]["num_attention_heads"]
        sizes |= {"num_attention_heads": query[0] // head, "num_key_value_heads": key[0] // head}
        options = {
            "text_config": config["text_config"] | sizes,
            "vision_config": config["vision_config"] | {"out_hidden_size": words[-1]},
            "tie_word_embeddings": sizes["tie_word_embeddings"],
        }
        return "qwen_image/text_encoder", "Qwen2_5_VLForConditionalGeneration", "as_is", options, "qwen", {}
    return None


def _shape(entries: Entries, name: str) -> tuple[int, ...] | None:
    """Of a matrix or a vector that is there."""
    return entries[name].shape if name in entries and len(entries[name].shape) in (1, 2) else None


def _count(entries: Entries, start: str) -> int:
    return len({name.removeprefix(start).split(".")[0] for name in entries if name.startswith(start)})


def _check_vocabulary(file: WeightsFile, kind: str, found: int, known: tuple[int, ...]) -> None:
    if found not in known:
        raise CheckpointError(f"{file.path}: expected {kind} with its {known[0]:,} words, found {found:,}. {_FOLDER}")
