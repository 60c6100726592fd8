"""A short brief -> a full prompt, or a checked scene and its prompts, by a language model that runs here."""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache as remembered
from pathlib import Path
from typing import Any

from .language.brief import cleaned, forgets, joined, language_of, tokens_a_character
from .language.language_model import LanguageModel
from .language.text_generation import OnText, Writer
from .model_cache import ModelCache

MODES = ("prompt", "scene")
LANGUAGES = ("as the brief", "English", "Chinese")
LEAST_NEW_TOKENS, MOST_NEW_TOKENS = 16, 1_024  # for one try
LONGEST_PROMPT = 2_000  # characters of an answer that is still a prompt
# Tokens a Chinese character above which a vocabulary only spells bytes. SmolLM2 takes 1.75 to 2.3 on short phrases;
# with each character a token of its own it would be 1, and with words less.
SPELLS_BYTES = 1.3
_FIELDS = {"subject": '"', "style": '"', "light": '"', "camera": '"', "palette": "]", "avoid": "]"}
_THOUGHT = re.compile(r"<think>.*?(</think>|$)", re.DOTALL)


@dataclass(frozen=True)
class DirectedPrompt:
    """What to draw. scene: JSON, empty without one; tokens: how many were written, 0 without the model.

    way: "free", the model wrote all of it; "guided", it went on from the brief, field by field in a scene; "brief", the
    brief as it came, because no answer could be used. notices: why, for the user.
    """

    prompt: str
    negative_prompt: str = ""
    scene: str = ""
    way: str = "brief"
    tokens: int = 0
    notices: tuple[str, ...] = ()


class Answers:
    """The last ``limit`` answers, so that the same question needs no model. Safe to call from any thread."""

    def __init__(self, limit: int = 256) -> None:
        self.limit = limit
        self._kept: OrderedDict[tuple, DirectedPrompt] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, question: tuple) -> DirectedPrompt | None:
        with self._lock:
            if question in self._kept:
                self._kept.move_to_end(question)
            return self._kept.get(question)

    def keep(self, question: tuple, answer: DirectedPrompt) -> None:
        with self._lock:
            self._kept[question] = answer
            while len(self._kept) > self.limit:
                self._kept.popitem(last=False)


class _UnusableError(ValueError):
    """The model's answer cannot be used; says why."""


@dataclass(frozen=True)
class _Task:
    """brief: cleaned; language: of the answer, a key of direct_prompt.json."""

    brief: str
    mode: str
    language: str
    max_new_tokens: int

    @property
    def begins_with_brief(self) -> bool:
        """A guided answer goes on from the brief, unless it is to be in another language."""
        return language_of(self.brief) == self.language


def direct_prompt(
    cache: ModelCache,
    model: LanguageModel,
    brief: str,
    *,
    mode: str = "prompt",
    language: str = "as the brief",
    guided: bool = False,
    seed: int = 0,
    temperature: float = 0.4,
    max_new_tokens: int = 160,
    answers: Answers | None = None,
    on_text: OnText = lambda tokens, text: None,
) -> DirectedPrompt:
    """Ask ``model``, opened by ``open_language_model``, for what a picture of ``brief`` shows.

    mode: "prompt" for one line of text, "scene" for JSON that is checked and made into two prompts. guided: from the
    first try; otherwise the second, if the first answer cannot be used. Then the brief itself is the answer, and a
    notice says why; so it is, without the model, where its vocabulary only spells the brief's bytes.
    temperature: 0 to 2; max_new_tokens: 16 to 1,024 for a try. answers: where the same question was answered before.
    on_text: called at each token with the number and the text so far; what it raises ends the writing within a token.
    Raises ValueError for a brief that is blank or beyond 2,000 characters, and settings out of range.
    """
    brief, notices = cleaned(brief)
    _check(mode, language, seed, temperature, max_new_tokens)
    question = (model.identity, brief, mode, language, guided, seed, temperature, max_new_tokens)
    answer = answers.get(question) if answers else None
    if answer is None:
        spoken = language_of(brief) if language == "as the brief" else language
        task = _Task(brief, mode, spoken, max_new_tokens)
        answer = _answered(cache, model, task, guided, seed, temperature, on_text)
        if answers:
            answers.keep(question, answer)
    return replace(answer, notices=notices + answer.notices)


