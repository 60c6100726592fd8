"""What each shortcut of a speed plan costs and saves on the small model: time, bytes of the models in use, likeness.

Each prompt is drawn by the exact plan and by each of the others, in turn; the first round, which reads and compiles,
does not count. time: of denoising and decoding, over the exact plan's, the median of pairs; model_bytes: denoiser and
decoder as they are held, over the exact plan's; psnr: dB over white, the median and the lowest.
``python -m benchmarks shortcuts`` prints one JSON line last. Needs the optional group ``quantise``.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipeline.acceleration.measuring import psnr
from pipeline.checkpoints import open_checkpoint
from pipeline.conditioning import FusedConditioning, Pictures
from pipeline.fusion import fuse
from pipeline.generation import generate
from pipeline.mini import MODEL_FOLDER
from pipeline.model_cache import ModelCache
from pipeline.residency import TorchResidency
from pipeline.speed_plan import EXACT, SpeedPlan
from pipeline.text_encoder import encode_prompt

from ._harness import interleaved, paired_ratio, rounded
from ._small_model import PROMPTS

PLANS: dict[str, SpeedPlan] = {
    "exact": EXACT,
    "int8": replace(EXACT, name="custom", quantisation="int8"),
    "int8 dynamic": replace(EXACT, name="custom", quantisation="int8 dynamic"),
    "channels_last": replace(EXACT, name="custom", memory_format="channels_last"),
    "bfloat16": replace(EXACT, name="custom", dtype="bfloat16"),
    "bfloat16, channels_last": replace(EXACT, name="custom", dtype="bfloat16", memory_format="channels_last"),
    "compile": replace(EXACT, name="custom", compile="regions"),
}


class _Painter:
    def __init__(self, steps: int, prompts: Sequence[str]) -> None:
        self._cache = ModelCache(TorchResidency(torch.device("cpu"), 2**32), 2**32)
        self._checkpoint, self._steps = open_checkpoint(MODEL_FOLDER), steps
        self._conditions: list[FusedConditioning] = [
            fuse(self._cache, self._checkpoint, encode_prompt(self._cache, self._checkpoint, prompt), None)
            for prompt in prompts
        ]

    def draw(self, number: int, plan: SpeedPlan) -> Pictures:
        side = self._checkpoint.family.native_size
        return generate(
            self._cache, self._checkpoint, self._conditions[number], seed=number, num_inference_steps=self._steps,
            width=side, height=side, plan=plan,
        )  # fmt: skip


def measure(steps: int, count: int) -> dict[str, Any]:
    prompts = PROMPTS[:count]
    painter = _Painter(steps, prompts)
    drawn: dict[str, list[Pictures]] = {name: [] for name in PLANS}

    def turn(name: str) -> float:
        made = painter.draw(len(drawn[name]) % len(prompts), PLANS[name])
        drawn[name].append(made)
        return sum(made.milliseconds[stage] for stage in ("generation", "decode"))

    spent = interleaved({name: lambda name=name: turn(name) for name in PLANS}, len(prompts))
    exact = drawn["exact"]
    told: dict[str, Any] = {"steps": steps, "prompts": len(prompts)}
    told["exact"] = {"milliseconds": statistics.median(spent["exact"]), "model_bytes": exact[-1].report.model_bytes}
    for name in list(PLANS)[1:]:
        likeness = sorted(
            psnr(_over_white(one), _over_white(other)).mean for one, other in zip(drawn[name], exact, strict=True)
        )
        told[name] = {
            "time": paired_ratio(spent[name], spent["exact"]),
            "model_bytes": drawn[name][-1].report.model_bytes / exact[-1].report.model_bytes,
            "psnr_median": statistics.median(likeness),
            "psnr_lowest": likeness[0],
        }
    return rounded(told)


def _over_white(made: Pictures) -> Tensor:
    return 1 + made.alpha * (made.pixels - 1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks shortcuts", description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    chosen = parser.parse_args(arguments)
    print(json.dumps(measure(chosen.steps, chosen.prompts)))
