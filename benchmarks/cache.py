"""What the shared cache and the store of embeddings save, and how near the evictions come to the best possible.

aba_third_over_warm: a whole run of a model after another one was used, over a run straight after its own; two copies of
the built-in model with different weights, in memory together, medians of interleaved runs. shared_component_*: two
checkpoints with the same text encoder and autoencoder; bytes saved, and those that are equal. embed_*: a prompt that
was made lately and so is in memory, against reading a text encoder of CLIP-L's size (123 million parameters,
random) and encoding; *_on_disk: one that is not in memory any more; the hit after a restart is the first of a new
process, opening the store included; the median of five. leak_bytes_after_50: bytes of all
tensors alive after 50 further runs of models in turn that do not fit together. evictions_over_optimal: bytes that
ModelCache loads over the fewest possible, the median of nine sessions of 1,000 uses under 48 GB, see cache_sessions.py.
Those that end in _cpu are by the process's own time, which other programs on a busy machine lengthen little.
``python -m benchmarks cache`` prints one JSON line last.
"""

import argparse
import gc
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.cache_sessions import SIZES, fewest_bytes, session
from pipeline.checkpoints import Checkpoint, open_checkpoint
from pipeline.files.content import Digests
from pipeline.fusion import fuse
from pipeline.generation import generate
from pipeline.mini import MODEL_FOLDER
from pipeline.model_cache import ModelCache, ModelKey
from pipeline.residency import TorchResidency
from pipeline.store.embedding_store import EmbeddingStore
from pipeline.store.recall import recalled
from pipeline.text_encoder import encode_prompt
from tests.pipeline.devices import FakeDevice
from tests.pipeline.folders import save_stable_diffusion

GB = 10**9
BUDGET = 48 * GB
SIDE = 128  # the small model's own size
SESSIONS = range(9)
RESTARTS = 5
RECENT_BYTES = 2**26  # as nodes.host has it


@dataclass
class Spent:
    """Milliseconds by the clock and by the process, once it is done."""

    wall: float = 0.0
    cpu: float = 0.0

    def __post_init__(self) -> None:
        self._started = (time.perf_counter(), time.process_time())

    def done(self) -> "Spent":
        now = (time.perf_counter(), time.process_time())
        self.wall, self.cpu = (1000 * (end - start) for end, start in zip(now, self._started, strict=True))
        return self


def _wall(spent: Sequence[Spent]) -> float:
    return statistics.median(each.wall for each in spent)


def _cpu(spent: Sequence[Spent]) -> float:
    return statistics.median(each.cpu for each in spent)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks cache", description=__doc__)
    parser.add_argument("--runs", type=int, default=45, help="of each kind in the medians of time")
    chosen = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        told = measure_evictions()
        print(json.dumps(told))
        for measure in (measure_sharing, measure_leak):
            told |= measure(work)
            print(json.dumps(told))
        told |= measure_back_and_forth(work, chosen.runs)
        told |= measure_embeddings(work, chosen.runs)
    order = ["aba_third_over_warm", "shared_component_bytes_saved", "shared_component_bytes_possible"]
    order += ["embed_hit_over_miss", "embed_hit_ms_after_restart", "leak_bytes_after_50", "evictions_over_optimal"]
    print(json.dumps({name: told.pop(name) for name in order} | told))


def measure_evictions() -> dict[str, Any]:
    ratios = {"ours": [], "least recently used": []}
    slack = 0.0
    for seed in SESSIONS:
        sequence = session(seed)
        best, bound = fewest_bytes(sequence, BUDGET)
        slack = max(slack, best / bound - 1)
        ratios["ours"].append(_loaded_by_cache(sequence) / best)
        ratios["least recently used"].append(_loaded_by_recency(sequence) / best)
    return {
        "evictions_over_optimal": round(statistics.median(ratios["ours"]), 3),
        "evictions_over_optimal_range": [round(min(ratios["ours"]), 3), round(max(ratios["ours"]), 3)],
        "least_recently_used_over_optimal": round(statistics.median(ratios["least recently used"]), 3),
        "optimal_over_its_bound": round(1 + slack, 5),
    }


def _loaded_by_cache(sequence: Sequence[str]) -> int:
    """Bytes that ModelCache has built in all, on a device that needs no hardware."""
    cache = ModelCache(FakeDevice(), BUDGET)
    loaded = 0
    for name in sequence:

        def build(name: str = name) -> nn.Module:
            nonlocal loaded
            loaded += SIZES[name]
            weights = nn.Parameter(torch.empty(SIZES[name], dtype=torch.uint8, device="meta"), requires_grad=False)
            return nn.ParameterList([weights])

        with cache.use(ModelKey(Path(name), SIZES[name], 1, name, torch.uint8), build):
            assert cache.stats().bytes_held <= BUDGET
    return loaded


def _loaded_by_recency(sequence: Sequence[str]) -> int:
    held: dict[str, int] = {}  # least recently used first
    loaded = 0
    for name in sequence:
        if name not in held:
            loaded += SIZES[name]
            while sum(held.values()) + SIZES[name] > BUDGET:
                del held[next(iter(held))]
        held[name] = held.pop(name, SIZES[name])
    return loaded


