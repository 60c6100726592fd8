"""A condition is pulled closer to a picture."""

from ..nodes import sockets
from ..pipeline.curves import draw_curve
from ..pipeline.refinement import OnStep, Preview, refine
from .described import described_once
from .host import io, model_cache, ui  # pyright: ignore[reportAttributeAccessIssue]  # the host is no package
from .host import steps as host_steps
from .images import to_image, to_preview
from .stages import stage


class DuetRefine(io.ComfyNode):
    @classmethod
    @described_once()
    def define_schema(cls):
        return io.Schema(
            node_id="DuetRefine",
            display_name="Refine",
            category="Duet",
            description="Pulls a condition closer to a picture, step by step, and shows how the difference falls.",
            inputs=[
                sockets.Model.Input("model", tooltip="The model that made the condition: the built-in one."),
                sockets.Conditioning.Input("conditioning", tooltip="Where to start, from Fuse."),
                sockets.ImageFeatures.Input(
                    "image_features",
                    tooltip="The picture to come closer to, from Image features. With style statistics, its style "
                    "counts as much as what it shows.",
                ),
                io.Float.Input(
                    "radius",
                    default=0.5,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How far from the start it may go, as a share of the condition's own length. 0 changes "
                    "nothing; beyond 1 the words are soon forgotten.",
                ),
                io.Int.Input("steps", default=20, min=1, max=500, tooltip="The most steps to take."),
                io.Float.Input(
                    "seconds",
                    default=30.0,
                    min=0.1,
                    max=3600.0,
                    step=0.5,
                    tooltip="The most time to take. What is best so far is kept.",
                ),
            ],
            outputs=[
                sockets.Conditioning.Output(
                    "refined", display_name="conditioning", tooltip="The refined condition. For Generate."
                ),
                io.Image.Output("loss_curve", display_name="loss curve", tooltip="The difference, step by step."),
            ],
        )

    @classmethod
    def execute(cls, model, conditioning, image_features, radius: float, steps: int, seconds: float):
        with stage("Refine", "refinement") as done:
            found = refine(
                model_cache(),
                model,
                conditioning,
                image_features,
                radius=radius,
                num_steps=steps,
                seconds=seconds,
                on_step=_report(steps),
            )
        curve = to_image(draw_curve(found.losses))
        told = f"similarity {found.similarity[0]:.3f} before, {found.similarity[1]:.3f} after"
        shown = done.ui((*found.conditioning.notices, told)) | ui.PreviewImage(curve, cls=cls).as_dict()
        return io.NodeOutput(found.conditioning, curve, ui=shown)


def _report(total: int) -> OnStep:
    """Progress, preview and interrupt of the host, as ``refine`` calls for them."""
    tell = host_steps(total)

    def on_step(step: int, total: int, loss: float, preview: Preview) -> None:
        tell(step, to_preview(preview))

    return on_step
