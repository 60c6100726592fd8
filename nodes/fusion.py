"""Words and a picture become one condition."""

from ..nodes import sockets
from ..pipeline.fusing.token_fusion import open_token_adapter
from ..pipeline.fusion import fuse
from .choices import check_choice
from .described import described_once
from .host import io, model_cache, weights_digests
from .model_files import fingerprint, model_names, model_path
from .stages import stage

METHODS = ["concat", "weighted", "gated", "spherical", "cross-attention"]
NO_WEIGHTS = "none"


class DuetFuse(io.ComfyNode):
    @classmethod
    @described_once(lambda: model_names("style_models"))
    def define_schema(cls):
        return io.Schema(
            node_id="DuetFuse",
            display_name="Fuse",
            category="Duet",
            description="Joins words and a picture into one condition for Generate. Either may be left out.",
            inputs=[
                sockets.Model.Input("model", tooltip="The model whose fusion network joins the two."),
                sockets.PromptEmbeds.Input(
                    "prompt_embeds",
                    optional=True,
                    tooltip="The words, from Embed text. Left out: the picture alone decides.",
                ),
                sockets.ImageFeatures.Input(
                    "image_features",
                    optional=True,
                    tooltip="The picture, from Image features. Left out: the words alone decide.",
                ),
                io.Combo.Input(
                    "method",
                    options=METHODS,
                    default="concat",
                    tooltip="concat: both side by side through the trained network, or, where the model has none, the "
                    "picture's tokens after the words'. weighted: the straight way between what each would give alone. "
                    "gated: every place of the picture changes over at its own moment. spherical: as weighted, but "
                    "nothing fades on the way. cross-attention: every word looks at the picture, in models without a "
                    "fusion network.",
                ),
                io.Float.Input(
                    "strength",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="How much the picture says: 0 is the text alone, 1 is the picture alone, 0.5 is what the "
                    "model was trained on: what the words say, in the picture's style, if it learned them together.",
                ),
                io.Combo.Input(
                    "projection",
                    options=[NO_WEIGHTS, *model_names("style_models")],
                    default=NO_WEIGHTS,
                    optional=True,
                    tooltip="Trained weights that turn a picture's tokens into words', for models without a fusion "
                    "network: Redux or cross-attention, of models/style_models.",
                ),
            ],
            outputs=[
                sockets.Conditioning.Output(
                    "conditioning", display_name="conditioning", tooltip="The one condition. For Generate."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, method: str | None = None, projection: str | None = None) -> bool | str:
        said = check_choice("Fuse", "method", method, METHODS)
        if said is not True:
            return said
        return check_choice("Fuse", "projection", projection, [NO_WEIGHTS, *model_names("style_models")])

    @classmethod
    def fingerprint_inputs(cls, projection: str | None = NO_WEIGHTS, **others: object) -> str | float:
        return fingerprint("style_models", projection)

    @classmethod
    def execute(
        cls,
        model,
        method: str,
        strength: float,
        prompt_embeds=None,
        image_features=None,
        projection: str = NO_WEIGHTS,
    ):
        with stage("Fuse", "fusion") as done:
            adapter = None
            if projection != NO_WEIGHTS:
                adapter = open_token_adapter(model_path("style_models", projection), weights_digests())
            fused = fuse(
                model_cache(), model, prompt_embeds, image_features, method=method, strength=strength, adapter=adapter
            )
        return io.NodeOutput(fused, ui=done.ui(fused.notices))