def measure_sharing(work: Path) -> dict[str, Any]:
    """Two checkpoints of one family that share all but the denoiser, as finetuned ones do."""
    one, other = save_stable_diffusion(work / "one"), save_stable_diffusion(work / "other", seed=1)
    shared = ("text_encoder", "vae")
    for name in shared:
        shutil.rmtree(other / name)
        shutil.copytree(one / name, other / name)
    cache = _cache()
    for folder in (one, other):
        checkpoint = open_checkpoint(folder)
        for name in (*shared, "unet"):
            with checkpoint.use(cache, name):
                pass
    apart = _cache()
    for name in shared:
        with open_checkpoint(one).use(apart, name):
            pass
    alone = _cache()
    for name in ("unet",):
        for folder in (one, other):
            with open_checkpoint(folder).use(alone, name):
                pass
    possible = apart.stats().bytes_held
    twice = alone.stats().bytes_held + 2 * possible
    return {
        "shared_component_bytes_saved": twice - cache.stats().bytes_held,
        "shared_component_bytes_possible": possible,
    }


def measure_leak(work: Path) -> dict[str, Any]:
    """Models in turn under a budget for one, so that every run reads and lets go."""
    checkpoints = [open_checkpoint(work / name) for name in ("one", "other")]
    cache = ModelCache(TorchResidency("cpu"), budget_bytes=1)
    alive = []
    for number in range(60):
        words = encode_prompt(cache, checkpoints[number % 2], f"a b number {number}")
        condition = fuse(cache, checkpoints[number % 2], words, None)
        generate(
            cache, checkpoints[number % 2], condition, seed=number, num_inference_steps=1, guidance_scale=1.0,
            width=SIDE, height=SIDE,
        )  # fmt: skip
        del words, condition
        if number in (9, 59):
            alive.append(_tensor_bytes())
    return {"leak_bytes_after_50": alive[1] - alive[0], "evictions_in_60_runs": cache.stats().evictions}


def _tensor_bytes() -> int:
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def measure_back_and_forth(work: Path, runs: int) -> dict[str, Any]:
    first, second = open_checkpoint(MODEL_FOLDER), open_checkpoint(_other_mini(work / "other-mini"))
    cache = _cache()

    def run(checkpoint: Checkpoint) -> Spent:
        spent = Spent()
        words = encode_prompt(cache, checkpoint, "a red rose")
        condition = fuse(cache, checkpoint, words, None)
        generate(
            cache, checkpoint, condition, seed=1, num_inference_steps=4, guidance_scale=1.0, width=SIDE, height=SIDE
        )
        return spent.done()

    for checkpoint in (first, second, first, second):
        run(checkpoint)
    misses = cache.stats().misses
    warm, third = [], []
    for _ in range(runs):
        run(first)
        warm.append(run(first))
        run(second)
        third.append(run(first))
    assert cache.stats().misses == misses, "the two must fit together"
    return {
        "aba_third_over_warm": round(_wall(third) / _wall(warm), 4),
        "aba_third_over_warm_cpu": round(_cpu(third) / _cpu(warm), 4),
        "aba_warm_ms": round(_wall(warm), 1),
    }


def _other_mini(folder: Path) -> Path:
    """The built-in model with every weight changed a little, so that nothing is shared."""
    shutil.copytree(MODEL_FOLDER, folder)
    for path in folder.rglob("*.safetensors"):
        save_file({name: tensor * 1.001 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    return folder


def measure_embeddings(work: Path, runs: int) -> dict[str, Any]:
    """A miss reads the encoder and encodes; a hit needs neither. Both through the same call, in turn."""
    folder = save_stable_diffusion(work / "large")
    shutil.rmtree(folder / "text_encoder")
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    CLIPTextModel(config).half().save_pretrained(folder / "text_encoder")
    digests = Digests(work / "digests")
    checkpoint = open_checkpoint(folder, digests=digests)
    checkpoint.key("text_encoder")  # reads all weights, once in a model's life
    store = EmbeddingStore(work / "embeddings", GB, recent_bytes=RECENT_BYTES)

    def ask(prompt: str, held: bool = True) -> Spent:
        cache = _cache()
        if not held:
            store.recent.clear()
        spent = Spent()
        recalled(store, encode_prompt, cache, checkpoint, prompt, None)
        return spent.done()

    missed, hit, read = [], [], []
    for number in range(max(3, runs // 3)):
        missed.append(ask(f"a b {number}"))
        hit += [ask(f"a b {number}") for _ in range(20)]
        read += [ask(f"a b {number}", held=False) for _ in range(20)]
    assert store.hits == len(hit) + len(read)
    command = [
        sys.executable,
        "-m",
        "benchmarks._first_hit",
        *map(str, (work / "embeddings", folder, work / "digests")),
    ]
    restarts = []
    for _ in range(RESTARTS):
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        restarts.append(Spent(*map(float, told.split())))
    return {
        "embed_hit_over_miss": round(_wall(hit) / _wall(missed), 6),
        "embed_hit_over_miss_cpu": round(_cpu(hit) / _cpu(missed), 6),
        "embed_hit_ms_after_restart": round(_wall(restarts), 3),
        "embed_hit_ms_after_restart_cpu": round(_cpu(restarts), 3),
        "embed_hit_ms_after_restart_least": round(min(each.wall for each in restarts), 3),
        "embed_hit_ms": round(_wall(hit), 3),
        "embed_hit_ms_on_disk": round(_wall(read), 3),
        "embed_miss_ms": round(_wall(missed), 1),
    }


def _cache() -> ModelCache:
    return ModelCache(TorchResidency("cpu"), budget_bytes=64 * GB)
