"""Whether a checkpoint, with what is laid over it, was distilled to few steps, and for which walk.

Facts come first: what the network takes, what the metadata of its files say, what its scheduler is set to. Names are
the last resort, because anything can be called turbo.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..adapters.lora import Lora
from ..checkpoints import Checkpoint
from ..files.safetensors_files import read_json

# What a file's metadata call it (modelspec.org, and Kohya's sd-scripts).
_TITLES = ("modelspec.title", "modelspec.tags", "ss_output_name")
_LONGEST_TITLE = 500
_STEPS = re.compile(r"(?<!\d)(\d{1,2})[-_ ]?steps?")


@dataclass(frozen=True)
class Distilled:
    """walk: "checkpoint" where its own scheduler is the one, else one of WALKS, for models that predict no flow.

    because: what told it, to follow the name of what it is about; by_name: that was a name alone. steps: that it was
    made for, None where nothing says. hears_guidance: steering away from a negative prompt was left in, or guidance is
    an input of the network. shift: of flow matching's sigmas, None for the scheduler's own. predicts: what the network
    predicts, where its scheduler's configuration cannot know.
    """

    walk: str
    because: str
    by_name: bool = False
    steps: int | None = None
    hears_guidance: bool = False
    shift: float | None = None
    predicts: str | None = None


# By what it is called, the walk it was distilled for. Hyper-SD (arXiv 2404.13686) and TCD (arXiv 2402.19159) before
# "lcm", which their names may also hold; DMD2 (arXiv 2405.14867) is walked as LCM (arXiv 2310.04378).
_CALLED: tuple[tuple[str, str], ...] = (
    ("hyper", "ddim trailing"),
    ("tcd", "tcd"),
    ("lcm", "lcm"),
    ("dmd2", "lcm"),
    ("lightning", "euler trailing"),
    ("turbo", "euler trailing"),
)
_AS_WRITTEN = {"hyper": r"hyper[-_ ]?(?:sd|flux)\w*"}
_MAKER = r"(?:sd|sdxl|xl|image|edit|flux)"  # of the LoRAs that are meant: SDXL-Lightning, Qwen-Image-Lightning
WALKS = frozenset(walk for _, walk in _CALLED)


def distilled(checkpoint: Checkpoint) -> Distilled | None:
    """How, or None where nothing says that it was. Reads JSON and the headers of files."""
    if checkpoint.family.tasks is None:
        return None
    if found := _by_network(checkpoint):
        return found
    found = _by_what_is_said(checkpoint)
    # A network that takes guidance as an input goes on taking it, whatever is laid over it.
    return replace(found, hears_guidance=True) if found and not checkpoint.family.takes_negative else found


def _by_what_is_said(checkpoint: Checkpoint) -> Distilled | None:
    # The LoRA that was laid over last comes first. One may be of a subject: a picture of lightning, or of a car.
    files = [adapter.path for adapter in reversed(_loras(checkpoint))]
    for path in files:
        if found := _called(_titles(path), f"{path.name} says so of itself", of_subjects=True):
            return found
    if found := _by_scheduler(checkpoint):
        return found
    for path in files:
        if found := _called(path.stem, f"{path.name} is called so", of_subjects=True):
            return replace(found, by_name=True)
    return _by_its_own_file(checkpoint)


def scheduler_config(checkpoint: Checkpoint) -> tuple[str, Mapping[str, Any]]:
    """The scheduler's class, and what its configuration says."""
    part = checkpoint.components["scheduler"]
    return part.class_name, read_json(part.config) | dict(part.options)


def predicts_flow(class_name: str, config: Mapping[str, Any]) -> bool:
    return class_name.startswith("FlowMatch") or bool(
        config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    )


def _loras(checkpoint: Checkpoint) -> list[Lora]:
    name = "unet" if checkpoint.has("unet") else "transformer"
    return [one for one in checkpoint.adapters if isinstance(one, Lora) and one.acts_on(name)]


def _by_network(checkpoint: Checkpoint) -> Distilled | None:
    if checkpoint.has("unet"):
        part = checkpoint.components["unet"]
        if (read_json(part.config) | dict(part.options)).get("time_cond_proj_dim") is None:
            return None
        # Our own sampler for Stable Diffusion gives the network no guidance, as diffusers' pipelines do.
        heard = not checkpoint.family.own_sampler
        return Distilled("lcm", "its UNet takes guidance as an input (time_cond_proj_dim)", hears_guidance=heard)
    part = checkpoint.components["transformer"]
    if part.class_name == "FluxTransformer2DModel" and not (read_json(part.config) | dict(part.options)).get(
        "guidance_embeds"
    ):
        return Distilled("checkpoint", "its transformer takes no guidance, as that of FLUX.1 schnell (guidance_embeds)")
    if read_json(checkpoint.index).get("is_distilled") is True:
        return Distilled("checkpoint", "its model_index.json says is_distilled")
    return None


def _by_scheduler(checkpoint: Checkpoint) -> Distilled | None:
    name, config = scheduler_config(checkpoint)
    if name in ("LCMScheduler", "TCDScheduler"):
        return Distilled("checkpoint", f"its scheduler is {name}")
    # Trailing steps alone also serve models whose noise was made to end at nothing (arXiv 2305.08891): those predict
    # velocity, or say that their betas were rescaled, and need all their steps.
    plain = config.get("prediction_type", "epsilon") == "epsilon" and not config.get("rescale_betas_zero_snr")
    euler = name in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
    if euler and plain and config.get("timestep_spacing") == "trailing":
        return Distilled("checkpoint", "its scheduler takes trailing Euler steps, as those of Turbo do")
    return None


def _by_its_own_file(checkpoint: Checkpoint) -> Distilled | None:
    path = checkpoint.folder
    if path.suffix == ".safetensors":
        if found := _called(_titles(path), "its file says so of itself"):
            return found
        path = path.with_suffix("")
    found = _called(path.name, "it is called so")
    return None if found is None else replace(found, by_name=True)


def _titles(path: Path) -> str:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError):
        return ""  # whoever reads the weights says what is wrong with the file
    return " ".join(metadata.get(name, "")[:_LONGEST_TITLE] for name in _TITLES)


def _called(text: str, because: str, of_subjects: bool = False) -> Distilled | None:
    """What words in a name or a title tell. of_subjects: whether lightning and turbo may also be what is drawn."""
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", text).lower()

    def has(word: str) -> bool:
        return re.search(rf"(?<![a-z]){word}(?![a-z])", text) is not None

    told = _STEPS.search(text)
    steps = int(told[1]) if told else None
    for word, walk in _CALLED:
        ambiguous = of_subjects and word in ("lightning", "turbo") and steps is None
        if not has(rf"{_MAKER}[-_ .0-9]*{word}" if ambiguous else _AS_WRITTEN.get(word, word)):
            continue
        in_one = word == "hyper" and steps == 1  # that LoRA is meant for any number of steps, by TCD
        return Distilled(
            "tcd" if in_one else walk,
            f"{because} ({word})",
            steps=None if in_one else steps,
            hears_guidance=word == "hyper" and has("cfg"),
            shift=3.0 if word == "lightning" else None,
            predicts="sample" if word == "lightning" and has("x0") else None,
        )
    return None
