"""The line on each node in the real page: what the last run took, notices, and nothing of it in what is saved."""

import json
import uuid
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from pipeline.families import FAMILIES
from tests.rig.client import Client
from tests.rig.host import ComfyServer
from tests.rig.page import ComfyPage

ROOT = Path(__file__).parents[2]
LOCALE_ZH = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
LINES = """() => Object.fromEntries(window.app.graph.nodes
    .map((node) => [node.type, node.widgets?.find((widget) => widget.name === "duet_line")?.element.innerText ?? ""])
    .filter(([type]) => type.startsWith("Duet")))"""


@pytest.fixture
def opened(page: ComfyPage) -> ComfyPage:
    page.page.wait_for_function("() => window.duetReady")
    workflow = json.loads((ROOT / "workflows" / "text-to-image.json").read_text(encoding="utf-8"))
    for node in workflow["nodes"]:
        if node["type"] == "DuetEmbedText":
            node["widgets_values"][0] = f"rose {uuid.uuid4().hex}"  # else the host may know the answer already
        if node["type"] == "DuetGenerate":
            node["widgets_values"][1] = "fixed"  # what becomes of the seed after a run
    page.load(workflow)
    return page


def test_each_node_tells_its_stages(opened: ComfyPage):
    assert set(opened.page.evaluate(LINES).values()) == {""}
    assert opened.run()["kind"] == "execution_success"
    lines = opened.page.evaluate(LINES)
    assert lines["DuetEmbedText"].startswith("text · ") and " ms" in lines["DuetEmbedText"]
    generation, decode, *notices = lines["DuetGenerate"].splitlines()
    assert generation.startswith("generation · ") and decode.startswith("decode · ")
    side = FAMILIES["DuetMiniPipeline"].native_size
    assert f"{side}x{side}" in notices[-1]
    assert "MB held" in lines["DuetModelCache"]

    assert opened.run()["kind"] == "execution_success"
    assert opened.page.evaluate(LINES)["DuetGenerate"] == "unchanged, not run again"
    assert opened.pack_errors() == []


def test_what_was_saved_before_is_not_said_to_be_saved_again(opened: ComfyPage):
    """Of nodes at the end of a graph the host repeats what they said."""
    opened.page.evaluate("""() => {
        const graph = window.app.graph, node = window.LiteGraph.createNode("DuetSavePictures");
        graph.add(node);
        graph.nodes.find((other) => other.type === "DuetGenerate").connect(0, node, "image");
    }""")
    assert opened.run()["kind"] == "execution_success"
    assert opened.page.evaluate(LINES)["DuetSavePictures"].startswith("save · ")
    assert opened.run()["kind"] == "execution_success"
    assert opened.page.evaluate(LINES)["DuetSavePictures"] == "unchanged, not run again"
    opened.page.evaluate("""() => {
        const node = window.app.graph.nodes.find((other) => other.type === "DuetSavePictures");
        node.widgets.find((widget) => widget.name === "filename_prefix").value = "again";
    }""")
    assert opened.run()["kind"] == "execution_success"
    assert opened.page.evaluate(LINES)["DuetSavePictures"].startswith("save · ")


def test_nodes_in_a_subgraph_tell_too(opened: ComfyPage):
    opened.page.evaluate("""() => {
        const graph = window.app.graph;
        graph.convertToSubgraph(new Set([graph.nodes.find((node) => node.type === "DuetEmbedText")]));
    }""")
    inner = """() => [...window.app.graph.subgraphs.values()].flatMap((graph) => graph.nodes)
        .find((node) => node.type === "DuetEmbedText").widgets
        .find((widget) => widget.name === "duet_line").element.innerText"""
    assert opened.run()["kind"] == "execution_success"
    assert opened.page.evaluate(inner).startswith("text · ")
    assert opened.run()["kind"] == "execution_success"
    assert opened.page.evaluate(inner) == "unchanged, not run again"


def test_the_line_is_not_saved(opened: ComfyPage):
    before = opened.page.evaluate(
        "() => JSON.stringify(window.app.graph.serialize().nodes.map((n) => n.widgets_values))"
    )
    opened.run()
    after = opened.page.evaluate(
        "() => JSON.stringify(window.app.graph.serialize().nodes.map((n) => n.widgets_values))"
    )
    assert before == after
    for node in opened.prompt().values():
        assert "duet_line" not in node["inputs"]


def test_help_is_served_in_both_languages(client: Client):
    for path, title in (("DuetFuse.md", "Fuse"), ("DuetFuse/zh.md", LOCALE_ZH["DuetFuse"]["display_name"])):
        assert client.fetch(f"/extensions/ComfyUI-Duet/docs/{path}").decode().startswith(f"# {title}")


def test_the_newest_page_speaks_chinese(browser: Browser, newest_host: ComfyServer):
    client = Client(newest_host.url)
    client.post("/api/settings", {"Comfy.Locale": "zh"})
    try:
        page = ComfyPage(browser, client).page
        page.wait_for_function("() => window.duetReady")
        title, label = page.evaluate("""() => {
            const node = window.LiteGraph.createNode("DuetFuse");
            return [node.title, node.widgets.find((widget) => widget.name === "strength").label];
        }""")
        page.close()
    finally:
        client.post("/api/settings", {"Comfy.Locale": "en"})
    told = LOCALE_ZH["DuetFuse"]
    assert (title, label) == (told["display_name"], told["inputs"]["strength"]["name"])
