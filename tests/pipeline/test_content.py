"""The same weights are held once, whatever folder or file they came from; other weights never pass for them."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoints import CheckpointError, open_checkpoint
from pipeline.files.content import Digests
from pipeline.model_cache import ModelCache
from tests.pipeline.family_folders import save_family
from tests.pipeline.folders import save_mini
from tests.pipeline.test_single_file import flux_in_diffusers_names, stable_diffusion


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Two models, trained apart, with the same text encoder and VAE."""
    first, second = save_family("sd15", tmp_path / "one"), save_family("sd15", tmp_path / "two", seed=1)
    for component in ("text_encoder", "vae"):
        shutil.rmtree(second / component)
        shutil.copytree(first / component, second / component)
    return first, second


def test_two_folders_hold_what_they_share_once(two: tuple[Path, Path], cache: ModelCache):
    first, second = map(open_checkpoint, two)
    for component in ("text_encoder", "vae"):
        with first.use(cache, component) as ours, second.use(cache, component) as theirs:
            assert ours is theirs
    with first.use(cache, "unet") as ours, second.use(cache, "unet") as theirs:
        assert ours is not theirs
    assert [entry.key.component for entry in cache.stats().entries] == ["text_encoder", "vae", "unet", "unet"]


def test_where_a_configuration_came_from_does_not_matter_and_what_it_says_does(two: tuple[Path, Path]):
    first, second = map(open_checkpoint, two)
    assert first.key("vae") == second.key("vae")
    path = two[1] / "vae/config.json"
    config = json.loads(path.read_text())
    said = {name: value for name, value in config.items() if name not in ("sample_size", "act_fn")}  # the defaults
    path.write_text(json.dumps(said | {"_name_or_path": "elsewhere", "_diffusers_version": "0.1"}))
    assert first.key("vae") == second.key("vae")
    path.write_text(json.dumps(config | {"scaling_factor": 0.5}))
    assert first.key("vae") != second.key("vae")


def test_the_component_in_another_model_has_another_name_and_is_the_same(tmp_path: Path, cache: ModelCache):
    first = save_family("flux_dev", tmp_path / "flux")
    second = save_family("sd3", tmp_path / "sd3")
    shutil.rmtree(second / "text_encoder_3")
    shutil.copytree(first / "text_encoder_2", second / "text_encoder_3")
    flux, sd3 = open_checkpoint(first), open_checkpoint(second)
    with flux.use(cache, "text_encoder_2") as ours, sd3.use(cache, "text_encoder_3") as theirs:
        assert ours is theirs


def test_one_byte_in_the_middle_makes_another_model(tmp_path: Path, two: tuple[Path, Path]):
    first, second = map(open_checkpoint, two)
    path = two[1] / "vae/diffusion_pytorch_model.safetensors"
    place = path.stat().st_size * 2 // 3
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    assert first.key("vae") != second.key("vae")


def test_swapped_names_make_another_model(two: tuple[Path, Path]):
    first, second = map(open_checkpoint, two)
    path = two[1] / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    one, other = "encoder.down_blocks.0.resnets.0.conv1.weight", "encoder.down_blocks.0.resnets.0.conv2.weight"
    weights[one], weights[other] = weights[other], weights[one]
    save_file(weights, path)
    assert first.key("vae") != second.key("vae")


def test_shards_are_the_whole_that_they_make(two: tuple[Path, Path]):
    first, second = map(open_checkpoint, two)
    whole = two[1] / "unet/diffusion_pytorch_model.safetensors"
    shutil.copy(two[0] / "unet/diffusion_pytorch_model.safetensors", whole)
    weights = load_file(whole)
    whole.unlink()
    shards = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(weights)}
    for shard in set(shards.values()):
        save_file({name: weights[name] for name in weights if shards[name] == shard}, whole.with_name(shard))
    whole.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert open_checkpoint(two[1]).key("unet") == first.key("unet")
    assert second.key("vae") == first.key("vae")


