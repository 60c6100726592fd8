"""The real ComfyUI in this very process: its own start, nodes and executor, and Duet loaded as it loads packs.

The host's modules bear names such as ``nodes`` and ``server``, so a process that has started it is of no use for
anything else; every measure runs in a process of its own.
"""

# pyright: reportMissingImports=false
# The host is no package that a checker could find: it is the program that loads us.

import asyncio
import importlib
import logging
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.rig.host import has_gpu, host_tree

from ._harness import ROOT, synchronise

PACK = "ComfyUI-Duet"
CLIENT = "benchmarks"  # with a client the host tells of progress, as it does whenever a page is open

Prompt = dict[str, dict[str, Any]]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """One node of an API prompt. A tuple (node, output) is a link."""
    linked = {name: list(value) if isinstance(value, tuple) else value for name, value in inputs.items()}
    return {"class_type": kind, "inputs": linked}


class StockHost:
    """Started once in a process. base: its scratch folder; what it says goes to comfyui.log there."""

    def __init__(self, base: Path, arguments: Sequence[str] = ()) -> None:
        self.base = base.resolve()
        for folder in ("custom_nodes", "models", "input", "output", "user"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        link = self.base / "custom_nodes" / PACK
        if not link.is_symlink():
            link.symlink_to(ROOT)
        options = [
            "--base-directory",
            str(self.base),
            "--database-url",
            f"sqlite:///{self.base / 'user' / 'comfyui.db'}",
        ]
        flags = ["--disable-auto-launch", "--disable-api-nodes", *([] if has_gpu() else ["--cpu"])]
        before = sys.argv
        sys.path.insert(0, str(host_tree()))
        sys.argv = ["main.py", *options, *flags, *arguments]
        try:
            started = importlib.import_module("main")
            self._log = open(self.base / "comfyui.log", "w", encoding="utf-8")  # noqa: SIM115  # as long as the process
            for handler in logging.getLogger().handlers:
                if isinstance(handler, logging.StreamHandler):
                    handler.setStream(self._log)
            loop = asyncio.new_event_loop()
            asyncio.set_event_loop(loop)
            _, self._server, _ = started.start_comfyui(loop)
        finally:
            sys.argv = before
        # What it sends to pages is sent from another thread, as in the host itself.
        threading.Thread(target=loop.run_until_complete, args=(self._server.publish_loop(),), daemon=True).start()
        known = self.module("nodes").NODE_CLASS_MAPPINGS
        if "DuetGenerate" not in known:
            raise RuntimeError(
                f"expected the host to load Duet, got {len(known)} nodes without it: see {self._log.name}"
            )

    def module(self, name: str) -> ModuleType:
        """One of the host's own modules, such as comfy.model_management."""
        return importlib.import_module(name)

    def pack(self, name: str) -> ModuleType:
        """One of Duet's modules as the host has loaded them, such as pipeline.denoising.latents."""
        root = next(
            key for key, module in list(sys.modules.items())
            if getattr(module, "WEB_DIRECTORY", None) == "./web" and hasattr(module, "comfy_entrypoint")
        )  # fmt: skip
        return importlib.import_module(f"{root}.{name}")

    def graph(self) -> "Graph":
        """An executor of its own, because the host keeps outputs only while they are in the prompt that ran last."""
        return Graph(self.module("execution"), self._server)


class Graph:
    """Prompts that run one after the other, the later ones warm."""

    def __init__(self, execution: ModuleType, server: Any) -> None:
        self._execution = execution
        self._executor = execution.PromptExecutor(
            server, cache_type=execution.CacheType.CLASSIC, cache_args={"lru": 0, "ram": 0}
        )

    def run(self, prompt: Prompt) -> float:
        """Seconds from the prompt's check, as the host makes it when one is queued, to the end of its last node."""
        number = uuid.uuid4().hex
        synchronise()
        started = time.perf_counter()
        valid, error, outputs, errors = asyncio.run(self._execution.validate_prompt(number, prompt, None))
        if not valid:
            raise RuntimeError(f"the host refused the prompt: {error} {errors}")
        self._executor.execute(prompt, number, {"client_id": CLIENT}, outputs)
        synchronise()
        spent = time.perf_counter() - started
        if not self._executor.success:
            raise RuntimeError(f"the host failed: {_failure(self._executor.status_messages)}")
        return spent

    def output(self, name: str, number: int = 0) -> Any:
        """What a node of the last prompt gave."""
        return self._executor.caches.outputs.get(name).outputs[number][0]


def _failure(messages: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    told = [data for kind, data in messages if kind == "execution_error"]
    return "; ".join(f"{data['node_type']}: {data['exception_message']}" for data in told) or "it gave no reason"
