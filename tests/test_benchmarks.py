"""The harness of the benchmarks: turns, clocks, fits, the table and the page."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import _harness as harness

ROOT = Path(__file__).parents[1]


def test_turns_are_taken_in_rounds_that_go_forth_and_back():
    order: list[str] = []

    def turn(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = harness.interleaved({"a": lambda: turn("a"), "b": lambda: turn("b")}, repeats=3, warm_up=1)
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert found == {"a": [4.0, 5.0, 8.0], "b": [3.0, 6.0, 7.0]}
    assert harness.medians(found) == {"a": 5.0, "b": 6.0}


def test_a_round_that_was_slow_for_both_sides_does_not_move_the_ratio():
    assert harness.paired_ratio([1.0, 10.0, 1.0], [2.0, 20.0, 2.0]) == 0.5


def test_the_stopwatch_counts_the_outermost_call_and_nothing_that_is_hidden():
    class Model:
        def outer(self) -> None:
            self.inner()

        def inner(self) -> None:
            time.sleep(0.01)

        def look(self) -> None:
            self.outer()

    before, model, clock = Model.outer, Model(), harness.Stopwatch()
    with clock.around((Model, "outer"), (Model, "inner")), clock.not_in((Model, "look")):
        model.outer()
        assert clock.calls == 1 and 0.01 <= clock.seconds < 0.1
        spent = clock.seconds
        model.look()
        assert (clock.calls, clock.seconds) == (1, spent)
    model.outer()
    assert clock.calls == 1 and Model.outer is before


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_fitted_exponent_is_the_power(power: float):
    sizes = [1.0, 2.0, 4.0, 8.0]
    assert harness.fitted_exponent(sizes, [3 * size**power for size in sizes]) == pytest.approx(power)


RESULTS = {
    "one": harness.result(ratio=0.5, ours=1.0, host=2.0, unit="s", aim="<= 0.95", met=True, rounds={"ours": [1.0]}),
    "two": harness.not_run("no GPU", ">= 0.35", "share"),
    "three": {"error": "not done within 5 s"},
}


def test_a_result_says_all_that_the_table_shows():
    assert list(RESULTS["one"]) == ["ratio", "ours", "host", "diffusers", "unit", "aim", "met", "rounds"]
    rows = harness.table(RESULTS)
    assert rows[1] == ("one", "1", "2", "-", "s", "0.5", "<= 0.95", "yes")
    assert rows[2][1] == "not run: no GPU" and rows[3][1] == "not run: not done within 5 s"
    assert len({len(row) for row in rows}) == 1
    assert len(harness.as_text(rows).splitlines()) == len(harness.as_markdown(rows).splitlines()) == 5


def test_a_number_that_is_none_stays_out_of_the_json():
    assert json.loads(json.dumps(harness.rounded({"a": float("nan"), "b": [1 / 3]}))) == {"a": None, "b": [0.33333]}


def test_the_page_keeps_its_words(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{harness.BEGIN}\nold\n{harness.END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        harness.write_page(RESULTS, {"cores": 2, "GPU": "none"}, page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert text.count("| one |") == 1 and "cores 2, GPU none" in text
    assert json.loads(page.with_suffix(".json").read_text(encoding="utf-8")) == measured("cores 2, GPU none")
    assert "kept from earlier" not in text
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="expected <!-- results -->"):
        harness.write_page(RESULTS, {}, page)
    assert page.read_text(encoding="utf-8") == "no marks"


def measured(on: str) -> dict[str, harness.Result]:
    return {name: one | {"measured_on": on} for name, one in RESULTS.items()}


def test_what_was_not_run_keeps_its_row_and_the_page_says_so(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(f"{harness.BEGIN}\n{harness.END}\n", encoding="utf-8")
    harness.write_page(RESULTS, {"cores": 2}, page)
    again = harness.result(ratio=0.25, ours=1.0, host=4.0, unit="s", aim="<= 0.95", met=True)
    harness.write_page({"three": again, "one": {"error": "not done within 5 s"}}, {"cores": 8}, page)
    kept = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    expected = {**measured("cores 2"), "three": again | {"measured_on": "cores 8"}}
    assert kept == expected, "a failure does not take away what was measured"
    text = page.read_text(encoding="utf-8")
    assert "| 0.25 |" in text
    assert "`one` (failed this time: not done within 5 s; measured on: cores 2), `two` (measured on: cores 2)." in text


def test_the_page_that_ships_has_its_marks():
    text = harness.PAGE.read_text(encoding="utf-8")
    assert text.count(harness.BEGIN) == text.count(harness.END) == 1


def test_the_last_json_is_found_after_other_lines():
    assert harness.last_json('noise\n{"a": 1}\n{"b": 2}\nwarning\n') == {"b": 2}
    with pytest.raises(ValueError, match="expected a JSON object"):
        harness.last_json("nothing")


def test_the_machine_is_told_without_its_name():
    about = harness.machine()
    assert {"cores", "GPU", "torch", "diffusers", "ComfyUI"} <= about.keys()
    assert about["ComfyUI"][0].isdigit()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_one_measure_prints_its_object_and_all_print_a_table_and_one_line():
    alone = run("decode")
    assert alone.returncode == 0, alone.stderr
    (line,) = alone.stdout.splitlines()
    assert {"ratio", "ours", "host", "diffusers", "unit", "aim"} <= json.loads(line).keys()
    together = run("--only", "decode")
    assert together.returncode == 0, together.stderr
    *lines, last = together.stdout.splitlines()
    assert lines[0].split()[:2] == ["measure", "ours"] and lines[2].startswith("decode")
    assert json.loads(last).keys() == {"decode"}
    assert "decode: 1 of 1" in together.stderr


def test_what_fails_or_hangs_takes_nothing_along():
    hung = run("--only", "overhead", "decode", "--within", "3")
    results = harness.last_json(hung.stdout)
    assert hung.returncode == 1
    assert results["overhead"]["error"].startswith("not done within") or "time" in results["overhead"]["error"]
    assert results.keys() == {"overhead", "decode"}


def test_an_unknown_name_is_told():
    unknown = run("nothing")
    assert unknown.returncode != 0 and "expected the name of a measure" in unknown.stderr
