"""Which model is used, and what the shared cache holds."""

import functools

from ..nodes import sockets
from .cache_report import cache_as_json, cache_as_text
from .choices import check_choice
from .described import described_once
from .host import embedding_store, io, let_go, model_cache
from .model_choice import AUTOMATIC, BUILT_IN, file_names, files_of, model_choices, open_choice
from .stages import stage

# Inputs of Load model for what a single file lacks, and the host's folder that each is chosen from.
FURTHER = {
    "text_encoder": "text_encoders",
    "text_encoder_2": "text_encoders",
    "text_encoder_3": "text_encoders",
    "vae": "vae",
}
ACTIONS = ["report", "unload"]


class DuetLoadModel(io.ComfyNode):
    @classmethod
    @described_once(model_choices, *(functools.partial(file_names, kind) for kind in dict.fromkeys(FURTHER.values())))
    def define_schema(cls):
        return io.Schema(
            node_id="DuetLoadModel",
            display_name="Load model",
            category="Duet",
            description="Chooses a model. No weights are read yet: each block loads the part that it needs, once.",
            inputs=[
                io.Combo.Input(
                    "model",
                    options=model_choices(),
                    default=BUILT_IN,
                    tooltip="The small model that comes with Duet, a diffusers folder in models/diffusers, or a file "
                    "in models/checkpoints or models/diffusion_models.",
                ),
                *(
                    io.Combo.Input(
                        name,
                        options=[AUTOMATIC, *file_names(kind)],
                        default=AUTOMATIC,
                        optional=True,
                        tooltip=f"For a model in one file that lacks it: a file in models/{kind}. automatic: the one "
                        "that fits.",
                    )
                    for name, kind in FURTHER.items()
                ),
            ],
            outputs=[
                sockets.Model.Output("duet_model", display_name="model", tooltip="The model, for every other block."),
            ],
        )

    @classmethod
    def validate_inputs(
        cls,
        model: str | None = None,
        text_encoder: str | None = None,
        text_encoder_2: str | None = None,
        text_encoder_3: str | None = None,
        vae: str | None = None,
    ) -> bool | str:
        told = [check_choice("Load model", "model", model, model_choices())]
        for (name, kind), chosen in zip(
            FURTHER.items(), (text_encoder, text_encoder_2, text_encoder_3, vae), strict=True
        ):
            told.append(check_choice("Load model", name, chosen, [AUTOMATIC, *file_names(kind)]))
        return next((message for message in told if message is not True), True)

    @classmethod
    def fingerprint_inputs(
        cls,
        model: str | None = None,
        text_encoder: str | None = AUTOMATIC,
        text_encoder_2: str | None = AUTOMATIC,
        text_encoder_3: str | None = AUTOMATIC,
        vae: str | None = AUTOMATIC,
    ) -> str | float:
        encoders = (text_encoder, text_encoder_2, text_encoder_3)
        if model is None or vae is None or None in encoders:  # it comes from another node, and is not known yet: run
            return float("nan")
        files = files_of(model, [name for name in encoders if name is not None], vae)
        statuses = [(str(path), path.stat()) for path in files]
        return repr([(path, status.st_size, status.st_mtime_ns) for path, status in statuses])

    @classmethod
    def execute(
        cls,
        model: str,
        text_encoder: str = AUTOMATIC,
        text_encoder_2: str = AUTOMATIC,
        text_encoder_3: str = AUTOMATIC,
        vae: str = AUTOMATIC,
    ):
        with stage("Load model", "model") as done:
            checkpoint, notices = open_choice(model, (text_encoder, text_encoder_2, text_encoder_3), vae)
        return io.NodeOutput(checkpoint, ui=done.ui(notices))


class DuetModelCache(io.ComfyNode):
    @classmethod
    @described_once()
    def define_schema(cls):
        return io.Schema(
            node_id="DuetModelCache",
            display_name="Model cache",
            category="Duet",
            description="Tells what Duet's shared cache holds, or empties it. Runs every time.",
            inputs=[
                io.Combo.Input(
                    "action",
                    options=ACTIONS,
                    default="report",
                    tooltip="report: tell what is held. unload: let go of every model and embedding first, then tell.",
                ),
                io.AnyType.Input("after", optional=True, tooltip="Anything. This node waits for it."),
            ],
            outputs=[
                io.String.Output("report", display_name="report", tooltip="What the cache holds, one model a line."),
            ],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def validate_inputs(cls, action: str | None = None) -> bool | str:
        return check_choice("Model cache", "action", action, ACTIONS)

    @classmethod
    def fingerprint_inputs(cls, action: str | None = None, after: object = None) -> float:
        return float("nan")  # equal to nothing, so the node always runs

    @classmethod
    def execute(cls, action: str, after: object = None):
        if action == "unload":
            let_go()
        told = model_cache().stats(), embedding_store().recent.bytes_held
        report = cache_as_text(*told)
        return io.NodeOutput(report, ui={"text": [report], "duet_cache": [cache_as_json(*told)]})
