"""Denoisers in 8 bits: near the exact picture, as few bytes as counted, entries of their own, LoRAs laid over them."""

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import cache as once
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.acceleration.compiling import repeated_blocks
from pipeline.acceleration.quantising import build_quantised, check_quantisation, use_quantised
from pipeline.adapters.ip_adapter import open_ip_adapter, show_picture
from pipeline.adapters.lora import open_lora
from pipeline.checkpoints import Checkpoint, open_checkpoint
from pipeline.model_cache import ModelCache
from pipeline.private_views import pictures_shown, private_view
from pipeline.residency import TorchResidency, module_bytes
from pipeline.vision.image_encoders import open_image_encoder
from tests.pipeline.adapter_files import random_factors, save_peft
from tests.pipeline.family_folders import save_family
from tests.pipeline.ip_adapter_files import adapter_tensors, save_adapter, save_encoder

ROOT = Path(__file__).parents[2]
WAYS = ("int8", "int8 dynamic")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    root = tmp_path_factory.mktemp("families")

    @once
    def saved(name: str) -> Checkpoint:
        return open_checkpoint(save_family(name, root / name))

    return saved


def predicted(unet: Any, shown: list[Tensor] | None = None) -> Tensor:
    source = torch.Generator().manual_seed(0)
    latents = torch.randn(2, unet.config.in_channels, 8, 8, generator=source)
    words = torch.randn(2, 5, unet.config.cross_attention_dim, generator=source)
    with torch.inference_mode():
        added = None if shown is None else {"image_embeds": shown}
        return unet(latents, 3, words, added_cond_kwargs=added, return_dict=False)[0]


