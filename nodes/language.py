"""A short brief becomes a full prompt, by a language model of the host's."""

from ..nodes import inputs
from ..pipeline.direct_prompt import (
    LANGUAGES,
    LEAST_NEW_TOKENS,
    MODES,
    MOST_NEW_TOKENS,
    Answers,
    as_it_is,
    direct_prompt,
)
from .choices import check_choice
from .described import described_once
from .host import io, model_cache, text_progress
from .language_files import NO_MODEL, fingerprint, language_names, open_named
from .stages import stage

ANSWERS = Answers()  # strings alone
MODEL_FOLDERS = "models/LLM or models/text_encoders"


class DuetDirectPrompt(io.ComfyNode):
    @classmethod
    @described_once(language_names)
    def define_schema(cls):
        return io.Schema(
            node_id="DuetDirectPrompt",
            display_name="Direct prompt",
            category="Duet",
            description="Lets a language model on this machine write a full prompt from a short brief.",
            inputs=[
                io.Combo.Input(
                    "language_model",
                    options=language_names(),
                    default=NO_MODEL,
                    tooltip="A folder (config.json, tokenizer.json, safetensors) or a GGUF file in models/LLM or "
                    "models/text_encoders. None passes the brief on as it is.",
                ),
                inputs.words(
                    "brief",
                    "What the picture is about, in a few words, in a language that the model reads.",
                    default="castle at night in the rain",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="scene",
                    tooltip="prompt: one line of text. scene: subject, style, light, camera, palette and avoid as "
                    "JSON, which is checked and made into a prompt and a negative prompt.",
                ),
                io.Combo.Input(
                    "language",
                    options=list(LANGUAGES),
                    default=LANGUAGES[0],
                    tooltip="The language of the answer.",
                ),
                io.Boolean.Input(
                    "guided",
                    default=False,
                    tooltip="Begin with the brief, and let the model fill in a scene field by field. Best for models "
                    "below a billion parameters. Otherwise this is the second try, if the first answer is of no use.",
                ),
                inputs.seed("The same seed gives the same answer."),
                io.Float.Input(
                    "temperature",
                    default=0.4,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="0 always takes the likeliest word; higher surprises more. Small models need a low one.",
                ),
                io.Int.Input(
                    "max_new_tokens",
                    default=160,
                    min=LEAST_NEW_TOKENS,
                    max=MOST_NEW_TOKENS,
                    tooltip="The longest answer, in tokens: about three quarters of a word each.",
                ),
            ],
            outputs=[
                io.String.Output("prompt", display_name="prompt", tooltip="What to draw, for Embed text."),
                io.String.Output(
                    "negative_prompt",
                    display_name="negative_prompt",
                    tooltip="What to avoid, from a scene. Empty in the mode prompt.",
                ),
                io.String.Output("scene", display_name="scene", tooltip="The scene as JSON. Empty without one."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, language_model: str | None = None, mode: str | None = None, language: str | None = None):
        choices = (("language_model", language_model, language_names()), ("mode", mode, MODES))
        for name, value, options in (*choices, ("language", language, LANGUAGES)):
            if (told := check_choice("Direct prompt", name, value, options)) is not True:
                return told
        return True

    @classmethod
    def fingerprint_inputs(cls, language_model: str | None = None, **others: object) -> str | float:
        return fingerprint(language_model)

    @classmethod
    def execute(cls, language_model: str, brief: str, **settings):
        with stage("Direct prompt", "brief") as done:
            if language_model == NO_MODEL:
                answer = as_it_is(brief, f"no language model is chosen: put one into {MODEL_FOLDERS}")
            else:
                on_text = text_progress(settings["max_new_tokens"], cls.hidden.unique_id)
                answer = direct_prompt(
                    model_cache(), open_named(language_model), brief, **settings, answers=ANSWERS, on_text=on_text
                )
        done.name = answer.way
        ui = {"text": [answer.prompt], "duet_scene": [answer.scene], **done.ui(answer.notices)}
        return io.NodeOutput(answer.prompt, answer.negative_prompt, answer.scene, ui=ui)
