"""A device that needs no hardware: it keeps count of what lies on it, and runs out."""

import torch
from torch import nn

from pipeline.residency import TorchResidency, module_bytes


class FakeDevice(TorchResidency):
    """Weights stay where they are; capacity: bytes; moves: (module, device type), in order."""

    def __init__(self, capacity: int | None = None, budget_bytes: int | None = None) -> None:
        super().__init__("xpu", budget_bytes)
        self.capacity = capacity
        self.moves: list[tuple[nn.Module, str]] = []
        self.interrupt_next_move: BaseException | None = None
        self._here: dict[int, int] = {}

    @property
    def used(self) -> int:
        return sum(self._here.values())

    def move(self, module: nn.Module, device: torch.device) -> None:
        self.moves.append((module, device.type))
        if device.type == "cpu":
            self._here.pop(id(module), None)
            return
        self._here[id(module)] = module_bytes(module)  # a real device, too, holds part of a module that did not fit
        if self.interrupt_next_move is not None:
            interrupt, self.interrupt_next_move = self.interrupt_next_move, None
            raise interrupt
        if self.capacity is not None and self.used > self.capacity:
            raise torch.OutOfMemoryError(f"tried to allocate {module_bytes(module)} bytes")

    def forget(self, resident) -> None:
        super().forget(resident)
        self._here.pop(id(resident.module), None)
