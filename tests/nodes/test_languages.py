"""Names, tooltips and help pages: for every node, input and output, in English and in Chinese."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INFO = json.loads(Path(__file__).with_name("object_info.json").read_text(encoding="utf-8"))
LANGUAGES = ("en", "zh")


def locale(language: str) -> dict:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def inputs_of(name: str) -> dict:
    kinds = (INFO[name]["input"].get(kind, {}) for kind in ("required", "optional"))
    return {key: options for inputs in kinds for key, (_, options) in inputs.items()}


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_node_is_missing_or_left_over(language: str):
    assert locale(language).keys() == INFO.keys()


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", INFO)
def test_everything_is_named_and_explained(name: str, language: str):
    told = locale(language)[name]
    assert told["display_name"] and told["description"]
    assert told["inputs"].keys() == inputs_of(name).keys()
    assert told["outputs"].keys() == {str(number) for number in range(len(INFO[name]["output"]))}
    for entry in (*told["inputs"].values(), *told["outputs"].values()):
        assert entry["name"] and entry["tooltip"]


@pytest.mark.parametrize("name", INFO)
def test_english_says_what_the_node_says(name: str):
    told = locale("en")[name]
    assert (told["display_name"], told["description"]) == (INFO[name]["display_name"], INFO[name]["description"])
    assert {key: entry["tooltip"] for key, entry in told["inputs"].items()} == {
        key: options["tooltip"] for key, options in inputs_of(name).items()
    }
    assert [entry["tooltip"] for entry in told["outputs"].values()] == INFO[name]["output_tooltips"]


@pytest.mark.parametrize("name", INFO)
def test_chinese_is_chinese(name: str):
    told = locale("zh")[name]
    texts = [told["display_name"], told["description"]]
    texts += [entry["tooltip"] for entry in (*told["inputs"].values(), *told["outputs"].values())]
    assert [text for text in texts if not any("\u4e00" <= character <= "\u9fff" for character in text)] == []


@pytest.mark.parametrize("name", INFO)
def test_help_is_there_in_both_languages(name: str):
    docs = ROOT / "web" / "docs"
    for page, language in ((docs / f"{name}.md", "en"), (docs / name / "zh.md", "zh")):
        title = page.read_text(encoding="utf-8").splitlines()[0]
        assert title == f"# {locale(language)[name]['display_name']}"


def test_no_help_is_left_over():
    assert {path.stem for path in (ROOT / "web" / "docs").glob("*.md")} == INFO.keys()
