"""Where the files that a workflow names should lie below the host's models folder, and where they lie instead."""

import difflib
import importlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..checkpoints import open_checkpoint
from ..files.safetensors_files import CheckpointError, check_weights, shown
from .extra_folders import ALIASES
from .workflow_files import ANY_FOLDER, WantedFile

# The folders of the host that have another name than their kind, the usual one first.
_PLACES = {
    "text_encoders": ("text_encoders", "clip"),
    "diffusion_models": ("diffusion_models", "unet"),
    "controlnet": ("controlnet", "t2i_adapter"),
}
_KINDS = (
    *("audio_encoders", "checkpoints", "clip_vision", "configs", "controlnet", "diffusers", "diffusion_models"),
    *("LLM", "embeddings", "gligen", "hypernetworks", "ipadapter", "latent_upscale_models", "loras", "model_patches"),
    *("photomaker", "style_models", "text_encoders", "upscale_models", "vae", "vae_approx"),
)
_BESIDE = ("input", "output", "temp")  # where pictures lie, which no model is looked for in
_MOST_LISTED = 20_000  # files of a host that are looked through for a name
_PICKLED = (".ckpt", ".pt", ".pt2", ".pth", ".bin", ".pkl")


@dataclass(frozen=True)
class Finding:
    """One file that was asked for. node: who asks; folder: its kind, "" if unknown; places: where it should lie.

    status: "found", "missing", "broken" or "refused"; note: what else is known, such as where it lies instead.
    """

    node: str
    folder: str
    name: str
    status: str
    places: tuple[str, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        note = f"; {self.note}" if self.note else ""
        where = self.places[0] if self.status == "found" and self.places else " or ".join(self.places)
        told = {"found": "is there: ", "missing": "is MISSING, expected at ", "broken": "is BROKEN: "}
        return f"{self.name} for {self.node} {told.get(self.status, 'is REFUSED')}{where}{note}"


def host_folders(models: Path) -> dict[str, list[Path]]:
    """The folders of a host by kind, below its models folder; those of pictures lie beside it."""
    kinds = {kind: [models / place for place in _PLACES.get(kind, (kind,))] for kind in _KINDS}
    return kinds | {kind: [models.parent / kind] for kind in _BESIDE}


def find_files(wanted: Iterable[WantedFile], folders: Mapping[str, Sequence[Path]]) -> list[Finding]:
    """Look for each. Nothing outside ``folders`` is looked at, and of weights only the header is read."""
    known: dict[str, list[Path]] = {}  # listed once, when something is missing
    found = []
    for each in wanted:
        folder = ALIASES.get(each.folder, each.folder)
        if not stays_inside(each.name):
            note = "expected a name inside the folder, without .. and not absolute"
            found.append(Finding(each.node, folder, shown(each.name), "refused", (), note))
            continue
        name, folder = _annotated(each.name, folder)
        kinds = [kind for kind in folders if kind not in _BESIDE] if folder == ANY_FOLDER else [folder]
        places = [root / name for kind in kinds for root in folders.get(kind, ())]
        here = next((place for place in places if place.exists()), None)
        if here is not None:
            found.append(_looked_at(each, folder, here))
            continue
        if not known:
            known = _listed(folders)
        note = _elsewhere(name, folder, known) if places else f"this host has no folder {folder!r}"
        shown_places = places if folder != ANY_FOLDER else []
        found.append(Finding(each.node, folder, name, "missing", tuple(map(str, shown_places)), note))
    return found


def _annotated(name: str, folder: str) -> tuple[str, str]:
    """The page writes "a.png [output]" for a picture that lies in another folder of pictures."""
    for kind in _BESIDE if folder in _BESIDE else ():
        if name.endswith(f" [{kind}]"):
            return name.removesuffix(f" [{kind}]"), kind
    return name, folder


def stays_inside(name: str) -> bool:
    """Whether a relative name, on any system, leads to no place outside the folder that it is looked for in."""
    parts = PureWindowsPath(name).parts  # splits at both kinds of slash
    absolute = PureWindowsPath(name).anchor or PurePosixPath(name).is_absolute()
    return bool(parts) and not absolute and ".." not in parts and "\0" not in name and len(name) < 1000


def _looked_at(wanted: WantedFile, folder: str, path: Path) -> Finding:
    note, status = "", "found"
    try:
        if path.is_dir() and folder == "diffusers":
            open_checkpoint(path)
        elif wanted.language_model:
            # Its library takes a second to import, and most workflows have none.
            importlib.import_module("..language.language_model", __package__).open_language_model(path)
        elif path.suffix in (".safetensors", ".sft"):
            check_weights(path)
        elif path.suffix in _PICKLED:
            note = "a Python pickle, which can run code: Duet never opens one, the host's own loaders do"
    except CheckpointError as error:
        status, note = "broken", str(error)
    return Finding(wanted.node, folder, wanted.name, status, (str(path),), note)


def _listed(folders: Mapping[str, Sequence[Path]]) -> dict[str, list[Path]]:
    """Every file of the host's folders, as a path relative to its folder, by kind."""
    count = 0
    known: dict[str, list[Path]] = {}
    for kind, roots in folders.items():
        names = known.setdefault(kind, [])
        for root in roots:
            for path in _files_below(root):
                count += 1
                if count > _MOST_LISTED:
                    return known
                names.append(path)
    return known


def _files_below(root: Path) -> Iterator[Path]:
    for folder, _, files in os.walk(root):
        for name in files:
            yield Path(folder, name).relative_to(root)


def _elsewhere(name: str, folder: str, known: Mapping[str, Sequence[Path]]) -> str:
    """Where a file of that name lies, or what is named nearly so."""
    if "\\" in name and PureWindowsPath(name).as_posix() in {path.as_posix() for path in known.get(folder, ())}:
        return f"it is there as {PureWindowsPath(name).as_posix()}, named as another system writes it: choose it again"
    base = PureWindowsPath(name).name
    for kind, paths in known.items():
        for path in paths:
            if path.name.lower() == base.lower() and (kind in _BESIDE) == (folder in _BESIDE):
                where = f"{kind}/{path.as_posix()}"
                return f"there is {where}: choose it by that name" if kind == folder else f"there is {where}: move it"
    names = [path.as_posix() for path in known.get(folder, ())]
    close = difflib.get_close_matches(name, names[:2000], n=3)
    return f"similar names there: {', '.join(close)}" if close else ""
