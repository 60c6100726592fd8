"""One training loop for every stage: seeded, averaged, logged, and resumable after a kill."""

import csv
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..acceleration.precision import multiplies_by_tiles

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """How long and how fast a stage learns. The rate rises over ``warmup`` steps and falls to zero at ``steps``.

    batch: examples in each step.
    """

    steps: int
    batch: int
    learning_rate: float
    warmup: int = 200
    weight_decay: float = 0.01
    average: float = 0.998  # exponential moving average of the weights, which is what a stage keeps
    save_seconds: float = 120.0


def device() -> torch.device:
    """Where stages learn: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def halves_pay() -> bool:
    """Whether bfloat16 is faster: on a GPU, and on a CPU with tiles, where it halves the time or better."""
    return device().type == "cuda" or multiplies_by_tiles()


def seeded(step: int) -> torch.Generator:
    """The random numbers of one step, drawn on ``device()``: the same in every run on a device of that kind."""
    return torch.Generator(device()).manual_seed(step)


def run_stage(
    name: str,
    work: Path,
    plan: Plan,
    modules: nn.ModuleDict,
    loss_at: Callable[[int], dict[str, Tensor]],
) -> nn.ModuleDict:
    """Train ``modules`` in place and return them holding the averaged weights.

    ``loss_at(step)`` returns named scalar losses of one batch, on ``device()``; their sum is minimised. Randomness must
    come from the step number, so that a resumed run sees the batches it would have seen. A checkpoint beside the curve
    in ``work`` is written every ``plan.save_seconds`` and replaced atomically. Where it pays, ``loss_at`` runs in
    bfloat16 as far as that is safe; the weights and their averages stay in float32.
    """
    work.mkdir(parents=True, exist_ok=True)
    modules.to(device())
    checkpoint, curve = work / f"{name}.pt", work / f"{name}-curve.csv"
    trained = [parameter for parameter in modules.parameters() if parameter.requires_grad]
    rule = torch.optim.AdamW(
        trained, lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=plan.weight_decay, fused=True
    )
    average = {key: value.detach().clone() for key, value in modules.state_dict().items()}
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device(), weights_only=True)
        modules.load_state_dict(saved["modules"])
        average, start = saved["average"], saved["step"]
        rule.load_state_dict(saved["optimizer"])
        logger.info("%s resumes at step %d of %d", name, start, plan.steps)
    if start > plan.steps:
        raise ValueError(f"expected at least the {start} steps that {checkpoint} has learned, got {plan.steps}")
    _cut(curve, start)

    modules.train()
    saved_at = logged_at = time.monotonic()
    sums: dict[str, Tensor] = {}  # on the device, which each look at a value would make wait
    logged_step = start
    for step in range(start, plan.steps):
        rate = plan.learning_rate * min((step + 1) / plan.warmup, 1.0) * (1 - step / plan.steps)
        for group in rule.param_groups:
            group["lr"] = rate
        rule.zero_grad(set_to_none=True)
        with torch.autocast(device().type, torch.bfloat16, enabled=halves_pay()):
            losses = loss_at(step)
        torch.stack([loss.float() for loss in losses.values()]).sum().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        rule.step()
        _move_average(average, modules, min(plan.average, (step + 1) / (step + 10)))
        for key, value in losses.items():
            sums[key] = value.detach().float() + sums.get(key, 0.0)
        now = time.monotonic()
        if now - logged_at > 20 or step + 1 == plan.steps:
            count = step + 1 - logged_step
            means = {key: float(value) / count for key, value in sums.items()}
            told = " ".join(f"{key} {value:.4f}" for key, value in means.items())
            logger.info("%s %d/%d: %s, %.1f steps/s", name, step + 1, plan.steps, told, count / (now - logged_at))
            _append_row(curve, {"step": step + 1, **means})
            sums, logged_at, logged_step = {}, now, step + 1
        if now - saved_at > plan.save_seconds or step + 1 == plan.steps:
            partial = checkpoint.with_name(f"{checkpoint.name}.partial")
            torch.save(
                {
                    "modules": modules.state_dict(),
                    "average": average,
                    "optimizer": rule.state_dict(),
                    "step": step + 1,
                },
                partial,
            )
            partial.replace(checkpoint)
            saved_at = now
    modules.load_state_dict(average)
    return modules.eval()


@torch.no_grad()
def _move_average(average: dict[str, Tensor], modules: nn.Module, decay: float) -> None:
    now = modules.state_dict()
    weights = [key for key, value in now.items() if value.is_floating_point()]
    torch._foreach_lerp_([average[key] for key in weights], [now[key] for key in weights], 1 - decay)
    for key in now.keys() - set(weights):
        average[key].copy_(now[key])


def _cut(curve: Path, start: int) -> None:
    """Rows beyond the checkpoint are of steps that come again, and a head without rows is of a kill."""
    if curve.exists():
        head, *rows = curve.read_text().splitlines(keepends=True) or [""]
        kept = [row for row in rows if row.endswith("\n") and int(float(row.split(",")[0])) <= start]
        curve.write_text("".join([head, *kept]) if kept else "")


def _append_row(curve: Path, row: dict[str, float]) -> None:
    new = not curve.exists() or not curve.stat().st_size
    with curve.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
