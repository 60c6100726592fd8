"""Embeddings that were made lately, in memory: what lies before the disk."""

import threading
from collections import OrderedDict

from .embedding_files import Embeddings, bytes_of, copied


class RecentEmbeddings:
    """Up to ``budget_bytes`` of them by their digests; the least recently used make way. For any number of threads.

    It takes copies, so whoever made one may go on with it. What it gives is shared by all who ask, as a host shares
    what its nodes gave: values are not changed in place. A copy would take as long as all else about a hit.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._held: OrderedDict[str, Embeddings] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def bytes_held(self) -> int:
        return self._bytes

    def get(self, digest: str) -> Embeddings | None:
        with self._lock:
            if digest not in self._held:
                return None
            self._held.move_to_end(digest)
            return self._held[digest]

    def put(self, digest: str, value: Embeddings) -> None:
        """One that is larger than the whole budget is not held."""
        if bytes_of(value) > self.budget_bytes:
            return
        value = copied(value)
        with self._lock:
            self._remove(digest)
            self._held[digest] = value
            self._bytes += bytes_of(value)
            while self._bytes > self.budget_bytes:
                self._remove(next(iter(self._held)))

    def clear(self) -> int:
        """Gives the bytes freed."""
        with self._lock:
            freed, self._bytes = self._bytes, 0
            self._held.clear()
        return freed

    def _remove(self, digest: str) -> None:
        removed = self._held.pop(digest, None)
        self._bytes -= 0 if removed is None else bytes_of(removed)
