"""In the real host: what was encoded before needs no encoder, embeddings as files, and the doctor."""

import shutil
import uuid
from pathlib import Path
from typing import Any

import pytest

from pipeline.mini import MODEL_FOLDER
from pipeline.store.embedding_files import read_embeddings
from tests.nodes.prompts import graph, pixels_of
from tests.rig.client import Client, Prompt, PromptRefusedError, Run
from tests.rig.host import ComfyServer


def stages(run: Run) -> dict[str, str]:
    assert run.succeeded, run.error
    return {stage["stage"]: stage["model"] for _, stage in run.stages()}


def with_node(prompt: Prompt, name: str, kind: str, **inputs: Any) -> Prompt:
    return prompt | {name: {"class_type": kind, "inputs": inputs}}


def test_words_and_a_picture_seen_before_need_no_encoder(host: ComfyServer, client: Client):
    prompt = graph(text__prompt=uuid.uuid4().hex, image__color=0x2468AC)
    client.free()
    first = client.run(prompt)
    assert (stages(first)["text"], stages(first)["features"]) == ("loaded", "loaded")
    client.free()
    again = client.run(prompt)
    assert (stages(again)["text"], stages(again)["features"]) == ("none", "none")
    assert stages(again)["generation"] == "loaded"
    assert pixels_of(client, again) == pixels_of(client, first)
    assert list((host.base / "user" / "__duet" / "embeddings").glob("*.safetensors"))


@pytest.mark.parametrize(("node", "output"), [("text", 0), ("look", 1), ("fuse", 2)])
def test_embeddings_come_back_from_a_file(host: ComfyServer, client: Client, node: str, output: int):
    prompt = graph(draw__seed=3)
    first = pixels_of(client, client.run(prompt))
    saved = client.run(with_node(prompt, "keep", "DuetSaveEmbeddings", embeddings=[node, 0], filename_prefix="e/rose"))
    assert saved.succeeded, saved.error
    (file,) = saved.outputs["keep"]["text"]
    assert read_embeddings(host.output / file.removesuffix(" [output]")).notices == ()
    loaded = with_node(prompt, "loaded", "DuetLoadEmbeddings", file=file)
    for other in loaded.values():
        for name, value in other["inputs"].items():
            if value == [node, 0]:
                other["inputs"][name] = ["loaded", output]
    assert pixels_of(client, client.run(loaded)) == first


def test_the_output_of_another_kind_says_what_the_file_holds(client: Client):
    prompt = graph()
    saved = client.run(with_node(prompt, "keep", "DuetSaveEmbeddings", embeddings=["text", 0], filename_prefix="words"))
    (file,) = saved.outputs["keep"]["text"]
    wrong = with_node(graph(draw__conditioning=["loaded", 2]), "loaded", "DuetLoadEmbeddings", file=file)
    run = client.run(wrong)
    assert run.ended == "execution_error"
    assert "holds prompt embeds: connect that output" in run.error["exception_message"]


@pytest.mark.parametrize(
    "prefix", ["../out", "/tmp/out", "a/../../out", "C:\\out", "con", "a/nul.x/b", "", "a\0b", "a:b", "dir/", "x" * 300]
)
def test_nothing_is_saved_outside_the_output_folder(client: Client, prefix: str):
    run = client.run(with_node(graph(), "keep", "DuetSaveEmbeddings", embeddings=["text", 0], filename_prefix=prefix))
    assert run.ended == "execution_error"
    assert "Save embeddings: expected filename_prefix to be a plain name" in run.error["exception_message"]


def test_what_the_disk_refuses_names_the_node(host: ComfyServer, client: Client):
    (host.output / "a-file").write_bytes(b"")
    long = "\u4e00" * 100  # 300 bytes of UTF-8, where a name may have 255
    for prefix in ("a-file/x", long):
        run = client.run(
            with_node(graph(), "keep", "DuetSaveEmbeddings", embeddings=["text", 0], filename_prefix=prefix)
        )
        assert run.ended == "execution_error" and "Save embeddings: " in run.error["exception_message"]


