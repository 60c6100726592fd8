"""Train the next small model, from nothing or from a finished one: ``python -m pipeline.mini.train``.

Fetches the pictures and words, teaches each part in turn, and writes a diffusers folder as the pack ships one. Every
stage resumes from its last checkpoint after a kill and is passed over when it is finished. Needs the optional group
``train``.
"""

import argparse
import json
import logging
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerFast, ResNetModel

from ..fusing.fusion_network import FusionNetwork
from .apart_stage import train_apart
from .autoencoder import deepened, new_autoencoder, train_autoencoder
from .choice_stage import train_choice
from .finish_stage import train_finish
from .fusion_stage import new_fusion, reaching_further, train_fusion
from .generator_stage import new_generator, train_generator
from .loop import Plan, device
from .parts import export, keep, read_part
from .pictures import PictureSet
from .reader_stage import train_reader
from .retouch_stage import train_retouch
from .tables import load_tables
from .training_set import SIZE, load_training_set
from .vision import new_image_encoder, train_image_encoder
from .words import (
    Captions,
    build_captions,
    build_tokenizer,
    dictionary_words,
    lengthened,
    new_text_encoder,
    train_text_encoder,
)

logger = logging.getLogger(f"{__package__}.train")  # __name__ is "__main__" where it is run

# From nothing; longer plans go on getting better (fusion above all), and --steps makes shorter those that go on from a
# model that has learned before. None has been run in full at 128 pixels; the model card tells what was. Of the last
# two: rounds, drawings at once, and how far a step moves them.
ON_CPU = {
    "text": Plan(4000, 256, learning_rate=1e-3),
    "vision": Plan(6000, 64, learning_rate=1.5e-3, warmup=100, weight_decay=0.02),
    "autoencoder": Plan(4000, 32, learning_rate=2e-3, warmup=100, weight_decay=0.0),
    "fusion": Plan(40_000, 256, learning_rate=1.5e-3, warmup=200, weight_decay=0.0),
    "choice": Plan(3000, 1024, learning_rate=3e-3, warmup=100),
    "generator": Plan(4000, 32, learning_rate=1.5e-3, warmup=100, weight_decay=0.0),
    "finish": Plan(1500, 32, learning_rate=7e-4, warmup=100, weight_decay=0.0),
    "retouch": Plan(4, 32, learning_rate=0.05),
    "apart": Plan(2, 32, learning_rate=0.05),
}
ON_GPU = {
    "text": Plan(4000, 256, learning_rate=1e-3),
    "vision": Plan(3000, 256, learning_rate=2e-3, warmup=100, weight_decay=0.02),
    "autoencoder": Plan(6000, 64, learning_rate=2e-3, warmup=200, weight_decay=0.0),
    "fusion": Plan(15_000, 4096, learning_rate=2e-3, warmup=300, weight_decay=0.0),
    "choice": Plan(3000, 1024, learning_rate=3e-3, warmup=100),
    "generator": Plan(4000, 256, learning_rate=1.5e-3, warmup=200, weight_decay=0.0),
    "finish": Plan(3000, 64, learning_rate=7e-4, warmup=200, weight_decay=0.0),
    "retouch": Plan(4, 64, learning_rate=0.05),
    "apart": Plan(2, 64, learning_rate=0.05),
}
PLANS = ON_GPU if device().type == "cuda" else ON_CPU
SIZES = 32  # which pixels a side are a multiple of, for the autoencoder and the generator to halve
MOVING = {"retouch", "apart"}  # pictures and no weights: their rate is how far
AGAIN = 0.3  # of a stage's rate where it goes on from a finished model, which may lose at the full rate what it knows


