"""An update of the pack or of a library empties the store of embeddings only where it may change a number."""

import os
import shutil
from pathlib import Path

import pytest

from pipeline.files.libraries import library_marks
from pipeline.store.embedding_store import NUMBERS, EmbeddingStore, code_version
from tests.pipeline.test_embedding_store import never, same, words
from tests.rig import ROOT
from tests.test_imports import all_imports


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return EmbeddingStore(tmp_path / "store", 2**20)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pack") / "pipeline"
    return shutil.copytree(ROOT / "pipeline", folder, ignore=shutil.ignore_patterns("*.safetensors", "configs"))


@pytest.mark.parametrize("name", ["text/clip_windows.py", "text_encoder.py", "vision/resizing.py", "adapters/lora.py"])
def test_an_update_of_an_encoder_is_another_key(store: EmbeddingStore, sources: Path, name: str):
    EmbeddingStore(store.folder, 2**20, code_version(sources)).recall(("a rose",), words)
    path = sources / name
    path.write_text(path.read_text() + "\n# changed\n")
    later = EmbeddingStore(store.folder, 2**20, code_version(sources))
    assert same(later.recall(("a rose",), lambda: words(1)), words(1))


@pytest.mark.parametrize("name", ["generation.py", "model_cache.py", "families.py", "files/content.py", "new.py"])
def test_an_update_of_anything_else_keeps_what_is_stored(store: EmbeddingStore, sources: Path, name: str):
    EmbeddingStore(store.folder, 2**20, code_version(sources)).recall(("a rose",), words)
    with open(sources / name, "a") as file:
        file.write("\n# changed\n")
    for path in sources.rglob("*.py"):
        os.utime(path)  # as a new installation has it
    EmbeddingStore(store.folder, 2**20, code_version(sources)).recall(("a rose",), never)


def test_what_was_imported_is_what_lies_there():
    assert code_version() == code_version(ROOT / "pipeline")


def test_another_release_of_a_library_is_another_key(store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch):
    store.recall(("a rose",), words)
    marks = "pipeline.store.embedding_store.library_marks"
    monkeypatch.setattr(marks, lambda *names: [*library_marks(*names[1:]), (names[0], 1, 1)])
    later = EmbeddingStore(store.folder, 2**20)
    assert same(later.recall(("a rose",), lambda: words(1)), words(1))


# Of the modules that an encoder imports, those that decide no number: they find, check, name and keep.
NO_NUMBERS = {
    "adapters/lora_families.py",
    "files/pixart_names.py",  # of a denoiser alone
    "families.py",  # what it says of a family is part of each key
    "family.py",
    "files/components.py", "files/content.py", "files/gguf_files.py", "files/hashing.py", "files/libraries.py",
    "files/safetensors_files.py", "files/single_file.py", "files/single_file_signs.py",
    "model_cache.py", "eviction.py", "residency.py",
}  # fmt: skip


def test_every_module_that_an_encoder_imports_is_on_one_side():
    """A new one must be put on a side by hand: whoever forgets it would serve old embeddings after an update."""
    imports: dict[str, set[str]] = {}
    for found in all_imports("pipeline"):
        module = ROOT.joinpath(*found.name.split(".")).with_suffix(".py")
        if found.relative and module.is_file():
            name = module.relative_to(ROOT / "pipeline").as_posix()
            imports.setdefault(found.file.relative_to("pipeline").as_posix(), set()).add(name)
    waiting = ["text_encoder.py", "image_encoder.py", "text/text_encoders.py", "adapters/lora.py"]
    reached: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting.extend(imports.get(name, ()))
    assert set(NUMBERS).isdisjoint(NO_NUMBERS) and len(set(NUMBERS)) == len(NUMBERS)
    assert reached == set(NUMBERS) | NO_NUMBERS
