"""Short texts in English or Chinese: cleaned, told apart, compared, joined."""

import re
from collections.abc import Iterable
from typing import Any

LONGEST_BRIEF = 2_000  # characters
HAN = re.compile(r"[\u3400-\u9fff]")
_WORD = re.compile(r"[^\W\d_]{3,}")
_STEM = 3  # letters by which words are compared, so that one fox and two foxes are the same
_SMALL = {"and", "for", "from", "into", "over", "the", "under", "with"}


def cleaned(brief: str) -> tuple[str, tuple[str, ...]]:
    """The brief on one line, and notices of what was left out. Raises ValueError for a blank or an endless one."""
    if len(brief) > LONGEST_BRIEF:
        raise ValueError(f"expected a brief of at most {LONGEST_BRIEF:,} characters, got {len(brief):,}")
    line = " ".join("".join(character if character.isprintable() else " " for character in brief).split())
    if not line:
        raise ValueError("expected a brief of one character or more, got a blank one")
    odd = sum(not character.isprintable() and not character.isspace() for character in brief)
    return line, (f"left out of the brief: {odd} characters that cannot be printed",) if odd else ()


def language_of(text: str) -> str:
    return "Chinese" if HAN.search(text) else "English"


def tokens_a_character(tokenizer: Any, text: str) -> float:
    """For the Chinese characters of a text; 0 without any."""
    characters = "".join(HAN.findall(text))
    ids = tokenizer(characters, add_special_tokens=False).input_ids if characters else []
    return len(ids) / max(1, len(characters))


def forgets(brief: str, answer: str) -> bool:
    """Whether an answer in the brief's language has not one of its words. Small models do that."""
    if language_of(brief) == "Chinese":
        said = set(HAN.findall(brief))
        return not said & set(HAN.findall(answer))
    said = {word[:_STEM] for word in _WORD.findall(brief.casefold()) if word not in _SMALL}
    return bool(said) and not any(stem in answer.casefold() for stem in said)


def joined(phrases: Iterable[str]) -> str:
    """One line, parts apart by commas, each said once: small models repeat themselves."""
    said: dict[str, str] = {}
    for phrase in phrases:
        for part in re.split(r"[,\uff0c\u3001]", phrase):
            if part := part.strip(" .\u3002;"):
                said.setdefault(part.casefold(), part)
    return ", ".join(said.values())
