"""The README's commands, run as a person runs them: as processes of their own, from the root of a clone."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.rig import OUTPUT, PYTHON, ROOT


@contextmanager
def rig(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.rig", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/system_stats", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def wait_until_answers(port: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not answers(port):
        assert process.poll() is None and time.monotonic() < deadline, "the page was never served"
        time.sleep(0.3)


def test_demo_tells_each_stage_and_saves_pictures():
    with rig("demo") as process:
        told, _ = process.communicate(timeout=180)
    assert process.returncode == 0, told
    lines = told.splitlines()
    for stage in ("text", "features", "fusion", "generation", "decode", "save"):
        (row,) = (line for line in lines if line.startswith(f"{stage} "))
        assert " ms" in row
    assert "cached by the host" in next(line for line in lines if line.startswith("text "))
    pictures = [ROOT / line for line in lines if line.startswith(f"{OUTPUT.name}/")]
    assert len(pictures) == 2
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda ending: ending.name)
def test_serve_leaves_no_server_behind(ending: signal.Signals):
    port = free_port()
    with rig("serve", "--port", str(port)) as process:
        wait_until_answers(port, process)
        process.send_signal(ending)
        process.wait(timeout=30)
        deadline = time.monotonic() + 10
        while answers(port) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not answers(port)


def test_a_clone_in_a_folder_of_another_name_collects_and_passes(tmp_path: Path):
    clone = tmp_path / "my duet-clone 2.0"
    ignored = shutil.ignore_patterns("model", "__pycache__")
    for folder in ("nodes", "pipeline", "tests"):
        shutil.copytree(ROOT / folder, clone / folder, ignore=ignored)
    for file in ("__init__.py", "pyproject.toml"):
        shutil.copy(ROOT / file, clone / file)
    command = [str(PYTHON), "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_imports.py"]
    ran = subprocess.run(command, cwd=clone, capture_output=True, text=True, env=os.environ, timeout=120)
    assert ran.returncode == 0, ran.stdout
    assert " passed" in ran.stdout.splitlines()[-1]
