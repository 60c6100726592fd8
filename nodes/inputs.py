"""Inputs that several nodes have: one range and one default for each, wherever it stands."""

from .host import io


def seed(tooltip: str):
    return io.Int.Input(
        "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip=tooltip
    )  # fmt: skip


def steps():
    return io.Int.Input(
        "steps",
        default=4,
        min=1,
        max=100,
        tooltip="1 to 4 for the built-in model and for turbo models; 20 to 30 for others.",
    )


def guidance_scale(tooltip: str):
    return io.Float.Input("guidance_scale", default=1.0, min=0.0, max=30.0, step=0.1, tooltip=tooltip)


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
