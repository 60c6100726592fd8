"""What saving a picture of 1024x1024 adds to a prompt: Duet's Save pictures against the stock Save Image, one process.

The real host runs both nodes by its own executor on one picture, and a node that does nothing as the zero of the
scale; before each turn all earlier pictures are compressed, so that no turn is slowed by another's. The files must be
the same, byte for byte, when they are. By itself the conversion and checksums are arithmetic of one core: what bounds
them is in ``parts``, in milliseconds of that core's own time, which a busy machine does not stretch, and their sum
without the compression in ``own_milliseconds``.

``prompts`` are several that draw and save, one after the other: until the last has ended, and until all is compressed.
``decode_overlap`` is the time of a decode beside denoising over one after the other, on this CPU, where both want every
core. ``python -m benchmarks save`` prints one JSON line last.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ._harness import Result, interleaved, result, told, wall
from ._stock_host import Graph, Prompt, StockHost, node

SIDE = 1024
AIM_MS = 5.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks save", description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--side", type=int, default=SIDE)
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        told("starting the host")
        print(json.dumps(measure(StockHost(Path(folder)), chosen.side, chosen.repeats)), flush=True)


def measure(host: StockHost, side: int, repeats: int) -> Result:
    write_picture(host.base / "input" / "picture.png", side)
    saver = host.pack("nodes.host").picture_saver()
    graphs = {name: host.graph() for name in ("ours", "host", "nothing")}
    numbers = iter(range(10_000))

    def turn(name: str) -> Callable[[], float]:
        def run() -> float:
            saver.wait()
            return 1000 * graphs[name].run(saving(name, next(numbers)))

        return run

    spent = interleaved({name: turn(name) for name in graphs}, repeats, warm_up=2)
    saver.wait()
    same_files(host.base / "output")
    added = {
        name: [one - nothing for one, nothing in zip(spent[name], spent["nothing"], strict=True)]
        for name in ("ours", "host")
    }
    ours, stock = (statistics.median(added[name]) for name in ("ours", "host"))
    found = parts(host, side, repeats)
    return result(
        milliseconds=ours,
        ours=ours,
        host=stock,
        unit="ms",
        aim=f"<= {AIM_MS:g}",
        met=ours <= AIM_MS,
        least={name: min(values) for name, values in added.items()},
        rounds=added,
        own_milliseconds=sum(spent for name, spent in found.items() if name != "compress_later"),
        parts=found,
        prompts=prompts(host, saver, side),
        decode_overlap=decode_overlap(),
        job=f"{side}x{side} RGB, the prompt in the file",
    )


def write_picture(path: Path, side: int) -> None:
    """Soft shapes under a little grain, which compress as pictures do: to about two thirds."""
    import torch
    from PIL import Image

    source = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, side // 16, side // 16, generator=source)
    soft = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    grain = 0.02 * torch.randn(soft.shape, generator=source)
    values = (255 * (soft + grain).clamp(0, 1))[0].byte().movedim(0, -1).contiguous()
    Image.fromarray(values.numpy()).save(path)


def saving(name: str, number: int) -> Prompt:
    """The picture stays in the host's cache, and only the last node runs."""
    last = {
        "ours": node("DuetSavePictures", image=("picture", 0), filename_prefix=f"ours{number}"),
        "host": node("SaveImage", images=("picture", 0), filename_prefix=f"host{number}"),
        "nothing": node("PreviewAny", source=f"{number}"),
    }
    keeps = {"kept": node("PreviewAny", source=("picture", 1))}  # so that the picture is part of all three
    return {"picture": node("LoadImage", image="picture.png"), "last": last[name], **keeps}


def same_files(folder: Path) -> None:
    from PIL import Image

    ours, stock = (sorted(folder.glob(f"{name}*.png")) for name in ("ours", "host"))
    assert ours and len(ours) == len(stock), "expected as many pictures of each"
    with Image.open(ours[0]) as one, Image.open(stock[0]) as other:
        assert one.tobytes() == other.tobytes(), "expected the same pixels"
    # The prompts in the files differ by the node's name and the prefix, and the files by little else.
    sizes = [path.stat().st_size for path in (ours[0], stock[0])]
    assert abs(sizes[0] - sizes[1]) < 200, f"expected the same compression, got files of {sizes} bytes"


