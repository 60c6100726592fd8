"""Encoders, language models and adapters are held once, whatever they are called, as a checkpoint's components are."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers

from pipeline.adapters.lora import open_lora
from pipeline.checkpoints import Checkpoint, open_checkpoint
from pipeline.files.content import Digests
from pipeline.image_encoder import encode_image
from pipeline.language.language_model import open_language_model
from pipeline.model_cache import ModelCache
from pipeline.text.text_encoders import encode_text, open_text_encoder
from pipeline.vision.image_encoders import open_image_encoder
from tests.pipeline.adapter_files import random_factors, save_peft
from tests.pipeline.family_folders import save_family
from tests.pipeline.language_models import save_llama
from tests.pipeline.test_image_encoders import MAKE, picture


@pytest.fixture
def eye(tmp_path: Path) -> Path:
    """A CLIP vision file, as models/clip_vision holds it."""
    torch.manual_seed(0)
    MAKE["clip"]().save_pretrained(tmp_path / "folder")
    return Path(shutil.copy(tmp_path / "folder/model.safetensors", tmp_path / "clip_vision_h.safetensors"))


def test_two_names_of_an_image_encoder_are_one_model(eye: Path, cache: ModelCache, shipped: Checkpoint):
    other = shutil.copy(eye, eye.with_name("open-clip.safetensors"))
    seen = [encode_image(cache, shipped, picture(), encoder=open_image_encoder(Path(path))) for path in (eye, other)]
    assert torch.equal(seen[0].tokens, seen[1].tokens)
    assert (len(cache.stats().entries), cache.stats().misses, cache.stats().hits) == (1, 1, 1)
    folder = open_image_encoder(eye.with_name("folder"))  # its config.json says what the header of the file shows
    with folder.use(cache) as ours, open_image_encoder(eye).use(cache) as theirs:
        assert ours is theirs


def test_a_changed_byte_makes_another_image_encoder(eye: Path, cache: ModelCache, shipped: Checkpoint):
    other = Path(shutil.copy(eye, eye.with_name("other.safetensors")))
    data = bytearray(other.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    other.write_bytes(data)
    for path in (eye, other):
        encode_image(cache, shipped, picture(), encoder=open_image_encoder(path))
    assert len(cache.stats().entries) == 2


def test_a_text_encoder_is_that_of_a_checkpoint(tmp_path: Path, cache: ModelCache):
    folder = save_family("sd15", tmp_path / "sd15")
    alone = tmp_path / "clip-l"
    shutil.copytree(folder / "text_encoder", alone)
    shutil.copytree(folder / "tokenizer", alone, dirs_exist_ok=True)
    checkpoint, encoder = open_checkpoint(folder), open_text_encoder(alone)
    with checkpoint.use(cache, "text_encoder") as ours, encoder.use(cache) as theirs:
        assert ours is theirs
    found = encode_text(cache, encoder, "a red rose")
    assert found.space.model.startswith("clip-l@") and cache.stats().misses == 1


def test_an_encoder_that_two_families_read_in_two_ways_is_no_replaced_file(tmp_path: Path, cache: ModelCache):
    """As SD 1.5 and SD 3 do clip_l, and FLUX.2 and Z-Image Qwen3."""
    folder = save_family("sd15", tmp_path / "sd15")
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    weights = other / "text_encoder/model.safetensors"
    weights.unlink()
    weights.symlink_to(folder / "text_encoder/model.safetensors")
    index = other / "model_index.json"
    index.write_text(index.read_text().replace('"CLIPTextModel"', '"CLIPTextModelWithProjection"'))
    checkpoints = open_checkpoint(folder), open_checkpoint(other)
    keys = [checkpoint.key("text_encoder") for checkpoint in checkpoints]
    assert keys[0] != keys[1] and keys[0].path == keys[1].path
    for key in (*keys, *keys):
        with cache.use(key, lambda: torch.nn.Linear(2, 2)):
            pass
    assert (cache.stats().misses, cache.stats().hits, cache.stats().evictions) == (2, 2, 0)


def test_two_folders_of_a_language_model_are_one_and_its_end_is_part_of_it(tmp_path: Path, cache: ModelCache):
    first = save_llama(tmp_path / "one")
    second = Path(shutil.copytree(first, tmp_path / "two"))
    with open_language_model(first).use(cache) as ours, open_language_model(second).use(cache) as theirs:
        assert ours is theirs
    transformers.GenerationConfig(eos_token_id=3).save_pretrained(second)
    with open_language_model(first).use(cache) as ours, open_language_model(second).use(cache) as theirs:
        assert ours is not theirs


def test_two_names_of_a_lora_are_one(tmp_path: Path, cache: ModelCache):
    plain = open_checkpoint(save_family("sd15", tmp_path / "sd15"))
    factors = random_factors(plain.build("unet"), lambda name: name.endswith("to_k"))
    path = save_peft(tmp_path / "ink.safetensors", {"unet": factors})
    other = Path(shutil.copy(path, tmp_path / "ink-v1.safetensors"))
    loras = [open_lora(plain, each, 0.5) for each in (path, other)]
    with loras[0].use(cache, torch.float32) as ours, loras[1].use(cache, torch.float32) as theirs:
        assert ours is theirs
    assert loras[0].identity == loras[1].identity


def test_the_weights_are_read_once_to_be_told_apart(eye: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "digests"
    first = open_image_encoder(eye, Digests(folder)).key(torch.float32)
    monkeypatch.setattr("pipeline.files.content.hash_spans", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr("pipeline.files.content.load_class", lambda *_: pytest.fail("a library was imported"))
    assert open_image_encoder(eye, Digests(folder)).key(torch.float32) == first