def main(arguments: Sequence[str] | None = None) -> None:
    chosen, plans = _asked(arguments)
    _tell()
    torch.set_num_threads(chosen.threads)
    wanted = list(PLANS)[: list(PLANS).index(chosen.until) + 1]
    work: Path = chosen.work
    if chosen.start is not None and not (work / "tokenizer").exists():
        shutil.copytree(chosen.start / "tokenizer", work / "tokenizer.copied", dirs_exist_ok=True)
        (work / "tokenizer.copied").rename(work / "tokenizer")

    def plan_of(stage: str) -> Plan:
        plan = plans[stage]
        goes_on = chosen.start is not None and stage not in {*chosen.anew, *MOVING}
        return replace(plan, learning_rate=chosen.again_rate * plan.learning_rate) if goes_on else plan

    def part(stage: str, name: str, kind: Any, new: Callable[[], Any], train: Callable[[Any, Plan], Any]) -> Any:
        """The finished part from the work folder; trained first, from the start or from nothing, if it is not there."""
        if not (work / stage).exists():
            torch.manual_seed(0)  # whichever stages this process has run before
            start = None if stage in chosen.anew else chosen.start
            begun = new() if start is None else read_part(start / name, kind)
            taught = train(begun, plan_of(stage)) if start is None or stage in chosen.again else begun
            keep(work / stage, taught)
        return read_part(work / stage, kind).to(device()).eval().requires_grad_(False)

    pictures = load_training_set(work, chosen.size)
    captions = _captions(work, pictures.emoji)
    tokenizer = _tokenizer(work, captions)
    text_encoder = part(
        "text", "text_encoder", CLIPTextModelWithProjection, lambda: new_text_encoder(len(tokenizer)),
        lambda begun, plan: train_text_encoder(work, tokenizer, captions, pictures.scenes, lengthened(begun), plan),
    )  # fmt: skip
    if "vision" not in wanted:
        return
    image_encoder = part(
        "vision", "image_encoder", ResNetModel, new_image_encoder,
        lambda begun, plan: train_image_encoder(work, pictures, begun, plan),
    )  # fmt: skip
    if "autoencoder" not in wanted:
        return
    vae = part(
        "autoencoder", "vae", AutoencoderDC, new_autoencoder,
        lambda begun, plan: train_autoencoder(work, pictures, deepened(begun), plan),
    )  # fmt: skip
    if "fusion" not in wanted:
        return
    tables = load_tables(work, pictures, captions, tokenizer, text_encoder, image_encoder, vae)
    fusion = part(
        "fusion", "fusion", FusionNetwork, lambda: new_fusion(tables),
        lambda begun, plan: train_fusion(
            work, pictures, tables, train_reader(work, pictures, tables, reaching_further(begun)), plan
        ),
    )  # fmt: skip
    if "choice" not in wanted:
        return
    if chosen.start is None or "choice" in chosen.anew:
        if not (work / "choice").exists():
            keep(work / "choice", train_choice(work, pictures, tables, fusion, plan_of("choice")))
        fusion = read_part(work / "choice", FusionNetwork).to(device()).eval().requires_grad_(False)
    if "generator" not in wanted:
        return
    unet = part(
        "generator", "unet", UNet2DConditionModel, lambda: new_generator(*tables.grid_and_channels),
        lambda begun, plan: train_generator(work, pictures, tables, fusion, begun, plan),
    )  # fmt: skip
    if "finish" in wanted and (chosen.start is None or "finish" in {*chosen.again, *chosen.anew}):
        torch.manual_seed(0)
        plan, vae = plan_of("finish"), deepened(vae)
        nn.Module.to(vae, device())
        unet, vae = _finished(
            work, unet, vae, lambda: train_finish(work, pictures, tables, fusion, image_encoder, unet, vae, plan)
        )
    for stage, train in (("retouch", train_retouch), ("apart", train_apart)):
        if stage in wanted and (chosen.start is None or stage in {*chosen.again, *chosen.anew}):
            if not (work / stage).exists():
                keep(work / stage, train(work, pictures, tables, fusion, unet, vae, plan_of(stage)))
                for moved in work.glob(f"{stage}-*"):  # from where that network said them, and no other
                    shutil.rmtree(moved)
            fusion = read_part(work / stage, FusionNetwork)
    parts = {"text_encoder": text_encoder, "image_encoder": image_encoder, "fusion": fusion, "unet": unet, "vae": vae}
    export(parts, tokenizer, tables.scaling_factor, chosen.model or work / "model")