def as_it_is(brief: str, *reasons: str) -> DirectedPrompt:
    """The brief as its own prompt. Raises ValueError as ``direct_prompt`` does."""
    brief, notices = cleaned(brief)
    return DirectedPrompt(brief, notices=(*notices, *reasons))


def _answered(
    cache: ModelCache, model: LanguageModel, task: _Task, guided: bool, seed: int, temperature: float, on_text: OnText
) -> DirectedPrompt:
    tokenizer = model.tokenizer()
    if (length := _heard(tokenizer, task)) > SPELLS_BYTES:
        return as_it_is(
            task.brief,
            f"{model.name} spells Chinese in bytes, {length:.1f} tokens a character, and hardly reads it: the "
            "brief is passed on as it is. Choose a model that was taught Chinese",
        )
    reasons, written = [], 0
    with model.use(cache) as module:
        for attempt, way in enumerate(("guided" if guided else "free", "guided")):
            writer = Writer(
                module,
                tokenizer,
                _question(tokenizer, task),
                seed=(seed + attempt) % 2**64,  # after the largest comes 0
                temperature=temperature,
                room=task.max_new_tokens,
                on_text=lambda tokens, text, before=written: on_text(before + tokens, text),
            )
            try:
                answer = _ASK[task.mode, way](writer, task)
            except _UnusableError as error:
                written += writer.written
                reasons.append(f"{way}: {error}")
                continue
            notice = (
                (f"the first answer could not be used ({reasons[0]}); this is the second, guided",) if reasons else ()
            )
            return replace(answer, way=way, tokens=written + writer.written, notices=notice)
    tried = "; ".join(reasons)
    return replace(
        as_it_is(task.brief, f"no answer could be used, the brief is passed on as it is. {tried}"), tokens=written
    )


# --- what is asked ---


@remembered
def _words(language: str) -> dict[str, Any]:
    return json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))[language]


def _question(tokenizer: Any, task: _Task) -> str:
    """The task with its examples, as a conversation where the tokenizer has a template for one, else as plain text."""
    words = _words(task.language)
    about = words[task.mode]
    examples = [(brief, as_text(answer)) for brief, answer in about["examples"]]
    asked = [words["brief"] + brief for brief in (*(brief for brief, _ in examples), task.brief)]
    if not getattr(tokenizer, "chat_template", None):
        shots = [
            f"{question}\n{about['answer']}{answer}\n\n" for question, (_, answer) in zip(asked, examples, strict=False)
        ]
        return f"{about['task']}\n\n{''.join(shots)}{asked[-1]}\n{about['answer'].rstrip()}"
    asked[0] = f"{about['task']}\n\n{asked[0]}"  # not as the system's, a role that some templates refuse
    talk = [{"role": "user", "content": asked[0]}]
    for question, (_, answer) in zip(asked[1:], examples, strict=True):
        talk += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
    try:
        return tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    except Exception as error:  # jinja2's, and whatever the template raises: it came with the model
        raise ValueError(f"expected a chat template that takes a conversation, got: {str(error)[:300]}") from error


def as_text(answer: str | dict[str, Any]) -> str:
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)


def _heard(tokenizer: Any, task: _Task) -> float:
    """Tokens a Chinese character: of the brief, or of an example where only the answer is Chinese."""
    if task.language == "Chinese" and language_of(task.brief) == "English":
        return tokens_a_character(tokenizer, _words("Chinese")["prompt"]["examples"][0][1])
    return tokens_a_character(tokenizer, task.brief)


# --- four ways to ask ---


def _free_prompt(writer: Writer, task: _Task) -> DirectedPrompt:
    return _as_prompt(writer.write("", task.max_new_tokens, _a_line), task)


def _guided_prompt(writer: Writer, task: _Task) -> DirectedPrompt:
    start = f"{task.brief}," if task.begins_with_brief else ""
    return _as_prompt(start + writer.write(start, task.max_new_tokens, _a_line), task)


