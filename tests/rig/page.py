"""The host's real page in headless Chromium: what a person at the browser does, as calls."""

import contextlib
import re
import shutil
from collections.abc import Iterator
from itertools import combinations
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from ..rig import RigError
from .client import Client

TITLE = 30  # pixels of a node's title, above its position

_CHROMIUM_OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
)
# What the host's pages say on a fresh 0.3.75 without the pack: files not yet written, a jobs API that it lacks, and
# its own code asking the internet about nodes and models, which --disable-api-nodes forbids. The last is what 0.33.0
# says of itself, from its settings.
_HOST_NOISE = re.compile(
    r"status of 404 .*/(user\.css|favicon\.ico|api/userdata\S*|api/jobs\S*)\)$"
    r"|Content Security Policy.*/assets/\S+\)$"
    r"|Jobs API|JobsApiError|reading 'id'\)\s+at onChange"
    r"|^ComfyApp graph accessed before initialization \(\S+/assets/settingStore-\S+\)$"
)
# Listens on the page's own socket from before the prompt is queued, so that no end is missed.
_RUN = """
(seconds) => new Promise((resolve) => {
    const kinds = ["execution_success", "execution_error", "execution_interrupted"];
    const outputs = {};
    const keep = (event) => { outputs[event.detail.node] = event.detail.output; };
    const end = (answer) => {
        for (const kind of kinds) window.app.api.removeEventListener(kind, listen);
        window.app.api.removeEventListener("executed", keep);
        resolve({...answer, outputs});
    };
    const listen = (event) => end({...event.detail, kind: event.type});
    for (const kind of kinds) window.app.api.addEventListener(kind, listen);
    window.app.api.addEventListener("executed", keep);
    setTimeout(() => end({kind: `no end within ${seconds} s`}), 1000 * seconds);
    window.app.queuePrompt(0, 1).then(() => {
        const refused = window.app.lastNodeErrors;
        if (refused && Object.keys(refused).length) end({kind: "refused", errors: refused});
    });
})
"""


class ComfyPage:
    """A tab with the host's page. errors: what the console and uncaught exceptions have said; clear it at will."""

    def __init__(self, browser: Browser, client: Client) -> None:
        # Else the template browser covers the graph on a fresh user's first visit.
        client.post("/api/settings", {"Comfy.TutorialCompleted": True})
        self.client = client
        self.errors: list[str] = []
        self.page: Page = browser.new_page(viewport={"width": 1600, "height": 900})
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.errors.append(f"uncaught: {error}"))
        self.page.goto(client.url)
        self.page.wait_for_function("() => window.app?.graph && window.app.extensionManager", timeout=90_000)
        self.page.wait_for_load_state("networkidle")
        self.opening_errors = self.pack_errors()

    def load(self, workflow: dict[str, Any]) -> None:
        """Open a workflow as the page does for a dropped file; unknown nodes stay in it as placeholders."""
        self.page.evaluate("(workflow) => window.app.loadGraphData(workflow)", workflow)

    def node_types(self) -> list[str]:
        return self.page.evaluate("() => window.app.graph.nodes.map((node) => node.type)")

    def missing_nodes(self) -> list[str]:
        """Types in the open graph that this page has no node for."""
        known = self.page.evaluate("() => Object.keys(window.LiteGraph.registered_node_types)")
        return [kind for kind in self.node_types() if kind not in known]

    def pack_errors(self) -> list[str]:
        """The errors, less those that the page makes without the pack too."""
        return [error for error in self.errors if not _HOST_NOISE.search(error)]

    def prompt(self) -> dict[str, Any]:
        """The open graph in API format, by the page's own conversion."""
        return self.page.evaluate("async () => (await window.app.graphToPrompt()).output")

    def run(self, seconds: float = 120) -> dict[str, Any]:
        """Press Run and wait for the end: the last message, its type as ``kind``, and ``outputs`` by node id."""
        return self.page.evaluate(_RUN, seconds)

    def overlapping(self) -> list[tuple[str, str]]:
        """Pairs of nodes that cover one another, titles included, at the sizes that they have by now."""
        boxes = self.page.evaluate("() => window.app.graph.nodes.map((node) => [node.type, ...node.pos, ...node.size])")
        return [
            (one[0], other[0])
            for one, other in combinations(boxes, 2)
            if abs(2 * one[1] + one[3] - 2 * other[1] - other[3]) < one[3] + other[3]
            and one[2] - TITLE < other[2] + other[4]
            and other[2] - TITLE < one[2] + one[4]
        ]

    def _console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(f"{message.text} ({message.location.get('url', '')})")


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    executable = shutil.which("chromium")
    if executable is None:
        raise RigError("driving the page needs chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=[*_CHROMIUM_OPTIONS])
        try:
            yield browser
        finally:
            browser.close()
