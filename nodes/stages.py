"""What every stage node says about its run: how long, whether the model was at hand, and whose error it is."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..pipeline.residency import OutOfDeviceMemory
from .host import model_cache


@dataclass
class Stage:
    name: str
    milliseconds: float = 0.0
    model: str = "none"  # "warm": it was in the cache; "loaded": it was read from disk; "none": none was needed

    def ui(
        self, notices: Sequence[str] = (), parts: dict[str, float] | None = None, summary: str = ""
    ) -> dict[str, list]:
        """The node's message to the page. ``parts`` splits the time by stage name where the pipeline measured it.

        summary: a line of its own below the stages.
        """
        times = parts or {self.name: self.milliseconds}
        return {
            "duet_stage": [
                {"stage": name, "milliseconds": round(float(spent), 2), "model": self.model}
                for name, spent in times.items()
            ],
            "duet_summary": [summary] if summary else [],
            "duet_notices": [str(notice) for notice in notices],
        }


@contextmanager
def stage(node: str, name: str) -> Iterator[Stage]:
    """Time the block and put the node's name before what an error about the input or the numbers says."""
    running = Stage(name)
    hits, misses = model_cache().uses()
    start = time.perf_counter()
    try:
        yield running
    except ValueError as error:
        raise ValueError(f"{node}: {error}") from error
    except FloatingPointError as error:
        raise FloatingPointError(f"{node}: {error}") from error
    except torch.OutOfMemoryError as error:
        raise OutOfDeviceMemory(f"{node}: {error}") from error
    running.milliseconds = (time.perf_counter() - start) * 1000
    hits_after, misses_after = model_cache().uses()
    if misses_after > misses:
        running.model = "loaded"
    elif hits_after > hits:
        running.model = "warm"
