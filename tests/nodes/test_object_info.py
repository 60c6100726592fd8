"""The nodes as the host describes them: a snapshot, so that no id, default or range changes unnoticed.

Saved workflows hold ids and widget orders. After a change that is meant: ``DUET_SNAPSHOT=1 python -m pytest
tests/nodes/test_object_info.py``, and read the difference.
"""

import json
import os
from pathlib import Path

import pytest

from tests.rig.client import Client

SNAPSHOT = Path(__file__).with_name("object_info.json")


@pytest.fixture(scope="module")
def described(client: Client) -> dict:
    found = {name: info for name, info in client.object_info().items() if info["category"] == "Duet"}
    # The files that there are, which are those that other tests of the session saved.
    found["DuetLoadEmbeddings"]["input"]["required"]["file"][1]["options"] = ["none"]
    return found


def test_it_is_as_it_was(described: dict):
    if os.environ.get("DUET_SNAPSHOT"):
        SNAPSHOT.write_text(json.dumps(described, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    assert described == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def test_everything_has_a_tooltip(described: dict):
    for name, info in described.items():
        assert info["description"], name
        assert all(info["output_tooltips"]), name
        for kind in ("required", "optional"):
            for key, (_, options) in info["input"].get(kind, {}).items():
                assert options.get("tooltip"), f"{name}.{key}"


def test_ids_begin_with_the_packs_name(described: dict):
    assert [name for name in described if not name.startswith("Duet")] == []
    assert {info["python_module"] for info in described.values()} == {"custom_nodes.ComfyUI-Duet"}
