"""What the Load model block offers, and which files one of its choices stands for."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

from ..pipeline.checkpoints import Checkpoint, open_checkpoint
from ..pipeline.files.listings import Entries
from ..pipeline.files.single_file import fitting_files
from ..pipeline.mini import MODEL_FOLDER
from .host import diffusers_folder, diffusers_names, weights_digests
from .host.folders import listings
from .model_files import model_names, model_path

BUILT_IN = "duet-mini (built in)"
AUTOMATIC = "automatic"
_SINGLE = ("checkpoints", "diffusion_models")  # the host's folders of models in one file
_ENDING = ".safetensors"
_READ = (".jinja", ".json", ".model", ".txt", _ENDING)  # of a folder: weights, configurations, words


def model_choices() -> list[str]:
    """The built-in model, diffusers folders, and single files by the host's folder that they lie in."""
    return [BUILT_IN, *diffusers_names(), *(f"{kind}/{name}" for kind in _SINGLE for name in file_names(kind))]


def file_names(kind: str) -> list[str]:
    return [name for name in model_names(kind) if name.endswith(_ENDING)]


def path_of(model: str) -> Path:
    """Raises ValueError for a choice that leads out of the host's folders, and for one that is not there."""
    if model == BUILT_IN:
        return MODEL_FOLDER
    kind, _, name = model.partition("/")
    if kind in _SINGLE and name.endswith(_ENDING):
        return model_path(kind, name)
    return diffusers_folder(model)


def open_choice(model: str, encoders: Iterable[str], vae: str) -> tuple[Checkpoint, list[str]]:
    """The model, and what to tell about it. encoders, vae: names of files, or AUTOMATIC."""
    path = path_of(model)
    given = [model_path("text_encoders", name) for name in encoders if name != AUTOMATIC]
    if vae != AUTOMATIC:
        given.append(model_path("vae", vae))
    found = [] if path.is_dir() else _found(path, given)
    checkpoint = open_checkpoint(path, [*given, *found], digests=weights_digests())
    used = {part.weights[0]: name for name, part in checkpoint.components.items() if part.weights}
    return checkpoint, [f"{used[file]}: {file.name}, the only file that fits" for file in found if file in used]


def files_of(model: str, encoders: Iterable[str], vae: str) -> list[Path]:
    """Every file that a choice depends on, in an order that stays; those that are looked through are among them."""
    path = path_of(model)
    if path.is_dir():
        return list(listings().found(("files", path), lambda entries: _files_below(path, entries)))
    given = [model_path("text_encoders", name) for name in encoders if name != AUTOMATIC]
    return [path, *given, *([model_path("vae", vae)] if vae != AUTOMATIC else []), *_candidates()]


def _files_below(folder: Path, entries: Entries) -> list[Path]:
    """Links to folders are not followed."""
    found, waiting = [], [str(folder)]
    while waiting:
        inside = entries(waiting.pop())
        waiting += [entry.path for entry in inside if entry.is_dir(follow_symlinks=False)]
        found += [Path(entry.path) for entry in inside if entry.name.endswith(_READ)]
    return sorted(found)


def _candidates() -> list[Path]:
    found = []
    for kind in ("text_encoders", "vae"):
        for name in file_names(kind):
            with contextlib.suppress(ValueError):  # a link that leads out of the folder
                found.append(model_path(kind, name))
    return found


def _found(path: Path, given: list[Path]) -> list[Path]:
    """For each part that is lacking, the one file that fits. Raises ValueError where several do."""
    found = []
    for component, files in fitting_files(path, _candidates(), given).items():
        if len(files) > 1:
            names = ", ".join(file.name for file in files[:10])
            raise ValueError(f"expected a choice of {component} for {path.name}, since several files fit: {names}")
        found.extend(file for file in files if file not in found)
    return found
