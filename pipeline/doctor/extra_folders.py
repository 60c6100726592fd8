"""The further folders that a host is told of by an extra_model_paths.yaml, for the command line."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files.safetensors_files import shown

LARGEST_FILE = 2**20
# How the host also calls some kinds of folders.
ALIASES = {"clip": "text_encoders", "unet": "diffusion_models", "t2i_adapter": "controlnet"}


def with_extra_folders(folders: Mapping[str, Sequence[Path]], file: Path) -> dict[str, list[Path]]:
    """``folders`` and those of the file, as the host reads it: by its sections, each with a base_path and kinds.

    A section's folders come last, or first where it says is_default. Raises ValueError for any other file, and OSError.
    """
    found = {kind: list(paths) for kind, paths in folders.items()}
    for kind, path, is_default in _paths(file):
        paths = found.setdefault(ALIASES.get(kind, kind), [])
        if path in paths:
            paths.remove(path)
        paths.insert(0 if is_default else len(paths), path)
    return found


def _paths(file: Path) -> Iterator[tuple[str, Path, bool]]:
    for name, section in _read(file).items():
        if section is None:
            continue
        if not isinstance(section, dict):
            raise ValueError(f"{file}: expected folders by their kind in {shown(name)}, found {shown(section)}")
        base = section.get("base_path")
        base = file.parent / os.path.expandvars(os.path.expanduser(base)) if isinstance(base, str) else file.parent
        for kind, lines in section.items():
            if kind in ("base_path", "is_default"):
                continue
            if not isinstance(kind, str) or not isinstance(lines, str):
                raise ValueError(f"{file}: expected a folder, or one a line, in {shown(kind)}, found {shown(lines)}")
            for line in filter(None, lines.split("\n")):
                yield kind, Path(os.path.abspath(base / line)), bool(section.get("is_default"))


def _read(file: Path) -> dict[Any, Any]:
    try:
        import yaml  # of the host; what is asked without such a file does not need it
    except ImportError:
        raise ValueError(f"{file}: to read it the package yaml is needed: pip install pyyaml") from None
    with open(file, "rb") as opened:
        text = opened.read(LARGEST_FILE + 1)
    if len(text) > LARGEST_FILE:
        raise ValueError(f"{file}: expected at most {LARGEST_FILE:,} bytes, found more")
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: expected YAML, found {shown(text[:40])} ({str(error)[:200]})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected sections with folders, found {shown(found)}")
    return found
