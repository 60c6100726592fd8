"""Which models make way: the ones whose reload is expected to cost least for the bytes that it frees."""

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

K = TypeVar("K", bound=Hashable)

# How much recency counts against habit. Chosen on simulated sessions, see benchmarks/cache_sessions.py.
_RECENCY = 2.0
_CONTEXT = 6  # uses; from 4 to 32 they do as well there
_STEPS = 256  # in which what is wanted is counted: the choice is exact up to a 256th of it


def choose_victims(held: Mapping[K, int], wanted: int, uses: Sequence[K]) -> list[K]:
    """Some of ``held``, a size in bytes for each, that free ``wanted`` bytes together, or all if they do not suffice.

    uses: what was used, in order, the last being what needs the room. Keeping a model is worth its bytes times the
    rate at which it is expected back: 2 / age + 1 / distance, in uses. age: since its own last use, as least recently
    used has it. distance: how soon it came after that earlier use of what needs the room before which most was as it
    is now, since artists repeat their workflows; this is Belady's rule (IBM Systems Journal 5, 1966) on the past in
    place of the future. Those go which are worth least together, found by dynamic programming over what they free, as
    for a knapsack.
    """
    if wanted <= 0:
        return []
    worth = {key: size * rate for (key, size), rate in zip(held.items(), _rates(held, uses), strict=True)}
    step = -(-wanted // _STEPS)
    enough = -(-wanted // step)
    # By what is freed, in steps: the least worth that is lost for it, and by whom.
    least: dict[int, tuple[float, tuple[K, ...]]] = {0: (0.0, ())}
    for key, size in held.items():
        for freed, (lost, gone) in list(least.items()):
            more, cost = min(enough, freed + size // step), lost + worth[key]
            if more > freed and (more not in least or cost < least[more][0]):
                least[more] = cost, (*gone, key)
    return list(least[enough][1]) if enough in least else list(held)


def _rates(held: Mapping[K, int], uses: Sequence[K]) -> list[float]:
    """How often each is expected to be used, in uses of any model."""
    age = {key: len(uses) - place for place, key in enumerate(uses)}
    distance: dict[K, int] = {}
    before = max(
        (place for place in range(len(uses) - 1) if uses[place] == uses[-1]),
        key=lambda place: (_alike(uses, place), place),
        default=len(uses),
    )
    for place in range(before + 1, len(uses)):
        distance.setdefault(uses[place], place - before)
    return [_RECENCY / age.get(key, len(uses) + 1) + (1 / distance[key] if key in distance else 0.0) for key in held]


def _alike(uses: Sequence[K], place: int) -> int:
    """How many uses that end at ``place`` are those that end now, up to ``_CONTEXT``."""
    most = min(_CONTEXT, place + 1)
    return next((count for count in range(most) if uses[place - count] != uses[-1 - count]), most)
