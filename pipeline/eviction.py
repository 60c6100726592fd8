"""Which models make way: the ones whose reload is expected to cost least for the bytes that it frees."""

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

K = TypeVar("K", bound=Hashable)

# How much recency counts against habit. Chosen on simulated sessions, see benchmarks/cache_sessions.py.
_RECENCY = 2.0


def choose_victims(held: Mapping[K, int], wanted: int, uses: Sequence[K]) -> list[K]:
    """Some of ``held``, a size in bytes for each, that free ``wanted`` bytes together, or all if they do not suffice.

    uses: what was used, in order, the last being what needs the room. Keeping a model is worth its bytes times the
    rate at which it is expected back: 2 / age + 1 / distance, in uses. age: since its own last use, as least recently
    used has it. distance: how soon it came after the previous use of what needs the room, since artists repeat their
    workflows; this is Belady's rule (IBM Systems Journal 5, 1966) on the past in place of the future. Those of the
    least worth per byte go first, but none that turns out not to be needed, and one alone if that is cheaper.
    """
    age = {key: len(uses) - place for place, key in enumerate(uses)}
    distance: dict[K, int] = {}
    before = next((place for place in range(len(uses) - 2, -1, -1) if uses[place] == uses[-1]), len(uses))
    for place in range(before + 1, len(uses)):
        distance.setdefault(uses[place], place - before)
    rate = {
        key: _RECENCY / age.get(key, len(uses) + 1) + (1 / distance[key] if key in distance else 0.0) for key in held
    }
    chosen: list[K] = []
    freed = 0
    for key in sorted(held, key=rate.__getitem__):
        if freed >= wanted:
            break
        chosen.append(key)
        freed += held[key]
    for key in reversed(chosen.copy()):
        if freed - held[key] >= wanted:
            chosen.remove(key)
            freed -= held[key]
    worth = {key: held[key] * rate[key] for key in held}
    alone = [key for key in held if held[key] >= wanted]
    cheapest = min(alone, key=worth.__getitem__, default=None)
    if cheapest is not None and worth[cheapest] < sum(worth[key] for key in chosen):
        return [cheapest]
    return chosen
