"""The host's HTTP and WebSocket interface, as far as the rig and the tests need it."""

import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..rig import RigError

Prompt = dict[str, dict[str, Any]]
Listener = Callable[[str, dict[str, Any]], None]

_PREVIEW_IMAGE, _PROGRESS_TEXT = 1, 3  # the host's BinaryEventTypes


class PromptRefusedError(RigError):
    """The host did not queue the prompt; ``answer`` is what it said, with node_errors by node id."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(json.dumps(answer, ensure_ascii=False))
        self.answer = answer


@dataclass
class Run:
    """What the host told about one queued prompt."""

    prompt_id: str
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)  # node id -> its ui
    cached: set[str] = field(default_factory=set)  # nodes the host answered from its own cache
    milliseconds: dict[str, float] = field(default_factory=dict)  # node id -> from its start to the next node's
    previews: int = 0
    texts: list[tuple[str, str]] = field(default_factory=list)  # (node id, what was shown on it while it ran)
    ended: str = ""  # execution_success, execution_error or execution_interrupted
    error: dict[str, Any] = field(default_factory=dict)

    @property
    def succeeded(self) -> bool:
        return self.ended == "execution_success"

    def images(self) -> list[dict[str, str]]:
        return [image for ui in self.outputs.values() for image in ui.get("images", [])]

    def stages(self) -> list[tuple[str, dict[str, Any]]]:
        """(node id, stage entry) for every stage a Duet node reported."""
        return [(node, stage) for node, ui in self.outputs.items() for stage in ui.get("duet_stage", [])]


class Client:
    def __init__(self, url: str) -> None:
        self.url = url
        self.client_id = uuid.uuid4().hex

    def get(self, path: str) -> Any:
        return json.loads(self.fetch(path))

    def fetch(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read()

    def fetch_image(self, image: dict[str, str]) -> bytes:
        """The file of one entry of ``Run.images``."""
        return self.fetch(f"/view?{urllib.parse.urlencode(image)}")

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def object_info(self) -> dict[str, Any]:
        return self.get("/object_info")

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def free(self) -> None:
        """Press 'Free model and node cache' and wait until the next prompt is sure to come after it.

        The host only sets flags, which its worker reads between two prompts without telling: so put one between.
        """
        self.post("/free", {"unload_models": True, "free_memory": True})
        self.run(
            {
                "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}},
                "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
            }
        )

    def queue(self, prompt: Prompt) -> str:
        try:
            return self.post("/prompt", {"prompt": prompt, "client_id": self.client_id})["prompt_id"]
        except urllib.error.HTTPError as refusal:
            raise PromptRefusedError(json.loads(refusal.read())) from None

    def run(self, prompt: Prompt, listener: Listener | None = None, timeout: float = 300) -> Run:
        """Queue a prompt and follow it to its end. listener: called with each message's type and data.

        Raises PromptRefusedError if it was not queued; an error inside a node is in the Run, not raised.
        """
        import websocket  # from .venv; the module itself must import before that exists

        socket = websocket.create_connection(
            f"{self.url.replace('http', 'ws', 1)}/ws?clientId={self.client_id}", timeout=timeout
        )
        try:
            run = Run(self.queue(prompt))
            node, since = None, time.perf_counter()
            while not run.ended:
                message = socket.recv()
                if isinstance(message, bytes):
                    event, length = int.from_bytes(message[:4], "big"), int.from_bytes(message[4:8], "big")
                    run.previews += event == _PREVIEW_IMAGE
                    if event == _PROGRESS_TEXT:
                        run.texts.append((message[8 : 8 + length].decode(), message[8 + length :].decode()))
                    continue
                kind, data = (parsed := json.loads(message))["type"], parsed.get("data") or {}
                if data.get("prompt_id") != run.prompt_id:
                    continue  # of another prompt, or the last node of one before, which a new socket is told
                if kind in ("executing", "execution_success"):
                    now = time.perf_counter()
                    if node is not None:
                        run.milliseconds[node] = run.milliseconds.get(node, 0.0) + 1000 * (now - since)
                    node, since = data.get("node"), now
                _note(run, kind, data)
                if listener:
                    listener(kind, data)
            return run
        finally:
            socket.close()


def _note(run: Run, kind: str, data: dict[str, Any]) -> None:
    if kind == "execution_cached":
        run.cached.update(data["nodes"])
    elif kind == "executed":
        run.outputs[data["node"]] = data["output"] or {}
    elif kind in ("execution_success", "execution_error", "execution_interrupted"):
        run.ended = kind
        run.error = data if kind == "execution_error" else {}
