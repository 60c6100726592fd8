"""Words become prompt embeddings."""

from dataclasses import replace

from ..nodes import inputs, sockets
from ..pipeline.conditioning import PromptEmbeds
from ..pipeline.store.recall import recalled
from ..pipeline.text.text_encoders import encode_text, open_text_encoder
from ..pipeline.text_encoder import encode_prompt
from .choices import check_choice
from .described import described_once
from .host import embedding_store, io, model_cache, weights_digests
from .model_files import fingerprint, model_names, model_path
from .stages import stage

NO_ENCODER = "none in models/text_encoders"


class DuetEmbedText(io.ComfyNode):
    @classmethod
    @described_once()
    def define_schema(cls):
        return io.Schema(
            node_id="DuetEmbedText",
            display_name="Embed text",
            category="Duet",
            description="Reads a prompt, in any language that the model knows, and gives its embeddings.",
            inputs=[
                sockets.Model.Input("model", tooltip="The model whose text encoder reads the prompt."),
                inputs.words(
                    "prompt",
                    "What the picture should show, in one line or many. Empty asks for nothing.",
                    default="a beautiful rose",
                ),
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
    def execute(cls, model, prompt: str, negative_prompt: str = ""):
        with stage("Embed text", "text") as done:
            embeds = recalled(embedding_store(), encode_prompt, model_cache(), model, prompt, negative_prompt or None)
        return io.NodeOutput(embeds, ui=done.ui(embeds.notices))


class DuetTextEncoder(io.ComfyNode):
    @classmethod
    @described_once(lambda: _encoders())
    def define_schema(cls):
        return io.Schema(
            node_id="DuetTextEncoder",
            display_name="Text encoder",
            category="Duet",
            description="Reads a prompt by an encoder of its own: CLIP, T5, BERT, or a layer of a language model.",
            inputs=[
                io.Combo.Input(
                    "text_encoder",
                    options=_encoders(),
                    tooltip="In models/text_encoders: a file of CLIP, T5 or Qwen, or a folder that transformers saved.",
                ),
                inputs.words("prompt", "What is read, in one line or many."),
                io.Int.Input(
                    "layer",
                    default=-1,
                    min=-200,
                    max=200,
                    tooltip="Which hidden states are given: -1 the last layer's, -2 the one before, 0 what enters the "
                    "first.",
                ),
                io.Boolean.Input(
                    "chat_template",
                    default=False,
                    tooltip="Say the prompt as a user says it to a language model, in the words that it was taught.",
                ),
                inputs.words(
                    "negative_prompt",
                    "Read in the same way, for what the picture should not show. Empty gives none.",
                    optional=True,
                ),
            ],
            outputs=[
                sockets.PromptEmbeds.Output(
                    "prompt_embeds",
                    display_name="prompt_embeds",
                    tooltip="The words, in the encoder's own space. A model of another space refuses them by name.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, text_encoder: str | None = None) -> bool | str:
        return check_choice("Text encoder", "text encoder", text_encoder, _encoders())

    @classmethod
    def fingerprint_inputs(cls, text_encoder: str | None = None, **others: object) -> str | float:
        return fingerprint("text_encoders", text_encoder)

    @classmethod
    def execute(cls, text_encoder: str, prompt: str, layer: int, chat_template: bool, negative_prompt: str = ""):
        with stage("Text encoder", "text") as done:
            encoder = open_text_encoder(model_path("text_encoders", text_encoder), weights_digests())

            def read(words: str) -> PromptEmbeds:
                options = {"layer": layer, "chat_template": chat_template}
                return recalled(embedding_store(), encode_text, model_cache(), encoder, words, **options)

            negative = read(negative_prompt) if negative_prompt.strip() else None
            embeds = replace(read(prompt), negative=negative)
        return io.NodeOutput(embeds, ui=done.ui(embeds.notices))


def _encoders() -> list[str]:
    return model_names("text_encoders") or [NO_ENCODER]
