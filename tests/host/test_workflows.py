"""Every example workflow opens in the real page, on the host's own and on the newest, and runs to its end."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipeline.language_models import SMOLLM2, lend, smollm2
from tests.rig.client import Client
from tests.rig.host import ComfyServer
from tests.rig.page import ComfyPage

FOLDER = Path(__file__).parents[2] / "workflows"
WORKFLOWS = sorted(FOLDER.glob("*.json"))


def test_each_scenario_has_a_workflow_with_a_thumbnail():
    assert len(WORKFLOWS) >= 5
    assert [path.name for path in WORKFLOWS if not path.with_suffix(".jpg").is_file()] == []


def test_the_template_browser_lists_them(client: Client):
    listed = client.get("/workflow_templates")["ComfyUI-Duet"]
    assert sorted(listed) == [path.stem for path in WORKFLOWS]
    for name in listed:
        assert client.fetch(f"/api/workflow_templates/ComfyUI-Duet/{name}.jpg").startswith(b"\xff\xd8")


def test_the_page_opens_without_an_error_from_the_pack(tab: ComfyPage):
    assert tab.opening_errors == []
    assert tab.page.evaluate("() => window.app.extensions.some(({name}) => /duet/i.test(name))")


@pytest.fixture
def language_model(host: ComfyServer, newest_host: ComfyServer) -> Iterator[None]:
    """What one of the workflows names, while it runs: other tests expect models/LLM to be empty."""
    folders = [server.base / "models" / "LLM" for server in (host, newest_host)]
    for folder in folders:
        lend(smollm2(), folder / SMOLLM2)
    yield
    for folder in folders:
        shutil.rmtree(folder)


@pytest.mark.usefixtures("language_model")
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_it_opens_and_runs(page: ComfyPage, path: Path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    page.load(workflow)
    assert len(page.node_types()) == len(workflow["nodes"])
    assert page.missing_nodes() == []
    end = page.run()
    assert end["kind"] == "execution_success", end
    page.page.wait_for_timeout(300)  # for what the page says about the result
    assert page.pack_errors() == []
    assert page.overlapping() == []
