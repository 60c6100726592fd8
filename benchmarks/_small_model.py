"""The small model with its trained weights, drawn from many conditions with a cache laid on its denoiser or without."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.acceleration.work import Work
from pipeline.checkpoints import open_checkpoint
from pipeline.conditioning import FusedConditioning
from pipeline.denoising.latents import channels_of, decode_latents, generators, noise
from pipeline.denoising.unet_sampler import denoise
from pipeline.fusing.ways import in_one_way
from pipeline.fusion import fuse
from pipeline.generation import generate
from pipeline.image_encoder import encode_image
from pipeline.mini import MODEL_FOLDER
from pipeline.model_cache import ModelCache
from pipeline.residency import TorchResidency
from pipeline.text_encoder import encode_prompt

SEED = 7
PROMPTS: list[str] = json.loads((Path(MODEL_FOLDER).parent / "sheet.json").read_text("utf-8"))["prompts"]
PICTURES = ("beach with umbrella", "potted plant")  # what is shown besides the words, as the model itself draws it

Lay = Callable[[Any, Work], Any]  # a denoiser and the run's counters -> its view


@dataclass(frozen=True)
class Condition:
    """One picture to draw: what it is called and what it is drawn from."""

    name: str
    fused: FusedConditioning
    seed: int


@dataclass(frozen=True)
class Drawn:
    """pixels: (6, S, S) in 0..1, over white and over black. Milliseconds, of the steps and of the decoder."""

    pixels: Tensor
    steps_ms: float
    steps_cpu_ms: float
    decode_ms: float
    work: Work


class SmallModel:
    """Its parts are in use for as long as this lives."""

    def __init__(self, kept_open: Any) -> None:
        cache = ModelCache(TorchResidency(torch.device("cpu"), 2**32), 2**32)
        self._cache, self._checkpoint = cache, open_checkpoint(MODEL_FOLDER)
        family = self._checkpoint.family
        self.side = family.native_size // family.downscale  # of its latents
        self.unet: Any = kept_open.enter_context(self._checkpoint.use(cache, "unet"))
        self.vae: Any = kept_open.enter_context(self._checkpoint.use(cache, "vae"))

    def conditions(self, prompts: Sequence[str] = PROMPTS) -> list[Condition]:
        """Each prompt alone, and each with each of the pictures."""
        cache, checkpoint = self._cache, self._checkpoint
        shown: list[tuple[str, Any]] = [("words alone", None)]
        for name in PICTURES:
            words = fuse(cache, checkpoint, encode_prompt(cache, checkpoint, name), None)
            side = checkpoint.family.native_size
            made = generate(cache, checkpoint, words, seed=SEED, num_inference_steps=4, width=side, height=side)
            over_white = made.pixels * made.alpha + 1 - made.alpha
            shown.append((name, encode_image(cache, checkpoint, over_white)))
        found = []
        for number, prompt in enumerate(prompts):
            words = encode_prompt(cache, checkpoint, prompt)
            for name, features in shown:
                found.append(Condition(f"{prompt}, {name}", fuse(cache, checkpoint, words, features), SEED + number))
        return found

    def draw(self, condition: Condition, steps: int, lay: Lay | None = None) -> Drawn:
        """The time of laying the cache on counts among the steps'."""
        work, own = Work(), generators(condition.seed, 1)
        start = noise((channels_of(self.vae), self.side, self.side), own)
        with torch.inference_mode():
            wall, cpu = time.perf_counter(), time.process_time()
            latents = denoise(
                self.unet if lay is None else lay(self.unet, work),
                self._checkpoint.scheduler(),
                start,
                in_one_way(condition.fused, [condition.seed]),
                num_inference_steps=steps,
                guidance_scale=1.0,
                start_noise=self._checkpoint.family.start_noise,
                generators=own,
                on_step=lambda step, total, now: None,
            )
            done, done_cpu = time.perf_counter(), time.process_time()
            pixels, alpha = decode_latents(self.vae, latents)
            decoded = time.perf_counter()
        both = torch.cat([pixels * alpha + 1 - alpha, pixels * alpha], dim=1)[0].float()
        return Drawn(both, 1000 * (done - wall), 1000 * (done_cpu - cpu), 1000 * (decoded - done), work)


@dataclass(frozen=True)
class Comparison:
    """Exact runs against runs with a cache. psnr: dB of each picture; the rest: exact over cached, by medians."""

    psnr: list[float]
    speed_up: float
    speed_up_cpu: float
    speed_up_picture: float
    steps_computed: float

    def told(self) -> dict[str, Any]:
        ordered = sorted(self.psnr)
        return {
            "psnr_mean": round(statistics.mean(ordered), 2),
            "psnr_median": round(statistics.median(ordered), 2),
            "psnr_tenth_lowest": round(ordered[len(ordered) // 10], 2),
            "psnr_lowest": round(ordered[0], 2),
            "speed_up": round(self.speed_up, 3),
            "speed_up_cpu_time": round(self.speed_up_cpu, 3),
            "speed_up_with_decoder": round(self.speed_up_picture, 3),
            "steps_computed_mean": round(self.steps_computed, 2),
            "pictures": len(ordered),
        }


def compare(model: SmallModel, conditions: Sequence[Condition], steps: int, lay: Lay, rounds: int = 1) -> Comparison:
    """Exact and cached in turn, each condition ``rounds`` times; the medians are over all of them."""
    exact, cached = [], []
    for _ in range(rounds):
        for condition in conditions:
            exact.append(model.draw(condition, steps))
            cached.append(model.draw(condition, steps, lay))
    pairs = list(zip(exact, cached, strict=True))[: len(conditions)]

    def ratio(measure: Callable[[Drawn], float]) -> float:
        return statistics.median(map(measure, exact)) / statistics.median(map(measure, cached))

    return Comparison(
        [psnr(one.pixels, other.pixels) for one, other in pairs],
        ratio(lambda drawn: drawn.steps_ms),
        ratio(lambda drawn: drawn.steps_cpu_ms),
        ratio(lambda drawn: drawn.steps_ms + drawn.decode_ms),
        statistics.mean(drawn.work.steps_computed for drawn in cached),
    )


def psnr(one: Tensor, other: Tensor) -> float:
    """dB, of values in 0..1; 100 where they are equal."""
    error = (one - other).square().mean().item()
    return min(100.0, -10 * torch.log10(torch.tensor(max(error, 1e-10))).item())
