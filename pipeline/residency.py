"""Where weights live. A residency owns device memory; the model cache owns the modules."""

import logging
import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import nn

log = logging.getLogger(__name__)

_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "not enough GPU video memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


class OutOfDeviceMemory(torch.OutOfMemoryError):
    """A module did not fit on its device even with everything else moved off; the message gives the sizes."""


class Resident(Protocol):
    """One module, wrapped once. Whoever holds this holds the weights: residencies keep no module alive on their own."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def bytes(self) -> int: ...

    @property
    def on_device(self) -> bool: ...


R = TypeVar("R", bound=Resident)


class Residency(Protocol[R]):
    """Brings modules to their load device, and moves others off to make room.

    Between ``acquire`` and ``release`` a module is pinned: this residency never moves it. Safe to call from any thread.
    """

    @property
    def device(self) -> torch.device: ...

    def adopt(self, module: nn.Module, name: str) -> R:
        """Wrap a module that lies on the CPU. ``name`` is for log lines and errors. Moves nothing."""
        ...

    def acquire(self, resident: R) -> None:
        """Pin, and load onto the device unless already there. Raises OutOfDeviceMemory, and is then not pinned."""
        ...

    def release(self, resident: R) -> None:
        """Undo one ``acquire``. The weights stay where they are until something else needs the room."""
        ...

    def make_room(self) -> int:
        """Move off the device all that is not pinned, other owners' too where it can; gives the bytes moved."""
        ...

    def forget(self, resident: R) -> None:
        """Let go of a resident that nobody has acquired; its device memory is free once the caller lets go too."""
        ...


def module_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers; one that is shared, as tied embeddings are, counts once."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({id(tensor): _tensor_bytes(tensor) for tensor in tensors}.values())


def _tensor_bytes(tensor: torch.Tensor) -> int:
    """A quantised one counts as what it is made of: of itself it says how large it would be in floats."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    return sum(_tensor_bytes(getattr(tensor, name)) for name in flatten()[0]) if flatten else tensor.nbytes


def place_of(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a module lies and in which precision, by its first weights.

    diffusers' own ``device`` and ``dtype`` look through all of them at each call, some milliseconds of every picture.
    """
    first = next(module.parameters())
    return first.device, first.dtype


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the machine itself, ran out of memory; not every backend has a class of its own for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def megabytes(count: float) -> str:
    return f"{count / 2**20:,.1f} MB"


@dataclass(eq=False)
class TorchResident:
    module: nn.Module
    name: str
    bytes: int
    on_device: bool
    pins: int = 0


class TorchResidency:
    """Keeps modules on ``device`` within ``budget_bytes``, moving the least recently used off first.

    A pinned module is never moved, so pins may exceed the budget; None is no budget. Where the device is the CPU itself
    there is nothing to bring or to move, and no tensor is ever copied.
    """

    def __init__(self, device: torch.device | str, budget_bytes: int | None = None) -> None:
        self.device = torch.device(device)
        self.budget_bytes = budget_bytes
        self._loaded: list[TorchResident] = []  # least recently used first
        # Held while weights move, so that two loads cannot both count on the same free room.
        self._lock = threading.RLock()

    def adopt(self, module: nn.Module, name: str) -> TorchResident:
        return TorchResident(module, name, module_bytes(module), on_device=self.device.type == "cpu")

    def acquire(self, resident: TorchResident) -> None:
        with self._lock:
            if self.device.type != "cpu":
                self._load(resident)
            resident.pins += 1

    def release(self, resident: TorchResident) -> None:
        with self._lock:
            resident.pins -= 1

    def make_room(self) -> int:
        with self._lock:
            return self._evict(math.inf, "out of memory")

    def forget(self, resident: TorchResident) -> None:
        with self._lock:
            if resident in self._loaded:
                self._loaded.remove(resident)

    def move(self, module: nn.Module, device: torch.device) -> None:
        """Move a module's weights; outside inference mode, or they could never be refined afterwards."""
        with torch.inference_mode(False):
            module.to(device)

    def _load(self, resident: TorchResident) -> None:
        if resident.on_device:
            self._loaded.remove(resident)
            self._loaded.append(resident)
            return
        if self.budget_bytes is not None:
            held = sum(other.bytes for other in self._loaded)
            self._evict(held + resident.bytes - self.budget_bytes, "over budget")
        retry = False
        try:
            self._bring(resident)
        except OutOfDeviceMemory:
            retry = True  # below: in here, the frames of the failed attempt still hold what it had brought
        if retry:
            self._bring(resident, moved=self._evict(math.inf, "out of memory"))
        resident.on_device = True
        self._loaded.append(resident)

    def _bring(self, resident: TorchResident, moved: int = 0) -> None:
        try:
            self.move(resident.module, self.device)
        except BaseException as error:
            self.move(resident.module, torch.device("cpu"))  # or it would lie half here, half there
            if is_out_of_memory(error):
                raise out_of_memory(resident.name, resident.bytes, self.device, moved, self._loaded) from error
            raise

    def _evict(self, wanted: float, reason: str) -> int:
        """Move unpinned modules off until ``wanted`` bytes are free or none is left; gives the bytes moved."""
        moved = 0
        for resident in [other for other in self._loaded if not other.pins]:
            if moved >= wanted:
                break
            self._loaded.remove(resident)
            resident.on_device = False
            self.move(resident.module, torch.device("cpu"))
            moved += resident.bytes
            log.info("moved %s (%d bytes) off %s: %s", resident.name, resident.bytes, self.device, reason)
        if moved and self.device.type == "cuda":
            torch.cuda.empty_cache()
        return moved


def out_of_memory(
    name: str, size: int, device: torch.device, moved: int, left: Iterable[Resident]
) -> OutOfDeviceMemory:
    """The error for a module that does not fit. size: what it needs; moved: what made way for it; left: in use."""
    in_use = sum(resident.bytes for resident in left)
    total = f" of {megabytes(torch.cuda.mem_get_info(device)[1])}" if device.type == "cuda" else ""
    return OutOfDeviceMemory(
        f"{name} needs {megabytes(size)}{total} on {device} and did not fit, even after {megabytes(moved)} of other "
        f"models made way; {megabytes(in_use)} are in use and stay. Choose a smaller model or dtype."
    )
