"""The host's own memory management, which counts our bytes as its own."""

# pyright: reportMissingImports=false, reportMissingModuleSource=false

import logging
import threading
from dataclasses import dataclass

import comfy.model_management as memory
import torch
from comfy.cli_args import args
from comfy.model_patcher import ModelPatcher
from torch import nn

from ...pipeline.residency import OutOfDeviceMemory, is_out_of_memory, module_bytes, out_of_memory

log = logging.getLogger(__name__)


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

    def loaded_size(self):
        # All or nothing, so it is our count; the host's takes tied weights twice, and 8-bit ones for floats.
        return self.model_size() if super().loaded_size() else 0

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

    def make_room(self) -> int:
        if memory.is_device_cpu(self.device):  # there is nowhere else to go
            return 0
        with self._lock:
            return self._evict_all()

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
