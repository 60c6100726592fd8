"""A node describes itself once, and anew when a list that it offers has changed: the host asks several times a run."""

import functools
from collections.abc import Callable, Sequence
from typing import Any


def described_once(*lists: Callable[[], Sequence[str]]) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """For ``define_schema``, below ``classmethod``. lists: gives each list of names that the schema is made of.

    The host finishes a schema in place, to the same end each time, and changes nothing else of it.
    """

    def decorated(define: Callable[[Any], Any]) -> Callable[[Any], Any]:
        known: tuple[list[Sequence[str]], Any] | None = None

        @functools.wraps(define)
        def define_schema(cls: Any) -> Any:
            nonlocal known
            offered = [names() for names in lists]
            held = known
            if held is None or held[0] != offered:
                known = held = offered, define(cls)
            return held[1]

        return define_schema

    return decorated