def parts(host: StockHost, side: int, repeats: int) -> dict[str, float]:
    """Where the time goes, in milliseconds of the thread's own time, medians."""
    import torch

    png, saving_module = host.pack("pipeline.files.png"), host.pack("pipeline.saving")
    picture = torch.rand(side, side, 3)
    info = png.texts_of({"prompt": "x" * 2000})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # or part of the conversion would be another thread's time
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = png.to_bytes(picture)
            pieces = png.stored_png(rows, 3, info)
            found = {
                "to_8_bits": _own_ms(lambda: png.to_bytes(picture), repeats),
                "checksums": _own_ms(lambda: png.stored_png(rows, 3, info), repeats),
                "write": _own_ms(lambda: saving_module._write_partial(Path(folder), pieces).unlink(), repeats),
                "compress_later": _own_ms(lambda: png.compressed_png(b"".join(pieces), info, 4), max(3, repeats // 3)),
            }
    finally:
        torch.set_num_threads(threads)
    return found


def _own_ms(work: Callable[[], Any], repeats: int) -> float:
    found = []
    for _ in range(repeats + 1):
        started = time.thread_time()
        work()
        found.append(1000 * (time.thread_time() - started))
    return statistics.median(found[1:])


def prompts(host: StockHost, saver: Any, side: int, count: int = 4, rounds: int = 2) -> dict[str, float]:
    """Seconds for prompts that draw by the small model, enlarge, and save: medians of alternating rounds."""
    graphs: dict[str, Graph] = {name: host.graph() for name in ("ours", "host")}
    seeds = iter(range(10_000))
    found: dict[str, list[float]] = {"ours": [], "ours until compressed": [], "host": []}
    for number in range(rounds + 1):
        for name in list(graphs)[:: 1 if number % 2 else -1]:
            saver.wait()
            started = time.perf_counter()
            for _ in range(count):
                graphs[name].run(_drawing(name, next(seeds), side))
            ended = time.perf_counter() - started
            saver.wait()
            if number:
                found[name].append(ended)
                if name == "ours":
                    found["ours until compressed"].append(time.perf_counter() - started)
        told(f"  prompts, round {number + 1} of {rounds + 1}")
    return {name: statistics.median(values) for name, values in found.items()} | {"count": count}


def _drawing(name: str, seed: int, side: int) -> Prompt:
    last = {
        "ours": node("DuetSavePictures", image=("large", 0), filename_prefix="drawn/ours"),
        "host": node("SaveImage", images=("large", 0), filename_prefix="drawn/host"),
    }
    return {
        "model": node("DuetLoadModel", model="duet-mini (built in)"),
        "words": node("DuetEmbedText", model=("model", 0), prompt="a red rose"),
        "fuse": node("DuetFuse", model=("model", 0), prompt_embeds=("words", 0), method="concat", strength=0.5),
        "picture": node(
            "DuetGenerate", model=("model", 0), conditioning=("fuse", 0), seed=seed, steps=4, guidance_scale=1.0,
            width=128, height=128, batch_size=1,
        ),
        "large": node(
            "ImageScale", image=("picture", 0), upscale_method="bicubic", width=side, height=side, crop="disabled"
        ),
        "last": last[name],
    }  # fmt: skip


def decode_overlap(rounds: int = 4) -> dict[str, float | None]:
    """A decode in a thread of its own beside denoising, over the two one after the other; 1 is no gain."""
    import diffusers
    import torch

    if torch.cuda.is_available():
        return {"ratio": None}  # another question there, which this does not answer
    torch.manual_seed(0)
    library: Any = diffusers  # whose types say that a tuple has one entry
    vae = library.AutoencoderKL(
        block_out_channels=(64, 128, 128), latent_channels=4, norm_num_groups=16,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    ).eval()  # fmt: skip
    unet = library.UNet2DConditionModel(
        sample_size=32, block_out_channels=(64, 128), cross_attention_dim=64, attention_head_dim=8,
        norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    latents, words = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 64)

    def decode() -> None:
        with torch.inference_mode():
            vae.decode(latents)

    def denoise() -> None:
        with torch.inference_mode():
            for step in range(8):
                unet(latents, step, words)

    def after() -> None:
        decode()
        denoise()

    def beside() -> None:
        other = threading.Thread(target=decode)
        other.start()
        denoise()
        other.join()

    spent = interleaved({"beside": lambda: wall(beside), "after": lambda: wall(after)}, rounds)
    middle = {name: statistics.median(values) for name, values in spent.items()}
    ratios = [one / other for one, other in zip(spent["beside"], spent["after"], strict=True)]
    return {"ratio": statistics.median(ratios), "seconds_beside": middle["beside"], "seconds_after": middle["after"]}
