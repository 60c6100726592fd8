"""What is remembered of folders, with real folders whose times are set."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.files.listings import Entries, Listings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "one.txt").touch()
    rest(tmp_path / "inner", tmp_path)
    return tmp_path


@pytest.fixture
def names(folder: Path) -> Callable[[], list[str]]:
    listings = Listings()

    def look(entries: Entries) -> list[str]:
        looked.append(1)
        return [file.name for below in entries(str(folder)) if below.is_dir() for file in entries(below.path)]

    looked: list[int] = []

    def found() -> list[str]:
        looked.clear()
        return [*listings.found("names", look), *(["looked"] * len(looked))]

    return found


def rest(*folders: Path) -> None:
    """As if nothing had happened there for a minute."""
    for folder in folders:
        os.utime(folder, ns=(0, time.time_ns() - 60 * 10**9))


def test_nothing_is_looked_for_again_while_nothing_changes(names: Callable[[], list[str]], folder: Path):
    assert names() == ["one.txt", "looked"]
    assert names() == ["one.txt"]
    (folder / "inner" / "one.txt").write_text("a file that is written to is no other name")
    assert names() == ["one.txt"]


def test_what_is_added_renamed_or_removed_is_noticed(names: Callable[[], list[str]], folder: Path):
    names()
    (folder / "inner" / "two.txt").touch()
    assert names() == ["one.txt", "two.txt", "looked"]
    rest(folder / "inner")
    assert names() == ["one.txt", "two.txt", "looked"]
    (folder / "inner" / "two.txt").rename(folder / "inner" / "three.txt")
    assert names() == ["one.txt", "three.txt", "looked"]
    (folder / "other").mkdir()
    (folder / "other" / "four.txt").touch()
    assert names() == ["one.txt", "three.txt", "four.txt", "looked"]


def test_a_folder_that_changed_a_moment_ago_is_looked_into_again(names: Callable[[], list[str]], folder: Path):
    """Two changes within a tick of the file system's clock bear one time."""
    (folder / "inner" / "two.txt").touch()
    stamp = (folder / "inner").stat()
    assert names() == ["one.txt", "two.txt", "looked"]
    (folder / "inner" / "three.txt").touch()
    os.utime(folder / "inner", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert names() == ["one.txt", "three.txt", "two.txt", "looked"]


def test_a_folder_that_is_not_there_has_nothing_until_it_is_made(names: Callable[[], list[str]], folder: Path):
    (folder / "inner" / "one.txt").unlink()
    (folder / "inner").rmdir()
    folder.rename(folder.with_name("away"))
    assert names() == ["looked"]
    assert names() == []
    folder.with_name("away").rename(folder)
    assert names() == ["looked"]
