"""Language models by the names that a choice lists, such as LLM/name: below roots that are given by their kind."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

Roots = Mapping[str, Sequence[Path]]  # "LLM" -> folders

_DEEPEST, _MOST_LISTED, _LONGEST_NAME = 3, 1000, 200
_NEEDED = {"config.json", "tokenizer.json"}


def language_model_names(roots: Roots) -> list[str]:
    """Folders with a config.json and a tokenizer.json, and GGUF files, three folders deep. Links are not followed."""
    found = ((kind, root, path) for kind, folders in roots.items() for root in folders for path in _models(root))
    return sorted({f"{kind}/{path.relative_to(root).as_posix()}" for kind, root, path in found})[:_MOST_LISTED]


def find_language_model(roots: Roots, name: str) -> Path:
    """The folder or file of a name, resolved, and certain to lie inside one of the roots.

    Raises ValueError for a name that leads anywhere else, and for one that is not there.
    """
    shown = name[:_LONGEST_NAME]
    parts = PureWindowsPath(name).parts  # splits at both kinds of slash
    if len(name) > _LONGEST_NAME or any(ord(character) < 32 for character in name):
        raise ValueError(f"expected a language model such as LLM/name, got {shown!r}")
    if PureWindowsPath(name).anchor or PurePosixPath(name).is_absolute() or ".." in parts or ":" in name:
        raise ValueError(f"{shown!r} leads out of the models folder: expected a name inside, such as LLM/name")
    if len(parts) < 2 or parts[0] not in roots:
        raise ValueError(f"expected a language model such as LLM/name, in {' or '.join(roots)}; got {shown!r}")
    for root in roots[parts[0]]:
        path = root.joinpath(*parts[1:]).resolve()
        if root.resolve() not in path.parents:
            raise ValueError(f"{shown!r} leads out of {root}, by a link: expected a file or folder inside")
        if path.is_dir() or (path.is_file() and path.suffix.lower() == ".gguf"):
            return path
    expected = " or ".join(str(root.joinpath(*parts[1:])) for root in roots[parts[0]])
    found = ", ".join(language_model_names(roots)[:20])
    raise ValueError(f"no {shown!r}: expected {expected or 'such a folder'}; found {found or 'none'}")


def _models(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        here = Path(folder)
        depth = len(here.relative_to(root).parts)
        if depth and set(files) >= _NEEDED:
            yield here
            subfolders.clear()
            continue
        yield from (here / name for name in files if name.lower().endswith(".gguf"))
        if depth == _DEEPEST:
            subfolders.clear()
