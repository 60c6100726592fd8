"""A warm run of Duet's Generate against the stock KSampler and VAEDecode, and against diffusers' own pipeline, eager.

One process, one Stable Diffusion of full size with random weights, one noise for all, one minute: the real host runs
both graphs by its own executor, as it does for a page, the words read and the model loaded before; only the seed
changes from run to run. The pictures must agree to 1e-4, or there is no result. On a GPU it runs SD 1.5 at 512 and SDXL
at 1024 in half precision instead, where no two programs round alike: there the mean difference must stay below 0.01.
``python -m benchmarks warm`` prints one JSON line last.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._harness import Result, interleaved, medians, paired_ratio, result, told
from ._stable_diffusion import Job, our_graph, plain_diffusers, save_model, stock_graph
from ._stock_host import StockHost

AGREE, AGREE_HALF = 1e-4, 1e-2
AIMS = {"cpu": 0.95, "sd15": 0.40, "sdxl": 0.55}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks warm", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", type=int, help="pixels; 256 on a CPU, 512 and 1024 on a GPU unless given")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--guidance", type=float, default=1.0, help="above 1 every step is drawn twice, on all sides")
    parser.add_argument("--base", type=Path, help="the host's scratch folder, to keep the models; else a passing one")
    parser.add_argument("--profile", type=Path, help="write where the time of both sides goes to this file")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        base = chosen.base or Path(folder)
        told("starting the host")
        # Before torch is imported here, so that the host chooses its allocator as it does by itself.
        host = StockHost(base, ("--force-fp32",) if not _has_gpu() else ())
        models = ["sd15", "sdxl"] if _has_gpu() else ["sd15"]
        found: Result = {}
        for model in models:
            side = chosen.side or {"sd15": 512, "sdxl": 1024}[model] if _has_gpu() else chosen.side or 256
            job = Job(model, side, chosen.steps, chosen.guidance)
            one = measure(host, job, chosen.repeats, chosen.profile)
            found = one if not found else found | {model: one}
        print(json.dumps(found), flush=True)


def _has_gpu() -> bool:
    from tests.rig.host import has_gpu

    return has_gpu()


def measure(host: StockHost, job: Job, repeats: int, profile: Path | None = None) -> Result:
    told(f"writing a {job.model} of random weights")
    save_model(host.base / "models" / "diffusers" / job.model, job.model, job.steps)
    ours, stock = host.graph(), host.graph()
    told("first runs, which load")
    ours.run(our_graph(job, seed=0))
    stock.run(stock_graph(job, seed=0))
    draw = plain_diffusers(job, ours.output("model"), host.pack("nodes.host").model_cache(), ours.output("fuse"))
    apart = _differences(ours.output("picture"), stock.output("picture"), draw(0).movedim(1, -1))
    told(f"the pictures differ by {apart}")
    half = _has_gpu()
    name, limit = ("mean", AGREE_HALF) if half else ("max", AGREE)
    assert max(side[name] for side in apart.values()) < limit, f"expected pictures that agree, got {apart}"
    assert ours.output("picture").std() > 0.05, "a picture that shows nothing agrees with everything"
    seeds = iter(range(1, 10_000))
    turns = {
        "ours": lambda: ours.run(our_graph(job, next(seeds))),
        "host": lambda: stock.run(stock_graph(job, next(seeds))),
        "diffusers": lambda: _timed(draw, next(seeds)),
    }
    spent = interleaved(turns, repeats)
    if profile is not None:
        _profiled({name: turns[name] for name in ("ours", "host")}, profile)
    middle = medians(spent)
    ratio = paired_ratio(spent["ours"], spent["host"])
    aim = AIMS[job.model if half else "cpu"]
    return result(
        ratio=ratio,
        **middle,
        unit="s",
        aim=f"<= {aim}",
        met=ratio <= aim,
        ours_over_diffusers=paired_ratio(spent["ours"], spent["diffusers"]),
        rounds=spent,
        apart=apart,
        job=f"{job.model} {job.side}x{job.side}, {job.steps} steps, guidance {job.guidance:g}",
    )


def _timed(draw: Any, seed: int) -> float:
    from ._harness import wall

    return wall(lambda: draw(seed))


def _differences(ours: Any, stock: Any, plain: Any) -> dict[str, dict[str, float]]:
    def between(one: Any, other: Any) -> dict[str, float]:
        apart = (one.float().cpu() - other.float().cpu()).abs()
        return {"max": apart.max().item(), "mean": apart.mean().item()}

    return {"ours and host": between(ours, stock), "ours and diffusers": between(ours, plain)}


def _profiled(turns: dict[str, Any], into: Path) -> None:
    from torch.profiler import ProfilerActivity, profile

    from ._harness import has_gpu

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if has_gpu() else [])]
    parts = []
    for name, turn in turns.items():
        with profile(activities=kinds) as seen:
            turn()
        order = "self_cuda_time_total" if has_gpu() else "self_cpu_time_total"
        parts.append(f"{name}\n{seen.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)}")
    into.write_text("\n\n".join(parts), encoding="utf-8")
