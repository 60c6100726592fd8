"""A picture as a director would note it: six fields, checked by a schema, and the prompt that they make.

Needs pydantic, which the host brings; the rest of the pipeline works without it, so this is imported where it is used.
"""

import json
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from .brief import joined

LONGEST_ANSWER = 20_000  # characters of a model's answer that are looked at
MOST_DEPTH = 8  # of brackets within brackets: a scene has two
_QUOTED = 120

Phrase = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=400)]
Word = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=80)]


class SceneError(ValueError):
    """An answer that is no scene: says what was expected, and what came."""


class Scene(BaseModel):
    """subject, style, light, camera: a phrase each; palette: 1 to 8 colours; avoid: up to 12 things not to show."""

    model_config = ConfigDict(frozen=True, strict=True)

    subject: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=2_400)]
    style: Phrase
    light: Phrase
    camera: Phrase
    palette: Annotated[tuple[Word, ...], Field(min_length=1, max_length=8)]
    avoid: Annotated[tuple[Word, ...], Field(max_length=12)] = ()

    @property
    def prompt(self) -> str:
        """Subject first, because encoders listen most to the beginning; then style, light, camera and colours."""
        return joined([self.subject, self.style, self.light, self.camera, *self.palette])

    @property
    def negative_prompt(self) -> str:
        """Without what the prompt asks for, or begins with: a small model repeats itself here."""
        asked = self.prompt.casefold()
        parts = tuple(asked.split(", "))
        words = [(word, word.casefold()) for word in self.avoid]
        return joined(word for word, plain in words if plain not in asked and not plain.startswith(parts))

    def as_json(self) -> str:
        return json.dumps(self.model_dump(), ensure_ascii=False, indent=1)


def parse_scene(answer: str) -> Scene:
    """The first JSON object of a model's answer, whatever is said around it. Raises SceneError, in bounded time."""
    found = extent(answer[:LONGEST_ANSWER])
    if found is None:
        raise SceneError(f"expected a JSON object, found {_shown(answer)}")
    start, end = found
    if end is None:
        raise SceneError(f"expected a JSON object that ends, found {_shown(answer[start:])}")
    try:
        return Scene.model_validate_json(answer[start:end])
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "the object"
        raise SceneError(f"{where}: {first['msg']}, found {_shown(first['input'])}") from None


def extent(text: str) -> tuple[int, int | None] | None:
    """Where the first JSON object begins, and where it ends if it does; None without one. Raises SceneError if deep."""
    start = text.find("{")
    if start < 0:
        return None
    depth, quoted, escaped = 0, False, False
    for place in range(start, len(text)):
        character = text[place]
        if quoted:
            quoted = escaped or character != '"'
            escaped = not escaped and character == "\\"
        elif character == '"':
            quoted = True
        elif character in "{[":
            depth += 1
            if depth > MOST_DEPTH:
                raise SceneError(f"expected brackets at most {MOST_DEPTH} deep, found more at character {place}")
        elif character in "}]":
            depth -= 1
            if depth == 0:
                return start, place + 1
    return start, None


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return repr(text if len(text) <= _QUOTED else f"{text[:_QUOTED]}...")
