"""A brief becomes a prompt or a scene: by SmolLM2 on real words, and by tiny models whose answers are known."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.direct_prompt import Answers, DirectedPrompt, as_it_is, direct_prompt
from pipeline.language.brief import cleaned, forgets, joined, tokens_a_character
from pipeline.language.language_model import LanguageModel, open_language_model
from pipeline.language.scene import Scene, SceneError, parse_scene
from pipeline.model_cache import ModelCache
from pipeline.residency import TorchResidency
from tests.pipeline.language_models import ALPHABET, END, save_llama, smollm2

BRIEFS: dict[str, str] = json.loads(Path(__file__).with_name("briefs.json").read_text(encoding="utf-8"))
SCENE = {
    "subject": "a cat",
    "style": "ink",
    "light": "dusk",
    "camera": "wide",
    "palette": ["red", "black"],
    "avoid": ["text"],
}


@pytest.fixture(scope="session")
def writers() -> ModelCache:
    return ModelCache(TorchResidency("cpu"), budget_bytes=2**31)


@pytest.fixture(scope="session")
def smol() -> LanguageModel:
    return open_language_model(smollm2())


@pytest.fixture(scope="module")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return open_language_model(save_llama(tmp_path_factory.mktemp("llama") / "random"))


def pins(cache: ModelCache) -> int:
    return sum(entry.pins for entry in cache.stats().entries)


# --- SmolLM2 ---


def test_a_small_model_fills_a_scene_field_by_field(writers: ModelCache, smol: LanguageModel):
    told: list[tuple[int, str]] = []
    answer = direct_prompt(
        writers,
        smol,
        BRIEFS["castle"],
        mode="scene",
        guided=True,
        temperature=0,
        max_new_tokens=48,
        on_text=lambda tokens, text: told.append((tokens, text)),
    )
    scene = parse_scene(answer.scene)
    assert (answer.way, answer.notices) == ("guided", ())
    assert scene.subject.startswith(BRIEFS["castle"]) and answer.prompt.startswith(BRIEFS["castle"])
    assert all(len(field) > 2 for field in (scene.style, scene.light, scene.camera, *scene.palette))
    assert all(word in answer.prompt for word in (scene.style, scene.light, scene.camera))
    assert 6 <= answer.tokens <= 48 and told[-1][0] == answer.tokens
    assert [tokens for tokens, _ in told] == sorted(tokens for tokens, _ in told)
    assert '"palette": ["' in told[-1][1], "what is shown is the scene so far"


def test_a_small_model_writes_a_prompt_on_the_brief(writers: ModelCache, smol: LanguageModel):
    answer = direct_prompt(writers, smol, BRIEFS["robot"], temperature=0, max_new_tokens=24)
    assert answer.way == "free" and not answer.notices
    assert "robot" in answer.prompt and len(answer.prompt) > len(BRIEFS["robot"])


def test_a_chinese_brief_is_passed_on_by_a_model_that_only_spells_it(smol: LanguageModel):
    cache = ModelCache(TorchResidency("cpu"), budget_bytes=2**31)
    answer = direct_prompt(cache, smol, BRIEFS["\u732b"], mode="scene")
    assert (answer.prompt, answer.scene, answer.way, answer.tokens) == (BRIEFS["\u732b"], "", "brief", 0)
    assert "taught Chinese" in answer.notices[0] and smol.name in answer.notices[0]
    assert cache.stats().misses == 0, "its weights need not be read for that"


def test_an_english_model_is_not_asked_to_answer_in_chinese(writers: ModelCache, smol: LanguageModel):
    answer = direct_prompt(writers, smol, BRIEFS["castle"], language="Chinese")
    assert answer.prompt == BRIEFS["castle"] and answer.way == "brief" and answer.notices


def test_smollm2_knows_english_after_unpacking(writers: ModelCache, smol: LanguageModel):
    """Weights in the wrong order would still load, and read no better than chance, which is log 49,152 = 10.8."""
    ids = torch.tensor(
        [smol.tokenizer()("The capital of France is Paris, and the capital of Italy is Rome.").input_ids]
    )
    with smol.use(writers) as module, torch.inference_mode():
        loss = float(module(input_ids=ids, labels=ids).loss)
    assert loss < 3.5


# --- answers that cannot be used ---


@pytest.mark.parametrize("template", [True, False])
def test_a_model_that_says_nothing_leaves_the_brief(tmp_path: Path, writers: ModelCache, template: bool):
    model = open_language_model(save_llama(tmp_path / "silent", says=END, template=template))
    answer = direct_prompt(writers, model, "a red fox", mode="scene", temperature=0)
    assert (answer.prompt, answer.negative_prompt, answer.scene, answer.way) == ("a red fox", "", "", "brief")
    (notice,) = answer.notices
    assert "free: expected a JSON object that ends" in notice and "guided: style: String should have" in notice


@pytest.mark.parametrize(
    ("says", "free", "guided"),
    [
        ("[", "expected brackets at most 8 deep", None),
        ("null", "expected a JSON object that ends", None),
        ('"', "expected a JSON object that ends", "style: String should have at least 1 character"),
        ("\\", "expected a JSON object that ends", "style: String should have at least 1 character"),
        ('{"subject":', "expected brackets at most 8 deep", "palette.0: String should have at most 80 characters"),
        ("]}", "the object: Invalid JSON", "palette: Tuple should have at least 1 item"),
        ("\n", "expected a JSON object that ends", "style: String should have at least 1 character"),
    ],
)
def test_broken_json_for_ever_ends_soon(tmp_path: Path, writers: ModelCache, says: str, free: str, guided: str | None):
    """guided: what then is wrong with the scene, if anything: the names and brackets of that are not the model's."""
    model = open_language_model(save_llama(tmp_path / "broken", says=says))
    start = time.perf_counter()
    answer = direct_prompt(writers, model, "a red fox", mode="scene", temperature=0, max_new_tokens=64)
    (notice,) = answer.notices
    assert f"free: {free}" in notice and len(notice) < 1000
    if guided is None:
        assert answer.way == "guided" and parse_scene(answer.scene).subject.startswith("a red fox")
    else:
        assert (answer.way, answer.prompt) == ("brief", "a red fox") and f"guided: {guided}" in notice
    assert pins(writers) == 0 and time.perf_counter() - start < 30


