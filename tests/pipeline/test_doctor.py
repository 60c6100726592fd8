"""The doctor: which files a workflow names, where they should lie, and what a model folder lacks."""

import json
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import save_file
from torch import nn

from pipeline.doctor.examination import (
    HOST,
    VERSIONS,
    Report,
    examine_folder,
    examine_memory,
    examine_versions,
    examine_workflow,
)
from pipeline.doctor.model_folders import Finding, host_folders
from pipeline.doctor.workflow_files import LARGEST_WORKFLOW, WantedFile, read_workflow, wanted_files
from pipeline.model_cache import ModelCache, ModelKey
from pipeline.residency import TorchResidency
from tests.rig import ROOT

API = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15.safetensors"}},
    "2": {"class_type": "LoraLoader", "inputs": {"lora_name": "styles/ink.safetensors", "model": ["1", 0]}},
    "3": {"class_type": "VAELoader", "inputs": {"vae_name": "taesd"}},
    "4": {"class_type": "DualCLIPLoader", "inputs": {"clip_name1": "l.safetensors", "clip_name2": "t5.safetensors"}},
    "5": {"class_type": "CLIPVisionLoader", "inputs": {"clip_name": "eye.safetensors"}},
    "6": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux.safetensors", "weight_dtype": "default"}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "a file.safetensors\nin words"}, "_meta": {"title": "W"}},
    "8": {"class_type": "SomePackLoader", "inputs": {"ckpt_name": "other.ckpt", "thing": "what.gguf", "mode": "fast"}},
    "9": {"class_type": "LoadImage", "inputs": {"image": "rose.png"}},
    "10": {"class_type": "DuetLoadModel", "inputs": {"model": "duet-mini (built in)"}},
    "11": {"class_type": "DiffusersLoader", "inputs": {"model_path": "tiny"}},
}
WANTED = {
    ("checkpoints", "sd15.safetensors"), ("loras", "styles/ink.safetensors"), ("text_encoders", "l.safetensors"),
    ("text_encoders", "t5.safetensors"), ("clip_vision", "eye.safetensors"), ("diffusion_models", "flux.safetensors"),
    ("checkpoints", "other.ckpt"), ("", "what.gguf"), ("input", "rose.png"), ("diffusers", "tiny"),
}  # fmt: skip


def page_workflow(**extra: Any) -> dict[str, Any]:
    """What API is, as the page saves it: values by their places."""
    nodes = []
    for number, node in API.items():
        values = [value for value in node["inputs"].values() if not isinstance(value, list)]
        nodes.append({"id": int(number), "type": node["class_type"], "widgets_values": values, "pos": [0, 0]})
    # The page of 2025 lists the widgets among the inputs; without them nothing names those of a strange node.
    nodes[7]["inputs"] = [{"name": name, "widget": {"name": name}} for name in API["8"]["inputs"]]
    return {"version": 0.4, "nodes": nodes, "links": []} | extra


def wanted(workflow: object) -> set[tuple[str, str]]:
    return {(each.folder, each.name) for each in wanted_files(read_workflow(json.dumps(workflow)))}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "ComfyUI" / "models"
    for kind in ("checkpoints", "loras", "clip", "vae", "unet"):
        (folder / kind).mkdir(parents=True)
    (folder.parent / "input").mkdir()
    return folder


def examine(models: Path, *named: tuple[str, str, str]) -> list[Finding]:
    """named: (class, input, value) of one node each."""
    workflow = {str(at): {"class_type": kind, "inputs": {name: value}} for at, (kind, name, value) in enumerate(named)}
    return list(examine_workflow(json.dumps(workflow), host_folders(models)).files)


def test_the_api_s_format_names_its_files():
    assert wanted(API) == WANTED
    assert wanted({"prompt": API, "client_id": "x"}) == WANTED


def test_the_page_s_format_names_the_same():
    assert wanted(page_workflow()) == WANTED