def _asked(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Plan]]:
    """Exits with a message for what cannot be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work", type=Path, default=Path(".cache/mini"), help="where packages, checkpoints and curves go"
    )
    parser.add_argument("--until", choices=list(PLANS), default="apart", help="stop after this stage")
    parser.add_argument(
        "--start", type=Path, help="a model to go on from: its parts are kept, but those of --again are trained further"
    )
    stages: dict[str, Any] = {"nargs": "*", "action": "extend", "default": []}
    parser.add_argument("--again", choices=list(PLANS), help="stages to repeat from --start", **stages)
    parser.add_argument("--again-rate", type=float, default=AGAIN, help="of their plans' rates, for those of --again")
    parser.add_argument("--anew", choices=list(PLANS), help="stages that begin from nothing", **stages)
    parser.add_argument("--steps", metavar="STAGE=STEPS", help="other lengths than those of the plans", **stages)
    parser.add_argument(
        "--size", type=int, default=SIZE, help=f"pixels a side; other than {SIZE} to try the stages, not to draw with"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--model", type=Path, help="the folder to write at the end; model in --work unless given")
    chosen = parser.parse_args(arguments)
    plans = _plans(parser, chosen.steps)
    if chosen.size % SIZES or chosen.size < SIZES:
        parser.error(f"expected --size to be a multiple of {SIZES}, got {chosen.size}")
    if chosen.again and chosen.start is None:
        parser.error("--again goes on from a model: expected --start, got none")
    if "autoencoder" in {*chosen.again, *chosen.anew}:  # other latents, of which nothing has learned yet
        chosen.anew = [*chosen.anew, "fusion", "generator", "finish"]
    if {"text", "vision", "fusion", "choice"} & {*chosen.again, *chosen.anew}:
        chosen.anew = [*chosen.anew, "choice"]  # of other vectors it knows nothing, and it takes minutes
    if {"fusion", "finish"} & {*chosen.again, *chosen.anew}:
        chosen.anew = [*chosen.anew, "retouch"]  # which lies in what both of them say
    if "retouch" in {*chosen.again, *chosen.anew}:
        chosen.anew = [*chosen.anew, "apart"]  # which is remembered beside what it moved
    if chosen.start is not None:
        if not (chosen.start / "model_index.json").is_file():
            parser.error(f"expected --start to be the folder of a model, found none in {chosen.start}")
        _check_together(parser, {*chosen.again, *chosen.anew}, chosen.until)
    begun = {
        "start": str(chosen.start.resolve()) if chosen.start is not None else "",
        "again": sorted(set(chosen.again)),
        "anew": sorted(set(chosen.anew)),
        "again_rate": chosen.again_rate,
        "size": chosen.size,
        **{f"the plan of {stage}": asdict(plan) for stage, plan in plans.items()},
    }
    _bind(parser, chosen.work, begun)
    return chosen, plans


def _check_together(parser: argparse.ArgumentParser, taught: set[str], until: str) -> None:
    """What a stage says anew, the ones that hear it have to learn."""
    wanted = list(PLANS)[: list(PLANS).index(until) + 1]
    for stages, heard_by in ((("text", "vision"), "fusion"), (("generator",), "finish")):
        for stage in stages:
            if stage in taught and heard_by in wanted and heard_by not in taught:
                parser.error(f"expected {heard_by} to learn again what {stage} says anew: add it to --again")


def _bind(parser: argparse.ArgumentParser, work: Path, begun: dict[str, Any]) -> None:
    """A folder holds what one run has made so far: under other arguments nothing of it would fit."""
    work.mkdir(parents=True, exist_ok=True)
    stored = work / "run.json"
    if not stored.exists():
        partial = stored.with_suffix(".partial")
        partial.write_text(json.dumps(begun, indent=1), "utf-8")
        partial.rename(stored)
    known = json.loads(stored.read_text("utf-8"))
    for name, value in begun.items():
        if known.get(name) != value:
            parser.error(f"{work} was begun with {name} {known.get(name)}, got {value}: give another --work")


def _finished(work: Path, unet: Any, vae: Any, train: Callable[[], Any]) -> tuple[Any, Any]:
    """Both parts as the last stage leaves them, which goes on from those given."""
    folder = work / "finish"
    if not folder.exists():
        unet.requires_grad_(True)
        train()
        partial = work / "finish.partial"
        shutil.rmtree(partial, ignore_errors=True)
        unet.save_pretrained(partial / "unet")
        vae.save_pretrained(partial / "vae")
        partial.rename(folder)
    return read_part(folder / "unet", UNet2DConditionModel), read_part(folder / "vae", AutoencoderDC)


def _captions(work: Path, pictures: PictureSet) -> Captions:
    stored = work / "captions.pkl"  # written and read by this command only
    if not stored.exists():
        captions = build_captions(pictures.concepts, pictures.held_out().concepts, dictionary_words())
        partial = stored.with_suffix(".partial")
        partial.write_bytes(pickle.dumps(captions))
        partial.rename(stored)
    return pickle.loads(stored.read_bytes())


def _tokenizer(work: Path, captions: Captions) -> PreTrainedTokenizerFast:
    folder = work / "tokenizer"
    if not folder.exists():
        keep(folder, build_tokenizer(captions))
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _plans(parser: argparse.ArgumentParser, lengths: Sequence[str]) -> dict[str, Plan]:
    plans = dict(PLANS)
    for length in lengths:
        stage, _, steps = length.partition("=")
        if stage not in PLANS or not steps.isdecimal():
            parser.error(f"expected STAGE=STEPS with one of {', '.join(PLANS)}, got {length!r}")
        plans[stage] = replace(plans[stage], steps=int(steps))
    return plans


def _tell() -> None:
    """What this package logs goes to stderr, with the time; what libraries log does not."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    ours = logging.getLogger(__package__)
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)


if __name__ == "__main__":
    main()
