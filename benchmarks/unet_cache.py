"""What a UNet cache saves of a 50-step run, and what it costs in likeness to the exact one.

sd15: a UNet of Stable Diffusion 1.5's size, random weights, drawn at 64x64 pixels without guidance, which would double
both sides alike. compute: floating point operations of the run with the cache over those without, as torch counts
them, at 64x64 and at 512x512 pixels (the latter on torch's meta device, which computes no values). time: of the steps,
runs in turn, medians; time_cpu: by the process's own time, which other programs lengthen little.
small_model: trained weights, many prompts, alone and with two pictures; psnr in dB over white and black together.
``python -m benchmarks unet_cache`` prints one JSON line last. Takes some 4 GB of memory.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch.utils.flop_counter import FlopCounterMode

import pipeline
from benchmarks._harness import result
from benchmarks._small_model import PROMPTS, SmallModel, compare
from pipeline.acceleration.unet_cache import whole_steps, with_unet_cache
from pipeline.acceleration.work import Work
from pipeline.fusing.ways import in_one_way

STEPS = 50
INTERVALS = (3, 5, 6, 10)
SMALL_RUNS = ((50, 3), (50, 6), (50, 10), (16, 3), (16, 4))  # steps, interval
AIMED_AT = (50, 6)
SIDES = (64, 512)  # pixels; the share of the work that is skipped depends on them
AIM, SMALL_AIM, LIKENESS = 0.25, 0.5, 30.0
_CONFIG = Path(pipeline.__file__).parent / "configs/sd15/unet/config.json"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks unet_cache", description=__doc__)
    parser.add_argument("--interval", type=int, default=6, help="of the runs that are timed")
    parser.add_argument("--rounds", type=int, default=1, help="exact and cached runs of Stable Diffusion 1.5's UNet")
    parser.add_argument("--prompts", type=int, default=6, help="of the small model")
    chosen = parser.parse_args(arguments)
    diffusers_logging.set_verbosity_error()
    small = measure_small_model(PROMPTS[: chosen.prompts])
    large = measure_stable_diffusion(chosen.interval, chosen.rounds)
    aimed = small["{} steps, every {}".format(*AIMED_AT)]
    compute = max(large["compute"][f"{side}x{side}, every {chosen.interval}"] for side in SIDES)
    told = result(
        ratio=compute,
        ours=compute,
        unit=f"of the compute of {STEPS} steps",
        aim=f"<= {AIM}, and >= {LIKENESS:g} dB at <= {SMALL_AIM} on the small model",
        met=compute <= AIM and aimed["psnr_mean"] >= LIKENESS and aimed["compute"] <= SMALL_AIM,
        time=large["time"],
        small_model_psnr=aimed["psnr_mean"],
        small_model_psnr_lowest=aimed["psnr_lowest"],
        small_model_compute=aimed["compute"],
        small_model_time=1 / aimed["speed_up"],
        sd15=large,
        small_model=small,
    )
    print(json.dumps(told))


def measure_stable_diffusion(interval: int, rounds: int) -> dict[str, Any]:
    config = json.loads(_CONFIG.read_text("utf-8"))
    with torch.device("meta"):
        made: Any = UNet2DConditionModel.from_config(config)
    unet: Any = made.eval()
    compute = {}
    for pixels in SIDES:
        costs = _operations(unet, pixels // 8, "meta")
        for every in sorted({*INTERVALS, interval}):
            whole = len(whole_steps(STEPS, every))
            part = (whole * costs[0] + (STEPS - whole) * costs[1]) / (STEPS * costs[0])
            compute[f"{pixels}x{pixels}, every {every}"] = round(part, 4)
        compute[f"{pixels}x{pixels}, a step from the cache"] = round(costs[1] / costs[0], 4)
    unet = unet.to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        if "norm" in name:
            parameter.fill_(float(name.endswith("weight")))
        else:
            parameter.uniform_(-0.02, 0.02, generator=generator)
    spent: dict[str, list[tuple[float, float]]] = {"exact": [], "cached": []}
    work = Work()
    _run(unet, 2)
    for _ in range(rounds):
        spent["exact"].append(_run(unet, STEPS))
        work = Work()
        spent["cached"].append(_run(with_unet_cache(unet, interval, STEPS, work), STEPS))

    def ratio(which: int) -> float:
        both = [statistics.median(run[which] for run in spent[kind]) for kind in ("cached", "exact")]
        return round(both[0] / both[1], 4)

    return {
        "steps": STEPS,
        "interval": interval,
        "steps_whole": work.steps_computed,
        "pixels": "64x64",
        "parameters": sum(parameter.numel() for parameter in unet.parameters()),
        "time": ratio(0),
        "time_cpu": ratio(1),
        "exact_seconds": round(statistics.median(run[0] for run in spent["exact"]), 1),
        "compute": compute,
    }


def _operations(unet: Any, side: int, device: str) -> tuple[int, int]:
    """Of a whole step and of one from the cache, as torch counts them."""
    view = with_unet_cache(unet, STEPS, STEPS, Work())
    sample = torch.zeros(1, unet.config.in_channels, side, side, device=device)
    tokens = torch.zeros(1, 77, unet.config.cross_attention_dim, device=device)
    found = []
    for number in range(2):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            view(sample, torch.full((1,), 900 - number, device=device), encoder_hidden_states=tokens)
        found.append(counter.get_total_flops())
    return found[0], found[1]


def _run(unet: Any, steps: int) -> tuple[float, float]:
    """Seconds of the steps, by the clock and by the process."""
    scheduler: Any = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    tokens = torch.randn(1, 77, 768, generator=generator)
    wall, cpu = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        for timestep in scheduler.timesteps:
            predicted = unet(latents, timestep, encoder_hidden_states=tokens, return_dict=False)[0]
            latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
    assert torch.isfinite(latents).all(), "the random weights overflow"
    return time.perf_counter() - wall, time.process_time() - cpu


def measure_small_model(prompts: Sequence[str]) -> dict[str, Any]:
    found = {}
    with ExitStack() as stack:
        model = SmallModel(stack)
        conditions = model.conditions(prompts)
        tokens = in_one_way(conditions[0].fused, [0]).tokens
        for steps, interval in SMALL_RUNS:

            def lay(unet: Any, work: Work, steps: int = steps, interval: int = interval) -> Any:
                return with_unet_cache(unet, interval, steps, work)

            view = with_unet_cache(model.unet, steps, steps, Work())
            costs = []
            for number in range(2):
                sample = torch.zeros(1, model.unet.config.in_channels, model.side, model.side)
                with FlopCounterMode(display=False) as counter, torch.inference_mode():
                    view(sample, torch.tensor(900.0 - number), encoder_hidden_states=tokens)
                costs.append(counter.get_total_flops())
            whole = len(whole_steps(steps, interval))
            compute = (whole * costs[0] + (steps - whole) * costs[1]) / (steps * costs[0])
            told = compare(model, conditions, steps, lay).told()
            found[f"{steps} steps, every {interval}"] = told | {"compute": round(compute, 4)}
            print(json.dumps(found))
    return found
