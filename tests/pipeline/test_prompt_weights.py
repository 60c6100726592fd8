"""Weighted phrases: what they mean, and what becomes of brackets that mean nothing."""

import re
import time

import pytest

from pipeline.text.prompt_weights import MOST_NESTED, Phrase, read_weights


@pytest.mark.parametrize(
    ("prompt", "phrases"),
    [
        ("", []),
        ("a rose", [("a rose", 1)]),
        ("a (red:1.2) rose", [("a ", 1), ("red", 1.2), (" rose", 1)]),
        ("(red)", [("red", 1.1)]),
        ("((red))", [("red", 1.21)]),
        ("[red]", [("red", 1 / 1.1)]),
        ("(a [b] c)", [("a ", 1.1), ("b", 1), (" c", 1.1)]),
        ("(a (b:1.5):2)", [("a ", 2), ("b", 3)]),
        ("(a:0) b", [("a", 0), (" b", 1)]),
        ("(a:-0.5)", [("a", -0.5)]),
        ("(ratio 16:9)", [("ratio 16", 9)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(a:1.2)(b:1.2)", [("ab", 1.2)]),
        (r"\(red\) \[a\] \\", [("(red) [a] \\", 1)]),
        ("(a: 1.3 )", [("a", 1.3)]),
        ("()", []),
    ],
)
def test_phrases_and_their_weights(prompt: str, phrases: list[tuple[str, float]]):
    found = read_weights(prompt)
    assert [phrase.text for phrase in found.phrases] == [text for text, _ in phrases]
    assert [phrase.weight for phrase in found.phrases] == pytest.approx([weight for _, weight in phrases])
    assert found.notices == ()


@pytest.mark.parametrize(
    ("prompt", "text", "said"),
    [
        ("a smile :)", "a smile :)", "a bracket without a partner .* the first being '\\)' at character 10"),
        ("(a", "(a", r"'\(' at character 1"),
        ("[a) b]", "a) b", r"'\)' at character 3"),
        ("(((a)", "((a", "2 brackets without a partner"),
    ],
)
def test_a_lonely_bracket_is_plain_text_and_told(prompt: str, text: str, said: str):
    found = read_weights(prompt)
    assert found.text == text
    assert re.search(said, found.notices[0])


@pytest.mark.parametrize("prompt", ["(" * 10_000 + ")" * 10_000, "(" * 10_000, "[(" * 5_000, "a" * 100 + "[" * 9_900])
def test_ten_thousand_brackets_are_refused_at_once(prompt: str):
    started = time.perf_counter()
    with pytest.raises(ValueError, match=f"at most {MOST_NESTED} brackets open at once, got more at character"):
        read_weights(prompt)
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    "prompt", ["()" * 10_000, ")" * 20_000, "(a:1.1)" * 2_800, "\\" * 20_000, "(" + ":" * 19_998 + ")"]
)
def test_twenty_thousand_characters_are_read_at_once(prompt: str):
    started = time.perf_counter()
    read_weights(prompt)
    assert time.perf_counter() - started < 2


def test_a_weight_that_would_drown_the_rest_is_refused():
    with pytest.raises(ValueError, match="expected a weight of -10 to 10, got 1000 at character 8"):
        read_weights("(a:1000)")


def test_a_weight_belongs_to_the_phrase_before_it():
    assert read_weights("(a red rose:1.2)").phrases == (Phrase("a red rose", 1.2),)
