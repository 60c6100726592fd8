"""Text encoders in single files through the real host: whose words they are, and that Cancel ends a long reading."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.nodes.prompts import graph
from tests.pipeline.test_encoder_files import CLIP, header_of, write_header
from tests.rig.client import Client, Prompt
from tests.rig.host import ComfyServer


@pytest.fixture(scope="module")
def encoders(host: ComfyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny CLIP in models/text_encoders, and a language model of 8 GB of noughts, which take no room on disk."""
    folder, scratch = host.base / "models" / "text_encoders", tmp_path_factory.mktemp("clip")
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP)).save_pretrained(scratch)
    save_file(load_file(scratch / "model.safetensors"), folder / "clip_l.safetensors")
    config = transformers.Qwen3Config(
        vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    shapes = header_of(transformers.Qwen3Model, config)
    write_header(folder / "qwen_3_4b.safetensors", {f"model.{name}": shape for name, shape in shapes.items()})
    yield folder
    for name in ("clip_l", "qwen_3_4b"):
        (folder / f"{name}.safetensors").unlink()


def encoded(name: str) -> Prompt:
    prompt = graph()
    inputs = {"text_encoder": f"{name}.safetensors", "prompt": "a red rose", "layer": -1, "chat_template": False}
    prompt["text"] = {"class_type": "DuetTextEncoder", "inputs": inputs}
    return prompt


def test_a_single_file_gives_embeddings_of_its_own_space(client: Client, encoders: Path):
    done = client.run(encoded("clip_l"))
    assert done.ended == "execution_error" and done.error["node_type"] == "DuetFuse"
    assert "clip_l.safetensors@" in done.error["exception_message"]  # and so it was read, and is not the model's own


def test_cancel_ends_the_reading_of_a_large_one(host: ComfyServer, client: Client, encoders: Path):
    asked: list[float] = []

    def interrupt(kind: str, data: dict[str, Any]) -> None:
        if kind == "progress_state" and not asked and data["nodes"].get("text", {}).get("value", 0) > 0:
            asked.append(time.monotonic())
            client.interrupt()

    done = client.run(encoded("qwen_3_4b"), listener=interrupt)
    spent = time.monotonic() - asked[0]
    assert done.ended == "execution_interrupted" and spent < 5, spent
    assert any("Reading qwen_3_4b.safetensors once" in text for _, text in done.texts)
    (path,) = host.base.rglob("digests/weights.json")
    assert not [place for place in json.loads(path.read_text()) if "qwen_3_4b.safetensors" in place]
