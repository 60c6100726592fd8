"""Weights are hashed on several threads; who asks is told how far it is, and may end it."""

import json
import struct
import threading
import time
from pathlib import Path

import pytest

from pipeline.files.components import Component
from pipeline.files.content import Content, Digests
from pipeline.files.hashing import Span, hash_spans, pieces_of
from pipeline.files.safetensors_files import CheckpointError

GIGABYTE = 2**30


class InterruptProcessingException(Exception):
    """As the host's, which is raised where its progress is told."""


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A gigabyte of noughts in four tensors, which takes no room on disk, and about a second to hash."""
    header = json.dumps(
        {
            f"layers.{number}.weight": {
                "dtype": "F16",
                "shape": [GIGABYTE // 8],
                "data_offsets": [number * GIGABYTE // 4, (number + 1) * GIGABYTE // 4],
            }
            for number in range(4)
        }
    ).encode()
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + GIGABYTE)
    (tmp_path / "config.json").write_text("{}")
    return path


def part(path: Path) -> Component:
    return Component("vae", "diffusers", "AutoencoderTiny", path.with_name("config.json"), (path,))


def test_an_interrupt_ends_the_reading_and_nothing_of_it_is_remembered(large: Path, tmp_path: Path):
    seen: list[int] = []
    threads = threading.active_count()

    def watch(name: str, size: int):
        assert (name, size) == (tmp_path.name, GIGABYTE)

        def on_read(read: int) -> None:
            assert threading.current_thread() is threading.main_thread()
            seen.append(read)
            if interrupted:
                raise InterruptProcessingException

        return on_read

    interrupted = True
    digests = Digests(tmp_path / "digests", watch)
    started = time.perf_counter()
    with pytest.raises(InterruptProcessingException):
        digests.of(part(large))
    spent = time.perf_counter() - started
    assert len(seen) == 1 and seen[0] < GIGABYTE, "it was read to its end"
    assert threading.active_count() == threads, "a thread still reads"
    known = json.loads((tmp_path / "digests/weights.json").read_text())
    assert not [place for place in known if "model.safetensors" in place]
    interrupted = False
    whole = digests.of(part(large))
    assert isinstance(whole, Content) and whole.bytes == GIGABYTE == seen[-1]
    assert spent < time.perf_counter() - started - spent, "an interrupt took longer than all of it"


def test_a_file_that_ends_early_is_named(tmp_path: Path):
    path = tmp_path / "short"
    path.write_bytes(bytes(100))
    with pytest.raises(CheckpointError, match="short is truncated: 50 bytes are missing"):
        hash_spans([Span(path, 0, 10), Span(path, 50, 150)])


def test_pieces_are_the_whole_and_their_order_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.files.hashing._PIECE", 7)
    path = tmp_path / "any.gguf"
    path.write_bytes(bytes(range(20)))
    pieces = pieces_of(path)
    assert [(piece.start, piece.stop) for piece in pieces] == [(0, 7), (7, 14), (14, 20)]
    assert len(set(hash_spans(pieces))) == 3 and hash_spans([]) == []
    content = Digests().of_network((path,), "", "LlamaForCausalLM", {})
    path.write_bytes(bytes([*range(7, 14), *range(7), *range(14, 20)]))
    assert Digests().of_network((path,), "", "LlamaForCausalLM", {}).digest != content.digest
