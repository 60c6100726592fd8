"""The way between Duet's blocks and the host's own nodes, in both directions."""

from ..nodes import inputs, sockets
from ..pipeline.fusion import fuse
from ..pipeline.stock import image_features_from
from .choices import check_choice
from .described import described_once
from .host import clip_vision_output, io, model_cache
from .stages import stage
from .stock_objects import DuetClip, DuetVae, from_conditionings, to_conditionings

LAYERS = ["last_hidden_state", "penultimate_hidden_states"]


class DuetModelToStock(io.ComfyNode):
    @classmethod
    @described_once()
    def define_schema(cls):
        return io.Schema(
            node_id="DuetModelToStock",
            display_name="Model to stock nodes",
            category="Duet",
            description="Lends a model's text encoder and VAE to the host's own nodes. Both stay in Duet's cache.",
            inputs=[sockets.Model.Input("model", tooltip="The model whose parts are lent.")],
            outputs=[
                io.Clip.Output("clip", display_name="CLIP", tooltip="The text encoder, for CLIP Text Encode."),
                io.Vae.Output("vae", display_name="VAE", tooltip="The VAE, for VAE Decode and VAE Encode."),
            ],
        )

    @classmethod
    def execute(cls, model):
        return io.NodeOutput(DuetClip(model), DuetVae(model))


class DuetConditionToStock(io.ComfyNode):
    @classmethod
    @described_once()
    def define_schema(cls):
        return io.Schema(
            node_id="DuetConditionToStock",
            display_name="Condition to stock nodes",
            category="Duet",
            description="Gives a condition to the host's own samplers: KSampler draws what Fuse has joined.",
            inputs=[
                io.MultiType.Input(
                    "conditioning",
                    types=[sockets.Conditioning, sockets.PromptEmbeds],
                    tooltip="The condition, from Fuse, or the words alone, from Embed text.",
                ),
                io.Model.Input(
                    "stock_model",
                    optional=True,
                    tooltip="The MODEL that is to hear it. Connected, a condition that does not fit is refused here.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("positive", display_name="positive", tooltip="What to draw, for KSampler."),
                io.Conditioning.Output(
                    "negative",
                    display_name="negative",
                    tooltip="What to steer away from, for KSampler. All zeros where nothing was said.",
                ),
            ],
        )

    @classmethod
    def execute(cls, conditioning, stock_model=None):
        with stage("Condition to stock nodes", "conversion") as done:
            positive, negative = to_conditionings(conditioning, stock_model)
        return io.NodeOutput(positive, negative, ui=done.ui(conditioning.notices))


class DuetConditionFromStock(io.ComfyNode):
    @classmethod
    @described_once()
    def define_schema(cls):
        return io.Schema(
            node_id="DuetConditionFromStock",
            display_name="Condition from stock nodes",
            category="Duet",
            description="Takes a condition of the host's own nodes: Generate draws what CLIP Text Encode has read.",
            inputs=[
                sockets.Model.Input("model", tooltip="The model that is to hear it. One of another width is refused."),
                io.Conditioning.Input("positive", tooltip="What to draw: one condition for the whole picture."),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What to steer away from. It acts only where Generate's guidance scale is above 1.",
                ),
            ],
            outputs=[
                sockets.PromptEmbeds.Output(
                    "prompt_embeds", display_name="prompt_embeds", tooltip="The words, for Fuse with a picture."
                ),
                sockets.Conditioning.Output(
                    "conditioning", display_name="conditioning", tooltip="The words alone, for Generate."
                ),
            ],
        )

    @classmethod
    def execute(cls, model, positive, negative=None):
        with stage("Condition from stock nodes", "conversion") as done:
            embeds = from_conditionings(model, positive, negative)
            alone = fuse(model_cache(), model, embeds, None)
        return io.NodeOutput(embeds, alone, ui=done.ui(embeds.notices))


class DuetEmbedTextByClip(io.ComfyNode):
    @classmethod
    @described_once()
    def define_schema(cls):
        return io.Schema(
            node_id="DuetEmbedTextByClip",
            display_name="Embed text by CLIP",
            category="Duet",
            description="Reads a prompt with a CLIP of the host, patched by LoRA or not, in place of the model's own.",
            inputs=[
                sockets.Model.Input("model", tooltip="The model that is to hear it. One of another width is refused."),
                io.Clip.Input("clip", tooltip="The CLIP that reads the prompt, with the host's own rules for weights."),
                inputs.words("prompt", "What the picture should show.", default="a beautiful rose"),
                inputs.words(
                    "negative_prompt",
                    "What it should not show. It acts only where Generate's guidance scale is above 1.",
                    optional=True,
                ),
            ],
            outputs=[
                sockets.PromptEmbeds.Output(
                    "prompt_embeds", display_name="prompt_embeds", tooltip="The words, for Fuse."
                ),
            ],
        )

    @classmethod
    def execute(cls, model, clip, prompt: str, negative_prompt: str = ""):
        with stage("Embed text by CLIP", "text") as done:
            if clip is None:  # as Load Checkpoint hands it on
                raise ValueError("expected a CLIP, got none: the checkpoint holds no text encoder")
            positive, negative = (
                clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, negative_prompt)
            )
            embeds = from_conditionings(model, positive, negative)
        return io.NodeOutput(embeds, ui=done.ui(embeds.notices))


class DuetFeaturesFromStock(io.ComfyNode):
    @classmethod
    @described_once()
    def define_schema(cls):
        return io.Schema(
            node_id="DuetFeaturesFromStock",
            display_name="Image features from stock nodes",
            category="Duet",
            description="Takes what CLIP Vision Encode has seen as image features.",
            inputs=[
                io.ClipVisionOutput.Input("vision", tooltip="The picture, from CLIP Vision Encode."),
                io.Combo.Input(
                    "layer",
                    options=LAYERS,
                    default=LAYERS[0],
                    tooltip="Which of the encoder's layers gives the tokens. Adapters are trained on one of them.",
                ),
                io.String.Input(
                    "encoder",
                    default="clip_vision",
                    tooltip="A name for the encoder, since its output bears none. Features of two names never meet.",
                ),
            ],
            outputs=[
                sockets.ImageFeatures.Output(
                    "image_features", display_name="image_features", tooltip="The features, for Fuse."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, layer: str | None = None) -> bool | str:
        return check_choice("Image features from stock nodes", "layer", layer, LAYERS)

    @classmethod
    def execute(cls, vision, layer: str, encoder: str):
        with stage("Image features from stock nodes", "conversion") as done:
            features = image_features_from(vision[layer], vision["image_embeds"], encoder, layer)
        return io.NodeOutput(features, ui=done.ui())


class DuetFeaturesToStock(io.ComfyNode):
    @classmethod
    @described_once()
    def define_schema(cls):
        return io.Schema(
            node_id="DuetFeaturesToStock",
            display_name="Image features to stock nodes",
            category="Duet",
            description="Gives image features to the host's own nodes, such as Apply Style Model and unCLIP "
            "Conditioning.",
            inputs=[sockets.ImageFeatures.Input("image_features", tooltip="The picture, from Image features.")],
            outputs=[
                io.ClipVisionOutput.Output(
                    "clip_vision_output",
                    display_name="CLIP_VISION_OUTPUT",
                    tooltip="The tokens as last and as penultimate layer, the pooled features as image embeds.",
                ),
            ],
        )

    @classmethod
    def execute(cls, image_features):
        tokens, pooled = (side.float().cpu() for side in (image_features.tokens, image_features.pooled))
        return io.NodeOutput(clip_vision_output(tokens, pooled))
