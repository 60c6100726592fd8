"""What a run of a graph costs besides its models: wall time less the time inside denoiser, decoder and text encoder.

The real host runs Duet's graph on the small model, and its own KSampler graph on the smallest model that it knows (a
Stable Diffusion 1.5 of full size), both at 128x128 in 4 steps, through its own check and executor, in turns. Previews,
which are not needed for the picture, count as overhead though they too are time in the decoder. "seed" changes the
seed alone, as when a picture is drawn anew; "words" changes the prompt too, which runs every block.
"host_without_a_model" is the same of a graph of an empty picture alone, the least that any graph costs.
``python -m benchmarks overhead`` prints one JSON line last.
"""

import argparse
import contextlib
import cProfile
import io
import json
import pstats
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ._harness import Result, Stopwatch, interleaved, medians, result, told
from ._stable_diffusion import Job, our_graph, save_model, stock_graph
from ._stock_host import Graph, Prompt, StockHost, node

BUILT_IN = "duet-mini (built in)"
AIM_OF_STOCK, AIM_OF_PICTURE = 0.25, 0.02
STEPS, SIDE = 4, 128  # the small model's own size


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks overhead", description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--base", type=Path, help="the host's scratch folder, to keep the models; else a passing one")
    parser.add_argument("--profile", type=int, metavar="RUNS", help="only say where so many runs of ours spend theirs")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        told("starting the host")
        host = StockHost(chosen.base or Path(folder))
        if chosen.profile:
            print(profiled(host.graph(), chosen.profile))
            return
        told("writing a Stable Diffusion 1.5 of random weights")
        save_model(host.base / "models" / "diffusers" / "sd15", "sd15", STEPS)
        print(json.dumps(measure(host, chosen.repeats)), flush=True)


def measure(host: StockHost, repeats: int) -> Result:
    small, large = Job(BUILT_IN, SIDE, STEPS), Job("sd15", SIDE, STEPS)
    graphs = {name: host.graph() for name in ("ours", "host", "no model")}
    numbers = iter(range(1, 10_000))
    clock = Stopwatch()
    inside: dict[str, list[float]] = {}

    def turn(side: str, name: str, prompt: Callable[[], Prompt]) -> Callable[[], float]:
        def measured() -> float:
            asked = prompt()
            clock.reset()
            spent = graphs[side].run(asked)
            inside.setdefault(name, []).append(clock.seconds)
            return spent - clock.seconds

        return measured

    def with_words(prompt: Prompt) -> Prompt:
        for entry in prompt.values():
            for name in {"prompt", "text"} & set(entry["inputs"]):
                entry["inputs"][name] = f"{entry['inputs'][name]}, number {next(numbers)}"
        return prompt

    turns = {
        "ours seed": turn("ours", "ours seed", lambda: our_graph(small, next(numbers))),
        "host seed": turn("host", "host seed", lambda: stock_graph(large, next(numbers))),
        "ours words": turn("ours", "ours words", lambda: with_words(our_graph(small, next(numbers)))),
        "host words": turn("host", "host words", lambda: with_words(stock_graph(large, next(numbers)))),
        "no model": turn("no model", "no model", lambda: without_model(next(numbers))),
    }
    told("first runs, which load")
    with contextlib.ExitStack() as stack:
        stack.enter_context(clock.not_in(*previews(host)))
        stack.enter_context(clock.around(*models(host)))
        spent = interleaved(turns, repeats, warm_up=2)
    middle = medians(spent)
    models_only = medians({name: values[2:] for name, values in inside.items()})
    of_stock = middle["ours seed"] / middle["host seed"]
    of_picture = middle["ours seed"] / (middle["ours seed"] + models_only["ours seed"])
    of_large = middle["ours seed"] / (middle["ours seed"] + models_only["host seed"])
    return result(
        ratio=of_stock,
        ours=1000 * middle["ours seed"],
        host=1000 * middle["host seed"],
        unit="ms",
        aim=f"<= {AIM_OF_STOCK}, and <= {AIM_OF_PICTURE:.0%} of a picture",
        met=of_stock <= AIM_OF_STOCK and of_picture <= AIM_OF_PICTURE,
        host_without_a_model=1000 * middle["no model"],
        share_of_picture=of_picture,
        share_of_a_stable_diffusion_picture=of_large,
        with_new_words={
            "ours": 1000 * middle["ours words"],
            "host": 1000 * middle["host words"],
            "ratio": middle["ours words"] / middle["host words"],
        },
        inside_models_ms={name: 1000 * value for name, value in models_only.items()},
        overhead_ms={name: [1000 * value for value in values] for name, values in spent.items()},
    )


def without_model(colour: int) -> Prompt:
    """What the host itself takes for any graph of one picture, and no block of ours could save."""
    return {
        "picture": node("EmptyImage", width=SIDE, height=SIDE, batch_size=1, color=colour),
        "shown": node("PreviewImage", images=("picture", 0)),
    }


def models(host: StockHost) -> list[tuple[Any, str]]:
    """Where either side enters a model. What the host does around its own, such as casts, is its overhead."""
    import diffusers
    import transformers

    stock = host.module("comfy.ldm.modules.diffusionmodules.openaimodel").UNetModel
    decoders = host.module("comfy.ldm.models.autoencoder")
    places: list[tuple[Any, str]] = [(stock, "forward"), (decoders.AutoencodingEngine, "decode")]
    places.append((decoders.AutoencodingEngineLegacy, "decode"))
    places.append((host.module("comfy.clip_model").CLIPTextModel, "forward"))
    places.append((diffusers.UNet2DConditionModel, "forward"))
    places += [(diffusers.AutoencoderDC, "decode"), (diffusers.AutoencoderKL, "decode")]
    places += [(transformers.CLIPTextModel, "forward"), (transformers.CLIPTextModelWithProjection, "forward")]
    places.append((host.pack("pipeline.fusing.fusion_network").FusionNetwork, "forward"))
    return places


def previews(host: StockHost) -> list[tuple[Any, str]]:
    """Where Duet's stage calls for a look at what is under way."""
    return [(host.pack("pipeline.drawing"), "preview")]


def profiled(graph: Graph, runs: int) -> str:
    """Ours alone, by function."""
    job = Job(BUILT_IN, SIDE, STEPS)
    for seed in range(3):
        graph.run(our_graph(job, seed))
    profile = cProfile.Profile()
    profile.enable()
    for seed in range(100, 100 + runs):
        graph.run(our_graph(job, seed))
    profile.disable()
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("cumulative").print_stats(90)
    return text.getvalue()
