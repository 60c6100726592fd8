"""Direct prompt in the real host: what it writes, what it shows meanwhile, and what bad input gets."""

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nodes.prompts import graph, pictures_of
from tests.pipeline.language_models import lend, save_llama, smollm2
from tests.rig.client import Client, Prompt, PromptRefusedError, Run
from tests.rig.host import ComfyServer

NO_MODEL = "none (the brief as it is)"


@pytest.fixture(scope="module")
def models(host: ComfyServer) -> Iterator[Path]:
    """models/LLM of the host, while these tests run: others expect it to be empty."""
    folder = host.base / "models" / "LLM"
    folder.mkdir(parents=True)
    save_llama(folder / "says-x", says="x")
    save_llama(folder / "talks-on", says="x", layers=24)
    lend(smollm2(), folder / "deeper" / "SmolLM2")
    yield folder
    shutil.rmtree(folder)


def directed(**settings: Any) -> Prompt:
    inputs = {
        "language_model": "LLM/says-x",
        "brief": "rose",
        "mode": "prompt",
        "language": "as the brief",
        "guided": True,
        "seed": 0,
        "temperature": 0.0,
        "max_new_tokens": 16,
    }
    return {
        "direct": {"class_type": "DuetDirectPrompt", "inputs": inputs | settings},
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["direct", 0]}},
    }


def told(run: Run) -> dict[str, Any]:
    assert run.succeeded, run.error
    return run.outputs["direct"]


def pins(client: Client) -> list[int]:
    run = client.run({"cache": {"class_type": "DuetModelCache", "inputs": {"action": "report"}}})
    return [entry["pins"] for entry in run.outputs["cache"]["duet_cache"][0]["entries"]]


def test_without_a_model_the_brief_goes_on(client: Client):
    output = told(client.run(directed(language_model=NO_MODEL, brief=" a\n rose ")))
    assert output["text"] == ["a rose"] and "models/LLM" in output["duet_notices"][0]
    assert [entry["stage"] for entry in output["duet_stage"]] == ["brief"]


def test_its_prompt_makes_a_picture(client: Client, models: Path):
    prompt = graph(text__prompt=["direct", 0], text__negative_prompt=["direct", 1]) | directed()
    run = client.run(prompt)
    assert told(run)["text"] == ["rose, " + "x" * 16]
    assert len(pictures_of(client, run)) == 1


def test_a_small_model_writes_a_scene_and_shows_it_growing(client: Client, models: Path):
    settings = {"language_model": "LLM/deeper/SmolLM2", "mode": "scene", "brief": "castle at night in the rain"}
    # Other tests of the session may have read the same weights, under whatever name.
    client.run({"cache": {"class_type": "DuetModelCache", "inputs": {"action": "unload"}}})
    run = client.run(directed(**settings, max_new_tokens=48))
    output = told(run)
    scene = json.loads(output["duet_scene"][0])
    assert scene["subject"].startswith("castle at night in the rain")
    assert output["text"][0].startswith(scene["subject"]) and output["duet_notices"] == []
    assert [(entry["stage"], entry["model"]) for entry in output["duet_stage"]] == [("guided", "loaded")]
    # A slow disk takes over a second to read the weights, and the node says that first.
    nodes, texts = zip(*(told for told in run.texts if not told[1].startswith("Reading SmolLM2")), strict=True)
    assert set(nodes) == {"direct"} and len(texts) > 3
    assert texts[0] == '{"subject": "castle at night in the rain' and '"style": "' in texts[-1]


def test_the_same_question_is_answered_without_the_model(client: Client, models: Path):
    first, other = (told(client.run(directed(seed=seed, temperature=1.0))) for seed in (1, 2))
    client.free()
    again = told(client.run(directed(seed=1, temperature=1.0)))
    assert (again["text"], again["duet_stage"][0]["model"]) == (first["text"], "none")
    assert other["duet_stage"][0]["model"] != "none"


def test_it_is_interrupted_within_a_token(client: Client, models: Path):
    seen: list[int] = []

    def interrupt(kind: str, data: dict[str, Any]) -> None:
        if kind == "progress_state":
            seen.extend(int(node["value"]) for name, node in data["nodes"].items() if name == "direct")
            if max(seen, default=0) >= 5:
                client.interrupt()

    # It never ends by itself, and 1,024 words take it many seconds: one that may stop early could win the race.
    run = client.run(directed(language_model="LLM/talks-on", max_new_tokens=1024), interrupt)
    assert run.ended == "execution_interrupted" and max(seen) < 1000
    assert not any(pins(client))
    assert client.run(directed()).succeeded


def test_a_model_that_is_replaced_is_asked_again(client: Client, models: Path):
    folder = save_llama(models / "changing", says="x")
    assert told(client.run(directed(language_model="LLM/changing")))["text"] == ["rose, " + "x" * 16]
    save_llama(folder, says="y")
    assert told(client.run(directed(language_model="LLM/changing")))["text"] == ["rose, " + "y" * 16]


# --- bad input ---


def fails(client: Client, **settings: Any) -> str:
    run = client.run(directed(**settings))
    assert (run.ended, run.error.get("node_type")) == ("execution_error", "DuetDirectPrompt")
    assert not any(pins(client))
    message = run.error["exception_message"].strip()
    assert message.startswith("Direct prompt: ")
    return message


NAMES = ["", "LLM/../../etc", "/etc/passwd", "..\\x\\y", "LLM/a\0b", "x" * 9999, "LLM/link"]


@pytest.mark.parametrize(
    "setting",
    [*({"language_model": name} for name in NAMES), {"mode": "poem"}, {"language": "Klingon"}],
    ids=lambda setting: repr(setting)[:40],
)
def test_what_is_not_listed_is_refused(client: Client, models: Path, tmp_path: Path, setting: dict[str, str]):
    save_llama(tmp_path / "elsewhere")
    (models / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PromptRefusedError) as refusal:
        client.run(directed(**setting))
    assert f"Direct prompt: {next(iter(setting))} must be one of" in str(refusal.value)
    (models / "link").unlink()


def test_pickled_weights_are_never_opened(client: Client, models: Path):
    folder = save_llama(models / "pickled")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps([1.0]))
    message = fails(client, language_model="LLM/pickled")
    assert "a Python pickle, which can run code and is never opened" in message and str(folder) in message
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("brief", "message"),
    [
        ("", "expected a brief of one character or more, got a blank one"),
        ("\0", "expected a brief of one character or more, got a blank one"),
        ("x" * 20_000, "expected a brief of at most 2,000 characters, got 20,000"),
    ],
)
def test_no_brief_and_endless_ones_are_refused(client: Client, models: Path, brief: str, message: str):
    assert fails(client, brief=brief) == f"Direct prompt: {message}"
