import copy
import inspect
import json
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.checkpoints import CheckpointError, fresh_scheduler, open_checkpoint
from pipeline.files.components import _SCHEDULERS
from pipeline.mini.parts import ship
from pipeline.model_cache import ModelCache
from tests.pipeline.devices import FakeDevice
from tests.pipeline.family_folders import FAMILY_FOLDERS, save_family
from tests.pipeline.folders import MODELS, save_mini


def test_the_small_model_opens_and_every_part_is_built(saved: Path, cache: ModelCache):
    checkpoint = open_checkpoint(saved / "mini")
    assert (checkpoint.family.name, checkpoint.family.fixed_size) == ("Duet mini", True)
    for component in MODELS:
        with checkpoint.use(cache, component) as model:
            assert type(model).__name__ == checkpoint.components[component].class_name
            assert not model.training
            assert not any(parameter.requires_grad for parameter in model.parameters())
            assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert checkpoint.tokenizer()("a rose")["input_ids"] == [2, 4, 5, 3]
    assert checkpoint.has("fusion") and not checkpoint.has("text_encoder_2")


def test_a_stable_diffusion_folder_opens_and_every_part_is_built(saved: Path, cache: ModelCache):
    checkpoint = open_checkpoint(saved / "sd15")
    assert checkpoint.family.pads_to_window
    assert not {"safety_checker", "feature_extractor", "image_encoder"} & set(checkpoint.components)
    for component in ("text_encoder", "unet", "vae"):
        with checkpoint.use(cache, component) as model:
            assert type(model).__name__ == checkpoint.components[component].class_name
    assert type(checkpoint.scheduler()).__name__ == "PNDMScheduler"
    assert checkpoint.tokenizer().model_max_length == 77


def test_the_weights_are_those_of_the_file(saved: Path):
    built = open_checkpoint(saved / "mini").build("fusion")
    assert isinstance(built, nn.Module)
    for name, stored in load_file(saved / "mini/fusion/diffusion_pytorch_model.safetensors").items():
        assert torch.equal(built.state_dict()[name], stored.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_dtype_can_be_chosen(saved: Path, dtype: torch.dtype):
    checkpoint = open_checkpoint(saved / "mini")
    for component in MODELS:
        built = checkpoint.build(component, dtype)
        assert {parameter.dtype for parameter in built.parameters()} == {dtype}
        assert checkpoint.key(component, dtype).dtype == dtype


def test_the_device_chooses_the_dtype(saved: Path, cache: ModelCache):
    device = ModelCache(FakeDevice(), budget_bytes=2**30)
    for folder, on_device in (("mini", torch.float32), ("sd15", torch.float16)):
        checkpoint = open_checkpoint(saved / folder)
        with checkpoint.use(cache, "unet") as unet:
            assert unet.dtype == torch.float32
        with checkpoint.use(device, "unet") as unet:
            assert unet.dtype == on_device


def test_built_in_inference_mode_it_can_still_be_refined(saved: Path):
    checkpoint = open_checkpoint(saved / "mini")
    with torch.inference_mode():
        built = {component: checkpoint.build(component, torch.float16) for component in MODELS}
    for model in built.values():
        assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
    latents = torch.zeros(1, 32, 8, 8, dtype=torch.float16, requires_grad=True)
    built["unet"](latents, 1, encoder_hidden_states=torch.zeros(1, 1, 16).half()).sample.sum().backward()
    assert latents.grad is not None


def test_threads_build_side_by_side(saved: Path):
    checkpoint = open_checkpoint(saved / "mini")
    wanted = [(component, dtype) for component in MODELS for dtype in (torch.float32, torch.float16)]
    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(lambda each: checkpoint.build(*each), wanted * 2))
    for (_, dtype), model in zip(wanted * 2, built, strict=True):
        assert {(parameter.dtype, parameter.device.type) for parameter in model.parameters()} == {(dtype, "cpu")}
    assert torch.get_default_dtype() == torch.float32


def test_a_scheduler_is_fresh_and_a_tokenizer_is_shared(saved: Path):
    checkpoint = open_checkpoint(saved / "mini")
    assert checkpoint.scheduler() is not checkpoint.scheduler()
    assert checkpoint.tokenizer() is checkpoint.tokenizer()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", sorted(_SCHEDULERS["diffusers"]))
