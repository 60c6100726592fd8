"""Inputs that several nodes have: one range and one default for each, wherever it stands."""

from typing import TypedDict

from .host import io


class Chosen(TypedDict):
    """As ``generate`` takes them: None where the model chooses."""

    num_inference_steps: int | None
    guidance_scale: float | None


def seed(tooltip: str):
    return io.Int.Input(
        "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip=tooltip
    )  # fmt: skip


def steps():
    return io.Int.Input(
        "steps",
        default=0,
        min=0,
        max=100,
        tooltip="0: as many as the model is meant for, 1 for the built-in one. 1 to 4 for turbo models; 20 to 30 for "
        "others.",
    )


def guidance_scale(tooltip: str):
    tooltip = f"{tooltip} -1: as the model is meant."
    return io.Float.Input("guidance_scale", default=-1.0, min=-1.0, max=30.0, step=0.1, tooltip=tooltip)


def chosen(steps: int, guidance_scale: float) -> Chosen:
    """What the two inputs above say."""
    return {
        "num_inference_steps": None if steps == 0 else steps,
        "guidance_scale": None if guidance_scale == -1 else guidance_scale,
    }


def size(of: str) -> list:
    """Width and height. of: what they are of, for the tooltips."""
    return [
        io.Int.Input(side, default=512, min=16, max=4096, tooltip=f"{side.capitalize()} of {of}, in pixels.")
        for side in ("width", "height")
    ]


def denoise(tooltip: str):
    return io.Float.Input("denoise", default=0.6, min=0.0, max=1.0, step=0.01, optional=True, tooltip=tooltip)


def words(name: str, tooltip: str, default: str = "", optional: bool = False):
    """A prompt of any length, with the host's dynamic prompts."""
    return io.String.Input(
        name, multiline=True, dynamic_prompts=True, default=default, optional=optional, tooltip=tooltip
    )  # fmt: skip