def test_an_answer_that_forgets_the_brief_is_asked_for_again(writers: ModelCache, random_llama: LanguageModel):
    answer = direct_prompt(writers, random_llama, "zebra", temperature=0, max_new_tokens=16)
    assert answer.way == "guided" and answer.prompt.startswith("zebra")
    assert "could not be used (free: " in answer.notices[0]


def test_the_largest_seed_too_is_asked_again(writers: ModelCache, random_llama: LanguageModel):
    answer = direct_prompt(writers, random_llama, "zebra", seed=2**64 - 1, temperature=1.0, max_new_tokens=16)
    assert answer.way == "guided" and "could not be used (free: " in answer.notices[0]


def test_a_guided_answer_goes_on_in_one_line(tmp_path: Path, writers: ModelCache):
    model = open_language_model(save_llama(tmp_path / "x", says="x"))
    answer = direct_prompt(writers, model, "a fox", guided=True, temperature=0, max_new_tokens=16)
    assert (answer.prompt, answer.tokens) == ("a fox, " + "x" * 16, 16)


# --- seeds, repetition, interruption ---


def test_a_seed_gives_the_same_answer_and_touches_no_other_randomness(writers: ModelCache, random_llama: LanguageModel):
    def ask(seed: int) -> DirectedPrompt:
        return direct_prompt(writers, random_llama, "a fox", guided=True, seed=seed, temperature=1.0, max_new_tokens=16)

    before = torch.random.get_rng_state()
    first, other, again = ask(1), ask(2), ask(1)
    assert first == again != other
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_same_question_needs_no_model(random_llama: LanguageModel):
    cache, answers = ModelCache(TorchResidency("cpu"), budget_bytes=2**30), Answers(limit=2)

    def ask(**changes: Any) -> DirectedPrompt:
        settings = {"guided": True, "seed": 3, "max_new_tokens": 16, "answers": answers, **changes}
        return direct_prompt(cache, random_llama, changes.pop("brief", "a fox"), **settings)

    first = ask()
    cache.unload()
    uses = (cache.stats().misses, cache.stats().hits)
    assert ask() == first
    assert (cache.stats().misses, cache.stats().hits) == uses
    assert ask(seed=4) != first
    assert cache.stats().misses == uses[0] + 1, "another seed is another question"
    ask(seed=5)
    before = cache.stats().hits
    ask()
    assert cache.stats().hits == before + 1, "only the last two are kept"