def apart(one: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference, relative to the spread of the exact one."""
    return ((one - exact).square().mean().sqrt() / exact.std()).item()


def linear_layers(module: nn.Module) -> list[nn.Linear]:
    return [part for block in repeated_blocks(module) for part in block.modules() if isinstance(part, nn.Linear)]


def is_8_bit(layer: nn.Linear) -> bool:
    parts: Any = layer.weight
    return hasattr(parts, "__tensor_flatten__") and parts.qdata.dtype == torch.int8


@pytest.mark.parametrize("how", WAYS)
def test_it_predicts_nearly_the_same(cache: ModelCache, shipped: Checkpoint, how: str):
    with shipped.use(cache, "unet") as unet, use_quantised(cache, shipped, "unet", how) as quantised:
        exact, near = predicted(unet), predicted(quantised)
        assert all(is_8_bit(layer) for layer in linear_layers(quantised))
        assert not any(is_8_bit(layer) for layer in linear_layers(unet)), "the shared one was changed"
    assert 0 < apart(near, exact) < 0.01
    assert not torch.equal(near, exact)


@pytest.mark.parametrize(("name", "component"), [("sd15", "unet"), ("flux_schnell", "transformer")])
def test_its_bytes_are_those_of_its_parts(
    cache: ModelCache, family: Callable[[str], Checkpoint], name: str, component: str
):
    checkpoint = family(name)
    with use_quantised(cache, checkpoint, component, "int8") as quantised:
        layers = linear_layers(quantised)
        assert layers
        floats = module_bytes(checkpoint.build(component))
        saved = sum(4 * layer.weight.numel() - layer.weight.numel() for layer in layers)
        scales = sum(8 * layer.out_features for layer in layers)  # a float and a zero point, with room
        held = module_bytes(quantised)
        assert floats - saved <= held <= floats - saved + scales
    (entry,) = cache.stats().entries
    assert entry.bytes == held < floats


def test_it_is_an_entry_of_its_own_and_keeps_no_floats(cache: ModelCache, shipped: Checkpoint):
    keys = [shipped.key("unet"), *(shipped.altered_key("unet", how, torch.float32) for how in WAYS)]
    assert len(set(keys)) == 3
    assert not any(one.replaces(other) for one in keys for other in keys)
    with use_quantised(cache, shipped, "unet", "int8") as quantised:
        assert [entry.key for entry in cache.stats().entries] == [keys[1]]
        weights = [weakref.ref(part) for part in quantised.modules()]
    with use_quantised(cache, shipped, "unet", "int8"):
        assert cache.stats().hits == 1
    del quantised
    gc.disable()
    try:
        cache.unload()
        alive = sum(weight() is not None for weight in weights)
    finally:
        gc.enable()
    plain = shipped.build("unet")
    weights = [weakref.ref(part) for part in plain.modules()]
    gc.disable()
    try:
        del plain
        assert alive == sum(weight() is not None for weight in weights), "torchao keeps what the cache lets go of"
    finally:
        gc.enable()


def test_it_moves_to_a_device_and_back(shipped: Checkpoint):
    quantised = build_quantised(shipped, "unet", "int8", torch.float32)
    size, before = module_bytes(quantised), predicted(quantised)
    elsewhere = TorchResidency("meta")
    elsewhere.move(quantised, torch.device("meta"))
    assert {parameter.device.type for parameter in quantised.parameters()} == {"meta"}
    assert module_bytes(quantised) == size
    again = build_quantised(shipped, "unet", "int8", torch.float32)
    with torch.inference_mode(False):
        again._apply(lambda tensor: tensor.clone())  # as Module.to does, to new places
    assert module_bytes(again) == size
    assert torch.equal(predicted(again), before)
    assert not any(parameter.is_inference() for parameter in again.parameters())


@pytest.mark.parametrize("how", WAYS)
def test_a_lora_lies_on_it_as_on_the_floats(
    cache: ModelCache, family: Callable[[str], Checkpoint], tmp_path: Path, how: str
):
    plain = family("sd15")
    factors = random_factors(plain.build("unet"), lambda name: "attn" in name)
    path = save_peft(tmp_path / "style.safetensors", {"unet": factors})
    styled = plain.with_adapter(open_lora(plain, path, 0.5))
    with plain.use(cache, "unet") as unet, styled.use(cache, "unet") as by_floats:
        exact, before = predicted(by_floats), predicted(unet)
    with use_quantised(cache, styled, "unet", how) as quantised:
        near = predicted(quantised)
    with use_quantised(cache, plain, "unet", how) as quantised:
        assert apart(predicted(quantised), before) < 0.02
    assert apart(near, exact) < 0.03  # the rounded layers see what the LoRA before them adds
    assert apart(before, exact) > 5 * apart(near, exact)
    with use_quantised(cache, styled, "unet", how) as view, use_quantised(cache, plain, "unet", how) as quantised:
        assert torch.equal(predicted(view), near)
        assert view is not quantised
        assert torch.equal(predicted(private_view(quantised)), predicted(quantised))


def test_a_picture_is_heard_by_it_as_by_the_floats(
    cache: ModelCache, family: Callable[[str], Checkpoint], tmp_path: Path
):
    plain = family("sd15")
    file = open_ip_adapter(plain, save_adapter(tmp_path / "ip.safetensors", adapter_tensors(plain.build("unet"))))
    eye = open_image_encoder(save_encoder(tmp_path / "eye"))
    picture = torch.rand(1, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    heard = show_picture(cache, plain, file, eye, picture, scale=0.6)
    with plain.use(cache, "unet") as unet, heard.use(cache, "unet") as by_floats:
        shown = pictures_shown(heard.adapters, "unet", unet, 2)
        assert shown is not None
        exact, before = predicted(by_floats, shown[0]), predicted(unet)
    with use_quantised(cache, heard, "unet", "int8") as quantised:
        near = predicted(quantised, shown[0])
    assert apart(near, exact) < 0.02
    assert apart(before, exact) > 5 * apart(near, exact)


def test_what_cannot_be_is_refused_with_the_reason(cache: ModelCache, shipped: Checkpoint):
    with pytest.raises(ValueError, match=r"an NVIDIA GPU of capability 8\.9 or more .* for float8, got cpu"):
        use_quantised(cache, shipped, "unet", "float8")
    with pytest.raises(ValueError, match="expected to quantise by int8, int8 dynamic, float8, got 'int4'"):
        use_quantised(cache, shipped, "unet", "int4")
    with (
        pytest.raises(ValueError, match="linear layers in its blocks to quantise, got the AutoencoderDC of duet-mini"),
        use_quantised(cache, shipped, "vae", "int8"),
    ):
        pass
    assert cache.stats().entries == ()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="floats of 8 bits are multiplied on NVIDIA GPUs")
def test_floats_of_8_bits_on_a_gpu(shipped: Checkpoint):
    cache = ModelCache(TorchResidency("cuda"), budget_bytes=2**30)
    check_quantisation("float8", cache.residency.device)
    with use_quantised(cache, shipped, "unet", "float8", torch.bfloat16) as quantised:
        assert any(hasattr(layer.weight, "__tensor_flatten__") for layer in linear_layers(quantised))


_WITHOUT_TORCHAO = """
import json, sys
sys.modules["torchao"] = None
from pipeline.acceleration.quantising import use_quantised
from pipeline.checkpoints import open_checkpoint
from pipeline.mini import MODEL_FOLDER
from pipeline.model_cache import ModelCache
from pipeline.residency import TorchResidency
cache = ModelCache(TorchResidency("cpu"), 2**30)
try:
    with use_quantised(cache, open_checkpoint(MODEL_FOLDER), "unet", "int8"):
        pass
except ValueError as error:
    print(json.dumps([str(error), len(cache.stats().entries)]))
"""


def test_without_torchao_it_says_what_to_install():
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TORCHAO],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said, entries = json.loads(done.stdout.splitlines()[-1])
    assert said == "quantisation needs a package that is not installed: pip install torchao"
    assert entries == 0