def test_a_link_out_of_the_folders_is_refused(host: ComfyServer, client: Client, tmp_path: Path):
    (host.output / "away").symlink_to(tmp_path)
    run = client.run(with_node(graph(), "keep", "DuetSaveEmbeddings", embeddings=["text", 0], filename_prefix="away/x"))
    assert "by a link" in run.error["exception_message"] and list(tmp_path.iterdir()) == []
    (tmp_path / "x.safetensors").write_bytes(b"")
    assert "by a link" in refused(client, "away/x.safetensors [output]")


def refused(client: Client, file: str) -> str:
    """What the host says of a Load embeddings with that file."""
    prompt = with_node(graph(fuse__prompt_embeds=["loaded", 0]), "loaded", "DuetLoadEmbeddings", file=file)
    try:
        return client.run(prompt).error["exception_message"]
    except PromptRefusedError as refusal:
        return str(refusal.answer["node_errors"]["loaded"]["errors"])


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/x.safetensors", "x.pickle", "none", "a\0.safetensors"])
def test_nothing_is_loaded_from_outside(client: Client, file: str):
    assert "expected the name of a .safetensors file inside the input folder" in refused(client, file)


def test_a_file_that_is_not_ours_is_refused(host: ComfyServer, client: Client):
    (host.input / "page.safetensors").write_text("<!DOCTYPE html>" + " " * 1000)
    assert "a web page" in refused(client, "page.safetensors")
    assert "found no such file" in refused(client, "missing.safetensors")


def examined(client: Client, prompt: Prompt, **inputs: Any) -> dict[str, Any]:
    run = client.run(with_node(prompt, "doctor", "DuetDoctor", **inputs))
    assert run.succeeded, run.error
    (report,) = run.outputs["doctor"]["duet_doctor"]
    assert run.outputs["doctor"]["text"][0]
    assert run.outputs["doctor"]["duet_summary"] == run.outputs["doctor"]["text"], "the page shows it on the node"
    return report


def test_the_doctor_finds_its_own_graph_in_order(client: Client):
    report = examined(client, graph(), after=["draw", 0])
    assert report["healthy"], report
    assert report["versions"][0]["name"] == "ComfyUI"
    assert report["nodes"] == [] and {version["verdict"] for version in report["versions"]} == {"works"}
    assert any("unet of" in line and "kept" in line for line in report["memory"])


def test_the_doctor_runs_beside_a_loader_that_cannot(host: ComfyServer, client: Client):
    broken = {
        "load": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "no-such.safetensors"}},
        "empty": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}},
        "encode": {"class_type": "VAEEncode", "inputs": {"pixels": ["empty", 0], "vae": ["load", 2]}},
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["encode", 0], "vae": ["load", 2]}},
        "save": {"class_type": "PreviewImage", "inputs": {"images": ["decode", 0]}},
    }
    report = examined(client, broken)
    (finding,) = report["files"]
    assert (finding["status"], finding["folder"]) == ("missing", "checkpoints")
    assert str(host.base / "models" / "checkpoints" / "no-such.safetensors") in finding["places"]


def test_the_doctor_reads_a_pasted_workflow_and_a_folder(host: ComfyServer, client: Client):
    workflow = '{"nodes": [{"id": 7, "type": "NoSuchNode", "widgets_values": ["x.gguf"]}]}'
    report = examined(client, graph(), workflow=workflow)
    assert report["nodes"] == ["NoSuchNode"] and report["files"][0]["name"] == "x.gguf"
    folder = host.base / "models" / "diffusers" / "lacking"
    shutil.copytree(MODEL_FOLDER, folder)
    shutil.rmtree(folder / "vae")
    try:
        report = examined(client, graph(), model_folder="lacking")
    finally:
        shutil.rmtree(folder)
    assert [(each["name"], each["status"]) for each in report["files"] if each["status"] != "found"] == [
        ("vae", "missing")
    ]


def test_the_doctor_refuses_what_is_no_workflow(client: Client):
    run = client.run(with_node(graph(), "doctor", "DuetDoctor", workflow="[" * 100_000))
    assert run.ended == "execution_error"
    assert "Doctor: expected a workflow as JSON" in run.error["exception_message"]
