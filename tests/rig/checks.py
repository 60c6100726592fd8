"""All checks in a row: lint, format, types, then the tests, whose summary comes last."""

import os
import shutil
import subprocess

from ..rig import CACHE, CALM_THREADS, PYTHON, ROOT
from .environment import apt_install

_CHECKS = (
    ("ruff check", ["ruff", "check", "--output-format=concise", "."]),
    ("ruff format", ["ruff", "format", "--check", "."]),
    ("pyright", ["pyright"]),
)
# Each file's tests stay together, and share the servers of their process. More processes would want more memory.
_PROCESSES = 2
_SIDE_BY_SIDE = [f"--numprocesses={_PROCESSES}", "--dist=loadfile"]


def run_checks(pytest_arguments: list[str]) -> int:
    """Give 0 if everything passed; a failed check does not keep the tests from running."""
    if shutil.which("chromium") is None:
        apt_install("chromium", "driving the page")
    own = {"PYRIGHT_PYTHON_CACHE_DIR": str(CACHE / "pyright"), "PYTHONDONTWRITEBYTECODE": "1"}
    environment = os.environ | CALM_THREADS | own
    failed = []
    for name, command in _CHECKS:
        print(f"check: {name}", flush=True)
        if _module(command, environment) != 0:
            failed.append(name)
    if failed:
        print(f"FAILED: {', '.join(failed)}; the tests run all the same", flush=True)
    print("check: pytest", flush=True)
    spread = [] if pytest_arguments else _SIDE_BY_SIDE  # whoever asks for some tests wants to see them run
    if spread:
        # More threads than cores wait for one another: on two cores the same tests took a quarter longer.
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // _PROCESSES))
    return _module(["pytest", *spread, *pytest_arguments], environment) or int(bool(failed))


def _module(command: list[str], environment: dict[str, str]) -> int:
    # python -m, because the scripts in .venv/bin break when the clone is moved.
    return subprocess.run([PYTHON, "-m", *command], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL).returncode
