"""Embeddings on disk: what comes back, how long it stays, and what becomes of spoilt files."""

import json
import os
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.conditioning import FusedConditioning, ImageFeatures, PromptEmbeds, Space
from pipeline.files.safetensors_files import CheckpointError
from pipeline.store.embedding_files import Embeddings, read_embeddings, write_embeddings
from pipeline.store.embedding_store import EmbeddingStore, digest_of
from tests.rig import ROOT


def words(seed: int = 0, length: int = 5) -> PromptEmbeds:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(1, length, 8, generator=generator)
    mask = torch.arange(length)[None] < 3
    return PromptEmbeds(tokens, tokens.mean(dim=1), mask, Space("model/text_encoder@1", "last", 8), notices=("one",))


def picture() -> ImageFeatures:
    tokens = torch.randn(2, 8, 4).transpose(1, 2)  # laid out as encode_image gives it
    return ImageFeatures(tokens, tokens.mean(dim=1), (2, 2), Space("model/image_encoder@1", "pooler", 8))


def fused() -> FusedConditioning:
    return FusedConditioning(
        torch.randn(1, 4, 8).half(), None, torch.ones(1, 4, dtype=torch.bool), Space("m", "grid", 8), grid=(2, 2)
    )


ALL = {
    "words": words(),
    "with a negative": replace(words(), pooled=None, negative=words(1, length=7)),
    "bfloat16": replace(words(), tokens=words().tokens.bfloat16()),
    "picture": picture(),
    "fused": replace(fused(), negative=fused()),
}


def same(one: Embeddings, other: Embeddings) -> bool:
    """To the bit, whatever the layout."""
    return repr_of(one) == repr_of(other)


