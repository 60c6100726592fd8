"""Captions as people and language models write them: one thing, and much around it that is not the thing.

Of a name alone and in short phrases the text encoder learned that everything it reads is the thing that is meant, and
"rocket, night photograph, muted blue" became none of the three. Here the thing is said first, or after what plainly
describes it, and the rest is drawn from words that go with pictures, from a dictionary and from other things' names.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# By language and place in the sentence; of "any", what is made of words of the dictionary, which {w} stands for. {} is
# the thing in the kinds of Chinese, which stand on both sides of it, and another thing in the joints.
FURTHER_WORDS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("further_words.json").read_text("utf-8"))
LONG_CAPTIONS = 12  # of each thing in each language, about as many as there are short ones
ANY_WORDS = 0.4  # how often it is any words, so that what nobody listed is passed over too
OTHER_THING = 0.35  # how often another thing stands behind this one
MOST_ENDINGS = 6


def long_caption(name: str, language: str, others: Sequence[str], words: Sequence[str], pick: random.Random) -> str:
    """``name`` among ``words`` of the dictionary and names of ``others``, each of the same language."""
    further = FURTHER_WORDS[language]

    def said(place: str) -> str:
        chosen = pick.choice(further["any"][place] if pick.random() < ANY_WORDS else further[place])
        while "{w}" in chosen:
            chosen = chosen.replace("{w}", pick.choice(words), 1)
        return chosen

    before = [said("adjectives") for _ in range(pick.choice((0, 0, 1, 1, 2)))]
    behind = [said("doings")] if pick.random() < 0.3 else []
    if pick.random() < OTHER_THING:
        behind.append(pick.choice(further["joints"]).format(pick.choice((pick.choice(others), pick.choice(words)))))
    endings = [said("endings") for _ in range(pick.randint(1, MOST_ENDINGS))] if pick.random() < 0.5 else []
    place = said("places") if pick.random() < 0.4 else ""
    kind = said("kinds") if pick.random() < 0.3 or not (before or behind or endings or place) else ""
    if language == "zh":  # what describes the thing stands before it
        thing = place + "".join(before) + name
        return further["comma"].join([(kind.format(thing) if kind else thing) + "".join(behind), *endings])
    article = pick.choice(("a", "the", "")) if not kind or kind.endswith(("of", "for", "with")) else ""
    said_of_it = " ".join(part for part in (kind, article, *before, name, *behind, place) if part)
    return further["comma"].join([said_of_it, *endings])


def words_of(language: str, words: Sequence[str]) -> list[str]:
    """Those of a dictionary of both languages that are of this one."""
    return [word for word in words if word.isascii() == (language == "en")]
