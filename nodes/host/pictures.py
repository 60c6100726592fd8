"""Where the host saves pictures, and what it writes into them."""

# pyright: reportMissingImports=false, reportMissingModuleSource=false

import functools
import json
import os
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import folder_paths
from comfy.cli_args import args

from ...pipeline.saving import PictureSaver, Place
from .folders import picture_folder

_DATE = re.compile(r"%date:([^%]+)%")
_PART_OF_DATE = re.compile(r"d{1,2}|M{1,2}|yyyy|yy|h{1,2}|m{1,2}|s{1,2}")


@functools.cache
def picture_saver() -> PictureSaver:
    """The one saver of this host, which compresses as its Save Image does."""
    return PictureSaver(picture_folder("output"), compress_level=4)


def picture_place(prefix: str, width: int, height: int) -> tuple[Place, str]:
    """Where the host's Save Image would save a picture of that name and size, and the subfolder by which it is viewed.

    Raises ValueError for a name that leads out of the output folder, by dots or by a link: the host follows links.
    """
    prefix = _dated(prefix, datetime.now())
    name = os.path.basename(os.path.normpath(prefix))
    if not prefix.strip() or name in ("", ".", "..") or any(ord(character) < 32 for character in prefix):
        raise ValueError(f"expected filename_prefix to be a name below the output folder, got {prefix[:200]!r}")
    root = folder_paths.get_output_directory()
    _stay_inside(root, os.path.dirname(os.path.normpath(prefix)), prefix)  # before the host makes the folder
    folder, name, number, subfolder, _ = folder_paths.get_save_image_path(prefix, root, width, height)
    _stay_inside(root, subfolder, prefix)
    return Place(Path(folder), name, number), subfolder


def _dated(prefix: str, now: datetime) -> str:
    """With %date:yyyy-MM-dd hh.mm.ss% and the like filled in, which the page does for the host's own blocks alone."""
    numbers = {"d": now.day, "M": now.month, "h": now.hour, "m": now.minute, "s": now.second}

    def part(found: re.Match[str]) -> str:
        letters = found[0]
        return str(now.year)[-len(letters) :] if letters[0] == "y" else f"{numbers[letters[0]]:0{len(letters)}}"

    return _DATE.sub(lambda date: _PART_OF_DATE.sub(part, date[1]), prefix)


def picture_texts(hidden: Any) -> dict[str, str]:
    """What the host writes into a PNG: the prompt and the workflow, or nothing if it was started so.

    hidden: of a node that asks for both.
    """
    if args.disable_metadata:
        return {}
    texts = {} if hidden.prompt is None else {"prompt": json.dumps(hidden.prompt)}
    return texts | {key: json.dumps(value) for key, value in (hidden.extra_pnginfo or {}).items()}


def _stay_inside(root: str, subfolder: str, prefix: str) -> None:
    real = os.path.realpath(root)
    try:
        inside = os.path.commonpath([real, os.path.realpath(os.path.join(root, subfolder))]) == real
    except ValueError:  # another drive
        inside = False
    if not inside:
        raise ValueError(f"filename_prefix {prefix[:200]!r} leads out of the output folder: expected a place inside")
