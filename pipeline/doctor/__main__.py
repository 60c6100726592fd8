"""The doctor from the command line.

``python -m pipeline.doctor WORKFLOW.json --models COMFYUI/models`` or ``python -m pipeline.doctor MODEL_FOLDER``
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .examination import examine_folder, examine_workflow
from .extra_folders import with_extra_folders
from .model_folders import host_folders


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all is well; 1: something is missing or broken; 2: the question itself could not be read."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.doctor", description=__doc__)
    parser.add_argument("path", type=Path, help="a workflow's JSON, or a model folder")
    parser.add_argument("--models", type=Path, help="the host's models folder, to look for what a workflow names")
    parser.add_argument("--extra-model-paths", type=Path, metavar="FILE", help="the host's extra_model_paths.yaml")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.path.is_dir():
            report = examine_folder(chosen.path)
        elif chosen.models is None:
            parser.error("expected --models with the host's models folder, to look for what the workflow names")
        elif not chosen.models.is_dir():
            parser.error(f"expected the host's models folder at {chosen.models}, found no folder")
        else:
            with open(chosen.path, "rb") as file:
                text = file.read(2**26)
            folders = host_folders(chosen.models)
            if chosen.extra_model_paths is not None:
                folders = with_extra_folders(folders, chosen.extra_model_paths)
            report = examine_workflow(text, folders)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    sys.stdout.write((json.dumps(report.as_json()) if chosen.json else report.as_text()) + "\n")
    return 0 if report.healthy else 1


if __name__ == "__main__":
    sys.exit(main())
