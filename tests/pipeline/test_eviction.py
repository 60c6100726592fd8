"""Which models make way for another: by bytes, by recency and by habit."""

import pytest

from pipeline.eviction import choose_victims


def test_of_equals_the_least_recently_used_goes():
    assert choose_victims(dict.fromkeys("abc", 4), 4, "abcad") == ["b"]


def test_nothing_more_goes_than_is_wanted():
    assert choose_victims({"old": 1, "older": 8}, 8, ["older", "old", "new"]) == ["older"]


def test_a_small_one_that_would_not_be_enough_is_kept():
    assert choose_victims({"small": 1, "large": 8}, 8, ["small", "large", "new"]) == ["large"]


def test_one_alone_goes_where_that_is_cheaper():
    assert choose_victims({"a": 30, "b": 30, "c": 31}, 31, ["a", "b", "c", "new"]) == ["c"], "31 bytes, or 60"
    assert choose_victims({"large": 20, "small": 4}, 4, ["large", "small", "new"]) == ["small"], "though used later"


def test_all_go_where_all_are_not_enough():
    assert sorted(choose_victims({"a": 1, "b": 2}, 100, "abc")) == ["a", "b"]


def test_a_loop_keeps_what_comes_next():
    # a b c again and again, with room for two: what came last, b, is needed again later than a.
    assert choose_victims({"a": 4, "b": 4}, 4, "abcabcabc") == ["b"]
    assert choose_victims({"a": 4, "b": 4}, 4, "abc") == ["a"], "before there is a habit, the older goes"


def test_of_two_habits_the_one_that_led_here_tells_what_comes():
    # After "u a" comes b, after "v a" comes c. Of equal age and size, what follows the present pair is kept.
    assert choose_victims({"b": 4, "c": 4}, 4, "uabvacbcua") == ["c"]
    assert choose_victims({"b": 4, "c": 4}, 4, "uabvaccbva") == ["b"]


@pytest.mark.parametrize("uses", [[], ["x"]])
def test_what_was_never_seen_in_use_goes_first(uses: list[str]):
    assert choose_victims({"x": 4, "unseen": 4}, 4, [*uses, "new"]) == [("unseen" if uses else "x")]
