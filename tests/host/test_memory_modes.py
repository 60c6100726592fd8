"""The cache under the host's own memory modes: see in_modes.py for what decides, and a real server for each flag."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.host.prompts import demo_prompt, with_reports
from tests.host.test_memory import SMALL, reports
from tests.rig.client import Client
from tests.rig.host import PROBE, ComfyServer, has_gpu, host_python, host_tree

SCRIPT = Path(__file__).with_name("in_modes.py")
CHECKS = re.findall(r"^def (check_\w+)", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
# Those that this host knows, of all there have been: --normalvram ended, dynamic VRAM began.
STATES = {
    "--normalvram": "NORMAL_VRAM",
    "--lowvram": "LOW_VRAM",
    "--novram": "NO_VRAM",
    "--highvram": "HIGH_VRAM",
    "--gpu-only": "HIGH_VRAM",
    "--disable-smart-memory": "NORMAL_VRAM",
    "--enable-dynamic-vram": "NORMAL_VRAM",
    "--cpu": "DISABLED",
}
KNOWN = (host_tree() / "comfy" / "cli_args.py").read_text(encoding="utf-8")
MODES = [flag for flag in STATES if f'"{flag}"' in KNOWN]
# Where there is no GPU the host starts with --cpu only, which it does not take together with another mode.
LAUNCHER = """
import sys
host = sys.argv[1]
sys.path[0], sys.argv = host, [f"{host}/main.py", *sys.argv[2:]]
import comfy.options
comfy.options.enable_args_parsing()
from comfy.cli_args import args
args.cpu = True
import runpy
runpy.run_path(f"{host}/main.py", run_name="__main__")
"""


@pytest.fixture(scope="module", params=MODES)
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    command = [host_python(), SCRIPT, host_tree(), tmp_path_factory.mktemp("base"), request.param]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=tmp_path_factory.mktemp("elsewhere")
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told.pop("state") == STATES[request.param], "the host was not in the mode that the flag asks for"
    return told


@pytest.mark.parametrize("check", CHECKS)
def test_in_mode(outcomes: dict[str, str | None], check: str):
    assert outcomes[check] is None, outcomes[check]


class ServerWith(ComfyServer):
    """A server with one memory flag, on the CPU where there is nothing else."""

    def _command(self) -> list[str]:
        command = super()._command()
        if has_gpu():
            return command
        command.remove("--cpu")
        return [str(host_python()), "-c", LAUNCHER, str(host_tree()), *command[2:]]


@pytest.mark.parametrize("flag", ["--lowvram", "--novram", "--highvram", "--gpu-only", "--disable-smart-memory"])
def test_a_server_starts_runs_and_counts(flag: str, tmp_path: Path):
    with ServerWith(tmp_path, beside=(PROBE,), arguments=(flag,)) as server:
        client = Client(server.url)
        for seed in (1, 2):
            cache, probe = reports(client.run(with_reports(demo_prompt(server, seed=seed, **SMALL))))
            assert cache["bytes_held"] == probe["bytes_alive"] >= probe["host_counts"] > 0
            if flag != "--disable-smart-memory":  # with it, the host moves everything off that is not asked for
                assert probe["host_counts"] == cache["bytes_held"]
            assert {entry["pins"] for entry in cache["entries"]} == {0}
        assert cache["misses"] == len(cache["entries"])
        client.free()
        assert (
            client.run({"probe": {"class_type": "DuetProbe", "inputs": {}}}).outputs["probe"]["duet_probe"][0]["alive"]
            == 0
        )
