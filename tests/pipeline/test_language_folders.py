import re
from pathlib import Path

import pytest

from pipeline.language.language_folders import find_language_model, language_model_names


@pytest.fixture
def roots(tmp_path: Path) -> dict[str, list[Path]]:
    for name in ("LLM/a", "LLM/deep/er/b", "LLM/a/b/c/d/too deep", "LLM/no tokenizer", "text_encoders/t"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
        if name != "LLM/no tokenizer":
            (folder / "tokenizer.json").touch()
    (tmp_path / "LLM" / "c.gguf").touch()
    (tmp_path / "LLM" / "d.bin").touch()
    (tmp_path / "secret").mkdir()
    (tmp_path / "LLM" / "link").symlink_to(tmp_path / "secret")
    return {"LLM": [tmp_path / "LLM", tmp_path / "absent"], "text_encoders": [tmp_path / "text_encoders"]}


def test_folders_and_gguf_files_are_listed(roots: dict[str, list[Path]], tmp_path: Path):
    names = language_model_names(roots)
    assert names == ["LLM/a", "LLM/c.gguf", "LLM/deep/er/b", "text_encoders/t"]
    assert [find_language_model(roots, name) for name in names] == [tmp_path.resolve() / name for name in names]
    assert find_language_model(roots, "LLM\\deep\\er\\b") == tmp_path.resolve() / "LLM/deep/er/b"
    assert language_model_names({}) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "expected a language model such as LLM/name"),
        ("LLM", "expected a language model such as LLM/name, in LLM or text_encoders; got 'LLM'"),
        ("secret/x", "in LLM or text_encoders; got 'secret/x'"),
        ("LLM/../secret", "leads out of the models folder"),
        ("LLM\\..\\secret", "leads out of the models folder"),
        ("/etc/passwd", "leads out of the models folder"),
        ("C:\\x", "leads out of the models folder"),
        ("\\\\server\\share\\x", "leads out of the models folder"),
        ("LLM/a:stream", "leads out of the models folder"),
        ("LLM/a\0b", "expected a language model such as LLM/name, got 'LLM/a\\x00b'"),
        ("LLM/" + "x" * 9999, "expected a language model such as LLM/name"),
        ("LLM/link", "by a link: expected a file or folder inside"),
        ("LLM/d.bin", "expected"),
        ("LLM/none", "found LLM/a, LLM/c.gguf, LLM/deep/er/b, text_encoders/t"),
    ],
)
def test_a_name_that_leads_elsewhere_is_refused(roots: dict[str, list[Path]], name: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        find_language_model(roots, name)
    assert len(str(refusal.value)) < 600
