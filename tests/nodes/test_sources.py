"""What a scanner, the host's start and an old console ask of the pack's files."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [ROOT / "__init__.py", *(path for name in ("nodes", "pipeline") for path in (ROOT / name).rglob("*.py"))]
IMPORT = """
import asyncio, importlib.util, inspect, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("a-pack with spaces", Path(sys.argv[1]) / "__init__.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert (Path(sys.argv[1]) / module.WEB_DIRECTORY / "duet.js").is_file()
assert inspect.iscoroutinefunction(module.comfy_entrypoint)
assert not hasattr(module, "NODE_CLASS_MAPPINGS"), "the host would ignore the entrypoint"
heavy = {"torch", "numpy", "PIL", "diffusers", "transformers", "comfy", "comfy_api"}
print(*heavy & {name.partition(".")[0] for name in sys.modules})
"""


def test_importing_the_root_imports_nothing_heavy():
    answer = subprocess.run([sys.executable, "-I", "-c", IMPORT, ROOT], capture_output=True, text=True)
    assert (answer.returncode, answer.stdout.strip()) == (0, ""), answer.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_western_console_can_show_the_source(path: Path):
    path.read_text(encoding="utf-8").encode("cp1252")
