"""What lies in folders, found once and remembered for as long as none of them has changed."""

import os
import time
from collections.abc import Callable, Hashable
from typing import TypeVar

Found = TypeVar("Found")
Entries = Callable[[str], list[os.DirEntry[str]]]

_RESTED_NS = 3 * 10**9  # FAT tells times to two seconds; a folder that changed later might change again unseen
_NOT_THERE = -1


class Listings:
    """Remembers what was found by the times at which the folders it was found in were last changed.

    A folder's time changes when an entry is added, removed or renamed, and not when a file is written to. Safe to use
    from several threads.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[list[tuple[str, int]], object]] = {}

    def found(self, key: Hashable, look: Callable[[Entries], Found]) -> Found:
        """What ``look(entries)`` gives, which sees folders by ``entries(path)`` alone: what lies there, sorted by name.

        key: equal where the same folders are looked into for the same thing. A folder that is not there, or not ours to
        read, has no entries.
        """
        known = self._known.get(key)
        if known is not None and all(_changed(folder) == then for folder, then in known[0]):
            return known[1]  # type: ignore[return-value]  # what `look` gave for this key
        folders: list[tuple[str, int]] = []

        def entries(folder: str) -> list[os.DirEntry[str]]:
            folders.append((folder, _changed(folder)))  # before it is read, or a change meanwhile would go unseen
            try:
                with os.scandir(folder) as opened:
                    return sorted(opened, key=lambda entry: entry.name)
            except OSError:
                return []

        latest = time.time_ns() - _RESTED_NS
        found = look(entries)
        if all(then < latest for _, then in folders):
            self._known[key] = folders, found
        else:
            self._known.pop(key, None)
        return found


def _changed(folder: str) -> int:
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return _NOT_THERE