def test_duets_own_blocks_name_files_too():
    load = {"model": "checkpoints/a/flux.safetensors", "text_encoder": "t5.safetensors", "vae": "automatic"}
    inputs = {"DuetLoadModel": load, "DuetImageFeatures": {"encoder": "dino"}, "DuetFuse": {"projection": "none"}}
    inputs |= {"DuetLoadEmbeddings": {"file": "embeddings/rose.safetensors [output]"}}
    inputs |= {"DuetIPAdapter": {"ip_adapter": "ip.safetensors", "image_encoder": "vit-h"}}
    inputs |= {"DuetLoadLora": {"lora": "lcm.safetensors"}}
    inputs |= {"DuetSpeedPlan": {"decoder": "vae_approx/taesd.safetensors", "preview": "the model's own"}}
    workflow = {name: {"class_type": name, "inputs": values} for name, values in inputs.items()}
    assert wanted(workflow) == {
        ("checkpoints", "a/flux.safetensors"), ("text_encoders", "t5.safetensors"), ("clip_vision", "dino"),
        ("input", "embeddings/rose.safetensors [output]"), ("ipadapter", "ip.safetensors"), ("clip_vision", "vit-h"),
        ("loras", "lcm.safetensors"), ("vae_approx", "taesd.safetensors"),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["taesd.safetensors", "taesd"])
@pytest.mark.parametrize("kind", ["vae_approx", "vae"])
def test_a_decoder_of_a_speed_plan_is_found_where_its_name_says(models: Path, kind: str, name: str):
    (models / kind).mkdir(exist_ok=True)
    (missing,) = examine(models, ("DuetSpeedPlan", "decoder", f"{kind}/{name}"))
    assert (missing.status, missing.places) == ("missing", (str(models / kind / name),))
    if name.endswith(".safetensors"):
        save_file({"a": torch.zeros(4)}, models / kind / name)
    else:
        (models / kind / name).mkdir()
    assert [each.status for each in examine(models, ("DuetSpeedPlan", "preview", f"{kind}/{name}"))] == ["found"]


def test_nodes_in_subgraphs_count_too():
    inner = {"id": 1, "type": "LoraLoader", "widgets_values": ["inner.safetensors", 1, 1]}
    graph = {"id": "a", "nodes": [inner]}
    assert wanted({"nodes": [], "definitions": {"subgraphs": [graph]}}) == {("loras", "inner.safetensors")}


def test_what_the_author_declared_tells_the_folder():
    node: dict[str, Any] = {"id": 1, "type": "StrangeLoader", "widgets_values": ["x.safetensors"]}
    declared = [{"name": "x.safetensors", "directory": "ipadapter"}, {"name": "y.safetensors", "directory": "vae"}]
    node["properties"] = {"models": [*declared, "nonsense", {"name": 1}]}
    assert wanted({"nodes": [node]}) == {("ipadapter", "x.safetensors"), ("vae", "y.safetensors")}


def test_every_example_workflow_is_read():
    for path in (ROOT / "workflows").glob("*.json"):
        assert len(read_workflow(path.read_bytes())) > 2, path


def test_a_missing_file_is_named_with_its_folder(models: Path):
    (finding,) = examine(models, ("CheckpointLoaderSimple", "ckpt_name", "sd15.safetensors"))
    assert (finding.status, finding.node) == ("missing", "CheckpointLoaderSimple (node 0)")
    assert finding.places == (str(models / "checkpoints" / "sd15.safetensors"),)
    (finding,) = examine(models, ("CLIPLoader", "clip_name", "t5.safetensors"))
    assert finding.places == tuple(str(models / kind / "t5.safetensors") for kind in ("text_encoders", "clip"))


def test_a_file_that_is_there_is_found(models: Path):
    save_file({"a": torch.zeros(4)}, models / "clip" / "t5.safetensors")
    (models.parent / "input" / "rose.png").write_bytes(b"")
    report = examine(models, ("CLIPLoader", "clip_name", "t5.safetensors"), ("LoadImage", "image", "rose.png [input]"))
    assert [finding.status for finding in report] == ["found", "found"]


