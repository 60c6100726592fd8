"""The condition becomes a picture, and the picture is finished."""

import time
from collections.abc import Callable

from PIL.Image import Image

from ..nodes import inputs, sockets
from ..pipeline.checkpoints import Checkpoint
from ..pipeline.finishing import finish_picture
from ..pipeline.generation import OnStep, Preview, generate
from ..pipeline.speed_plan import EXACT, SpeedPlan
from .choices import check_choice
from .described import described_once
from .host import io, model_cache
from .host import steps as host_steps
from .host.progress import previews_wanted
from .images import over_white, to_colour, to_image, to_mask, to_opaque, to_pixels, to_preview
from .speed import as_line
from .stages import stage
from .stock_objects import to_latent

_SHOWN_EVERY_S = 0.1
FITS = ["crop", "pad", "stretch"]


class DuetGenerate(io.ComfyNode):
    @classmethod
    @described_once()
    def define_schema(cls):
        return io.Schema(
            node_id="DuetGenerate",
            display_name="Generate",
            category="Duet",
            description="Draws pictures from a condition in a few steps, with previews on the way.",
            inputs=[
                sockets.Model.Input("model", tooltip="The model that draws."),
                sockets.Conditioning.Input("conditioning", tooltip="What to draw, from Fuse."),
                inputs.seed(
                    "The same seed gives the same picture. From words alone, the built-in model also takes its style "
                    "from it."
                ),
                inputs.steps(),
                inputs.guidance_scale(
                    "How hard to hold to the words. 1 is plain and fastest; above 1 the negative prompt "
                    "counts, and every step takes twice as long."
                ),
                *inputs.size("the picture"),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="How many pictures to draw at once."),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="A schedule of the host, such as Basic Scheduler's, to walk along by Euler's method. It "
                    "takes the place of steps. For Stable Diffusion.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="A picture to draw from, cut to the size above; a batch gives one picture each. For models "
                    "whose family draws from pictures.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the picture is drawn anew: 1 is new, 0 is kept to the pixel. An empty mask "
                    "counts as none.",
                ),
                inputs.denoise(
                    "How much of the picture is replaced: the share of the steps that are taken, at least one. "
                    "Without a picture it has no effect."
                ),
                sockets.SpeedPlan.Input(
                    "speed_plan",
                    optional=True,
                    tooltip="Which shortcuts to take, from Speed plan. Without one, none is.",
                ),
            ],
            outputs=[
                io.Image.Output("pictures", display_name="image", tooltip="The pictures, RGB, laid over white."),
                io.Mask.Output(
                    "pictures_mask", display_name="mask", tooltip="1 where a picture is transparent: 1 - alpha."
                ),
                io.Latent.Output(
                    "latent", display_name="latent", tooltip="What was decoded, for the host's own nodes, unscaled."
                ),
                sockets.Report.Output(
                    "report", display_name="report", tooltip="What the run cost, for the block Report."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        conditioning,
        seed: int,
        steps: int,
        guidance_scale: float,
        width: int,
        height: int,
        batch_size: int,
        sigmas=None,
        image=None,
        mask=None,
        denoise: float = 0.6,
        speed_plan=None,
    ):
        schedule = None if sigmas is None else sigmas.tolist()
        with stage("Generate", "generation") as done:
            pictures = generate(
                model_cache(),
                model,
                conditioning,
                seed=seed,
                **inputs.chosen(steps, guidance_scale),
                width=width,
                height=height,
                batch_size=batch_size,
                sigmas=schedule,
                image=None if image is None else to_opaque(image),
                mask=None if mask is None or not mask.any() else mask.reshape(-1, *mask.shape[-2:]),
                strength=denoise,
                plan=speed_plan or EXACT,
                on_step=report_steps(model, speed_plan or EXACT),
            )
            latent = to_latent(model, pictures.latents)
        image = to_image(over_white(pictures.pixels, pictures.alpha))
        said = done.ui(pictures.notices, pictures.milliseconds, as_line(pictures.report))
        return io.NodeOutput(image, to_mask(pictures.alpha), latent, pictures.report, ui=said)


class DuetFinishImage(io.ComfyNode):
    @classmethod
    @described_once()
    def define_schema(cls):
        return io.Schema(
            node_id="DuetFinishImage",
            display_name="Finish image",
            category="Duet",
            description="Brings a picture to its last size, and lays it over a colour or keeps it transparent.",
            inputs=[
                io.Image.Input("image", tooltip="One picture or a batch; grey, RGB or RGBA."),
                io.Mask.Input("mask", optional=True, tooltip="1 where the picture is transparent."),
                io.Int.Input(
                    "width", default=0, min=0, max=8192, tooltip="Width of the result. 0 keeps the proportions."
                ),
                io.Int.Input(
                    "height", default=0, min=0, max=8192, tooltip="Height of the result. 0 keeps the proportions."
                ),
                io.Combo.Input(
                    "fit",
                    options=FITS,
                    default="pad",
                    tooltip="crop: fill the size and cut what sticks out. pad: show all and leave the rest to the "
                    "background. stretch: squeeze to the size.",
                ),
                io.String.Input(
                    "background",
                    default="transparent",
                    tooltip='What lies behind the picture: "transparent" keeps alpha and gives RGBA, which Save Image '
                    'writes as it is; "#ffffff", "white" and the like lay it over that colour and give RGB.',
                ),
                io.Boolean.Input(
                    "lift_off_white",
                    default=True,
                    tooltip="On for pictures of Generate, which come laid over white: soft edges get back their own "
                    "colour. Off for pictures of Load Image.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "finished", display_name="image", tooltip="RGBA where the background is transparent, else RGB."
                ),
                io.Mask.Output("finished_mask", display_name="mask", tooltip="1 where the result is transparent."),
            ],
        )

    @classmethod
    def validate_inputs(cls, fit: str | None = None) -> bool | str:
        return check_choice("Finish image", "fit", fit, FITS)

    @classmethod
    def execute(cls, image, width: int, height: int, fit: str, background: str, lift_off_white: bool, mask=None):
        with stage("Finish image", "finish") as done:
            pixels, opacity = to_pixels(image, mask, lies_over_white=lift_off_white)
            alpha = None if opacity is None else opacity.unsqueeze(1)
            colour = to_colour(background)
            finished = finish_picture(pixels, alpha, width=width, height=height, fit=fit, background=colour)
        return io.NodeOutput(to_image(finished.pixels), to_mask(finished.alpha), ui=done.ui())


def report_steps(model: Checkpoint, plan: SpeedPlan) -> OnStep:
    """Progress, preview and interrupt of the host, as ``generate`` calls for them. The last step needs no preview.

    The decoder of a large model takes about as long as two steps, so there a preview waits until the host, or the plan
    by a small decoder, asks for it. Of steps that are over before an eye could see them, few are shown, and none where
    the picture itself is about to be there.
    """
    bars: dict[int, Callable[[int, Image | None], None]] = {}
    wanted = model.family.tasks is None or plan.preview is not None or plan.decoder is not None or previews_wanted()
    started = shown = time.monotonic()

    def on_step(step: int, total: int, preview: Preview) -> None:
        nonlocal shown, wanted
        if total not in bars:  # how many there are is known with the first
            bars[total] = host_steps(total)
        now = time.monotonic()
        left = (now - started) / step * (total - step)
        due = wanted and now - shown > _SHOWN_EVERY_S and left > _SHOWN_EVERY_S
        picture = to_preview(preview) if due else None
        bars[total](step, picture)
        wanted = wanted and not (due and picture is None)
        shown = time.monotonic() if due else shown

    return on_step
