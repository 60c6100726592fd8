"""The KL decoder of Stable Diffusion against the arithmetic limit of the device. On a GPU only: a CPU has no such limit
that is worth reaching. Operations are counted by torch's own counter, the limit is what one large matrix product
reaches on this very device in the same minute, and what its maker says stands beside it.
``python -m benchmarks decode`` prints one JSON line last.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from ._harness import Result, has_gpu, interleaved, not_run, result, wall

AIM = 0.35
H100_PEAK = 790e12  # operations a second in half precision, dense, as measured at best; 989e12 on paper


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks decode", description=__doc__)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=20)
    chosen = parser.parse_args(arguments)
    if not has_gpu():
        print(json.dumps(not_run("no GPU", f">= {AIM}", "share of the limit")))
        return
    print(json.dumps(measure(chosen.side, chosen.repeats)), flush=True)


def measure(side: int, repeats: int) -> Result:
    import torch
    from diffusers import AutoencoderKL
    from torch.utils.flop_counter import FlopCounterMode

    from pipeline.denoising.latents import decode_latents

    sizes: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 4,
    }
    device, dtype = torch.device("cuda"), torch.float16
    vae: Any = AutoencoderKL(**sizes)
    fast: Any = AutoencoderKL(**sizes)
    fast.load_state_dict(vae.state_dict())
    vae.to(device, dtype).eval().requires_grad_(False)
    fast.to(device, dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
    latents = torch.randn(1, 4, side // 8, side // 8, device=device, dtype=dtype)
    width = 8192
    left, right = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            vae.decode(latents)
        work = counter.get_total_flops()
        spent = interleaved(
            {
                "ours": lambda: wall(lambda: decode_latents(fast, latents)),
                "diffusers": lambda: wall(lambda: vae.decode(latents)),
                "product": lambda: wall(lambda: left @ right),
            },
            repeats,
            warm_up=3,
        )
    best = {name: min(values) for name, values in spent.items()}
    peak = 2 * width**3 / best["product"]
    share = work / best["ours"] / peak
    return result(
        ratio=share,
        ours=1000 * best["ours"],
        diffusers=1000 * best["diffusers"],
        unit="ms",
        aim=f">= {AIM} of the limit",
        met=share >= AIM,
        tera_operations=work / 1e12,
        limit_tera_operations_per_second=peak / 1e12,
        share_of_a_published_h100=work / best["ours"] / H100_PEAK,
        side=side,
    )