def test_it_stops_within_a_token_when_told(writers: ModelCache, random_llama: LanguageModel):
    class Interrupted(Exception):
        pass

    seen = []

    def on_text(tokens: int, text: str) -> None:
        seen.append(tokens)
        if tokens == 5:
            raise Interrupted

    settings: dict[str, Any] = {"guided": True, "seed": 7, "temperature": 1.0, "max_new_tokens": 64}
    with pytest.raises(Interrupted):
        direct_prompt(writers, random_llama, "a fox", on_text=on_text, **settings)
    assert (max(seen), pins(writers)) == (5, 0)
    fresh = ModelCache(TorchResidency("cpu"), budget_bytes=2**30)
    assert direct_prompt(writers, random_llama, "a fox", **settings) == direct_prompt(
        fresh, random_llama, "a fox", **settings
    )


# --- what goes in ---


@pytest.mark.parametrize(
    ("brief", "message"),
    [
        ("", "expected a brief of one character or more"),
        (" \n\t ", "expected a brief of one character or more"),
        ("\0\0", "expected a brief of one character or more"),
        ("x" * 20_000, "expected a brief of at most 2,000 characters, got 20,000"),
    ],
)
def test_no_brief_and_endless_ones_are_refused(
    writers: ModelCache, random_llama: LanguageModel, brief: str, message: str
):
    with pytest.raises(ValueError, match=re.escape(message)):
        direct_prompt(writers, random_llama, brief)
    with pytest.raises(ValueError, match=re.escape(message)):
        as_it_is(brief)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"mode": "poem"}, "expected mode to be one of prompt, scene, got 'poem'"),
        ({"language": "Klingon"}, "expected language to be one of"),
        ({"seed": -1}, "expected a seed of 0 to"),
        ({"temperature": float("nan")}, "expected a temperature of 0 to 2, got nan"),
        ({"max_new_tokens": 10**9}, "expected 16 to 1,024 new tokens, got 1000000000"),
    ],
)
def test_settings_out_of_range_are_refused(
    writers: ModelCache, random_llama: LanguageModel, setting: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=re.escape(message)):
        direct_prompt(writers, random_llama, "a fox", **setting)


def test_a_brief_longer_than_the_window_is_refused(writers: ModelCache, random_llama: LanguageModel):
    with pytest.raises(ValueError, match=r"fit the model's window of 4,096 tokens"):
        direct_prompt(writers, random_llama, "a cat " * 333, mode="scene", max_new_tokens=1_024)


def test_what_cannot_be_printed_is_left_out_and_said(writers: ModelCache, random_llama: LanguageModel):
    answer = direct_prompt(writers, random_llama, "a\0 red\n fox\x1b", guided=True, max_new_tokens=16)
    assert answer.prompt.startswith("a red fox")
    assert "2 characters that cannot be printed" in answer.notices[0]


