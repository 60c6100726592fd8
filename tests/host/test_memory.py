"""The shared cache as the host sees it: counted to the byte, emptied by its free button, level over many runs."""

import re
import time
import uuid
from pathlib import Path

import pytest

from tests.host.prompts import demo_prompt, node_of, only_reports, with_reports
from tests.rig.client import Client, Run
from tests.rig.host import ComfyServer, host_tree

RUNS = 50
SMALL = {"width": 64, "height": 64}
# What the host itself gains per prompt (its history) over all the runs, and the allocator's slack.
LEVEL_WITHIN_BYTES = 24 * 2**20


def reports(run: Run) -> tuple[dict, dict]:
    """(cache, probe): the two counts of one run."""
    assert run.succeeded, run.error
    return run.outputs["cache"]["duet_cache"][0], run.outputs["probe"]["duet_probe"][0]


def resident_bytes(host: ComfyServer) -> int:
    status = Path(f"/proc/{host.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


def test_bytes_counted_are_the_bytes_held(host: ComfyServer, client: Client):
    client.free()
    cache, probe = reports(client.run(with_reports(demo_prompt(host, prompt=uuid.uuid4().hex))))
    assert len(cache["entries"]) >= 4, "text encoder, fusion, denoiser and decoder at least"
    assert cache["bytes_held"] == sum(entry["bytes"] for entry in cache["entries"])
    assert cache["bytes_held"] == probe["bytes_alive"] == probe["host_counts"]
    assert probe["alive"] == len(cache["entries"])
    assert [entry["pins"] for entry in cache["entries"]] == [0] * len(cache["entries"])


def test_free_leaves_none_alive(host: ComfyServer, client: Client):
    cache, _ = reports(client.run(with_reports(demo_prompt(host, prompt=uuid.uuid4().hex))))
    assert cache["embedding_bytes"] > 0
    client.free()
    cache, probe = reports(client.run(only_reports()))
    assert (cache["entries"], cache["embedding_bytes"]) == ([], 0)
    assert (cache["bytes_held"], probe["alive"], probe["bytes_alive"], probe["host_counts"]) == (0, 0, 0, 0)


def test_unload_in_the_graph_leaves_none_alive(host: ComfyServer, client: Client):
    client.run(with_reports(demo_prompt(host, seed=1), action="unload"))
    cache, probe = reports(client.run(only_reports()))
    assert (cache["entries"], cache["embedding_bytes"], probe["alive"]) == ([], 0, 0)


def test_what_the_graph_does_not_use_is_not_loaded(host: ComfyServer, client: Client):
    client.free()
    prompt = demo_prompt(host, prompt=uuid.uuid4().hex)
    del prompt[node_of(prompt, "DuetFuse")]["inputs"]["image_features"]
    cache, _ = reports(client.run(with_reports(prompt)))
    assert "image_encoder" not in {entry["component"] for entry in cache["entries"]}
    assert "text_encoder" in {entry["component"] for entry in cache["entries"]}


def test_a_second_run_finds_every_model_warm(host: ComfyServer, client: Client):
    client.run(demo_prompt(host, seed=1, prompt=uuid.uuid4().hex))
    before, _ = reports(client.run(only_reports()))
    run = client.run(with_reports(demo_prompt(host, seed=2, prompt=uuid.uuid4().hex)))
    after, _ = reports(run)
    assert (after["misses"], after["bytes_held"]) == (before["misses"], before["bytes_held"])
    assert after["hits"] > before["hits"]
    assert {stage["model"] for node, stage in run.stages() if node not in run.cached} <= {"warm", "none"}


def test_many_runs_leave_memory_level(host: ComfyServer, client: Client):
    for seed in range(5):  # the allocator and the host's own caches settle
        assert client.run(demo_prompt(host, seed=seed, **SMALL)).succeeded
    before, counted = resident_bytes(host), reports(client.run(only_reports()))
    for seed in range(100, 100 + RUNS):
        assert client.run(demo_prompt(host, seed=seed, prompt=f"a rose, number {seed}", **SMALL)).succeeded
    cache, probe = reports(client.run(only_reports()))
    assert (cache["bytes_held"], probe) == (counted[0]["bytes_held"], counted[1])
    assert resident_bytes(host) - before < LEVEL_WITHIN_BYTES


def test_a_cancelled_run_leaves_no_pin_and_the_next_equals_a_fresh_one(host: ComfyServer, client: Client):
    fresh = client.run(demo_prompt(host, seed=7))
    picture = client.fetch_image(fresh.images()[0])

    def cancel_at_the_second_step(kind: str, data: dict) -> None:
        if kind == "progress" and data["value"] >= 2:  # newer hosts do not tell of every step
            client.interrupt()

    cancelled = client.run(demo_prompt(host, seed=8, steps=100), cancel_at_the_second_step)
    assert cancelled.ended == "execution_interrupted"
    cache, _ = reports(client.run(only_reports()))
    assert {entry["pins"] for entry in cache["entries"]} == {0}
    client.run(demo_prompt(host, seed=9))
    again = client.run(demo_prompt(host, seed=7))
    assert client.fetch_image(again.images()[0]) == picture


@pytest.mark.parametrize("steps", [1, 4, 100])
def test_each_step_is_told_and_some_are_shown_until_the_picture_itself_comes(
    host: ComfyServer, client: Client, steps: int
):
    values = []
    started = time.monotonic()
    run = client.run(
        demo_prompt(host, seed=1000 + steps, steps=steps),
        lambda kind, data: values.append(data["value"]) if kind == "progress" else None,
    )
    assert run.succeeded, run.error
    told = [value for value in values if value]
    throttled = "PROGRESS_THROTTLE" in (host_tree() / "comfy" / "utils.py").read_text(encoding="utf-8")
    assert told == sorted(set(told)) and (told[0], told[-1]) == (1, steps)
    assert len(told) == steps or throttled
    most = min(steps - 1, 10 * (time.monotonic() - started))
    assert (steps == 100) <= run.previews <= most, "one every tenth of a second"
