"""API prompts for the host tests, built on the demo's."""

import copy
import json
import shutil
from pathlib import Path

from tests.rig.client import Prompt
from tests.rig.host import ComfyServer

RIG = Path(__file__).parents[1] / "rig"
_DEMO: Prompt = json.loads((RIG / "demo.json").read_text(encoding="utf-8"))


def demo_prompt(host: ComfyServer, **changes: object) -> Prompt:
    """The demo's prompt for ``host``; each change sets the input of that name wherever it is a plain value."""
    shutil.copy(RIG / "style.png", host.input)
    prompt = copy.deepcopy(_DEMO)
    for name, value in changes.items():
        nodes = [node for node in prompt.values() if name in node["inputs"] and not _is_link(node["inputs"][name])]
        assert nodes, f"no node of the demo has an input {name}"
        for node in nodes:
            node["inputs"][name] = value
    return prompt


def node_of(prompt: Prompt, kind: str) -> str:
    """The id of the one node of a kind."""
    (node,) = (node for node, entry in prompt.items() if entry["class_type"] == kind)
    return node


def with_reports(prompt: Prompt, action: str = "report") -> Prompt:
    """The prompt, then what Duet's cache says of itself ("cache") and what the probe counts ("probe")."""
    last = [node_of(prompt, "DuetGenerate"), 0]
    return prompt | {
        "cache": {"class_type": "DuetModelCache", "inputs": {"action": action, "after": last}},
        "probe": {"class_type": "DuetProbe", "inputs": {"after": last}},
    }


def only_reports() -> Prompt:
    return {
        "cache": {"class_type": "DuetModelCache", "inputs": {"action": "report"}},
        "probe": {"class_type": "DuetProbe", "inputs": {}},
    }


def _is_link(value: object) -> bool:
    return isinstance(value, list)
