"""How time and memory grow with the number of pictures and with their size: the exponent of cost ~ amount^p.

Pictures: 1 to 16 at once of the small model, whose weights ship with the pack. Sizes: 256 to 1024 pixels a side, in
pixels, of a Stable Diffusion with random weights and a fraction of its width, which draws them by the same code; on a
GPU of full width in half precision. Memory is the peak of the run over what was held before, by torch's allocator on a
GPU; on a CPU, of a process of its own for the least, the middle and the most, by the operating system.
``python -m benchmarks growth`` prints one JSON line last.
"""

import argparse
import contextlib
import ctypes
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ._harness import (
    ROOT,
    Result,
    fitted_exponent,
    has_gpu,
    interleaved,
    last_json,
    medians,
    result,
    told,
    wall,
)

COUNTS = (1, 2, 4, 8, 16)
SIDES = (256, 384, 512, 768, 1024)
AIM = 1.0
SD15 = ROOT / "pipeline" / "configs" / "sd15" / "unet"
SLACK = 0.03  # of a fit through five medians


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks growth", description=__doc__)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--memory", nargs=3, metavar=("FOLDER", "COUNT", "SIDE"), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.memory:
        folder, count, side = chosen.memory
        print(json.dumps(_memory_of(Path(folder), int(count), int(side))))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), chosen.repeats)), flush=True)


def measure(work: Path, repeats: int) -> Result:
    from pipeline.checkpoints import open_checkpoint
    from pipeline.mini import MODEL_FOLDER

    told("writing a Stable Diffusion of reduced width")
    sized = _save_narrow(work / "narrow")
    side = open_checkpoint(MODEL_FOLDER).family.native_size
    pictures = _grown(MODEL_FOLDER, [(count, side) for count in COUNTS], repeats, [float(count) for count in COUNTS])
    sizes = _grown(sized, [(1, side) for side in SIDES], max(1, repeats // 2), [float(side * side) for side in SIDES])
    worst = max(grown[kind] for grown in (pictures, sizes) for kind in ("time_exponent", "memory_exponent"))
    return result(
        ratio=worst,
        ours=worst,
        unit="exponent",
        aim=f"<= {AIM:g} (linear)",
        met=worst <= AIM + SLACK,
        pictures=pictures | {"count": list(COUNTS)},
        sizes=sizes
        | {
            "side": list(SIDES),
            "arithmetic_exponent": _arithmetic_exponent(sized / "unet"),
            "arithmetic_exponent_sd15": _arithmetic_exponent(SD15),
        },
    )


def _grown(folder: Path, jobs: Sequence[tuple[int, int]], repeats: int, amounts: Sequence[float]) -> Result:
    draw = _drawing(folder)
    turns: dict[str, Callable[[], float]] = {str(job): lambda job=job: wall(lambda: draw(*job)) for job in jobs}
    draw(*jobs[0])
    spent = medians(interleaved(turns, repeats, warm_up=0))
    told(f"memory of {folder.name}, each in a process of its own")
    measured = slice(None, None, len(jobs) // 2)  # a process takes seconds to begin
    memory = [_apart(folder, count, side) for count, side in jobs[measured]]
    seconds = [spent[str(job)] for job in jobs]
    return {
        "time_exponent": fitted_exponent(amounts, seconds),
        "memory_exponent": fitted_exponent(amounts[measured], memory),
        "seconds": seconds,
        "megabytes": dict(zip(map(str, jobs[measured]), [each / 2**20 for each in memory], strict=True)),
    }


def _arithmetic_exponent(config: dict[str, Any] | str | Path) -> float:
    """Of the UNet's operations over the same sizes, as torch counts them on its meta device: attention is quadratic."""
    import torch
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    read = json.loads((Path(config) / "config.json").read_text("utf-8")) if not isinstance(config, dict) else config
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(read)
        costs = []
        for side in SIDES:
            latents = torch.zeros(1, unet.config.in_channels, side // 8, side // 8)
            tokens = torch.zeros(1, 77, unet.config.cross_attention_dim)
            with FlopCounterMode(display=False) as counter, torch.inference_mode():
                unet(latents, torch.zeros(1), encoder_hidden_states=tokens)
            costs.append(float(counter.get_total_flops()))
    return fitted_exponent([float(side * side) for side in SIDES], costs)


def _drawing(folder: Path) -> Callable[[int, int], Any]:
    import torch

    from pipeline.checkpoints import open_checkpoint
    from pipeline.fusion import fuse
    from pipeline.generation import generate
    from pipeline.model_cache import ModelCache
    from pipeline.residency import TorchResidency
    from pipeline.text_encoder import encode_prompt

    cache = ModelCache(TorchResidency(torch.device("cuda" if has_gpu() else "cpu")), budget_bytes=2**40)
    checkpoint = open_checkpoint(folder)
    condition = fuse(cache, checkpoint, encode_prompt(cache, checkpoint, "a red rose"), None)

    def draw(count: int, side: int) -> Any:
        return generate(
            cache, checkpoint, condition, seed=1, num_inference_steps=1, width=side, height=side, batch_size=count
        )

    return draw


def _apart(folder: Path, count: int, side: int) -> int:
    command = [sys.executable, "-m", "benchmarks", "growth", "--memory", str(folder), str(count), str(side)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return last_json(done.stdout)["bytes"]


def _memory_of(folder: Path, count: int, side: int) -> dict[str, int]:
    """The most that a run held beyond what was held before it, once the smallest run has loaded all that is loaded."""
    import torch

    draw = _drawing(folder)
    draw(1, 64)
    with contextlib.suppress(
        OSError, AttributeError
    ):  # glibc's: what is free is given back, or it would not be counted
        ctypes.CDLL(None).malloc_trim(0)
    held = torch.cuda.memory_allocated() if has_gpu() else 0  # on a CPU the report counts from the run's start
    peak = draw(count, side).report.peak_bytes
    if peak is None:
        raise RuntimeError("expected a system that tells a process's largest size, as Linux does")
    return {"bytes": max(1, peak - held)}


def _save_narrow(folder: Path) -> Path:
    """Stable Diffusion's layout of blocks with an eighth of its channels; all of them where there is a GPU."""
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from tests.host.stable_diffusion_15 import INDEX, save_tokenizer

    torch.manual_seed(0)
    narrow = 1 if has_gpu() else 8
    save_tokenizer(folder / "tokenizer")
    width = 768 // narrow
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=12 // narrow,
        num_attention_heads=12 // min(narrow, 4), bos_token_id=49406, eos_token_id=49407,
    )  # fmt: skip
    unet: dict[str, Any] = {
        "sample_size": 64, "cross_attention_dim": width, "attention_head_dim": 8 // narrow,  # heads, in truth
        "block_out_channels": tuple(channels // narrow for channels in (320, 640, 1280, 1280)),
        "norm_num_groups": 32 // narrow,
    }  # fmt: skip
    vae: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": tuple(channels // narrow for channels in (128, 256, 512, 512)),
        "norm_num_groups": 32 // narrow, "layers_per_block": 2, "latent_channels": 4, "sample_size": 512,
    }  # fmt: skip
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    UNet2DConditionModel(**unet).save_pretrained(folder / "unet")
    AutoencoderKL(**vae).save_pretrained(folder / "vae")
    EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        folder / "scheduler"
    )
    (folder / "model_index.json").write_text(json.dumps(INDEX), encoding="utf-8")
    return folder
