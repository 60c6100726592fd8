"""Folders and files that are not what they should be: each is refused promptly, in a message that says what came."""

import json
import os
import pickle
import resource
import socket
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoints import Checkpoint, CheckpointError, open_checkpoint
from pipeline.model_cache import ModelCache
from tests.pipeline.folders import MODELS, edit_index

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


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
    refused(mini, str(mini / "tokenizer"), "expected tokenizer.json, or vocab.json and merges.txt", "or spiece.model")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"unet": ["diffusers", "StableDiffusionPipeline"]}, ["unet is ['diffusers', 'StableDiffusionPipeline']"]),
        ({"unet": ["os", "system"]}, ["unet is ['os', 'system']", "UNet2DConditionModel"]),
        ({"extra": ["custom_code", "Model"]}, ["extra is ['custom_code', 'Model']"]),
        ({"../unet": ["diffusers", "UNet2DConditionModel"]}, ["found '../unet'"]),
        ({"unet": ["diffusers", ["UNet2DConditionModel"]]}, ["expected a name with [library, class]"]),
        ({"unet": [None, None]}, ["expected a component 'unet' for a Duet mini model"]),
        (
            {"_class_name": "WanPipeline"},
            ["expected a DuetMiniPipeline or ", "or StableDiffusionPipeline", "'WanPipeline'"],
        ),
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
        ("unet", {"block_out_channels": [10**9, 8]}, ["block_out_channels", "found 1000000000"]),
        ("text_encoder", {"hidden_size": 10**9}, ["hidden_size", "found 1000000000"]),
        ("fusion", {"width": 10**12}, ["width", "found 1000000000000"]),
    ],
    ids=range(11),
)
def test_a_config_that_would_fetch_code_or_never_end(mini: Path, component: str, changes: dict, parts: list[str]):
    config = mini / component / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    refused(mini, str(config), *parts)


@pytest.mark.parametrize("steps", [10**12, "1000", None])
def test_a_scheduler_whose_tables_would_fill_the_memory(mini: Path, steps: object):
    config = mini / "scheduler/scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_train_timesteps": steps}))
    refused(mini, str(config), "num_train_timesteps", repr(steps))


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


def test_a_config_of_a_network_that_would_fill_the_memory(mini: Path, cache: ModelCache):
    """200,000 squared is 160 GB."""
    config = mini / "fusion/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"width": 200_000, "hidden": 200_000}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    build_refused(open_checkpoint(mini), cache, "fusion", "are missing or of another shape")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10  # in KB


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
