"""Where the host keeps models and pictures."""

# pyright: reportMissingImports=false, reportMissingModuleSource=false

import functools
from collections.abc import Iterable
from pathlib import Path

import folder_paths

from ...pipeline.files.listings import Entries, Listings
from ...pipeline.files.names import check_name

_DEEPEST = 3  # folders below models/diffusers in which a model is looked for


@functools.cache
def listings() -> Listings:
    """What lies in this host's folders of models."""
    return Listings()


def diffusers_names() -> list[str]:
    """The models in the host's models/diffusers folders, as names for ``diffusers_folder``."""
    roots = tuple(folder_paths.get_folder_paths("diffusers"))
    return list(listings().found(("diffusers", roots), lambda entries: _diffusers_names(roots, entries)))


def _diffusers_names(roots: Iterable[str], entries: Entries) -> list[str]:
    names = set()
    waiting = [(root, "", 0) for root in roots]
    while waiting:
        folder, name, depth = waiting.pop()
        inside = entries(folder)
        if depth and any(entry.name == "model_index.json" and not entry.is_dir() for entry in inside):
            names.add(name)
        elif depth < _DEEPEST:
            below = [entry for entry in inside if entry.is_dir(follow_symlinks=False)]
            waiting += [(entry.path, f"{name}/{entry.name}".lstrip("/"), depth + 1) for entry in below]
    return sorted(names)


def diffusers_folder(name: str) -> Path:
    """The folder of a model named in a prompt, resolved, and certain to lie inside one of the host's models/diffusers.

    Raises ValueError for a name that leads anywhere else, and for one that is not there.
    """
    check_name(name)
    roots = [Path(root).resolve() for root in folder_paths.get_folder_paths("diffusers")]
    for root in roots:
        folder = (root / name).resolve()
        if root not in folder.parents:
            raise ValueError(
                f"model {name!r} leads out of {root}, by a link: expected a folder inside. "
                "A folder elsewhere can be named in the host's extra_model_paths.yaml"
            )
        if folder.is_dir():
            return folder
    expected = " or ".join(str(root / name / "model_index.json") for root in roots)
    raise ValueError(f"no model {name!r}: expected {expected}; found {', '.join(diffusers_names()) or 'no models'}")


def folders_of(kind: str) -> tuple[str, ...]:
    """Where the host keeps models of one kind; none for a kind that it does not know."""
    if kind not in folder_paths.folder_names_and_paths:
        return tuple(map(str, model_folders().get(kind, [])))
    return tuple(folder_paths.folder_names_and_paths[kind][0])


def model_folders() -> dict[str, list[Path]]:
    """Every folder that the host knows by kind, those of pictures too; it knows some by their older names as well."""
    kinds = {kind: [Path(root) for root in roots] for kind, (roots, _) in folder_paths.folder_names_and_paths.items()}
    kinds.pop("custom_nodes", None)
    # The host itself has no such kind; packs that add it have it there.
    kinds.setdefault("ipadapter", [Path(folder_paths.models_dir) / "ipadapter"])
    return kinds | {kind: [picture_folder(kind)] for kind in ("input", "output", "temp")}


def picture_folder(kind: str) -> Path:
    """kind: "input", "output" or "temp"."""
    return Path(folder_paths.get_directory_by_type(kind)).resolve()
