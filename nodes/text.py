"""Words become prompt embeddings."""

from ..pipeline.recall import recalled
from ..pipeline.text_encoder import encode_prompt
from . import sockets
from .host import embedding_store, io, model_cache
from .stages import stage


class DuetEmbedText(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DuetEmbedText",
            display_name="Embed text",
            category="Duet",
            description="Reads a prompt, in any language that the model knows, and gives its embeddings.",
            inputs=[
                sockets.Model.Input("model", tooltip="The model whose text encoder reads the prompt."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="a beautiful rose",
                    tooltip="What the picture should show, in one line or many. Empty asks for nothing.",
                ),
                io.String.Input(
                    "negative_prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    optional=True,
                    tooltip="What it should not show. It acts only where Generate's guidance scale is above 1.",
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
