"""What the tests share for a whole session: real servers, started when first asked for, and one browser."""

import ctypes
import sys
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from tests.rig.client import Client
from tests.rig.host import COMPARE, PROBE, ComfyServer, newest_frontend
from tests.rig.page import ComfyPage, open_browser


@pytest.fixture(scope="module", autouse=True)
def given_back() -> Iterator[None]:
    """What a file's tests have freed goes back to the system, of which glibc keeps gigabytes.

    Two processes that hold them and a server with models of full size are more than 24 GB.
    """
    yield
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """The real host with its own page, the pack mounted, and nodes that count and compare what lives in its process."""
    with ComfyServer(tmp_path_factory.mktemp("host"), beside=(PROBE, COMPARE)) as server:
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


@pytest.fixture(scope="session", params=["host", "newest_host"], ids=["own page", "newest page"])
def tab(request: pytest.FixtureRequest, browser: Browser) -> ComfyPage:
    """One tab for all tests, with the host's own page and then with the newest: opening one takes seconds."""
    server: ComfyServer = request.getfixturevalue(request.param)
    return ComfyPage(browser, Client(server.url))


@pytest.fixture
def page(tab: ComfyPage) -> ComfyPage:
    """The tab, its errors forgotten."""
    tab.errors.clear()
    return tab
