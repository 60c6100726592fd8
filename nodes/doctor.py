"""What a workflow or a model lacks, told on the node."""

import json
from dataclasses import replace

from ..pipeline.doctor.examination import Report, examine_folder, examine_memory, examine_versions, examine_workflow
from .choices import check_choice
from .described import described_once
from .host import diffusers_folder, diffusers_names, host_version, installed_nodes, io, model_cache, model_folders
from .language_files import language_roots
from .stages import stage

NO_MODEL = "none"


class DuetDoctor(io.ComfyNode):
    @classmethod
    @described_once(diffusers_names)
    def define_schema(cls):
        return io.Schema(
            node_id="DuetDoctor",
            display_name="Doctor",
            category="Duet",
            description="Tells which files a workflow or a model folder lacks, and where they belong; which versions "
            "are installed and known to work; what is in memory, and why. Runs every time.",
            inputs=[
                io.String.Input(
                    "workflow",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="A workflow's JSON, pasted. Empty: the one that this node is part of.",
                ),
                io.Combo.Input(
                    "model_folder",
                    options=[NO_MODEL, *diffusers_names()],
                    default=NO_MODEL,
                    optional=True,
                    tooltip="A folder in models/diffusers to examine, instead of a workflow.",
                ),
                io.AnyType.Input("after", optional=True, tooltip="Anything. This node waits for it."),
            ],
            outputs=[
                io.String.Output("report", display_name="report", tooltip="What was found, the missing first."),
            ],
            hidden=[io.Hidden.prompt],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def validate_inputs(cls, model_folder: str | None = None) -> bool | str:
        return check_choice("Doctor", "model_folder", model_folder, [NO_MODEL, *diffusers_names()])

    @classmethod
    def fingerprint_inputs(cls, workflow: str = "", model_folder: str = NO_MODEL, after: object = None) -> float:
        return float("nan")  # equal to nothing, so the node always runs

    @classmethod
    def execute(cls, workflow: str = "", model_folder: str = NO_MODEL, after: object = None):
        with stage("Doctor", "examination") as done:
            report = _examined(workflow.strip() or json.dumps(cls.hidden.prompt), model_folder)
        report = replace(
            report, versions=examine_versions(host_version()), memory=examine_memory(model_cache().stats())
        )
        text = report.as_text()
        return io.NodeOutput(text, ui={"text": [text], "duet_doctor": [report.as_json()], **done.ui(summary=text)})


def _examined(workflow: str, model_folder: str) -> Report:
    if model_folder != NO_MODEL:
        return examine_folder(diffusers_folder(model_folder))
    return examine_workflow(workflow, model_folders() | language_roots(), installed_nodes())
