"""Eight variants in one job against eight queued runs of one picture each, in the real host, each picture equal.

By default the small model, whose queued runs are Duet's own Generate, as the host has no node that runs it; with
``--model sd15`` a Stable Diffusion 1.5 of full size and random weights against the stock KSampler and VAEDecode. Both
sides run by the host's own executor, words read and model loaded before; only the seeds change. The pictures must agree
to 1e-5 for the small model, whose two sides differ by the size of the batch alone, and to 1e-4 against the stock nodes.
``python -m benchmarks variants`` prints one JSON line last.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._harness import Result, interleaved, medians, paired_ratio, result, told
from ._stable_diffusion import Job, our_graph, save_model, stock_graph
from ._stock_host import Prompt, StockHost, node

COUNT = 8
AIM_CPU, AIM_GPU = 0.9, 0.33
MINI = "duet-mini (built in)"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks variants", description=__doc__)
    parser.add_argument("--model", choices=("mini", "sd15", "sdxl"), help="sd15 on a GPU, else mini, unless given")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--at-once", type=int, default=COUNT, help="pictures in one batch")
    parser.add_argument("--side", type=int, help="pixels; of Stable Diffusion")
    parser.add_argument("--steps", type=int, default=4)
    chosen = parser.parse_args(arguments)
    from tests.rig.host import has_gpu

    gpu = has_gpu()
    model = chosen.model or ("sd15" if gpu else "mini")
    side = 128 if model == "mini" else chosen.side or ({"sd15": 512, "sdxl": 1024}[model] if gpu else 256)
    with tempfile.TemporaryDirectory() as folder:
        told("starting the host")
        host = StockHost(Path(folder), () if gpu else ("--force-fp32",))
        job = Job(MINI if model == "mini" else model, side, chosen.steps)
        print(json.dumps(measure(host, job, chosen.at_once, chosen.repeats, gpu)), flush=True)


def measure(host: StockHost, job: Job, at_once: int, repeats: int, gpu: bool) -> Result:
    small = job.model == MINI
    if not small:
        told(f"writing a {job.model} of random weights")
        save_model(host.base / "models" / "diffusers" / job.model, job.model, job.steps)
    single = our_graph if small else stock_graph
    together, alone = host.graph(), host.graph()
    starts = iter(range(1000, 100_000, COUNT))

    def ours() -> float:
        return together.run(variants(job, next(starts), at_once))

    def queued() -> float:
        first = next(starts)
        return sum(alone.run(single(job, seed)) for seed in range(first, first + COUNT))

    told("first runs, which load")
    together.run(variants(job, 0, at_once))
    apart = 0.0
    for seed in range(COUNT):
        alone.run(single(job, seed))
        apart = max(apart, _apart(together.output("picture")[seed], alone.output("picture")[0]))
    told(f"the pictures differ by at most {apart}")
    limit = 1e-5 if small and not gpu else 1e-4 if not gpu else 5e-2
    assert apart < limit, f"expected pictures that agree to {limit}, got {apart}"
    assert together.output("picture").std() > 0.05, "a picture that shows nothing agrees with everything"
    spent = interleaved({"ours": ours, "host": queued}, repeats)
    ratio, aim = paired_ratio(spent["ours"], spent["host"]), AIM_GPU if gpu else AIM_CPU
    return result(
        ratio=ratio,
        **medians(spent),
        unit="s",
        aim=f"<= {aim}",
        met=ratio <= aim,
        apart=apart,
        rounds=spent,
        job=f"{COUNT} pictures of {job.model}, {job.side}x{job.side}, {job.steps} steps, {at_once} at once, against "
        f"{COUNT} queued runs of {'Generate' if small else 'KSampler and VAEDecode'}",
    )


def variants(job: Job, seed: int, at_once: int) -> Prompt:
    """The graph of one picture with Variants in Generate's place."""
    prompt = our_graph(job, seed)
    prompt["picture"] = node(
        "DuetVariants", model=("model", 0), conditioning=("fuse", 0), seed=seed, count=COUNT, steps=job.steps,
        guidance_scale=job.guidance, width=job.side, height=job.side, at_once=at_once,
    )  # fmt: skip
    return prompt


def _apart(one: Any, other: Any) -> float:
    return (one.float().cpu() - other.float().cpu()).abs().max().item()