def test_a_broken_file_is_said_to_be(models: Path):
    path = models / "loras" / "ink.safetensors"
    save_file({"a": torch.zeros(400)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    (models / "vae" / "page.safetensors").write_text("<!DOCTYPE html>")
    findings = examine(
        models, ("LoraLoader", "lora_name", "ink.safetensors"), ("VAELoader", "vae_name", "page.safetensors")
    )
    assert [finding.status for finding in findings] == ["broken", "broken"]
    assert "is truncated: expected" in findings[0].note and "a web page" in findings[1].note


@pytest.mark.parametrize(
    ("there", "asked", "told"),
    [
        ("unet/flux.safetensors", ("CheckpointLoaderSimple", "ckpt_name", "flux.safetensors"), "move it"),
        ("loras/a/ink.safetensors", ("LoraLoader", "lora_name", "ink.safetensors"), "choose it by that name"),
        ("loras/a/ink.safetensors", ("LoraLoader", "lora_name", "a\\ink.safetensors"), "as another system writes it"),
        ("loras/ink_v2.safetensors", ("LoraLoader", "lora_name", "ink_v3.safetensors"), "similar names there"),
        ("vae/what.gguf", ("SomePackLoader", "thing", "other/what.gguf"), "there is vae/what.gguf"),
    ],
    ids=["another folder", "a subfolder", "a backslash", "nearly", "any folder"],
)
def test_where_a_missing_file_lies_instead_is_said(models: Path, there: str, asked: tuple[str, str, str], told: str):
    path = models / there
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.zeros(4)}, path)
    (finding,) = examine(models, asked)
    assert finding.status == "missing" and told in finding.note


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "C:\\x.ckpt", "a/../../x.pt", "x" * 2000 + ".pt"]
)
def test_nothing_outside_the_folders_is_looked_at(models: Path, name: str):
    (models.parent / "x.safetensors").write_bytes(b"")
    (finding,) = examine(models, ("CheckpointLoaderSimple", "ckpt_name", name))
    assert finding.status == "refused" and len(str(finding)) < 400


def test_nodes_that_are_not_installed_are_named(models: Path):
    workflow = page_workflow()
    workflow["nodes"].append({"id": 99, "type": "Note", "widgets_values": ["x"]})
    report = examine_workflow(
        json.dumps(workflow), host_folders(models), {node["class_type"] for node in API.values()} - {"SomePackLoader"}
    )
    assert report.nodes == ("SomePackLoader",)
    assert not report.healthy and "SomePackLoader" in report.as_text()


