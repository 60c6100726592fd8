"""What nodes/host does with the host's own memory management, folders and progress: see in_host.py."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.rig.host import host_python, host_tree

SCRIPT = Path(__file__).with_name("in_host.py")
CHECKS = re.findall(r"^def (check_\w+)", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    command = [host_python(), SCRIPT, host_tree(), tmp_path_factory.mktemp("base")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=tmp_path_factory.mktemp("elsewhere")
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("check", CHECKS)
def test_in_host(outcomes: dict[str, str | None], check: str):
    assert outcomes[check] is None, outcomes[check]
