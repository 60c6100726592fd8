"""The doctor in further folders: those of extra_model_paths.yaml, and those of language models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.doctor.extra_folders import with_extra_folders
from tests.pipeline.language_models import save_llama
from tests.pipeline.test_doctor import examine, models
from tests.rig import ROOT

__all__ = ["models"]  # a fixture


def extra(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "extra_model_paths.yaml"
    path.write_text(text)
    return path


def test_further_folders_are_read_as_the_host_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SHELF", str(tmp_path / "shelf"))
    path = extra(
        tmp_path,
        "a111:\n base_path: $SHELF\n checkpoints: models/Stable-diffusion\n loras: |\n  models/Lora\n  models/LyCORIS\n"
        f"other:\n is_default: true\n clip: {tmp_path}/far/clip\n loras: beside\nnothing:\n",
    )
    known = {"checkpoints": [Path("/models/checkpoints")], "text_encoders": [Path("/models/text_encoders")]}
    found = with_extra_folders(known, path)
    assert found["checkpoints"] == [Path("/models/checkpoints"), tmp_path / "shelf/models/Stable-diffusion"]
    assert found["text_encoders"] == [tmp_path / "far/clip", Path("/models/text_encoders")]
    assert found["loras"] == [
        tmp_path / "beside", tmp_path / "shelf/models/Lora", tmp_path / "shelf/models/LyCORIS"
    ]  # fmt: skip
    assert known["checkpoints"] == [Path("/models/checkpoints")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "expected YAML"),
        ("- a", "expected sections with folders"),
        ("a: b", "expected folders by their kind in 'a'"),
        ("a:\n loras: [1]", "expected a folder, or one a line, in 'loras'"),
        ("a: !!python/object/apply:os.system ['true']", "expected YAML"),
        ("[" * 20_000, "expected YAML"),
        ("#" * 2**21, "expected at most 1,048,576 bytes"),
        ("\0", "expected YAML"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, text: str, said: str):
    with pytest.raises(ValueError, match=rf"extra_model_paths\.yaml: {said}"):
        with_extra_folders({}, extra(tmp_path, text))


def test_the_command_line_knows_further_folders(models: Path, tmp_path: Path):
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    save_file({"a": torch.zeros(1)}, shelf / "ink.safetensors")
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps({"1": {"class_type": "LoraLoader", "inputs": {"lora_name": "ink.safetensors"}}}))
    command = [sys.executable, "-m", "pipeline.doctor", str(path), "--models", str(models)]
    for arguments, code in (
        ([], 1),
        (["--extra-model-paths", str(extra(tmp_path, "more:\n loras: shelf\n"))], 0),
        (["--extra-model-paths", str(tmp_path / "none.yaml")], 2),
    ):
        done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stdout + done.stderr
    assert "none.yaml" in done.stderr


def test_a_language_model_is_looked_for_where_its_name_says(models: Path):
    save_llama(models / "LLM" / "small")
    (models / "text_encoders" / "half").mkdir(parents=True)
    (models / "text_encoders" / "half" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    found = examine(
        models,
        *(
            ("DuetDirectPrompt", "language_model", name)
            for name in ("LLM/small", "text_encoders/half", "LLM/absent", "none (the brief as it is)")
        ),
    )
    assert [(each.folder, each.name, each.status) for each in found] == [
        ("LLM", "small", "found"), ("text_encoders", "half", "broken"), ("LLM", "absent", "missing"),
    ]  # fmt: skip
    assert "expected weights at" in found[1].note and found[2].places == (str(models / "LLM" / "absent"),)
