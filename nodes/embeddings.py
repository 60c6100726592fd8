"""Embeddings as files: saved to the output folder, loaded from the input and the output folder."""

import os
import re
from pathlib import Path

from ..nodes import sockets
from ..pipeline.conditioning import FusedConditioning, ImageFeatures, PromptEmbeds
from ..pipeline.doctor.model_folders import stays_inside
from ..pipeline.store.embedding_files import Embeddings, read_embeddings, write_embeddings
from .described import described_once
from .host import ExecutionBlocker, io, picture_folder  # pyright: ignore[reportAttributeAccessIssue]
from .stages import stage

_SUFFIX = ".safetensors"
_MOST_LISTED, _DEEPEST = 1000, 3
_NO_FILE = "none"
# What a name may not be on some system that the file is taken to.
_UNFIT = re.compile(r'[<>:"|?*\0-\x1f]|(^|/)(con|prn|aux|nul|com\d|lpt\d)(\.|/|$)|[. ](/|$)', re.IGNORECASE)
_KINDS = {PromptEmbeds: "prompt embeds", ImageFeatures: "image features", FusedConditioning: "a conditioning"}


class DuetSaveEmbeddings(io.ComfyNode):
    @classmethod
    @described_once()
    def define_schema(cls):
        return io.Schema(
            node_id="DuetSaveEmbeddings",
            display_name="Save embeddings",
            category="Duet",
            description="Saves words, a picture's features or a condition as a safetensors file in the output folder.",
            inputs=[
                io.MultiType.Input(
                    "embeddings",
                    [sockets.PromptEmbeds, sockets.ImageFeatures, sockets.Conditioning],
                    tooltip="From Embed text, Image features or Fuse.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="embeddings/duet",
                    tooltip="A name below the output folder; a number is added to it, and nothing is overwritten.",
                ),
            ],
            outputs=[
                io.String.Output("file", display_name="file", tooltip="The file's name, as Load embeddings takes it."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, embeddings: Embeddings, filename_prefix: str):
        with stage("Save embeddings", "save") as done:
            try:
                path = _next_path(filename_prefix)
                write_embeddings(path, embeddings)
            except OSError as error:
                raise type(error)(error.errno, f"Save embeddings: {error.strerror or error}") from error
        file = f"{path.relative_to(picture_folder('output')).as_posix()} [output]"
        return io.NodeOutput(file, ui={"text": [file], **done.ui()})


class DuetLoadEmbeddings(io.ComfyNode):
    @classmethod
    @described_once(lambda: _files())
    def define_schema(cls):
        return io.Schema(
            node_id="DuetLoadEmbeddings",
            display_name="Load embeddings",
            category="Duet",
            description="Loads what Save embeddings saved; no encoder is needed. Connect the output of the same kind.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=_files() or [_NO_FILE],
                    tooltip="A safetensors file in the input folder, or in the output folder where it says [output].",
                ),
            ],
            outputs=[
                sockets.PromptEmbeds.Output(
                    "prompt_embeds", display_name="prompt_embeds", tooltip="Where the file holds words."
                ),
                sockets.ImageFeatures.Output(
                    "image_features", display_name="image_features", tooltip="Where it holds a picture's features."
                ),
                sockets.Conditioning.Output(
                    "conditioning", display_name="conditioning", tooltip="Where it holds a condition, from Fuse."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        try:
            return file is None or bool(_find(file))
        except ValueError as error:
            return f"Load embeddings: {error}"

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None) -> str | float:
        if file is None:  # its name comes from another node, and is not known yet: run
            return float("nan")
        status = _find(file).stat()
        return f"{status.st_size} {status.st_mtime_ns}"

    @classmethod
    def execute(cls, file: str):
        with stage("Load embeddings", "load") as done:
            value = read_embeddings(_find(file))
        held = f"Load embeddings: {file} holds {_KINDS[type(value)]}: connect that output"
        outputs = [value if isinstance(value, kind) else ExecutionBlocker(held) for kind in _KINDS]
        return io.NodeOutput(*outputs, ui=done.ui(value.notices))


def _files() -> list[str]:
    """The files of both folders as names for ``_find``, those of the input folder first."""
    names = []
    for kind, mark in (("input", ""), ("output", " [output]")):
        root = picture_folder(kind)
        for folder, subfolders, files in os.walk(root):
            relative = Path(folder).relative_to(root)
            names += [(relative / name).as_posix() + mark for name in sorted(files) if name.endswith(_SUFFIX)]
            if len(relative.parts) == _DEEPEST or len(names) > _MOST_LISTED:
                subfolders.clear()
    return names[:_MOST_LISTED]


def _find(file: str) -> Path:
    """Raises ValueError for a name that leads out of its folder, and for one that is not there."""
    kind = "output" if file.endswith(" [output]") else "input"
    name = file.removesuffix(f" [{kind}]")
    root = picture_folder(kind)
    if not stays_inside(name) or not name.endswith(_SUFFIX):
        raise ValueError(f"expected the name of a {_SUFFIX} file inside the {kind} folder, got {file[:200]!r}")
    path = (root / name).resolve()
    if root not in path.parents:
        raise ValueError(f"{file[:200]!r} leads out of the {kind} folder, by a link: expected a file inside")
    if not path.is_file():
        raise ValueError(f"expected embeddings at {root / name}, found no such file")
    return path


def _next_path(prefix: str) -> Path:
    """prefix_00001_.safetensors, or the next number that is free, as the host names its pictures."""
    root = picture_folder("output")
    name = prefix.replace("\\", "/").strip()
    if not stays_inside(name) or _UNFIT.search(name) or name.endswith("/") or len(name) > 200:
        raise ValueError(f"expected filename_prefix to be a plain name below the output folder, got {prefix[:200]!r}")
    folder = (root / name).parent.resolve()
    if folder != root and root not in folder.parents:
        raise ValueError(
            f"filename_prefix {prefix!r} leads out of the output folder, by a link: expected a place inside"
        )
    folder.mkdir(parents=True, exist_ok=True)
    stem = Path(name).name
    taken = (re.fullmatch(rf"{re.escape(stem)}_(\d+)_{re.escape(_SUFFIX)}", other) for other in os.listdir(folder))
    number = 1 + max((int(match[1]) for match in taken if match), default=0)
    return folder / f"{stem}_{number:05}_{_SUFFIX}"
