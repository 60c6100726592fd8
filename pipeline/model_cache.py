"""The one cache that every stage draws its models from: identity, pins, order of use, and a budget of bytes."""

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from .eviction import choose_victims
from .residency import Residency, Resident, is_out_of_memory, out_of_memory

log = logging.getLogger(__name__)

Module = TypeVar("Module", bound=nn.Module)

_REMEMBERED_USES = 512  # some hundred runs of a workflow, from which its habits are known
_REMEMBERED_EVICTIONS = 20


@dataclass(frozen=True, eq=False)
class ModelKey:
    """Which weights, and as what. Equal keys are the same model; a file replaced on disk gives another key.

    path: resolved, so that two names of one file agree; size: bytes on disk; mtime_ns: of its newest file. content: a
    digest of the weights and the configuration, by which the same model under two paths is one; empty where only the
    file is known. class_name: what the weights are read as; one file may serve two families in two ways.
    """

    path: Path
    size: int
    mtime_ns: int
    component: str
    dtype: torch.dtype
    content: str = ""
    class_name: str = ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelKey) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[object, ...]:
        if self.content:
            return self.content, self.dtype
        return self.path, self.size, self.mtime_ns, self.component, self.dtype

    def replaces(self, other: "ModelKey") -> bool:
        """Whether ``other`` names the same file, read alike, as it was before it was replaced."""
        if (self.path, self.component, self.class_name) != (other.path, other.component, other.class_name):
            return False
        if self.content and other.content:
            return self.content != other.content
        return (self.size, self.mtime_ns) != (other.size, other.mtime_ns)

    def __str__(self) -> str:
        return f"{self.component} of {self.path} as {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class CacheEntryStats:
    """One model. bytes: of weights, shared ones once; pins: uses under way; on_device: on the load device now.

    idle: uses of any model since its own last one began.
    """

    key: ModelKey
    bytes: int
    pins: int
    hits: int
    on_device: bool
    idle: int = 0


@dataclass(frozen=True)
class Eviction:
    """A model that was let go, and why. bytes: what it held."""

    key: ModelKey
    bytes: int
    reason: str


@dataclass(frozen=True)
class CacheStats:
    """entries: least recently used first; evictions: models dropped for any reason, since the cache was made.

    recent_evictions: the last of them, newest last; budget_bytes: what may be held once nothing is in use.
    """

    entries: tuple[CacheEntryStats, ...]
    bytes_held: int
    hits: int
    misses: int
    evictions: int
    budget_bytes: int = 0
    recent_evictions: tuple[Eviction, ...] = ()


@dataclass(eq=False)
class _Entry:
    key: ModelKey
    resident: Resident
    pins: int = 1
    hits: int = 0
    last_use: int = 0
    replaced: bool = False


