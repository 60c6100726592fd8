"""Duet's cache in a real ComfyUI: bytes counted against bytes held, what 'free' leaves, and memory over many runs.

Starts the host of the tests with the pack and the tests' probe, and queues the demo's prompt. ``bytes_counted`` is what
the cache says, ``bytes_held`` what the weights of all models alive in the process take, ``bytes_host`` what the host's
own memory management counts as ours. ``python -m benchmarks host_cache`` prints one JSON line last.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.host.prompts import demo_prompt, only_reports
from tests.host.test_memory import SMALL, reports, resident_bytes
from tests.rig.client import Client
from tests.rig.host import PROBE, ComfyServer


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks host_cache", description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, ComfyServer(Path(folder), beside=(PROBE,)) as server:
        print(json.dumps(measure(server, chosen.runs)))


def measure(server: ComfyServer, runs: int) -> dict[str, float]:
    client = Client(server.url)
    cold = _run(server, client, seed=0)
    cache, probe = reports(client.run(only_reports()))
    for seed in range(1, 6):  # the allocator and the host's own caches settle
        _run(server, client, seed)
    before = resident_bytes(server)
    warm = [_run(server, client, seed) for seed in range(100, 100 + runs)]
    after = resident_bytes(server)
    client.free()
    freed_cache, freed_probe = reports(client.run(only_reports()))
    return {
        "models": len(cache["entries"]),
        "bytes_counted": cache["bytes_held"],
        "bytes_held": probe["bytes_alive"],
        "bytes_host": probe["host_counts"],
        "alive_after_free": freed_probe["alive"],
        "bytes_after_free": freed_probe["bytes_alive"] + freed_cache["bytes_held"],
        "runs": runs,
        "rss_megabytes": round(before / 2**20, 1),
        "rss_growth_megabytes": round((after - before) / 2**20, 1),
        "ms_first_run": round(cold, 1),
        "ms_warm_run_median": round(statistics.median(warm), 1),
    }


def _run(server: ComfyServer, client: Client, seed: int) -> float:
    """Milliseconds of a whole run with words never seen before."""
    start = time.perf_counter()
    run = client.run(demo_prompt(server, seed=seed, prompt=f"a rose, number {seed}", **SMALL))
    assert run.succeeded, run.error
    return 1000 * (time.perf_counter() - start)
