"""Model files and folders of one of the host's kinds, such as clip_vision, by the names that a combo lists."""

from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..pipeline.files.listings import Entries
from .host.folders import folders_of, listings

_DEEPEST, _MOST_LISTED, _LONGEST_NAME = 3, 1000, 200


def model_names(kind: str) -> list[str]:
    """Folders that hold a config.json, and .safetensors files outside of them, three folders deep."""
    roots = folders_of(kind)
    return list(listings().found(("models", roots), lambda entries: _model_names(roots, entries)))


def _model_names(roots: Iterable[str], entries: Entries) -> list[str]:
    names: set[str] = set()
    for root in roots:
        waiting = [(root, "", 0)]
        while waiting and len(names) < _MOST_LISTED:
            folder, name, depth = waiting.pop()
            inside = entries(folder)
            if depth and any(entry.name == "config.json" for entry in inside):
                names.add(name.rstrip("/"))
                continue
            names.update(name + entry.name for entry in inside if _is_model(entry.name) and entry.is_file())
            if depth < _DEEPEST:
                waiting.extend((entry.path, f"{name}{entry.name}/", depth + 1) for entry in inside if entry.is_dir())
    return sorted(names)


def _is_model(name: str) -> bool:
    return PurePosixPath(name).suffix == ".safetensors"


def model_path(kind: str, name: str) -> Path:
    """The file or folder of a name in a prompt, resolved, and certain to lie inside one of the host's folders.

    Raises ValueError for a name that leads anywhere else, and for one that is not there.
    """
    shown = name[:_LONGEST_NAME]
    if not name.strip() or len(name) > _LONGEST_NAME or any(ord(character) < 32 for character in name):
        raise ValueError(f"expected a name in models/{kind}, got {shown!r}")
    if PureWindowsPath(name).anchor or PurePosixPath(name).is_absolute() or ".." in PureWindowsPath(name).parts:
        raise ValueError(f"{shown!r} leads out of models/{kind}: expected a name inside")
    roots = [Path(root).resolve() for root in folders_of(kind)]
    for root in roots:
        path = (root / name).resolve()
        if root not in path.parents:
            raise ValueError(f"{shown!r} leads out of {root}, by a link: expected a file or folder inside")
        if path.is_dir() or (path.is_file() and path.suffix == ".safetensors"):
            return path
    expected = " or ".join(str(root / name) for root in roots)
    raise ValueError(f"no {shown!r}: expected {expected}; found {', '.join(model_names(kind)[:20]) or 'none'}")


def fingerprint(kind: str, name: str | None) -> str | float:
    """Another one as soon as the file, or a file of the folder, is replaced; the name itself where it is no file."""
    if name is None:  # it comes from another node, and is not known yet: run
        return float("nan")
    if name not in model_names(kind):
        return name
    path = model_path(kind, name)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return repr([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()])
