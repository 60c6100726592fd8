"""All of the host that Duet touches: memory, progress, model folders, nodes. No other module imports the host."""

# pyright: reportMissingImports=false, reportMissingModuleSource=false
# The host is no package that a checker could find: it is the program that loads us.

import functools
import inspect
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import comfy.model_management as memory
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import args
from comfy.clip_vision import Output as ClipVisionOutput
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import ComfyExtension, ui
from comfy_api.latest import io as host_io
from comfy_execution.graph_utils import ExecutionBlocker
from PIL import Image
from server import PromptServer
from torch import nn

from ..pipeline.content import Digests
from ..pipeline.embedding_store import EmbeddingStore
from ..pipeline.model_cache import ModelCache
from ..pipeline.residency import OutOfDeviceMemory, is_out_of_memory, module_bytes, out_of_memory

log = logging.getLogger(__name__)

__all__ = [
    "ComfyExtension",
    "ComfyResidency",
    "ExecutionBlocker",
    "clip_vision_output",
    "diffusers_folder",
    "diffusers_names",
    "embedding_store",
    "installed_nodes",
    "io",
    "model_cache",
    "model_folders",
    "picture_folder",
    "steps",
    "text_progress",
    "ui",
    "weights_digests",
]


# --- memory ---


class DuetModel(nn.Module):
    """A plain parent for a module: the patcher sets ``device``, which transformers and diffusers make read-only."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


_ASKED_BY_HOST = "the host asked for it, for a model of its own or by a button"


class WholePatcher(ModelPatcher):
    """Loads all of a model or none of it.

    The host loads layers one by one when memory is short, and counts on its own layer classes to fetch the rest;
    those of transformers and diffusers would be stranded. Weights move outside inference mode, or none could be
    refined later. Whoever moves them off, it is logged; name and why are for that line.
    """

    name = "a model"

    @staticmethod
    def why() -> str:
        return _ASKED_BY_HOST

    def partially_load(self, device_to, extra_memory=0, **options):
        with torch.inference_mode(False):
            return super().partially_load(device_to, extra_memory=1e32, **options)

    def partially_unload(self, device_to, memory_to_free=0, **options):
        return 0  # nothing in part: the host then detaches the whole

    def detach(self, unpatch_all=True):
        leaving = self.loaded_size() if unpatch_all and self.load_device != self.offload_device else 0
        model = super().detach(unpatch_all)
        if leaving:
            log.info("moved %s (%d bytes) off %s: %s", self.name, leaving, self.load_device, self.why())
        return model

    def unpatch_model(self, *arguments, **options):
        with torch.inference_mode(False):
            return super().unpatch_model(*arguments, **options)


@dataclass(eq=False)
class ComfyResident:
    """Owns the patcher: the host itself keeps only a weak reference to it, and forgets it when this dies."""

    module: nn.Module
    name: str
    bytes: int
    patcher: WholePatcher

    @property
    def on_device(self) -> bool:
        return self.patcher.loaded_size() > 0


class ComfyResidency:
    """The host's own memory management as a residency: it counts our bytes, and may evict us for its models.

    Outside ``acquire`` .. ``release`` the host is free to move any of ours off; so every use asks it to load again.
    """

    def __init__(self) -> None:
        self.device: torch.device = memory.get_torch_device()
        # Not unet_offload_device(): with --highvram that is the GPU, and moving a model off would free nothing.
        self._offload_device = self.device if args.gpu_only else torch.device("cpu")
        self._pinned: list[ComfyResident] = []
        self._why = _ASKED_BY_HOST  # a model of ours is moved off at this moment
        self._lock = threading.RLock()  # the host's list of loaded models has none

    def adopt(self, module: nn.Module, name: str) -> ComfyResident:
        size = module_bytes(module)  # the host's own count would take tied weights twice
        patcher = WholePatcher(DuetModel(module), self.device, self._offload_device, size=size)
        patcher.name, patcher.why = name, lambda: self._why
        return ComfyResident(module, name, size, patcher)

    def acquire(self, resident: ComfyResident) -> None:
        with self._lock:
            retry = False
            try:
                self._load(resident)
            except OutOfDeviceMemory:
                retry = True  # below: in here, the frames of the failed attempt still hold what it had brought
            if retry:
                self._load(resident, moved=self._evict_all())
            self._pinned.append(resident)

    def release(self, resident: ComfyResident) -> None:
        with self._lock:
            self._pinned.remove(resident)

    def forget(self, resident: ComfyResident) -> None:
        """Nothing to do: the patcher dies with the resident, and the host strikes it off its list."""

    def _load(self, resident: ComfyResident, moved: int = 0) -> None:
        # The pinned ones are named too: the host evicts anything that is not part of the request.
        pinned = [other.patcher for other in self._pinned]
        self._why = f"{resident.name} needs {resident.bytes} bytes there"
        try:
            memory.load_models_gpu([resident.patcher, *pinned])
        except BaseException as error:
            if pinned:
                memory.load_models_gpu(pinned)  # the host had struck them off its list before it failed
            if is_out_of_memory(error):
                raise out_of_memory(resident.name, resident.bytes, self.device, moved, self._pinned) from error
            raise
        finally:
            self._why = _ASKED_BY_HOST

    def _evict_all(self) -> int:
        pinned = {id(resident.patcher) for resident in self._pinned}
        keep = [loaded for loaded in memory.current_loaded_models if id(loaded.model) in pinned]
        self._why = "out of memory"
        try:
            evicted = memory.free_memory(1e30, self.device, keep)
        finally:
            self._why = _ASKED_BY_HOST
        memory.soft_empty_cache()
        moved = sum(loaded.model_memory() for loaded in evicted if loaded.model is not None)
        log.info("moved %d models (%d bytes) off %s: out of memory", len(evicted), moved, self.device)
        return moved


_making_cache = threading.Lock()


def model_cache() -> ModelCache:
    """The one cache of this host, made at its first use. It may hold half of the machine's memory."""
    with _making_cache:
        return _make_cache()