BOMBS = {
    "nested lists": b"[" * 1_000_000,
    "nested objects": b'{"a":' * 200_000,
    "nested nodes": b'{"nodes":' + b"[" * 500_000,
    "too large": b" " * (LARGEST_WORKFLOW + 1),
    "a number without end": b'{"nodes": ' + b"9" * 1_000_000 + b"}",
    "too many nodes": json.dumps({"nodes": [{"type": "N"}] * 25_000}).encode(),
    "no JSON": b"\x89PNG\r\n",
    "empty": b"",
    "a list": b"[]",
    "a text": b'"nodes"',
    "no workflow": b'{"a": 1}',
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_what_is_no_workflow_is_refused_promptly(text: bytes):
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(ValueError, match="expected") as refused:
        read_workflow(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(str(refused.value)) < 600
    assert time.perf_counter() - start < 20 and peak < 2**29


@pytest.mark.parametrize(
    "node",
    [
        None, 1, [], {}, {"type": 3}, {"type": "LoraLoader", "widgets_values": 5}, {"type": "LoraLoader", "inputs": 7},
        {"type": "LoraLoader", "widgets_values": [None, {}, []], "inputs": [None, {"widget": 1}], "properties": []},
        {"type": "LoraLoader", "widgets_values": {"lora_name": 3}, "title": {}, "properties": {"models": {}}},
    ],
    ids=repr,
)  # fmt: skip
def test_nodes_of_a_strange_shape_want_nothing(node: object):
    assert (
        wanted({"nodes": [node, {"type": "Good", "widgets_values": []}], "definitions": {"subgraphs": [node]}}) == set()
    )


def test_a_whole_folder_is_in_order(mini: Path):
    report = examine_folder(mini)
    assert report.healthy, report.as_text()
    assert {finding.name for finding in report.files} >= {"tokenizer", "text_encoder", "unet", "vae", "scheduler"}


def test_all_that_a_folder_lacks_is_told_at_once(mini: Path):
    shutil.rmtree(mini / "vae")
    (mini / "tokenizer" / "tokenizer.json").unlink()
    weights = next((mini / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-9])
    wrong = {finding.name: finding for finding in examine_folder(mini).files if finding.status != "found"}
    assert {name: finding.status for name, finding in wrong.items()} == {
        "vae": "missing", "tokenizer": "broken", "unet": "broken",
    }  # fmt: skip
    assert str(mini / "vae" / "config.json") in wrong["vae"].note
    assert "expected tokenizer.json" in wrong["tokenizer"].note and "is truncated" in wrong["unet"].note


def test_a_folder_without_an_index_is_told(tmp_path: Path):
    (finding,) = examine_folder(tmp_path).files
    assert (finding.status, finding.places) == ("missing", (str(tmp_path / "model_index.json"),))


def test_the_versions_are_those_that_the_project_asks_for_and_ran_with():
    lines = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text("utf-8"), re.M | re.S)
    assert lines
    asked = {needed.name: str(needed.specifier) for needed in map(Requirement, re.findall(r'"(.+?)"', lines[1]))}
    assert {name: f">={lowest}" for name, (lowest, _) in VERSIONS.items()} == asked
    assert {version.name: version.verdict for version in examine_versions()} == dict.fromkeys(VERSIONS, "works")


def test_of_the_host_too():
    asked = re.search(r'^requires-comfyui = ">=(.+)"', (ROOT / "pyproject.toml").read_text("utf-8"), re.M)
    assert asked and asked[1] == HOST[0]
    for installed, verdict in (("0.3.74", "too old"), ("0.3.75", "works"), ("0.18.2", "works"), ("1.0.0", "newer")):
        host, *others = examine_versions(installed)
        assert (host.name, host.installed, host.verdict) == ("ComfyUI", installed, verdict)
        assert tuple(others) == examine_versions()


def test_a_version_is_too_old_or_newer(monkeypatch: pytest.MonkeyPatch):
    for installed, verdict in (("2.9.1", "too old"), ("2.10", "works"), ("2.14.1+cpu", "works"), ("3.0.0rc1", "newer")):
        monkeypatch.setattr("importlib.metadata.version", lambda name, installed=installed: installed)
        torch_version = examine_versions()[0]
        assert (torch_version.name, torch_version.verdict) == ("torch", verdict), installed
        assert installed in str(torch_version)


def test_what_is_in_memory_and_why():
    cache = ModelCache(TorchResidency("cpu"), budget_bytes=10_000)

    def key(name: str) -> ModelKey:
        return ModelKey(Path("/models") / name, 4096, 1, "unet", torch.float32)

    def build() -> nn.Module:
        return nn.Linear(32, 32, bias=False)

    for name in ("a", "b", "c"):
        with cache.use(key(name), build):
            pass
    with cache.use(key("b"), build):
        head, b, c, a = examine_memory(cache.stats())
    assert "2 models" in head
    assert "/models/b" in b and "in use 1 times" in b
    assert "/models/c" in c and "kept" in c and "used 1 times, last 1 uses" in c
    assert "/models/a" in a and "over the budget of 10000 bytes" in a


def test_a_report_is_plain_json():
    report = Report((Finding("n", "loras", "x", "missing", ("p",)),), ("N",), examine_versions(), ("m",))
    assert json.loads(json.dumps(report.as_json())) == report.as_json()
    assert report.as_json()["files"][0]["places"] == ["p"]


@pytest.mark.parametrize("what", ["workflow", "folder", "no workflow"])
def test_the_command_line(what: str, models: Path, mini: Path, tmp_path: Path):
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(API) if what == "workflow" else "[")
    arguments = [mini] if what == "folder" else [path, "--models", models]
    command = [sys.executable, "-m", "pipeline.doctor", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == {"workflow": 1, "folder": 0, "no workflow": 2}[what], done.stderr
    if what == "workflow":
        assert str(models / "checkpoints" / "sd15.safetensors") in done.stdout
    assert ("error: expected a workflow as JSON" in done.stderr) == (what == "no workflow")


def test_a_wanted_file_is_asked_for_once():
    node = {"class_type": "DualCLIPLoader", "inputs": {"clip_name1": "l.safetensors", "clip_name2": "l.safetensors"}}
    assert wanted_files(read_workflow(json.dumps({"1": node}))) == [
        WantedFile("DualCLIPLoader (node 1)", "text_encoders", "l.safetensors")
    ]
