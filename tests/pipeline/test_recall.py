"""A prompt or a picture that was seen before needs no encoder: with the real stages, on real classes at tiny sizes."""

from pathlib import Path

import pytest
import torch

from pipeline.checkpoints import open_checkpoint
from pipeline.image_encoder import encode_image
from pipeline.model_cache import ModelCache
from pipeline.residency import TorchResidency
from pipeline.store.embedding_store import EmbeddingStore
from pipeline.store.recall import recalled
from pipeline.text_encoder import encode_prompt


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return EmbeddingStore(tmp_path / "store", 2**24)


def fresh_cache() -> ModelCache:
    return ModelCache(TorchResidency("cpu"), budget_bytes=2**30)


def pictures(seed: int = 0) -> torch.Tensor:
    return torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(seed))


def test_words_seen_before_need_no_encoder(mini: Path, store: EmbeddingStore, cache: ModelCache):
    first = recalled(store, encode_prompt, cache, open_checkpoint(mini), "a rose", None)
    later = fresh_cache()
    again = recalled(store, encode_prompt, later, open_checkpoint(mini), "a rose", None)
    assert later.stats().misses == 0
    assert (again.tokens.equal(first.tokens), again.space, again.notices) == (True, first.space, first.notices)
    assert first.pooled is not None and again.pooled is not None and again.pooled.equal(first.pooled)
    plain = encode_prompt(later, open_checkpoint(mini), "a rose", None)
    assert again.tokens.equal(plain.tokens) and again.mask.equal(plain.mask)


def test_a_picture_seen_before_needs_no_encoder(mini: Path, store: EmbeddingStore, cache: ModelCache):
    checkpoint = open_checkpoint(mini)
    first = recalled(store, encode_image, cache, checkpoint, pictures(), None, encoder="model")
    again = recalled(store, encode_image, fresh_cache(), checkpoint, pictures(), None, encoder="model")
    assert again.tokens.equal(first.tokens) and store.hits == 1
    recalled(store, encode_image, cache, checkpoint, pictures(1), None, encoder="model")
    recalled(store, encode_image, cache, checkpoint, pictures(), torch.ones(1, 40, 40), encoder="model")
    assert store.hits == 1, "other pixels, or a mask, are another picture"


def test_other_words_and_other_files_are_encoded(mini: Path, store: EmbeddingStore, cache: ModelCache):
    def encode(prompt: str, negative: str | None = None) -> None:
        recalled(store, encode_prompt, cache, open_checkpoint(mini), prompt, negative)

    encode("a rose")
    encode("a rose", "a car")
    encode("a car")
    assert store.hits == 0
    for file in ("tokenizer/tokenizer.json", "text_encoder/config.json"):
        path = mini / file
        path.write_text(path.read_text() + " ")
        encode("a rose")
        assert store.hits == 0, file
    encode("a rose")
    assert store.hits == 1
    (mini / "unet" / "config.json").touch()
    encode("a rose")
    assert store.hits == 2, "the denoiser says nothing about words"


def test_an_error_is_not_kept(mini: Path, store: EmbeddingStore, cache: ModelCache):
    for _ in range(2):
        with pytest.raises(ValueError, match="at most 20,000 characters"):
            recalled(store, encode_prompt, cache, open_checkpoint(mini), "a" * 30_000, None)
    assert not store.folder.exists()
