"""The rig itself: what the other host tests stand on."""

from pathlib import Path

import pytest
import websocket

from tests.rig import PYTHON, RigError
from tests.rig.client import Client, PromptRefusedError
from tests.rig.host import ANOTHER_HOST, ComfyServer, host_python, host_tree
from tests.rig.page import ComfyPage

EMPTY = {"class_type": "EmptyImage", "inputs": {"width": 48, "height": 32, "batch_size": 2, "color": 0x204060}}
SAVE = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "rig"}}


def test_a_prompt_runs_and_its_pictures_are_on_disk(host: ComfyServer, client: Client):
    run = client.run({"1": EMPTY, "2": SAVE})
    assert run.succeeded
    assert [(host.output / image["filename"]).is_file() for image in run.images()] == [True, True]
    assert run.milliseconds["2"] > 0


def test_an_unchanged_prompt_comes_from_the_host_s_cache(client: Client):
    client.run({"1": EMPTY, "2": SAVE})
    assert client.run({"1": EMPTY, "2": SAVE}).cached == {"1", "2"}
    client.free()
    assert client.run({"1": EMPTY, "2": SAVE}).cached == set()


def test_a_prompt_that_cannot_run_is_refused_by_node(client: Client):
    with pytest.raises(PromptRefusedError) as refusal:
        client.run({"1": {"class_type": "EmptyImage", "inputs": EMPTY["inputs"] | {"width": 0}}, "2": SAVE})
    assert set(refusal.value.answer["node_errors"]) == {"1"}


def test_an_error_inside_a_node_is_in_the_run(client: Client):
    outside = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "../outside"}}
    run = client.run({"1": EMPTY, "2": outside})
    assert run.ended == "execution_error"
    assert run.error["node_id"] == "2"
    assert "outside the output folder" in run.error["exception_message"]


def test_the_server_ends_with_its_block(tmp_path):
    with ComfyServer(tmp_path) as server:
        client = Client(server.url)
        assert client.get("/system_stats")["system"]["comfyui_version"]
        assert server.alive
    assert not server.alive
    with pytest.raises((OSError, websocket.WebSocketException)):
        client.get("/system_stats")


def test_the_page_loads_a_graph_and_runs_it(page: ComfyPage):
    page.load(
        {
            "version": 0.4,
            "last_node_id": 2,
            "last_link_id": 1,
            "nodes": [
                {
                    "id": 1,
                    "type": "EmptyImage",
                    "pos": [0, 0],
                    "size": [300, 150],
                    "widgets_values": [48, 32, 1, 255],
                    "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [1]}],
                },
                {
                    "id": 2,
                    "type": "PreviewImage",
                    "pos": [400, 0],
                    "size": [300, 150],
                    "inputs": [{"name": "images", "type": "IMAGE", "link": 1}],
                },
            ],
            "links": [[1, 1, 0, 2, 0, "IMAGE"]],
        }
    )
    assert page.missing_nodes() == []
    assert page.prompt()["1"]["inputs"]["width"] == 48
    assert page.run()["kind"] == "execution_success"


def test_the_page_names_a_missing_node(page: ComfyPage):
    page.load(
        {"version": 0.4, "nodes": [{"id": 1, "type": "NoSuchNode", "pos": [0, 0], "size": [99, 99]}], "links": []}
    )
    assert page.missing_nodes() == ["NoSuchNode"]


def test_another_comfyui_is_run_by_its_own_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(ANOTHER_HOST, str(tmp_path))
    with pytest.raises(RigError, match=r"DUET_COMFYUI: expected a folder of ComfyUI with its main\.py, got /"):
        host_tree()
    (tmp_path / "main.py").touch()
    assert (host_tree(), host_python()) == (tmp_path, PYTHON)
    own = tmp_path / "venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.touch()
    assert host_python() == own
