"""A warm run at the precision that is fastest here, as the presets choose it, against the stock KSampler as it starts.

The same graphs, model and noise as in ``warm``, but the host with no flag, and Generate by a speed plan of dtype
"fastest": bfloat16 on a CPU with tiles (AMX), elsewhere no other than the model's own. Unlike ``warm`` this does less
exact work than the host, and so says how far the pictures are apart. channels_last: the same, with its convolutions in
that memory format. ``python -m benchmarks fastest`` prints one JSON line last. For a CPU.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._harness import Result, interleaved, medians, not_run, paired_ratio, result, told
from ._stable_diffusion import Job, our_graph, save_model, stock_graph
from ._stock_host import Prompt, StockHost, node

AIM = "<= 0.6"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks fastest", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--base", type=Path, help="the host's scratch folder, to keep the models; else a passing one")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        host = StockHost(chosen.base or Path(folder), ())
        from pipeline.acceleration.precision import multiplies_by_tiles

        from ._harness import has_gpu

        if has_gpu() or not multiplies_by_tiles():
            found = not_run("a CPU with tiles for bfloat16 is needed", AIM, "s")
        else:
            found = measure(host, Job("sd15", chosen.side, chosen.steps), chosen.repeats)
        print(json.dumps(found), flush=True)


def measure(host: StockHost, job: Job, repeats: int) -> Result:
    from pipeline.acceleration.measuring import psnr

    told(f"writing a {job.model} of random weights")
    save_model(host.base / "models" / "diffusers" / job.model, job.model, job.steps)
    ours, exact, stock = host.graph(), host.graph(), host.graph()
    seeds = iter(range(1, 10_000))
    apart: dict[str, list[float]] = {"fastest": [], "channels_last": []}

    def turn(name: str, **dials: Any) -> float:
        seed = next(seeds)
        spent = ours.run(_planned(job, seed, **dials))
        exact.run(our_graph(job, seed))
        pictures = (graph.output("picture").movedim(-1, 1) for graph in (ours, exact))
        apart[name].append(psnr(*pictures).mean)
        return spent

    spent = interleaved(
        {
            "ours": lambda: turn("fastest"),
            "channels_last": lambda: turn("channels_last", memory_format="channels_last"),
            "float32": lambda: exact.run(our_graph(job, next(seeds))),
            "host": lambda: stock.run(stock_graph(job, next(seeds))),
        },
        repeats,
    )
    middle = medians({name: spent[name] for name in ("ours", "host")})
    ratio = paired_ratio(spent["ours"], spent["host"])
    return result(
        ratio=ratio,
        **middle,
        unit="s",
        aim=AIM,
        met=ratio <= 0.6,
        over_our_float32=paired_ratio(spent["ours"], spent["float32"]),
        channels_last=paired_ratio(spent["channels_last"], spent["host"]),
        psnr={name: statistics.median(values) for name, values in apart.items()},
        rounds=spent,
        job=f"{job.model} {job.side}x{job.side}, {job.steps} steps",
    )


def _planned(job: Job, seed: int, **dials: Any) -> Prompt:
    graph = our_graph(job, seed)
    graph["plan"] = node("DuetSpeedPlan", **_SPEED_PLAN | dials)
    graph["picture"]["inputs"]["speed_plan"] = ["plan", 0]
    return graph


# Every dial as the preset "exact" has it, but for the precision.
_SPEED_PLAN = {
    "preset": "exact", "steps": 0, "guidance_scale": -1.0, "scheduler": "as the preset", "shift": 0.0,
    "step_cache": -1.0, "unet_cache": 0, "compile": "as the preset", "quantisation": "as the preset",
    "decoder": "the model's own", "preview": "the model's own", "dtype": "fastest", "memory_format": "as the preset",
    "measure_loss": False,
}  # fmt: skip
