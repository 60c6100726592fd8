"""What the tests share for a whole session: real servers, started when first asked for, and one browser."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.rig.client import Client
from tests.rig.host import ComfyServer, newest_frontend
from tests.rig.page import ComfyPage, open_browser

PROBE = Path(__file__).parent / "host" / "probe_node.py"


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """The real host with its own page, the pack mounted, and the probe that counts what lives in its process."""
    with ComfyServer(tmp_path_factory.mktemp("host"), beside=(PROBE,)) as server:
        yield server


@pytest.fixture(scope="session")
def newest_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """The same host serving the newest page."""
    with ComfyServer(tmp_path_factory.mktemp("newest"), front_end_root=newest_frontend()) as server:
        yield server


@pytest.fixture(scope="session")
def client(host: ComfyServer) -> Client:
    return Client(host.url)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture
def open_page(browser: Browser):
    """Call it with a server for a fresh tab; all tabs close with the test."""
    with ExitStack() as tabs:

        def open_tab(server: ComfyServer) -> ComfyPage:
            tab = ComfyPage(browser, Client(server.url))
            tabs.callback(tab.page.close)
            return tab

        yield open_tab


@pytest.fixture(params=["host", "newest_host"], ids=["own page", "newest page"])
def page(request: pytest.FixtureRequest, open_page) -> ComfyPage:
    """A fresh tab, once on the host's own page and once on the newest."""
    return open_page(request.getfixturevalue(request.param))
