"""All of the host that Duet touches: memory, progress, folders, nodes. No other package imports the host."""

# pyright: reportMissingImports=false, reportMissingModuleSource=false
# The host is no package that a checker could find: it is the program that loads us.

from comfy_api.latest import ComfyExtension, ui
from comfy_execution.graph_utils import ExecutionBlocker

from .api import clip_vision_output, host_version, installed_nodes, io
from .folders import diffusers_folder, diffusers_names, model_folders, picture_folder
from .pictures import picture_place, picture_saver, picture_texts
from .progress import steps, text_progress
from .residency import ComfyResidency
from .stores import embedding_store, let_go, model_cache, weights_digests

__all__ = [
    "ComfyExtension",
    "ComfyResidency",
    "ExecutionBlocker",
    "clip_vision_output",
    "diffusers_folder",
    "diffusers_names",
    "embedding_store",
    "host_version",
    "installed_nodes",
    "io",
    "let_go",
    "model_cache",
    "model_folders",
    "picture_folder",
    "picture_place",
    "picture_saver",
    "picture_texts",
    "steps",
    "text_progress",
    "ui",
    "weights_digests",
]
