"""How fast Generate draws, and what that costs: the presets, every dial by hand, and the line that says what came."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..nodes import sockets
from ..pipeline.conditioning import GenerationReport
from ..pipeline.residency import megabytes
from ..pipeline.speed_plan import (
    COMPILE,
    DTYPES,
    LARGEST_SHIFT,
    MEMORY_FORMATS,
    PRESETS,
    QUANTISATION,
    SCHEDULERS,
    SpeedPlan,
)
from .choices import check_choice
from .described import described_once
from .host import io
from .model_files import fingerprint, model_names, model_path
from .stages import stage

AS_PRESET, OWN_DECODER = "as the preset", "the model's own"
_DECODER_FOLDERS = ("vae_approx", "vae")  # the host's folders in which a tiny decoder may lie
_CHOICES = {
    "scheduler": SCHEDULERS,
    "compile": COMPILE,
    "quantisation": QUANTISATION,
    "dtype": DTYPES,
    "memory_format": MEMORY_FORMATS,
}
# What stands for "as the preset" in each dial, and what one of them is called in a plan.
_UNSET = {"steps": 0, "guidance_scale": -1, "shift": 0, "step_cache": -1, "unet_cache": 0} | dict.fromkeys(
    _CHOICES, AS_PRESET
)
_FIELDS = {"steps": "num_inference_steps"}


class DuetSpeedPlan(io.ComfyNode):
    @classmethod
    @described_once(lambda: _decoders())
    def define_schema(cls):
        return io.Schema(
            node_id="DuetSpeedPlan",
            display_name="Speed plan",
            category="Duet",
            description="Chooses how fast Generate draws: a preset, and any dial of it by hand.",
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=[*PRESETS],
                    default="balanced",
                    tooltip="lightning: 4 steps, for models that were distilled to few. balanced: Generate's steps, of "
                    "which a cache skips what hardly changes. exact: no shortcut. A preset leaves out, with a notice, "
                    "what the model cannot do; a dial that is set by hand is done or refused.",
                ),
                io.Int.Input(
                    "steps", default=0, min=0, max=100,
                    tooltip="0: as the preset, which for balanced and exact is what Generate says. Any other number "
                    "goes before Generate's.",
                ),
                io.Float.Input(
                    "guidance_scale", default=-1.0, min=-1.0, max=30.0, step=0.1,
                    tooltip="-1: as the preset, which is what Generate says, and off for a model that was distilled "
                    "without it. 1 is off and takes half the time.",
                ),
                _choice(
                    "scheduler", SCHEDULERS,
                    "checkpoint: the model's own. automatic: the one it was distilled for, else its own. Others by "
                    "name, refused where they do not fit.",
                ),
                io.Float.Input(
                    "shift", default=0.0, min=0.0, max=LARGEST_SHIFT, step=0.1,
                    tooltip="For models of flow matching: above 1, more of the steps go to the layout. 0: the model's "
                    "own.",
                ),
                io.Float.Input(
                    "step_cache", default=-1.0, min=-1.0, max=1.0, step=0.01,
                    tooltip="How far what the model sees may drift, relative to its size, before it is computed again. "
                    "About 0.1 is hard to see. 0: off. -1: as the preset.",
                ),
                io.Int.Input(
                    "unet_cache", default=0, min=0, max=20,
                    tooltip="Every how many steps all of a UNet is computed; in between only its outer layers are. 1: "
                    "off. 0: as the preset. Needs five steps or more.",
                ),
                _choice(
                    "compile", COMPILE,
                    "regions: compile the blocks that repeat; the first run takes longer. cuda graphs: the whole, on "
                    "an NVIDIA GPU. Without a compiler it runs as it is, with a notice.",
                ),
                _choice(
                    "quantisation", QUANTISATION,
                    "int8: weights in half the memory of 16 bits. int8 dynamic and float8: also faster products, where "
                    "the machine has them. Needs torchao.",
                ),
                io.Combo.Input(
                    "decoder", options=_decoders(), default=OWN_DECODER,
                    tooltip="A tiny decoder (TAESD and the like) in models/vae_approx or models/vae, in place of the "
                    "model's own: much faster, a little less sharp.",
                ),
                io.Combo.Input(
                    "preview", options=_decoders(), default=OWN_DECODER,
                    tooltip="A tiny decoder for the previews alone. The result stays as it is.",
                ),
                _choice(
                    "dtype", DTYPES,
                    "Precision of the model. automatic: what the family is meant for, float32 on a CPU. fastest: also "
                    "bfloat16 on a CPU that has tiles for it. Where half precision overflows, the stage is done again "
                    "in float32.",
                ),
                _choice(
                    "memory_format", MEMORY_FORMATS,
                    "channels_last may speed up convolutions in half precision; the picture stays the same but for "
                    "rounding.",
                ),
                io.Boolean.Input(
                    "measure_loss", default=False,
                    tooltip="Draws everything a second time without shortcuts, and says how far apart the two are "
                    "(PSNR and SSIM). For choosing a plan, not for daily use.",
                ),
            ],
            outputs=[
                sockets.SpeedPlan.Output("speed_plan", display_name="speed plan", tooltip="The plan, for Generate."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(
        cls,
        preset: str | None = None,
        scheduler: str | None = None,
        compile: str | None = None,
        quantisation: str | None = None,
        dtype: str | None = None,
        memory_format: str | None = None,
        decoder: str | None = None,
        preview: str | None = None,
    ) -> bool | str:
        given = {
            "scheduler": scheduler,
            "compile": compile,
            "quantisation": quantisation,
            "dtype": dtype,
            "memory_format": memory_format,
        }
        told = [check_choice("Speed plan", "preset", preset, [*PRESETS])]
        told += [check_choice("Speed plan", name, given[name], [AS_PRESET, *known]) for name, known in _CHOICES.items()]
        for name, chosen in (("decoder", decoder), ("preview", preview)):
            told.append(check_choice("Speed plan", name, chosen, _decoders()))
        return next((message for message in told if message is not True), True)

    @classmethod
    def fingerprint_inputs(cls, decoder: str | None = None, preview: str | None = None, **_: object) -> str | float:
        if decoder is None or preview is None:  # it comes from another node, and is not known yet: run
            return float("nan")
        files = [_split(chosen) for chosen in (decoder, preview) if chosen != OWN_DECODER]
        return repr([fingerprint(kind, name) for kind, name in files])

    @classmethod
    def execute(cls, preset: str, decoder: str, preview: str, measure_loss: bool, **dials: Any):
        with stage("Speed plan", "plan") as done:
            by_hand = {_FIELDS.get(name, name): value for name, value in dials.items() if value != _UNSET[name]}
            files = {"decoder": decoder, "preview": preview}
            by_hand |= {name: _file_of(chosen) for name, chosen in files.items() if chosen != OWN_DECODER}
            plan = planned(preset, by_hand, measure_loss)
        return io.NodeOutput(plan, ui=done.ui(summary=str(plan)))


def planned(preset: str, by_hand: Mapping[str, Any], measure_loss: bool = False) -> SpeedPlan:
    """The preset with the dials that are set by hand: those are done or refused, and never left out."""
    if preset not in PRESETS:  # of a linked input, which the host hands on unseen
        raise ValueError(f"expected a preset of {', '.join(PRESETS)}, got {str(preset)[:80]!r}")
    base = PRESETS[preset]
    changed = {name for name, value in by_hand.items() if value != getattr(base, name)} - {"preview"}
    left_out = tuple(name for name in base.where_it_fits if name not in by_hand)
    name = "custom" if changed else base.name
    return replace(base, name=name, where_it_fits=left_out, measure_loss=measure_loss, **by_hand)


def as_line(report: GenerationReport) -> str:
    """What a run cost, in one line."""
    steps = report.steps_computed + report.steps_skipped
    said = [report.plan, f"{report.steps_computed} of {steps} steps computed in full"]
    said += report.shortcuts
    said.append(f"{report.dtype} on {report.device}")
    said.append(f"models {megabytes(report.model_bytes)}, {report.cache_hits} at hand, {report.cache_misses} read")
    if report.peak_bytes is not None:
        grown = "" if report.device.startswith("cuda") else "grew by "
        said.append(f"peak {grown}{megabytes(report.peak_bytes)}")
    if report.retries:
        said.append(f"{' and '.join(report.retries)} done again in float32")
    if report.psnr is not None and report.ssim is not None:
        ratio = "no difference" if math.isinf(report.psnr) else f"{report.psnr:.1f} dB"
        said.append(f"loss: {ratio}, SSIM {report.ssim:.3f}")
    return " · ".join(said)


def _choice(name: str, known: Sequence[str], tooltip: str) -> Any:
    return io.Combo.Input(name, options=[AS_PRESET, *known], default=AS_PRESET, tooltip=tooltip)


def _decoders() -> list[str]:
    return [OWN_DECODER, *(f"{kind}/{name}" for kind in _DECODER_FOLDERS for name in model_names(kind))]


def _file_of(chosen: str) -> Path:
    """Raises ValueError for a name that leads out of the host's folders, and for one that is not there."""
    return model_path(*_split(chosen))


def _split(chosen: str) -> tuple[str, str]:
    kind, _, name = chosen.partition("/")
    if kind not in _DECODER_FOLDERS:
        raise ValueError(f"expected a decoder in models/{' or models/'.join(_DECODER_FOLDERS)}, got {chosen[:80]!r}")
    return kind, name
