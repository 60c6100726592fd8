"""How much faster a step cache draws at a given likeness to the exact run: 34 and 30 dB, and over a run of four steps.

The small model with its trained weights; many prompts, alone and with each of two pictures. Thresholds are tried on
every second prompt; the largest one whose mean PSNR is half a decibel above what is asked for is then measured on
the other prompts, exact and cached runs in turn. speed_up: of the steps, by the clock, medians; _cpu_time: by the
process's own time, which other programs lengthen little; _with_decoder: of steps and decoder. psnr: dB over white and
black together, the mean over pictures; the lowest tenth and the lowest are told too. transformers: tiny ones with
random weights, for the mechanics alone: what is computed, and that nothing changes at a threshold of 0.
``python -m benchmarks step_cache`` prints one JSON line last; --sheet draws what was compared.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel
from PIL import Image, ImageDraw

from benchmarks._harness import result
from benchmarks._small_model import PROMPTS, Comparison, Condition, Lay, SmallModel, compare, psnr
from pipeline.acceleration.step_cache import with_step_cache
from pipeline.acceleration.work import Work

THRESHOLDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5, 0.7, 1.0)
ASKED = (34.0, 30.0)
MARGIN = 0.5
HEADLINE, FEW = 16, 4
AIMS = ((HEADLINE, 34.0, 2.3), (HEADLINE, 30.0, 3.5), (FEW, 34.0, 1.5))  # steps, decibels, times as fast
SHOWN = 8  # columns of the sheet


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks step_cache", description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[FEW, HEADLINE], help="of the runs")
    parser.add_argument("--rounds", type=int, default=1, help="how often each picture of the second half is drawn")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--sheet", type=Path, help="where to draw the first pictures, exact and from the cache")
    chosen = parser.parse_args(arguments)
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        model = SmallModel(stack)
        prompts = PROMPTS[: chosen.prompts]
        tried, reported = model.conditions(prompts[::2]), model.conditions(prompts[1::2])
        rows: dict[str, Any] = {}
        for steps in chosen.steps:
            swept = sweep(model, tried, steps)
            told: dict[str, Any] = {"sweep": swept}
            found[f"{steps} steps"] = told
            for asked in ASKED:
                fit = [threshold for threshold in THRESHOLDS if swept[str(threshold)]["psnr"] >= asked + MARGIN]
                threshold = max(fit, default=min(THRESHOLDS))
                told[f"{asked:g} dB"] = {"threshold": threshold} | at(
                    model, reported, steps, threshold, chosen.rounds
                ).told()
                if steps == HEADLINE:
                    rows[f"{asked:g} dB"] = threshold
                print(json.dumps({f"{steps} steps": told}))
        if chosen.sheet is not None:
            draw_sheet(model, reported, HEADLINE, rows, chosen.sheet)
    headline = [
        {"steps": steps, "asked_dB": asked, "speed_up_aim": aim}
        | {name: found[f"{steps} steps"][f"{asked:g} dB"][name] for name in ("speed_up", "psnr_mean", "psnr_lowest")}
        for steps, asked, aim in AIMS
        if steps in chosen.steps
    ]
    told = result(
        ratio=headline[0]["speed_up"] if headline else None,
        ours=headline[0]["speed_up"] if headline else None,
        unit="times as fast",
        aim=", ".join(f">= {aim} at {asked:g} dB, {steps} steps" for steps, asked, aim in AIMS),
        met=len(headline) == len(AIMS)
        and all(one["speed_up"] >= one["speed_up_aim"] and one["psnr_mean"] >= one["asked_dB"] for one in headline),
        headline=headline,
        small_model=found,
        transformers=measure_transformers(),
    )
    print(json.dumps(told))


def sweep(model: SmallModel, conditions: Sequence[Condition], steps: int) -> dict[str, dict[str, float]]:
    """By threshold: the mean PSNR, and how many steps were computed."""
    exact = [model.draw(condition, steps).pixels for condition in conditions]
    found = {}
    for threshold in THRESHOLDS:
        drawn = [model.draw(condition, steps, _lay(threshold, steps)) for condition in conditions]
        likeness = [psnr(one, other.pixels) for one, other in zip(exact, drawn, strict=True)]
        found[str(threshold)] = {
            "psnr": round(statistics.mean(likeness), 2),
            "steps_computed": round(statistics.mean(one.work.steps_computed for one in drawn), 2),
        }
    return found


def at(model: SmallModel, conditions: Sequence[Condition], steps: int, threshold: float, rounds: int) -> Comparison:
    return compare(model, conditions, steps, _lay(threshold, steps), rounds)


def _lay(threshold: float, steps: int) -> Lay:
    return lambda unet, work: with_step_cache(unet, threshold, steps, work)


@torch.inference_mode()
def measure_transformers() -> dict[str, Any]:
    """A DiT, by the cache of this pack, and FLUX, by diffusers' own; both sides of guidance in calls of their own."""
    torch.manual_seed(0)
    dit = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=4, sample_size=8
    )
    flux = FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    grid = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
    sides: dict[str, Any] = {
        "dit": (dit, (1, 4, 8, 8), [{"class_labels": torch.tensor([number])} for number in (3, 1000)]),
        "flux": (
            flux,
            (1, 16, 4),
            [
                {"encoder_hidden_states": torch.randn(1, 5, 8), "pooled_projections": torch.randn(1, 8)} | grid
                for _ in range(2)
            ],
        ),
    }
    found = {}
    for name, (transformer, shape, told) in sides.items():
        start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        exact = _walk(transformer.eval(), start, told)
        for threshold in (0.0, 0.2, 0.5):
            work = Work()
            cached = _walk(with_step_cache(transformer, threshold, 20, work), start, told)
            found[f"{name}, threshold {threshold:g}"] = {
                "steps_computed": work.steps_computed,
                "steps_from_cache": work.steps_from_cache,
                "blocks_computed": work.blocks_computed,
                "blocks_skipped": work.blocks_skipped,
                "equal": torch.equal(exact, cached),
            }
    return found


def _walk(transformer: Any, latents: torch.Tensor, told: Sequence[dict[str, Any]]) -> torch.Tensor:
    """Twenty of Euler's steps, steered by 3."""
    for number in range(20):
        timestep = torch.full((1,), 999 - 50 * number)
        towards, away = (
            transformer(hidden_states=latents, timestep=timestep, return_dict=False, **side)[0] for side in told
        )
        latents = latents - 0.05 * (away + 3 * (towards - away))[:, : latents.shape[1]]
    return latents


def draw_sheet(
    model: SmallModel, conditions: Sequence[Condition], steps: int, rows: dict[str, float], path: Path
) -> None:
    """Every fourth condition, unchosen, three times as large: exact, and at each of the thresholds."""
    shown = list(conditions)[::4][:SHOWN]
    side, left = 192, 90
    sheet = Image.new("RGB", (left + len(shown) * side, (len(rows) + 1) * side), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, threshold) in enumerate([("exact", 0.0), *rows.items()]):
        pen.text((4, row * side + side // 2), f"{name}\n{threshold:g}" if row else name, fill="black")
        for column, condition in enumerate(shown):
            drawn = model.draw(condition, steps, _lay(threshold, steps))
            levels = (255 * drawn.pixels[:3].clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()
            picture = Image.fromarray(levels).resize((side - 4, side - 4), Image.Resampling.NEAREST)
            sheet.paste(picture, (left + column * side, row * side))
    sheet.save(path, optimize=True)