def _as_prompt(answer: str, task: _Task) -> DirectedPrompt:
    said = _THOUGHT.sub("", answer).strip()
    line = said.splitlines()[0] if said else ""
    for label in (_words(task.language)["prompt"]["answer"], '"', "\u201c"):
        line = line.removeprefix(label.strip()).strip()
    prompt = joined([line.strip("\"\u201c\u201d' ")])
    if not prompt or len(prompt) > LONGEST_PROMPT:
        raise _UnusableError(f"expected one line of up to {LONGEST_PROMPT:,} characters, got {len(prompt):,}")
    _check_about(task, prompt)
    return DirectedPrompt(prompt)


def _free_scene(writer: Writer, task: _Task) -> DirectedPrompt:
    from .language.scene import SceneError, extent, parse_scene

    def ends(text: str) -> bool:
        found = extent("{" + text)
        return found is not None and found[1] is not None

    try:
        scene = parse_scene("{" + writer.write("{", task.max_new_tokens, ends))
    except SceneError as error:
        raise _UnusableError(str(error)) from error
    return _as_scene(scene, task)


def _guided_scene(writer: Writer, task: _Task) -> DirectedPrompt:
    """The model writes the values alone, one after the other; names, quotes and brackets are ours, and so are right."""
    from .language.scene import SceneError, parse_scene

    values: dict[str, Any] = {}
    for number, (name, end) in enumerate(_FIELDS.items()):
        opened = "" if end == '"' else '["'
        before = json.dumps(values, ensure_ascii=False)[:-1] + (", " if values else "")
        start = task.brief if name == "subject" and task.begins_with_brief else ""
        written = writer.write(
            f'{before}"{name}": {opened or chr(34)}{json.dumps(start, ensure_ascii=False)[1:-1]}',
            max(1, (task.max_new_tokens - writer.written) // (len(_FIELDS) - number)),
            lambda text, end=end: end in text or "\n" in text,
        )
        value = re.split(r"[\]\n]" if opened else r'["\n]', written)[0]
        if opened:
            values[name] = [word for part in value.split(",") if (word := part.strip(' "\\'))][:8]
        else:
            values[name] = (start + value).replace("\\", " ").strip(" ,")
    try:
        scene = parse_scene(json.dumps(values, ensure_ascii=False))
    except SceneError as error:
        raise _UnusableError(str(error)) from error
    return _as_scene(scene, task)


def _as_scene(scene: Any, task: _Task) -> DirectedPrompt:
    _check_about(task, scene.prompt)
    return DirectedPrompt(scene.prompt, scene.negative_prompt, scene.as_json())


_ASK: dict[tuple[str, str], Callable[[Writer, _Task], DirectedPrompt]] = {
    ("prompt", "free"): _free_prompt,
    ("prompt", "guided"): _guided_prompt,
    ("scene", "free"): _free_scene,
    ("scene", "guided"): _guided_scene,
}


def _a_line(text: str) -> bool:
    return "\n" in _THOUGHT.sub("", text).lstrip()


def _check_about(task: _Task, answer: str) -> None:
    # A translation has other words, and cannot be told from an answer that forgets.
    if task.begins_with_brief and forgets(task.brief, answer):
        raise _UnusableError(f"it says nothing of the brief: {answer[:60]!r}")


def _check(mode: str, language: str, seed: int, temperature: float, max_new_tokens: int) -> None:
    for name, value, known in (("mode", mode, MODES), ("language", language, LANGUAGES)):
        if value not in known:
            raise ValueError(f"expected {name} to be one of {', '.join(known)}, got {str(value)[:80]!r}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"expected a seed of 0 to 2**64 - 1, got {seed}")
    if not 0 <= temperature <= 2:
        raise ValueError(f"expected a temperature of 0 to 2, got {temperature}")
    if not LEAST_NEW_TOKENS <= max_new_tokens <= MOST_NEW_TOKENS:
        raise ValueError(f"expected {LEAST_NEW_TOKENS} to {MOST_NEW_TOKENS:,} new tokens, got {max_new_tokens}")
