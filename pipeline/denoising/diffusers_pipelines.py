"""diffusers' pipelines around parts that the cache holds. They borrow the parts and own nothing."""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from ..checkpoints import Checkpoint
from ..files.safetensors_files import read_json


def assemble(checkpoint: Checkpoint, class_name: str, parts: Mapping[str, Any]) -> Any:
    """A diffusers pipeline of ``parts``; a part that is not given is None. Reads no weights and moves nothing."""
    pipeline_class = getattr(importlib.import_module("diffusers"), class_name)
    options = pipeline_options(checkpoint) | {"requires_safety_checker": False, "add_watermarker": False}
    given = {}
    for name, parameter in inspect.signature(pipeline_class.__init__).parameters.items():
        if name in parts:
            given[name] = parts[name]
        elif name in options:
            given[name] = options[name]
        elif name != "self" and parameter.default is inspect.Parameter.empty:
            given[name] = None
    pipeline = pipeline_class(**given)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline_options(checkpoint: Checkpoint) -> dict[str, bool]:
    """The switches of model_index.json, such as is_distilled."""
    return {name: value for name, value in read_json(checkpoint.index).items() if isinstance(value, bool)}
