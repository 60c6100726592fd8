import copy
import json
import os
import pickle
import shutil
import socket
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.checkpoints import Checkpoint, CheckpointError, open_checkpoint
from pipeline.model_cache import ModelCache
from pipeline.residency import TorchResidency
from tests.pipeline.devices import FakeDevice
from tests.pipeline.folders import edit_index, save_mini, save_stable_diffusion

MODELS = ("text_encoder", "image_encoder", "fusion", "unet", "vae")
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_mini(root / "mini")
    save_stable_diffusion(root / "sd15")
    return root


@pytest.fixture
def mini(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(saved / "mini", tmp_path / "mini"))


@pytest.fixture
def cache() -> ModelCache:
    return ModelCache(TorchResidency("cpu"), budget_bytes=2**30)


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


# --- bad input ---


def refused(folder: Path, *parts: str) -> str:
    """Opening is refused promptly, and the message holds every one of ``parts``."""
    started = time.perf_counter()
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(folder)
    assert time.perf_counter() - started < 2
    for part in parts:
        assert part in str(raised.value)
    assert len(str(raised.value)) < 1000
    return str(raised.value)


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def tensor(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> bytes:
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


class Bomb:
    """Executed by whoever unpickles it."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_truncated_weights(mini: Path):
    size = (mini / WEIGHTS).stat().st_size
    os.truncate(mini / WEIGHTS, size - 1000)
    refused(mini, str(mini / WEIGHTS), "truncated", f"expected {size:,} bytes", f"found {size - 1000:,}")


def test_trailing_bytes(mini: Path):
    with open(mini / WEIGHTS, "ab") as file:
        file.write(b"PK\x03\x04")
    refused(mini, str(mini / WEIGHTS), "4 bytes after its last tensor")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["0 bytes", "empty, or truncated"]),
        (b"\x10", ["1 bytes"]),
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", ["a web page"]),
        (b"\n <html>503 Service Unavailable</html>", ["a web page"]),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 3438167534\n",
            ["Git LFS pointer for 3,438,167,534 bytes", "git lfs pull"],
        ),
        (pickle.dumps(Bomb()), ["a Python pickle"]),
        (pickle.dumps(Bomb(), protocol=2) + bytes(2000), ["a Python pickle"]),
        (b"PK\x03\x04" + bytes(4000), ["a zip archive", "PyTorch"]),
        (b"GGUF\x03\x00\x00\x00" + bytes(100), ["GGUF"]),
        (b"not weights at all", ["something else", "not weights"]),
        (with_header(tensor())[:20], ["truncated", "its header claims"]),
        (with_header(b"[]"), ["something else"]),
        (with_header(b'{"a": '), ["expected JSON"]),
        (with_header(b'{"a": 1}'), ["'a' is described wrongly: 1"]),
        (with_header(b"{" + b'"a":[' * 5000 + b"]" * 5000 + b"}"), ["expected JSON"]),
        (with_header(tensor("F33")), ["described wrongly"]),
        (with_header(tensor(shape=[-1])), ["described wrongly"]),
        (with_header(tensor(shape=[1] * 100_000)), ["described wrongly"]),
        (with_header(tensor(shape=[2**62] * 16)), ["described wrongly"]),
        (with_header(tensor(shape=[True])), ["described wrongly"]),
        (with_header(tensor(offsets=[0, 8]), bytes(8)), ["described wrongly"]),
        (with_header(tensor(offsets=[4, 8]), bytes(8)), ["expected tensor 'a' to start at byte 0, it claims 4"]),
        (with_header(tensor(shape=[2**40], offsets=[0, 2**42])), ["truncated", "4,398,046,511,"]),
    ],
    ids=range(23),
)
def test_files_that_are_no_weights(mini: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, parts: list[str]):
    monkeypatch.chdir(mini)
    (mini / WEIGHTS).write_bytes(content)
    refused(mini, str(mini / WEIGHTS), *parts)
    assert not Path("executed").exists()


def test_a_pickle_that_torch_wrote(mini: Path):
    torch.save({"weight": torch.zeros(4)}, mini / WEIGHTS)
    refused(mini, "a zip archive", "convert")
    torch.save({"weight": torch.zeros(4)}, mini / WEIGHTS, _use_new_zipfile_serialization=False)
    refused(mini, "a Python pickle")


@pytest.fixture
def peak_memory() -> Iterator[Callable[[], int]]:
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


@pytest.mark.parametrize("claimed", [90 * 2**20, 2**40, 2**63])
def test_a_header_bomb(mini: Path, peak_memory: Callable[[], int], claimed: int):
    with open(mini / WEIGHTS, "wb") as file:
        file.write(claimed.to_bytes(8, "little") + b'{"a":')
        file.truncate(100 * 2**20)
    refused(mini, str(mini / WEIGHTS))
    assert peak_memory() < 8 * 2**20


@pytest.mark.parametrize("entry", [b'"%d":{}', b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'])
def test_an_entry_bomb(mini: Path, peak_memory: Callable[[], int], entry: bytes):
    header = b"{" + b",".join(entry % number for number in range(200_000)) + b"}"
    (mini / WEIGHTS).write_bytes(with_header(header))
    before = peak_memory()
    refused(mini, "expected at most 100,000 tensors", "the header lists 200,001")
    assert peak_memory() - before < 32 * 2**20


def test_a_pipe_instead_of_weights_does_not_wait(mini: Path):
    (mini / WEIGHTS).unlink()
    os.mkfifo(mini / WEIGHTS)
    refused(mini, "found a folder or device")


def test_missing_parts_name_the_folder_and_the_file(saved: Path, mini: Path, tmp_path: Path):
    refused(tmp_path / "nowhere", str(tmp_path / "nowhere"), "model_index.json")
    refused(tmp_path, str(tmp_path / "model_index.json"), "no such file")
    (mini / WEIGHTS).rename(mini / "unet/diffusion_pytorch_model.bin")
    refused(mini, str(mini / WEIGHTS), "diffusion_pytorch_model.bin, a Python pickle")
    (mini / "unet/diffusion_pytorch_model.bin").unlink()
    refused(mini, str(mini / WEIGHTS), "found config.json")
    (mini / "unet/config.json").unlink()
    refused(mini, str(mini / "unet/config.json"))


def test_a_tokenizer_without_files(mini: Path):
    (mini / "tokenizer/tokenizer.json").unlink()
    refused(mini, str(mini / "tokenizer"), "expected tokenizer.json, or vocab.json and merges.txt")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"unet": ["diffusers", "StableDiffusionPipeline"]}, ["unet is a StableDiffusionPipeline of diffusers"]),
        ({"unet": ["os", "system"]}, ["unet is a system of os", "UNet2DConditionModel"]),
        ({"extra": ["custom_code", "Model"]}, ["extra is a Model of custom_code"]),
        ({"../unet": ["diffusers", "UNet2DConditionModel"]}, ["found '../unet'"]),
        ({"unet": ["diffusers", ["UNet2DConditionModel"]]}, ["expected a name with [library, class]"]),
        ({"unet": [None, None]}, ["expected a component 'unet' for a Duet mini model"]),
        ({"_class_name": "FluxPipeline"}, ["expected a DuetMiniPipeline or StableDiffusionPipeline", "'FluxPipeline'"]),
        ({"_class_name": ["custom", "Pipeline"]}, ["found ['custom', 'Pipeline']"]),
    ],
    ids=range(8),
)
def test_an_index_that_asks_for_something_else(mini: Path, changes: dict, parts: list[str]):
    edit_index(mini, **changes)
    refused(mini, str(mini / "model_index.json"), *parts)


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff", "{" * 2000, '{"a":"' + "x" * 2**21 + '"}'], ids=range(6))
def test_an_index_that_is_no_index(mini: Path, text: str):
    (mini / "model_index.json").write_text(text, encoding="latin-1")
    refused(mini, str(mini / "model_index.json"))


@pytest.mark.parametrize(
    ("component", "changes", "parts"),
    [
        ("text_encoder", {"attn_implementation": "somebody/kernel"}, ["attn_implementation 'somebody/kernel'"]),
        ("text_encoder", {"_attn_implementation": {"": "somebody/kernel"}}, ["the attention of torch"]),
        ("text_encoder", {"text_config": {"attn_implementation": "somebody/kernel"}}, ["the attention of torch"]),
        ("text_encoder", {"quantization_config": {"quant_method": "hqq"}}, ["expected plain weights"]),
        ("unet", {"quantization_config": {"quant_method": "gguf"}}, ["expected plain weights"]),
        ("text_encoder", {"num_hidden_layers": 10**9}, ["num_hidden_layers", "found 1000000000"]),
        ("image_encoder", {"depths": [1, 10**9]}, ["depths", "found 1000000000"]),
        ("unet", {"layers_per_block": 10**9}, ["layers_per_block", "found 1000000000"]),
    ],
    ids=range(8),
)
def test_a_config_that_would_fetch_code_or_never_end(mini: Path, component: str, changes: dict, parts: list[str]):
    config = mini / component / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    refused(mini, str(config), *parts)


def test_nothing_is_fetched(saved: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise AssertionError("reached for the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    for folder in ("mini", "sd15"):
        checkpoint = open_checkpoint(saved / folder)
        for component, part in checkpoint.components.items():
            if part.weights:
                checkpoint.build(component)
        checkpoint.tokenizer()
        checkpoint.scheduler()


def build_refused(checkpoint: Checkpoint, cache: ModelCache, component: str, *parts: str) -> None:
    """Building is refused, and leaves nothing in the cache."""
    with pytest.raises(CheckpointError) as raised, checkpoint.use(cache, component):
        pass
    for part in (str(checkpoint.folder / component), *parts):
        assert part in str(raised.value)
    assert cache.stats().entries == ()


@pytest.mark.parametrize("component", MODELS)
def test_weights_of_another_model(mini: Path, cache: ModelCache, component: str):
    checkpoint = open_checkpoint(mini)
    path = checkpoint.components[component].weights[0]
    save_file({"something.else": torch.zeros(2)}, path, metadata={"format": "pt"})
    build_refused(
        checkpoint, cache, component, f"the weights of a {checkpoint.components[component].class_name}", "are missing"
    )


@pytest.mark.parametrize("component", MODELS)
def test_weights_of_another_shape(mini: Path, cache: ModelCache, component: str):
    checkpoint = open_checkpoint(mini)
    path = checkpoint.components[component].weights[0]
    weights = {
        name: torch.cat([tensor, tensor]) if tensor.dim() else tensor for name, tensor in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})
    build_refused(checkpoint, cache, component, checkpoint.components[component].class_name)


def test_weights_spoiled_after_opening(mini: Path, cache: ModelCache):
    checkpoint = open_checkpoint(mini)
    os.truncate(mini / WEIGHTS, 1000)
    build_refused(checkpoint, cache, "unet", "truncated")
    (mini / WEIGHTS).unlink()
    build_refused(checkpoint, cache, "unet")


def test_a_component_that_is_not_there(saved: Path):
    with pytest.raises(CheckpointError, match="expected a component 'fusion', found scheduler, text_encoder"):
        open_checkpoint(saved / "sd15").key("fusion")
    with pytest.raises(CheckpointError, match="expected a component with weights, found a PNDMScheduler"):
        open_checkpoint(saved / "sd15").key("scheduler")
