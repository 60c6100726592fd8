"""The project's own files: what a user's installer reads, and what .venv was made from."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.rig import VENV, environment

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DEPENDENCIES = [Requirement(line) for line in PROJECT["project"]["dependencies"]]


def test_users_get_lower_bounds_only():
    assert [str(needed) for needed in DEPENDENCIES if {part.operator for part in needed.specifier} != {">="}] == []


def test_requirements_are_the_dependencies_without_torch():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    listed = {str(Requirement(line)) for line in lines if line and not line.startswith("#")}
    assert listed == {str(needed) for needed in DEPENDENCIES if needed.name != "torch"}


def test_the_pack_names_what_the_registry_asks_for():
    comfy = PROJECT["tool"]["comfy"]
    assert {"PublisherId", "DisplayName", "Icon", "requires-comfyui", "includes"} <= set(comfy)
    assert (ROOT / comfy["Icon"]).is_file()
    assert "web" not in comfy, "WEB_DIRECTORY says it already"


def test_the_environment_meets_every_bound_and_torch_was_not_moved():
    for needed in DEPENDENCIES:
        assert needed.specifier.contains(importlib.metadata.version(needed.name), prereleases=True), needed
    for pin in environment.TORCH:
        name, _, version = pin.partition("==")
        assert importlib.metadata.version(name).partition("+")[0] == version


def test_a_second_set_up_installs_nothing(capsys: pytest.CaptureFixture[str]):
    environment.prepare()  # by the command that runs this
    capsys.readouterr()
    environment.prepare()
    assert capsys.readouterr().out == ""


def test_the_rig_needs_no_package_before_it_has_installed_some():
    code = "from tests.rig import environment, host, client, demo, checks; import sys; print(*sys.modules)"
    loaded = subprocess.run([VENV / "bin" / "python", "-S", "-c", code], cwd=ROOT, capture_output=True, text=True)
    tops = {name.partition(".")[0] for name in loaded.stdout.split()}
    assert loaded.returncode == 0, loaded.stderr
    assert {name for name in tops - set(sys.stdlib_module_names) if not name.startswith("_")} == {"tests"}


def test_the_test_script_calls_the_readme_s_command():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.search(r"^exec python3 -m tests\.rig test$", script, re.MULTILINE)
