"""Weighted phrases of a prompt: ``(word:1.2)``, ``(word)``, ``[word]``, and brackets that are meant as such."""

import re
from dataclasses import dataclass

STEP = 1.1  # ( ) multiplies by it, [ ] divides
MOST_NESTED = 32  # open brackets at one place; beyond it a prompt is no prompt
LARGEST_WEIGHT = 10.0

_PARTNERS = {")": "(", "]": "["}
_WEIGHT = re.compile(r"\s*:\s*([-+]?(?:\d+(?:\.\d*)?|\.\d+))\s*$")
_LONGEST_WEIGHT = 40  # characters, or the search for a weight at the end of a long phrase would read all of it


@dataclass(frozen=True)
class Phrase:
    text: str
    weight: float


@dataclass(frozen=True)
class WeightedPrompt:
    """phrases: in the prompt's order, neighbours of one weight joined; notices: sentences for the user.

    explicit: whether some phrase names its weight, as ``(word:1.2)`` does; plain brackets may be mere punctuation.
    """

    phrases: tuple[Phrase, ...]
    explicit: bool
    notices: tuple[str, ...]

    @property
    def text(self) -> str:
        return "".join(phrase.text for phrase in self.phrases)

    @property
    def is_weighted(self) -> bool:
        return any(phrase.weight != 1 for phrase in self.phrases)


def read_weights(prompt: str) -> WeightedPrompt:
    """``(word:1.2)`` counts 1.2 times, ``(word)`` 1.1 times, ``[word]`` 1/1.1 times, and nested ones multiply.

    A backslash before a bracket, or before another backslash, makes it plain text. A bracket without a partner is plain
    text too, as in ":)", and a notice says where it is. Raises ValueError, naming the place, where more than 32
    brackets are open at once or a weight is beyond -10 to 10. Time grows with the prompt's length alone.
    """
    pairs, lonely = _pairs(prompt)
    phrases: list[Phrase] = []
    starts: list[int] = []  # of each open bracket: how many phrases came before it
    explicit, characters = False, list[str]()

    def end_phrase() -> str:
        text = "".join(characters)
        characters.clear()
        if text:
            phrases.append(Phrase(text, 1.0))
        return text

    place = 0
    while place < len(prompt):
        character = prompt[place]
        if character == "\\" and prompt[place + 1 : place + 2] in {"(", ")", "[", "]", "\\"}:
            characters.append(prompt[place + 1])
            place += 2
            continue
        if place not in pairs:
            characters.append(character)
        elif character in "([":
            end_phrase()
            starts.append(len(phrases))
        else:
            weight = STEP if character == ")" else 1 / STEP
            tail = "".join(characters[-_LONGEST_WEIGHT:])
            if character == ")" and (found := _WEIGHT.search(tail)):
                weight, explicit = _checked(float(found[1]), place), True
                del characters[len(characters) - (len(tail) - found.start()) :]
            end_phrase()
            start = starts.pop()
            phrases[start:] = [Phrase(phrase.text, phrase.weight * weight) for phrase in phrases[start:]]
        place += 1
    end_phrase()
    return WeightedPrompt(_joined(phrases), explicit, _told(prompt, lonely))


def _pairs(prompt: str) -> tuple[set[int], list[int]]:
    """The places of brackets that have a partner, and of those that have none."""
    waiting: list[int] = []
    pairs: set[int] = set()
    lonely: list[int] = []
    escaped = False
    for place, character in enumerate(prompt):
        if escaped or character == "\\":
            escaped = not escaped
            continue
        if character in "([":
            waiting.append(place)
            if len(waiting) > MOST_NESTED:
                raise ValueError(
                    f"expected at most {MOST_NESTED} brackets open at once, got more at character {place + 1} of the "
                    f"prompt; write \\{character} for a bracket that is no weight"
                )
        elif character in ")]":
            if waiting and prompt[waiting[-1]] == _PARTNERS[character]:
                pairs |= {waiting.pop(), place}
            else:
                lonely.append(place)
    return pairs, sorted(lonely + waiting)


def _checked(weight: float, place: int) -> float:
    if abs(weight) > LARGEST_WEIGHT:
        raise ValueError(
            f"expected a weight of -{LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g}, got {weight:g} at character {place + 1} "
            "of the prompt"
        )
    return weight


def _joined(phrases: list[Phrase]) -> tuple[Phrase, ...]:
    joined: list[tuple[list[str], float]] = []
    for phrase in phrases:
        if joined and joined[-1][1] == phrase.weight:
            joined[-1][0].append(phrase.text)
        else:
            joined.append(([phrase.text], phrase.weight))
    return tuple(Phrase("".join(texts), weight) for texts, weight in joined)


def _told(prompt: str, lonely: list[int]) -> tuple[str, ...]:
    if not lonely:
        return ()
    first = lonely[0]
    what = "a bracket" if len(lonely) == 1 else f"{len(lonely)} brackets"
    return (f"{what} without a partner read as plain text, the first being {prompt[first]!r} at character {first + 1}",)