@functools.cache
def _make_cache() -> ModelCache:
    cache = ModelCache(ComfyResidency(), budget_bytes=memory.get_total_memory(torch.device("cpu")) // 2)
    _empty_when_freed(cache)
    return cache


_EMBEDDINGS_BYTES = 2**30  # some thousand prompts, or some hundred of the largest encoders


@functools.cache
def embedding_store() -> EmbeddingStore:
    """The one store of this host, in a folder of its user directory that the host serves to nobody."""
    return EmbeddingStore(_own_folder() / "embeddings", _EMBEDDINGS_BYTES)


@functools.cache
def weights_digests() -> Digests:
    """The contents of all weights that were read in this host, remembered in the same folder."""
    return Digests(_own_folder() / "digests")


def _own_folder() -> Path:
    try:
        return Path(folder_paths.get_system_user_directory("duet"))
    except AttributeError:  # an older host
        return Path(folder_paths.get_user_directory()) / "__duet"


def _empty_when_freed(cache: ModelCache) -> None:
    """Let 'Free model and node cache' empty our cache too.

    The host drops what its node outputs own, and tells nobody. It takes the wish from the queue's flags, between
    prompts and on the one thread that may touch its list of models: so we look on as it does. 'Unload models' alone
    needs nothing from us, since the host moves our weights off as it does its own.
    """
    queue = getattr(getattr(PromptServer, "instance", None), "prompt_queue", None)
    if queue is None:  # imported without a running server
        return
    take_flags = queue.get_flags

    @functools.wraps(take_flags)
    def get_flags(*arguments, **options):
        flags = take_flags(*arguments, **options)
        if flags.get("free_memory"):
            cache.unload()
        return flags

    queue.get_flags = get_flags


# --- progress ---


_TEXT_EVERY_S = 0.1


def steps(total: int) -> Callable[[int, Image.Image | None], None]:
    """A callback for ``generate``: ``on_step(done, preview)`` moves this node's progress bar and shows the preview.

    Raises the host's InterruptProcessingException as soon as the user has cancelled.
    """
    bar = comfy.utils.ProgressBar(total)

    def on_step(done: int, preview: Image.Image | None = None) -> None:
        memory.throw_exception_if_processing_interrupted()
        # JPEG knows no alpha, and an error while the server encodes a preview ends the server.
        shown = None if preview is None else ("JPEG", preview.convert("RGB"), min(args.preview_size, max(preview.size)))
        bar.update_absolute(done, total, shown)

    return on_step


def text_progress(total: int, node_id: str) -> Callable[[int, str], None]:
    """A callback for ``direct_prompt``: ``on_text(tokens, text)`` shows on the node what is written so far.

    Raises the host's InterruptProcessingException as soon as the user has cancelled.
    """
    bar = comfy.utils.ProgressBar(total)
    told = 0.0

    def on_text(tokens: int, text: str) -> None:
        nonlocal told
        memory.throw_exception_if_processing_interrupted()
        bar.update_absolute(min(tokens, total), total)
        if time.monotonic() - told > _TEXT_EVERY_S:
            PromptServer.instance.send_progress_text(text, node_id)
            told = time.monotonic()

    return on_text


# --- the host's own values ---


def clip_vision_output(tokens: torch.Tensor, pooled: torch.Tensor) -> ClipVisionOutput:
    """What CLIP Vision Encode gives. tokens: (B, N, D), for every layer that a node may ask for; pooled: (B, P)."""
    output = ClipVisionOutput()
    for layer in ("last_hidden_state", "penultimate_hidden_states"):
        output[layer] = tokens
    output["image_embeds"] = pooled
    output["mm_projected"] = None
    return output


# --- model folders ---

_DEVICE_NAMES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}
_LONGEST_NAME = 200
_DEEPEST = 3  # folders below models/diffusers in which a model is looked for