def test_chinese_is_asked_in_chinese_where_it_is_read(tmp_path: Path, writers: ModelCache):
    told = []
    brief = BRIEFS["\u732b"]
    model = open_language_model(save_llama(tmp_path / "zh", says="x", also=BRIEFS["every character"]))
    assert tokens_a_character(model.tokenizer(), brief) == 1
    answer = direct_prompt(
        writers, model, brief, guided=True, max_new_tokens=16, temperature=0, on_text=lambda _, text: told.append(text)
    )
    assert answer.prompt == f"{brief}, {'x' * 16}" and told[0] == f"{brief},"


# --- scenes and words ---


def test_a_scene_is_found_in_what_is_said_around_it():
    scene = parse_scene(f"Sure! Here it is:\n```json\n{json.dumps(SCENE)}\n``` Do you like it?")
    assert scene == Scene.model_validate_json(json.dumps(SCENE))
    assert scene.prompt == "a cat, ink, dusk, wide, red, black" and scene.negative_prompt == "text"
    assert parse_scene(scene.as_json()) == scene


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("no object at all", "expected a JSON object, found 'no object at all'"),
        ('{"subject": "a cat"', "expected a JSON object that ends"),
        ('{"subject": }', "the object: Invalid JSON"),
        (json.dumps({**SCENE, "style": 7}), "style: Input should be a valid string, found '7'"),
        (json.dumps({**SCENE, "style": ""}), "style: String should have at least 1 character"),
        (json.dumps({**SCENE, "palette": "red"}), "palette: Input should be a valid "),
        (json.dumps({**SCENE, "palette": []}), "palette: "),
        (json.dumps({**SCENE, "avoid": [None]}), "avoid.0: Input should be a valid string"),
        (json.dumps({**SCENE, "light": "x" * 401}), "light: String should have at most 400 characters"),
        (json.dumps({"subject": "a cat"}), "style: Field required"),
        ("{" * 10_000, "expected brackets at most 8 deep"),
        ('{"a": ' + "[" * 10_000 + "]" * 10_000 + "}", "expected brackets at most 8 deep"),
        ('{"a": "' + "[{" * 100_000, "expected a JSON object that ends"),
    ],
)
def test_what_is_no_scene_is_refused_soon(answer: str, message: str):
    start = time.perf_counter()
    with pytest.raises(SceneError, match="^" + re.escape(message)) as refusal:
        parse_scene(answer)
    assert len(str(refusal.value)) < 400 and time.perf_counter() - start < 1


def test_what_is_asked_for_is_not_also_avoided():
    scene = parse_scene(json.dumps({**SCENE, "avoid": ["Cat", "inks", "text", "TEXT"]}))
    assert scene.negative_prompt == "text"


def test_words_are_joined_once():
    assert joined(["a fox, snow.", "Snow", "\u96ea\uff0c\u72d0\u3002", "\u96ea"]) == "a fox, snow, \u96ea, \u72d0"


@pytest.mark.parametrize(
    ("brief", "answer", "forgotten"),
    [
        ("two foxes", "a bear in snow", True),
        ("two foxes", "foxglove", False),
        ("two foxes", "Foxes at play", False),
        ("\u4e00\u53ea\u732b", "\u732b\u5728\u7761\u89c9", False),
        ("\u732b", "\u72d7", True),
        ("42", "anything", False),
    ],
)
def test_forgetting_is_told_by_words(brief: str, answer: str, forgotten: bool):
    assert forgets(brief, answer) is forgotten


def test_the_alphabet_of_the_tiny_models_covers_the_instructions():
    """Else they would be asked nothing but <unk>, and the tests above would prove less than they seem to."""
    path = Path(__file__).parents[2] / "pipeline" / "direct_prompt.json"
    assert set(json.dumps(json.loads(path.read_text(encoding="utf-8"))["English"])) <= set(ALPHABET)
    assert cleaned("".join(ALPHABET))[0].startswith("!")