def test_a_fresh_scheduler_walks_alike_and_leaves_the_first_as_it_was(name: str):
    kept = getattr(diffusers, name)()
    before = state(kept)
    first, second = (walked(fresh_scheduler(kept)) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(first, walked(copy.deepcopy(kept)))
    assert state(kept) == before


def state(scheduler: Any) -> str:
    held = vars(scheduler).items()
    return repr({name: value.tolist() if hasattr(value, "tolist") else value for name, value in held})


def walked(scheduler: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    scheduler.set_timesteps(2 if type(scheduler).__name__ == "SCMScheduler" else 4)
    latents = torch.ones(1, 4, 2, 2)
    for timestep in scheduler.timesteps[:2]:
        seen = scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
        latents = scheduler.step(0.5 * seen, timestep, latents, return_dict=False, **options)[0]
    return latents


def test_two_names_of_one_folder_share_a_model(saved: Path, tmp_path: Path, cache: ModelCache):
    (tmp_path / "link").symlink_to(saved / "mini")
    for folder in (saved / "mini", saved / "sd15/../mini", tmp_path / "link"):
        with open_checkpoint(folder).use(cache, "unet"):
            pass
    assert len(cache.stats().entries) == 1


def test_an_identity_says_the_same_elsewhere_and_otherwise_for_other_weights(mini: Path, tmp_path: Path):
    before = open_checkpoint(mini)
    moved = open_checkpoint(Path(shutil.copytree(mini, tmp_path / "elsewhere/mini")))
    assert moved.identity == before.identity
    assert moved.identity_of("unet") == before.identity_of("unet")
    assert str(tmp_path) not in before.identity
    save_mini(mini, seed=1)  # the same shapes, so the headers are the same
    after = open_checkpoint(mini)
    assert after.identity != before.identity
    assert after.identity_of("unet") != before.identity_of("unet")


def test_a_file_replaced_on_disk_is_noticed(mini: Path, cache: ModelCache):
    checkpoint = open_checkpoint(mini)
    with checkpoint.use(cache, "fusion") as old:
        save_mini(mini, seed=1)
        os.utime(mini / "fusion/diffusion_pytorch_model.safetensors")
        with checkpoint.use(cache, "fusion") as new:
            assert not torch.equal(old.exit.weight, new.exit.weight)
    assert len(cache.stats().entries) == 1


def test_a_changed_config_is_noticed(mini: Path):
    checkpoint = open_checkpoint(mini)
    before = checkpoint.key("vae")
    config = mini / "vae/config.json"
    config.write_text(config.read_text().replace('"scaling_factor": 1.0', '"scaling_factor": 0.5'))
    assert checkpoint.key("vae").replaces(before)


@pytest.mark.parametrize("component", MODELS)
def test_a_file_overwritten_in_place_leaves_the_loaded_model_alone(mini: Path, component: str):
    checkpoint = open_checkpoint(mini)
    model = checkpoint.build(component, torch.float16)  # as stored: the libraries then map the file itself
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = checkpoint.components[component].weights[0]
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    os.truncate(path, 0)  # reading a mapped page beyond the end would now end the process
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_sharded_weights(mini: Path):
    whole = mini / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(whole)
    expected = open_checkpoint(mini).build("unet").state_dict()
    whole.unlink()
    shards = {
        name: f"diffusion_pytorch_model-0000{1 + number % 2}-of-00002.safetensors"
        for number, name in enumerate(weights)
    }
    for file in set(shards.values()):
        part = {name: weights[name] for name in weights if shards[name] == file}
        save_file(part, mini / "unet" / file, metadata={"format": "pt"})
    index = mini / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    checkpoint = open_checkpoint(mini)
    assert len(checkpoint.components["unet"].weights) == 2
    for name, tensor in checkpoint.build("unet").state_dict().items():
        assert torch.equal(tensor, expected[name])
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"files beside it, found '\.\./\.\./elsewhere"):
        open_checkpoint(mini)


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_folder_with_only_the_fp16_variant(mini: Path, component: str):
    path = open_checkpoint(mini).components[component].weights[0]
    path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    checkpoint = open_checkpoint(mini)
    assert checkpoint.components[component].variant == "fp16"
    assert isinstance(checkpoint.build(component), nn.Module)


def test_a_text_encoder_in_integers_is_multiplied_out(mini: Path):
    before: Any = open_checkpoint(mini).build("text_encoder")
    ship(copy.deepcopy(before), mini / "text_encoder")
    with safe_open(mini / "text_encoder/model.safetensors", "pt") as file:
        stored = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert {stored[name] for name in stored if name.endswith((".token_embedding.weight", "proj.weight"))} == {"I8"}
    read: Any = open_checkpoint(mini).build("text_encoder")
    assert {weight.dtype for weight in read.parameters()} == {torch.float32}
    assert all(weight.untyped_storage().resizable() for weight in read.parameters()), "copied, not mapped"
    ids = torch.tensor([[2, 4, 6, 5, 3]])
    with torch.no_grad():
        wanted, made = (encoder(input_ids=ids).text_embeds for encoder in (before, read))
    assert 0 < float((made - wanted).square().mean() / wanted.square().mean()) < 1e-3


def test_the_names_that_older_libraries_gave_to_weights(saved: Path, tmp_path: Path):
    """As in the published files of Stable Diffusion 1.5."""
    folder = Path(shutil.copytree(saved / "sd15", tmp_path / "sd15"))
    expected = {
        component: open_checkpoint(folder).build(component).state_dict() for component in ("vae", "text_encoder")
    }
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for name, stored in load_file(path).items():
        for new, old in older.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        weights[name] = stored
    assert any(".query." in name for name in weights)
    save_file(weights, path, metadata={"format": "pt"})
    path = folder / "text_encoder/model.safetensors"
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(load_file(path) | positions, path, metadata={"format": "pt"})
    for component, before in expected.items():
        built = open_checkpoint(folder).build(component).state_dict()
        assert all(torch.equal(built[name], stored) for name, stored in before.items())


def test_a_checkpoint_can_be_copied(saved: Path):
    checkpoint = open_checkpoint(saved / "mini")
    assert copy.deepcopy(checkpoint) == pickle.loads(pickle.dumps(checkpoint)) == checkpoint


@pytest.mark.parametrize("name", FAMILY_FOLDERS)
def test_the_folder_of_every_family_opens_and_every_part_is_built(tmp_path: Path, cache: ModelCache, name: str):
    saved = save_family(name, tmp_path / name)
    checkpoint = open_checkpoint(saved)
    assert set(checkpoint.family.components) <= set(checkpoint.components)
    for component, part in checkpoint.components.items():
        if part.weights:
            with checkpoint.use(cache, component) as model:
                assert type(model).__name__ == part.class_name
                stored = load_file(part.weights[0]).values()
                held = {tensor.numpy().tobytes() for tensor in model.state_dict().values()}
                assert stored and all(tensor.numpy().tobytes() in held for tensor in stored)  # names may be older
        elif component.startswith("tokenizer"):
            ids = checkpoint.tokenizer(component)("a red rose")["input_ids"]
            assert len(set(ids)) > 3
    assert type(checkpoint.scheduler()).__name__ == checkpoint.components["scheduler"].class_name
