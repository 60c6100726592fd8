"""From a new process to its first picture, Duet's graph against the stock one, on the same folder of full size.

Each turn starts a new process that starts the real host with Duet in its custom_nodes, as a user's does, and runs one
graph once; so both pay for the host and for every pack it loads, and each for what it alone imports, reads and makes.
The picture is small and of two steps, since what counts is all that comes before it. What a host remembers from one
start to the next, such as Duet's digests of weights, is there, as it is for a user; "first ever" is a start without.
The files lie in the system's cache for both.
``python -m benchmarks cold`` prints one JSON line last.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.rig.host import has_gpu

from ._harness import ROOT, Result, interleaved, last_json, medians, paired_ratio, result, told
from ._stable_diffusion import Job, our_graph, save_model, stock_graph

AIM = 1.05
JOB = Job("sd15", side=64, steps=2)
GRAPHS = {"ours": our_graph, "host": stock_graph}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks cold", description=__doc__)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--base", type=Path, help="the host's scratch folder, to keep the models; else a passing one")
    parser.add_argument("--first", choices=GRAPHS, help=argparse.SUPPRESS)  # what a new process is asked for
    parser.add_argument("--profile", action="store_true", help="only say where one start of ours spends its time")
    chosen = parser.parse_args(arguments)
    if chosen.first:
        print(json.dumps(first_picture(chosen.base, chosen.first)))
        return
    with tempfile.TemporaryDirectory() as folder:
        base = chosen.base or Path(folder)
        told("writing a Stable Diffusion 1.5 of random weights")
        save_model(base / "models" / "diffusers" / JOB.model, JOB.model, JOB.steps)
        if chosen.profile:
            print(profiled(base))
            return
        print(json.dumps(measure(base, chosen.repeats)), flush=True)


def measure(base: Path, repeats: int) -> Result:
    parts: dict[str, list[dict[str, float]]] = {}

    def start(side: str, name: str) -> float:
        spent, found = _in_new_process(base, side)
        parts.setdefault(name, []).append(found)
        return spent

    def forgetful() -> float:
        shutil.rmtree(base / "user", ignore_errors=True)
        return start("ours", "first ever")

    told("the first start, which leaves the host's own files and ours behind")
    ever = forgetful()
    turns = {"ours": lambda: start("ours", "ours"), "host": lambda: start("host", "host")}
    spent = interleaved(turns, repeats)
    middle, ratio = medians(spent), paired_ratio(spent["ours"], spent["host"])
    return result(
        ratio=ratio,
        **middle,
        unit="s",
        aim=f"<= {AIM}",
        met=ratio <= AIM,
        first_ever=ever,
        parts={side: medians(_columns(parts[side])) for side in GRAPHS},
        rounds=spent,
        job=f"{JOB.model} {JOB.side}x{JOB.side}, {JOB.steps} steps",
    )


def _columns(rows: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _in_new_process(base: Path, side: str) -> tuple[float, dict[str, float]]:
    """Seconds from the process's start until its picture was there, and how they were spent."""
    command = [sys.executable, "-m", "benchmarks", "cold", "--first", side, "--base", str(base)]
    started = time.time()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"a first run of {side} failed: {done.stderr[-1000:]}")
    found = last_json(done.stdout)
    return found.pop("at") - started, found


def first_picture(base: Path, side: str) -> dict[str, float]:
    """In a new process. "at": the time of day when the picture was there."""
    from ._stock_host import StockHost

    started = time.time()
    host = StockHost(base, () if has_gpu() else ("--force-fp32",))
    ready = time.time()
    graph = host.graph()
    graph.run(GRAPHS[side](JOB, seed=1))
    at = time.time()
    picture = graph.output("picture")
    assert tuple(picture.shape) == (1, JOB.side, JOB.side, 3) and picture.std() > 0.05, "expected a picture"
    return {"at": at, "start_of_the_host": ready - started, "first_run": at - ready}


def profiled(base: Path) -> str:
    """Ours alone, by function, after one start that leaves its digests behind."""
    import cProfile
    import io
    import pstats

    from ._stock_host import StockHost

    _in_new_process(base, "ours")
    graph = StockHost(base, () if has_gpu() else ("--force-fp32",)).graph()
    profile = cProfile.Profile()
    profile.runcall(graph.run, our_graph(JOB, seed=1))
    text: Any = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("cumulative").print_stats(110)
    return text.getvalue()
