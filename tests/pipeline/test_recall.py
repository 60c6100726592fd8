"""A prompt or a picture that was seen before needs no encoder: with the real stages, on real classes at tiny sizes."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.checkpoints import Checkpoint, open_checkpoint
from pipeline.files.content import Digests
from pipeline.image_encoder import encode_image
from pipeline.model_cache import ModelCache
from pipeline.residency import TorchResidency
from pipeline.store.embedding_store import EmbeddingStore
from pipeline.store.recall import recalled
from pipeline.text_encoder import encode_prompt
from tests.pipeline.family_folders import save_family
from tests.rig import ROOT


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


def test_a_copy_elsewhere_is_known_again(mini: Path, tmp_path: Path, store: EmbeddingStore, cache: ModelCache):
    recalled(store, encode_prompt, cache, open_checkpoint(mini), "a rose", None)
    copy = tmp_path / "elsewhere" / mini.name
    shutil.copytree(mini, copy, copy_function=shutil.copyfile)  # files of another time
    recalled(store, encode_prompt, cache, open_checkpoint(copy), "a rose", None)
    assert store.hits == 1


def misses(store: EmbeddingStore, cache: ModelCache, model: Checkpoint, prompt: str = "a rose") -> int:
    recalled(store, encode_prompt, cache, model, prompt, None)
    return store.misses


def test_the_switches_of_a_model_index_count(tmp_path: Path, store: EmbeddingStore, cache: ModelCache):
    folder = save_family("sdxl", tmp_path / "sdxl")
    assert misses(store, cache, open_checkpoint(folder)) == 1
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"force_zeros_for_empty_prompt": False}))
    changed = open_checkpoint(folder)
    assert misses(store, cache, changed) == 2
    negative = encode_prompt(cache, changed, "a rose", "").negative
    assert negative is not None and negative.tokens.abs().sum() > 0  # it does differ


def test_what_the_family_says_of_words_counts(mini: Path, store: EmbeddingStore, cache: ModelCache):
    model = open_checkpoint(mini)
    assert misses(store, cache, model) == 1
    changed = replace(model, family=replace(model.family, clip_layer=-2))
    assert misses(store, cache, changed) == 2
    assert misses(store, cache, model) == 2


def test_what_is_different_about_a_tokenizer_counts(tmp_path: Path, store: EmbeddingStore, cache: ModelCache):
    model = open_checkpoint(save_family("sd15", tmp_path / "sd15"))
    assert misses(store, cache, model) == 1
    tokenizer = replace(model.components["tokenizer"], options={"pad_token": "!"})
    padded = replace(model, components={**model.components, "tokenizer": tokenizer})
    assert misses(store, cache, padded) == 2


def test_the_denoiser_counts_where_it_stands_in_for_an_encoder(
    tmp_path: Path, store: EmbeddingStore, cache: ModelCache
):
    folder = save_family("sd3", tmp_path / "sd3")
    index = folder / "model_index.json"
    parts = json.loads(index.read_text())
    whole = open_checkpoint(folder)
    assert misses(store, cache, whole) == 1
    parts["text_encoder_3"] = parts["tokenizer_3"] = [None, None]
    index.write_text(json.dumps(parts))
    narrow = recalled(store, encode_prompt, cache, open_checkpoint(folder), "a rose", None)
    config = folder / "transformer" / "config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps(told | {"joint_attention_dim": told["joint_attention_dim"] + 8}))
    wide = recalled(store, encode_prompt, cache, open_checkpoint(folder), "a rose", None)
    assert store.misses == 3 and wide.tokens.shape[-1] == narrow.tokens.shape[-1] + 8


def test_a_first_hit_imports_no_model_class(mini: Path, tmp_path: Path, store: EmbeddingStore, cache: ModelCache):
    digests = Digests(tmp_path / "digests")
    recalled(store, encode_prompt, cache, open_checkpoint(mini, digests=digests), "a rose", None)
    code = (
        "import sys; from pathlib import Path; from pipeline.checkpoints import open_checkpoint\n"
        "from pipeline.files.content import Digests; from pipeline.model_cache import ModelCache\n"
        "from pipeline.residency import TorchResidency; from pipeline.text_encoder import encode_prompt\n"
        "from pipeline.store.embedding_store import EmbeddingStore; from pipeline.store.recall import recalled\n"
        "model, folder, digests = map(Path, sys.argv[1:])\n"
        "store, cache = EmbeddingStore(folder, 2**24), ModelCache(TorchResidency('cpu'), 2**30)\n"
        "checkpoint = open_checkpoint(model, digests=Digests(digests))\n"
        "recalled(store, encode_prompt, cache, checkpoint, 'a rose', None)\n"
        "print(store.hits, cache.stats().misses, 'transformers.models.clip.modeling_clip' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(mini), str(store.folder), str(tmp_path / "digests")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.stdout.split() == ["1", "0", "False"], done.stderr


def test_an_error_is_not_kept(mini: Path, store: EmbeddingStore, cache: ModelCache):
    for _ in range(2):
        with pytest.raises(ValueError, match="at most 20,000 characters"):
            recalled(store, encode_prompt, cache, open_checkpoint(mini), "a" * 30_000, None)
    assert not store.folder.exists()