def repr_of(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return (value.dtype, tuple(value.shape), value.contiguous().view(torch.uint8).numpy().tobytes())
    if hasattr(value, "__dataclass_fields__"):
        return (type(value), [(name, repr_of(getattr(value, name))) for name in value.__dataclass_fields__])  # type: ignore[attr-defined]
    return value


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return EmbeddingStore(tmp_path / "store", 2**20)


def never() -> PromptEmbeds:
    raise AssertionError("it was made again")


@pytest.mark.parametrize("value", ALL.values(), ids=ALL)
def test_a_file_gives_back_every_bit(value: Embeddings, tmp_path: Path):
    path = tmp_path / "saved.safetensors"
    assert write_embeddings(path, value) == path.stat().st_size
    assert same(read_embeddings(path), value)
    assert list(tmp_path.iterdir()) == [path]


def test_a_prompt_seen_before_is_not_encoded_again(store: EmbeddingStore):
    first = store.recall(("a rose", None, 1.0), words)
    again = store.recall(("a rose", None, 1.0), never)
    assert same(first, words()) and same(again, words())
    assert (store.hits, store.misses) == (1, 1)
    other = store.recall(("a rose", None, 2.0), lambda: words(1))
    assert not same(other, first)


def test_both_ways_lie_alike_in_memory(store: EmbeddingStore):
    made, stored = store.recall(("p",), picture), store.recall(("p",), picture)
    assert made.tokens.stride() == stored.tokens.stride()


def test_it_survives_a_restart(store: EmbeddingStore):
    store.recall(("a rose",), words)
    code = (
        "import sys; from pathlib import Path; from pipeline.store.embedding_store import EmbeddingStore\n"
        "value = EmbeddingStore(Path(sys.argv[1]), 2**20).recall(('a rose',), lambda: sys.exit('made again'))\n"
        "print(float(value.tokens.sum()), value.notices)"
    )
    command = [sys.executable, "-c", code, str(store.folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{float(words().tokens.sum())} ('one',)"


def test_the_least_recently_used_make_way(store: EmbeddingStore):
    size = write_embeddings(store.folder.parent / "one.safetensors", words())
    small = EmbeddingStore(store.folder, int(3.5 * size))
    for number in range(3):
        small.recall((number,), words)
        os.utime(max(store.folder.iterdir(), key=lambda path: path.stat().st_mtime_ns), ns=(number, number))
    small.recall((0,), never)  # and so 1 is the oldest
    small.recall((3,), words)
    for number in (0, 2, 3):
        small.recall((number,), never)
    with pytest.raises(AssertionError, match="made again"):
        small.recall((1,), never)
    assert sum(path.stat().st_size for path in store.folder.iterdir()) <= 3.5 * size


def test_a_restart_knows_what_lies_there(store: EmbeddingStore):
    for number in range(10):
        store.recall((number,), words)
    size = next(store.folder.iterdir()).stat().st_size
    EmbeddingStore(store.folder, 4 * size).recall((10,), words)
    assert len(list(store.folder.iterdir())) == 4


def spoil(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    match how:
        case "truncated":
            path.write_bytes(data[:-10])
        case "empty":
            path.write_bytes(b"")
        case "a bit of a tensor":
            data[-1] ^= 1
            path.write_bytes(data)
        case "a web page":
            path.write_text("<!DOCTYPE html><html></html>")
        case "a pickle":
            path.write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
        case "other weights":
            save_file({"tokens": torch.zeros(1, 2, 3)}, path)
        case "a class that is not ours":
            value = {"type": "Popen", "fields": {"args": "false"}}
            _write(path, {"format": "duet-embeddings-1", "crc32": 0, "value": value})
        case "deep notes":
            _write(path, '{"format": ' + "[" * 100_000)
        case "no space":
            tensors = {"tensor-0": torch.zeros(1, 2, 3)}
            value = {"type": "ImageFeatures", "fields": {"tokens": {"tensor": "tensor-0"}, "pooled": None}}
            value["fields"] |= {"grid": None, "space": "here"}
            notes = {"format": "duet-embeddings-1", "crc32": zlib.crc32(bytes(24)), "value": value}
            save_file(tensors, path, {"duet": json.dumps(notes)})
        case "a type that has no number":
            data[8:] = data[8:].replace(b'"F32"', b'"U32"')
            path.write_bytes(data)
        case "a header bomb":
            path.write_bytes(struct.pack("<Q", 2**40) + b"{" + bytes(1000))


def _write(path: Path, notes: object) -> None:
    save_file({}, path, {"duet": notes if isinstance(notes, str) else json.dumps(notes)})


def test_a_tensor_that_begins_at_an_odd_byte_is_read(tmp_path: Path):
    """safetensors writes none, and its format allows them."""
    path = tmp_path / "odd.safetensors"
    write_embeddings(path, words())
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    notes = header.pop("__metadata__")
    by_size = sorted(header, key=lambda name: header[name]["dtype"] != "BOOL")  # those of an odd size first
    stop, pieces = 0, []
    for name in by_size:
        start, was = header[name]["data_offsets"]
        pieces.append(data[end + start : end + was])
        header[name]["data_offsets"] = [stop, stop + was - start]
        stop += was - start
    text = json.dumps(header | {"__metadata__": notes}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(pieces))
    assert any(entry["data_offsets"][0] % 2 for entry in header.values())
    assert same(read_embeddings(path), words())


SPOILS = [
    "truncated", "empty", "a bit of a tensor", "a web page", "a pickle", "other weights", "a class that is not ours",
    "deep notes", "no space", "a type that has no number", "a header bomb",
]  # fmt: skip


@pytest.mark.parametrize("how", SPOILS)
def test_a_file_that_is_not_what_it_should_be_is_replaced(store: EmbeddingStore, how: str):
    store.recall(("a rose",), words)
    (path,) = store.folder.iterdir()
    spoil(path, how)
    with pytest.raises(CheckpointError, match=path.name):
        read_embeddings(path)
    assert same(store.recall(("a rose",), lambda: words(2)), words(2))
    assert same(store.recall(("a rose",), never), words(2))
    assert list(store.folder.iterdir()) == [path]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (replace(fused(), grid=(0, 0)), "expected a grid .* for 4 tokens"),
        (replace(fused(), grid=(3, 1)), "expected a grid .* for 4 tokens"),
        (replace(fused(), grid=(2.0, 2)), "expected a grid .* for 4 tokens"),  # type: ignore[arg-type]
        (replace(picture(), grid=(2, 1)), "expected a grid .* for 4 tokens"),
        (replace(picture(), pooled=None), "expected pooled features"),  # type: ignore[arg-type]
    ],
)
def test_a_file_of_shapes_that_do_not_fit_is_refused(value: Embeddings, said: str, tmp_path: Path):
    write_embeddings(tmp_path / "odd.safetensors", value)
    with pytest.raises(CheckpointError, match=said):
        read_embeddings(tmp_path / "odd.safetensors")


def test_what_a_killed_process_left_goes_and_other_files_stay(store: EmbeddingStore):
    store.folder.mkdir()
    left = store.folder / f"{'a' * 64}.{'b' * 32}.part"
    fresh = store.folder / f"{'c' * 64}.{'d' * 32}.part"
    other = store.folder / "notes.txt"
    for path in (left, fresh, other):
        path.write_bytes(bytes(100))
    os.utime(left, (1, 1))
    store.recall(("a rose",), words)
    assert (left.exists(), fresh.exists(), other.exists()) == (False, True, True)
    assert store.clear() > 0
    assert {path.name for path in store.folder.iterdir()} == {fresh.name, other.name}


def test_a_folder_that_cannot_be_written_costs_no_result(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").write_text("in the way")
    store = EmbeddingStore(tmp_path / "file" / "store", 2**20)
    assert same(store.recall(("a rose",), words), words())
    assert "embeddings are not kept" in caplog.text


def test_a_disk_that_fills_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(self: Path, data: bytes) -> int:
        with open(self, "wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    store = EmbeddingStore(tmp_path, 2**20)
    assert same(store.recall(("a rose",), words), words())
    assert list(tmp_path.iterdir()) == []


def test_threads_share_a_folder(store: EmbeddingStore):
    other = EmbeddingStore(store.folder, 2**12)  # so small that it removes what the first has just written

    def work(seed: int) -> bool:
        mine = (store, other)[seed % 2]
        return all(
            same(mine.recall((number,), lambda number=number: words(number)), words(number)) for number in range(20)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert [path for path in store.folder.iterdir() if path.suffix == ".part"] == []


def test_a_digest_tells_apart_what_differs():
    parts = [
        ("ab", "c"), ("a", "bc"), ("abc",), (1,), (1.0,), (True,), ("1",), (None,), ("None",), ((1, 2), 3), (1, (2, 3)),
        (torch.zeros(2, 3),), (torch.zeros(3, 2),), (torch.zeros(2, 3).double(),), (torch.zeros(6).bool(),), ([],), (),
        ({"a": 1},), ({"a": 2},), (torch.tensor([-0.0]),), (torch.tensor([0.0]),), ("\udcff",),
    ]  # fmt: skip
    assert len({digest_of(*part) for part in parts}) == len(parts)
    assert digest_of(torch.arange(6.0).reshape(2, 3).T) == digest_of(torch.tensor([[0.0, 3], [1, 4], [2, 5]]))
    with pytest.raises(TypeError, match="got object"):
        digest_of(object())