def diffusers_names() -> list[str]:
    """The models in the host's models/diffusers folders, as names for ``diffusers_folder``."""
    names = set()
    for root in folder_paths.get_folder_paths("diffusers"):
        for folder, subfolders, files in os.walk(root):
            relative = Path(folder).relative_to(root)
            if "model_index.json" in files and relative.parts:
                names.add(relative.as_posix())
                subfolders.clear()
            if len(relative.parts) == _DEEPEST:
                subfolders.clear()
    return sorted(names)


def diffusers_folder(name: str) -> Path:
    """The folder of a model named in a prompt, resolved, and certain to lie inside one of the host's models/diffusers.

    Raises ValueError for a name that leads anywhere else, and for one that is not there.
    """
    _check_name(name)
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


def _check_name(name: str) -> None:
    parts = PureWindowsPath(name).parts  # splits at both kinds of slash
    if not parts or len(name) > _LONGEST_NAME or any(ord(character) < 32 for character in name):
        raise ValueError(f"model name {name[:_LONGEST_NAME]!r}: expected the name of a folder in models/diffusers")
    if PureWindowsPath(name).anchor or PurePosixPath(name).is_absolute() or ".." in parts:
        raise ValueError(f"model name {name!r} leads out of models/diffusers: expected the name of a folder inside")
    for part in parts:
        if part.split(".")[0].strip().lower() in _DEVICE_NAMES or part != part.rstrip(". ") or ":" in part:
            raise ValueError(f"model name {name!r}: {part!r} cannot name a folder on every system")


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


# --- nodes ---


def installed_nodes() -> set[str]:
    """The types that this host can run."""
    return set(sys.modules["nodes"].NODE_CLASS_MAPPINGS)  # the host's own module of that name, not ours


def _known(call: Callable) -> Callable:
    """The same call, less the keyword arguments that this host is too old to know; they only add comfort."""
    parameters = inspect.signature(call).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return call

    @functools.wraps(call, updated=())
    def filtered(*arguments, **options):
        return call(*arguments, **{name: value for name, value in options.items() if name in parameters})

    return filtered


def _of_several(call: Callable) -> Callable:
    """An input of several types, given as the host's own types or as ours around them."""

    def unwrapped(name: str, types: list[Any], **options: Any) -> Any:
        return _known(call)(name, types=[getattr(kind, "_wrapped", kind) for kind in types], **options)

    return unwrapped


class _Io:
    """The host's ``io``, whose Schema and Inputs accept arguments of newer hosts: a TypeError drops the whole pack."""

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._wrapped, name)
        if name == "Input" and self._wrapped is host_io.MultiType:
            return _of_several(value)
        if name == "Schema" or name in ("Input", "Output"):
            return _known(value)
        if name == "Custom":
            return lambda io_type: _Io(value(io_type))
        return _Io(value) if hasattr(value, "Input") else value


if TYPE_CHECKING:
    io = host_io
else:
    io = _Io(host_io)
