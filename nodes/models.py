"""Which model is used, and what the shared cache holds."""

from pathlib import Path

from ..pipeline.checkpoints import open_checkpoint
from ..pipeline.mini import MODEL_FOLDER
from . import sockets
from .cache_report import cache_as_json, cache_as_text
from .choices import check_choice
from .host import diffusers_folder, diffusers_names, io, model_cache
from .stages import stage

BUILT_IN = "duet-mini (built in)"
ACTIONS = ["report", "unload"]


class DuetLoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DuetLoadModel",
            display_name="Load model",
            category="Duet",
            description="Chooses a model. No weights are read yet: each block loads the part that it needs, once.",
            inputs=[
                io.Combo.Input(
                    "model",
                    options=[BUILT_IN, *diffusers_names()],
                    default=BUILT_IN,
                    tooltip="The small model that comes with Duet, or a diffusers folder in models/diffusers.",
                ),
            ],
            outputs=[
                sockets.Model.Output("duet_model", display_name="model", tooltip="The model, for every other block."),
            ],
        )

    @classmethod
    def validate_inputs(cls, model: str | None = None) -> bool | str:
        return check_choice("Load model", "model", model, [BUILT_IN, *diffusers_names()])

    @classmethod
    def fingerprint_inputs(cls, model: str | None = None) -> str | float:
        if model is None:  # its name comes from another node, and is not known yet: run
            return float("nan")
        files = [path for path in _folder(model).rglob("*") if path.suffix in (".json", ".safetensors")]
        return repr(sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files))

    @classmethod
    def execute(cls, model: str):
        with stage("Load model", "model") as done:
            checkpoint = open_checkpoint(_folder(model))
        return io.NodeOutput(checkpoint, ui=done.ui())


class DuetModelCache(io.ComfyNode):
    @classmethod
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
                    tooltip="report: tell what is held. unload: let go of every model first, then tell.",
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
            model_cache().unload()
        report = cache_as_text(model_cache().stats())
        return io.NodeOutput(report, ui={"text": [report], "duet_cache": [cache_as_json(model_cache().stats())]})


def _folder(model: str) -> Path:
    return MODEL_FOLDER if model == BUILT_IN else diffusers_folder(model)
