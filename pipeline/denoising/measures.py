"""What a run costs: time by stage, uses of the cache, bytes of models, the most memory. Measured, not reckoned."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..model_cache import ModelCache, ModelKey

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_LINES = re.compile(rb"^(VmRSS|VmHWM):\s*(\d+) kB", re.MULTILINE)
_BEGUN_WITHIN = 2**24
"""Bytes by which a maximum begun anew may lie above what is resident: other threads go on meanwhile."""


class Meter:
    """Of one run, from when it is made. milliseconds: by stage, in the order they ran; a stage run twice adds up."""

    def __init__(self, cache: ModelCache) -> None:
        self.milliseconds: dict[str, float] = {}
        self._cache = cache
        self._before = cache.uses()
        self._used: dict[ModelKey, int] = {}
        self._memory = _memory_before(cache.residency.device)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.milliseconds[name] = self.milliseconds.get(name, 0.0) + 1000 * (time.perf_counter() - started)
        # Now, since a model may be dropped before the run ends.
        self._used |= self._cache.used_since(sum(self._before))

    def uses(self) -> tuple[int, int]:
        """Models that were at hand, and that were read; of every run, should several be under way."""
        hits, misses = self._cache.uses()
        return hits - self._before[0], misses - self._before[1]

    def model_bytes(self) -> int:
        return sum(self._used.values())

    def peak_bytes(self) -> int | None:
        """On CUDA, the most that was allocated; on Linux, the most the process grew by; None where neither is told."""
        device = self._cache.residency.device
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        if device.type != "cpu" or self._memory is None:
            return None
        peak = _resident().get("VmHWM")
        return None if peak is None else max(0, peak - self._memory)


def _memory_before(device: torch.device) -> int | None:
    """Starts a new maximum; gives the bytes resident now, where the maximum of what is resident can be told."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return None
    try:
        # The kernel keeps one maximum for the whole life of a process; "5" begins it anew, and changes nothing else.
        _RESET.write_text("5", encoding="ascii")
    except OSError:
        return None
    resident = _resident()
    before, peak = resident.get("VmRSS"), resident.get("VmHWM")
    # A kernel that took the word and kept the old maximum would have us report the largest run there ever was.
    return None if before is None or peak is None or peak - before > _BEGUN_WITHIN else before


def _resident() -> dict[str, int]:
    """Bytes by the kernel's own names, VmRSS now and VmHWM at most; either is left out where it does not tell."""
    try:
        told = _STATUS.read_bytes()
    except OSError:
        return {}
    return {name.decode("ascii"): 1024 * int(count) for name, count in _LINES.findall(told)}
