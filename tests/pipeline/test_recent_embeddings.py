"""What was made lately, held in memory before the disk."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pipeline.checkpoints import Checkpoint
from pipeline.conditioning import PromptEmbeds, Space
from pipeline.fusion import fuse
from pipeline.generation import generate
from pipeline.model_cache import ModelCache
from pipeline.store.embedding_files import bytes_of
from pipeline.store.embedding_store import EmbeddingStore
from pipeline.store.recall import recalled
from pipeline.store.recent_embeddings import RecentEmbeddings
from pipeline.text_encoder import encode_prompt


def words(number: int) -> PromptEmbeds:
    tokens = torch.full((1, 4, 8), float(number))
    return PromptEmbeds(tokens, tokens[:, 0], torch.ones(1, 4, dtype=torch.bool), Space("m", "l", 8))


SIZE = bytes_of(words(0))


def never() -> PromptEmbeds:
    raise AssertionError("it was made again")


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return EmbeddingStore(tmp_path / "store", 2**20, recent_bytes=3 * SIZE)


def test_what_was_made_lately_needs_no_disk(store: EmbeddingStore):
    made = store.recall(("a rose",), lambda: words(1))
    (path,) = store.folder.iterdir()
    path.unlink()
    again = store.recall(("a rose",), never)
    assert torch.equal(made.tokens, again.tokens) and again.space == made.space
    assert (store.hits, store.misses) == (1, 1)


def test_what_comes_from_the_disk_is_not_copied(store: EmbeddingStore):
    """The copy takes as long as reading it did, and the first prompt after a start would wait for it."""
    EmbeddingStore(store.folder, 2**20).recall(("a rose",), lambda: words(1))
    assert float(store.recall(("a rose",), never).tokens[0, 0, 0]) == 1
    assert store.recent.bytes_held == 0


def test_the_disk_knows_what_memory_served(store: EmbeddingStore):
    """Or the next process would let go of the prompts that are used most."""
    store.recall(("a rose",), lambda: words(1))
    (path,) = store.folder.iterdir()
    os.utime(path, (1, 1))
    store.recall(("a rose",), never)
    assert path.stat().st_mtime > 1


def test_whoever_made_it_may_go_on_with_it(store: EmbeddingStore):
    made = store.recall(("a rose",), lambda: words(1))
    made.tokens.zero_()
    assert float(store.recall(("a rose",), never).tokens.mean()) == 1


def test_what_it_gives_is_as_it_was_after_it_was_drawn_with(warm: ModelCache, shipped: Checkpoint, tmp_path: Path):
    """It is shared: whatever changed it in place would change all that is drawn later."""
    store = EmbeddingStore(tmp_path, 2**24, recent_bytes=2**24)
    given, drawn = [], []
    for _ in range(3):
        embeds = recalled(store, encode_prompt, warm, shipped, "a red rose", "blue")
        before = embeds.tokens.clone(), None if embeds.pooled is None else embeds.pooled.clone()
        condition = fuse(warm, shipped, embeds, None)
        pictures = generate(
            warm, shipped, condition, seed=1, num_inference_steps=2, guidance_scale=2.0, width=64, height=64
        )
        assert torch.equal(before[0], embeds.tokens)
        assert before[1] is None or (embeds.pooled is not None and torch.equal(before[1], embeds.pooled))
        given.append(embeds)
        drawn.append(pictures.pixels)
    assert store.hits == 2 and given[1] is given[2]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[1], drawn[2])


def test_the_least_recently_used_make_way():
    recent = RecentEmbeddings(3 * SIZE)
    for number in range(3):
        recent.put(str(number), words(number))
    assert recent.get("0") is not None  # and so 1 is the oldest
    recent.put("3", words(3))
    assert recent.get("1") is None
    assert all(recent.get(name) is not None for name in "023")
    recent.put("3", words(4))
    assert recent.bytes_held == 3 * SIZE


def test_one_that_is_too_large_is_not_held_and_none_makes_way_for_it():
    recent = RecentEmbeddings(SIZE)
    recent.put("small", words(0))
    large = PromptEmbeds(torch.zeros(1, 64, 8), None, torch.ones(1, 64, dtype=torch.bool), Space("m", "l", 8))
    recent.put("large", large)
    assert recent.get("large") is None and recent.get("small") is not None


def test_it_lets_go_of_all(store: EmbeddingStore):
    store.recall(("a rose",), lambda: words(1))
    assert store.recent.clear() == SIZE
    assert (store.recent.bytes_held, store.recent.get("x")) == (0, None)
    store.recall(("a rose",), never)  # from the disk
    store.clear()
    assert store.recent.bytes_held == 0
    with pytest.raises(AssertionError, match="made again"):
        store.recall(("a rose",), never)


def test_threads_share_it():
    recent = RecentEmbeddings(5 * SIZE)

    def work(seed: int) -> bool:
        for number in range(200):
            name = str((number * seed) % 11)
            found = recent.get(name)
            if found is not None and float(found.tokens[0, 0, 0]) != float(name):
                return False
            recent.put(name, words(int(name)))
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, (1, 2, 3, 5)))
    assert 0 < recent.bytes_held <= 5 * SIZE