class ModelCache:
    """Holds modules up to ``budget_bytes``; makes room as ``choose_victims`` says, never with one that is in use.

    Safe to call from any thread. There is one lock, and it is held only while the table is read or changed: never
    while a module is built, moved or destroyed, and never while a residency's lock is taken. So the two locks have no
    order to get wrong, and ``stats`` answers while a large model loads.
    """

    def __init__(self, residency: Residency[Any], budget_bytes: int) -> None:
        self.residency = residency
        self.budget_bytes = budget_bytes
        self._entries: OrderedDict[ModelKey, _Entry] = OrderedDict()  # least recently used first
        self._building: set[ModelKey] = set()
        self._uses: deque[ModelKey] = deque(maxlen=_REMEMBERED_USES)
        self._hits = self._misses = self._evictions = 0
        self._recent_evictions: deque[Eviction] = deque(maxlen=_REMEMBERED_EVICTIONS)
        self._table = threading.Condition()

    @contextmanager
    def use(self, key: ModelKey, build: Callable[[], Module]) -> Iterator[Module]:
        """The only way to touch a model: on its load device, and pinned, while in the block.

        ``build`` is called on a miss, once however many threads ask; whatever it raises leaves nothing behind. Raises
        OutOfDeviceMemory if the machine, or then the device, cannot hold the model even with all others dropped.
        """
        entry = self._pin(key, build)
        try:
            self.residency.acquire(entry.resident)
            try:
                yield entry.resident.module  # type: ignore[misc]  # what `build` gave for this key
            finally:
                self.residency.release(entry.resident)
        finally:
            self._unpin(entry)

    def unload(self) -> int:
        """Drop every model that is not in use; gives the bytes let go."""
        return self._drop_unpinned("unload was asked for")

    def stats(self) -> CacheStats:
        """What is held now, without waiting for anything that is being built or moved."""
        with self._table:
            entries = tuple(
                CacheEntryStats(
                    entry.key,
                    entry.resident.bytes,
                    entry.pins,
                    entry.hits,
                    entry.resident.on_device,
                    idle=self._hits + self._misses - entry.last_use,
                )
                for entry in self._entries.values()
            )
            return CacheStats(
                entries,
                self._bytes_held(),
                self._hits,
                self._misses,
                self._evictions,
                self.budget_bytes,
                tuple(self._recent_evictions),
            )

    def uses(self) -> tuple[int, int]:
        """Hits and misses since the cache was made: of ``stats``, what is asked for around every block."""
        with self._table:
            return self._hits, self._misses

    def used_since(self, use: int) -> dict[ModelKey, int]:
        """The bytes of each model that is held and was used after the ``use``-th use, hits and misses together."""
        with self._table:
            held = self._entries.values()
            return {entry.key: entry.resident.bytes for entry in held if entry.last_use > use}

    def _pin(self, key: ModelKey, build: Callable[[], nn.Module]) -> _Entry:
        with self._table:
            self._table.wait_for(lambda: key not in self._building)
            entry = self._entries.get(key)
            self._uses.append(key)
            if entry is not None:
                entry.pins += 1
                entry.hits += 1
                self._hits += 1
                entry.last_use = self._hits + self._misses
                self._entries.move_to_end(key)
                return entry
            self._misses += 1
            self._building.add(key)
        try:
            self._drop_replaced(key)
            # The file's size is a fair guess of what is coming, so room is made before, not after, both are in memory.
            self._trim(key.size)
            entry = _Entry(key, self.residency.adopt(self._built(key, build), str(key)))
            with self._table:
                entry.last_use = self._hits + self._misses
                self._entries[key] = entry
        finally:
            with self._table:
                self._building.discard(key)
                self._table.notify_all()
        self._trim()
        return entry

    def _built(self, key: ModelKey, build: Callable[[], nn.Module]) -> nn.Module:
        try:
            return build()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # Out here, where the frames of the failed attempt are gone, and with them what it had read.
        freed = self._drop_unpinned("out of memory")
        try:
            return build()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            with self._table:
                left = [entry.resident for entry in self._entries.values()]
            raise out_of_memory(str(key), key.size, torch.device("cpu"), freed, left) from error

    def _unpin(self, entry: _Entry) -> None:
        with self._table:
            entry.pins -= 1
            dropped = self._take_out([entry]) if entry.replaced and not entry.pins else []
        self._let_go(dropped, "its file was replaced")
        self._trim()

    def _drop_replaced(self, key: ModelKey) -> None:
        with self._table:
            replaced = [entry for entry in self._entries.values() if key.replaces(entry.key)]
            for entry in replaced:
                entry.replaced = True  # one that is in use goes when it is unpinned
            dropped = self._take_out([entry for entry in replaced if not entry.pins])
        self._let_go(dropped, "its file was replaced")

    def _drop_unpinned(self, reason: str) -> int:
        with self._table:
            dropped = self._take_out([entry for entry in self._entries.values() if not entry.pins])
        return self._let_go(dropped, reason)

    def _trim(self, coming: int = 0) -> None:
        with self._table:
            excess = self._bytes_held() + coming - self.budget_bytes
            idle = {key: entry.resident.bytes for key, entry in self._entries.items() if not entry.pins}
            victims = choose_victims(idle, excess, tuple(self._uses)) if excess > 0 and idle else []
            dropped = self._take_out([self._entries[key] for key in victims])
        self._let_go(dropped, f"over the budget of {self.budget_bytes} bytes")

    def _bytes_held(self) -> int:
        return sum(entry.resident.bytes for entry in self._entries.values())

    def _take_out(self, entries: list[_Entry]) -> list[_Entry]:
        for entry in entries:
            del self._entries[entry.key]
        self._evictions += len(entries)
        return entries

    def _let_go(self, entries: list[_Entry], reason: str) -> int:
        """Outside the lock: the last reference to a module dies here, and with it gigabytes of weights."""
        freed = 0
        while entries:
            entry = entries.pop()
            self.residency.forget(entry.resident)
            freed += entry.resident.bytes
            with self._table:
                self._recent_evictions.append(Eviction(entry.key, entry.resident.bytes, reason))
            log.info("dropped %s (%d bytes): %s", entry.key, entry.resident.bytes, reason)
        return freed