def test_a_folder_and_a_single_file_share_what_is_named_alike(tmp_path: Path, cache: ModelCache):
    folder = save_family("sd15", tmp_path / "folder")
    path = stable_diffusion(folder, tmp_path / "sd15.safetensors")[0]
    checkpoints = open_checkpoint(folder), open_checkpoint(path, config=folder)
    with checkpoints[0].use(cache, "text_encoder") as ours, checkpoints[1].use(cache, "text_encoder") as theirs:
        assert ours is theirs
    assert checkpoints[0].key("unet") != checkpoints[1].key("unet")  # other names; see docs/families.md
    folder = save_family("flux_dev", tmp_path / "flux")
    path, *further = flux_in_diffusers_names(folder, tmp_path / "flux.safetensors")
    checkpoints = open_checkpoint(folder), open_checkpoint(path, further, config=folder)
    for component in ("transformer", "text_encoder", "text_encoder_2"):
        assert checkpoints[0].key(component) == checkpoints[1].key(component)


def test_a_replaced_file_is_another_model_and_its_twin_stays(two: tuple[Path, Path], cache: ModelCache):
    first, second = map(open_checkpoint, two)
    with first.use(cache, "vae") as before, second.use(cache, "vae"):
        pass
    other = save_family("sd15", two[0].with_name("three"), seed=2) / "vae/diffusion_pytorch_model.safetensors"
    shutil.copy(other, two[1] / "vae/diffusion_pytorch_model.safetensors")
    with second.use(cache, "vae") as replaced, first.use(cache, "vae") as after:
        assert replaced is not before
        assert after is before
    assert second.key("vae").replaces(first.key("vae")) is False
    shutil.copy(other, two[0] / "vae/diffusion_pytorch_model.safetensors")
    with first.use(cache, "vae") as after:
        assert after is replaced


def test_a_digest_is_remembered_on_disk_until_the_file_changes(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "cache"
    key = open_checkpoint(mini, digests=Digests(folder)).key("unet")
    monkeypatch.setattr("pipeline.files.content.hash_spans", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr("pipeline.files.content.load_class", lambda *_: pytest.fail("a library was imported"))
    again = open_checkpoint(mini, digests=Digests(folder))
    assert again.key("unet") == key
    monkeypatch.undo()
    save_mini(mini, seed=1)
    os.utime(mini / "unet/diffusion_pytorch_model.safetensors")
    assert again.key("unet") != key
    for spoiled in ("{", "[]", '{"a": 1}', '{"a": ["b", "c"]}'):
        (folder / "weights.json").write_text(spoiled)
        assert open_checkpoint(mini, digests=Digests(folder)).key("unet") == again.key("unet")
    assert [path.name for path in folder.iterdir()] == ["weights.json"]


def test_large_configurations_do_not_fill_what_is_remembered(mini: Path, tmp_path: Path):
    folder, weights = tmp_path / "cache", [mini / "unet/diffusion_pytorch_model.safetensors"]
    for number in range(3):
        Digests(folder).of_network(weights, "", "LoRA", {"settings": f"{number}" * 2**20})
    assert (folder / "weights.json").stat().st_size < 10_000


def test_a_disk_that_cannot_be_written_costs_only_the_memory(mini: Path, tmp_path: Path):
    (tmp_path / "cache").write_text("a file where a folder is wanted")
    digests = Digests(tmp_path / "cache")
    assert open_checkpoint(mini, digests=digests).key("unet") == open_checkpoint(mini).key("unet")


def test_a_full_disk_leaves_no_part_behind(mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pipeline.files.content.os.replace", full)
    key = open_checkpoint(mini, digests=Digests(tmp_path / "cache")).key("unet")
    monkeypatch.undo()
    assert key == open_checkpoint(mini).key("unet") and list((tmp_path / "cache").iterdir()) == []


def test_a_file_that_went_is_named(mini: Path):
    checkpoint = open_checkpoint(mini)
    path = mini / "unet/diffusion_pytorch_model.safetensors"
    path.unlink()
    with pytest.raises(CheckpointError, match="which was there before"):
        checkpoint.key("unet")
    torch.save({}, path)
    with pytest.raises(CheckpointError, match="a zip archive"):
        checkpoint.key("unet")
