"""Compiled blocks draw what the plain ones draw, are compiled once for all runs, and stand in no run's way."""

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import cache as once
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from pipeline.acceleration.compiling import compile_view, repeated_blocks
from pipeline.acceleration.quantising import use_quantised
from pipeline.acceleration.step_cache import with_step_cache
from pipeline.acceleration.work import Work
from pipeline.adapters.lora import open_lora
from pipeline.checkpoints import Checkpoint, open_checkpoint
from pipeline.model_cache import ModelCache
from pipeline.private_views import private_view, skeleton
from tests.pipeline.adapter_files import random_factors, save_peft
from tests.pipeline.family_folders import FAMILY_FOLDERS, save_family

ROOT = Path(__file__).parents[2]
CLOSE = 1e-4


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Checkpoint]:
    root = tmp_path_factory.mktemp("families")

    @once
    def saved(name: str, seed: int = 0) -> Checkpoint:
        return open_checkpoint(save_family(name, root / f"{name}{seed}", seed))

    return saved


@pytest.fixture(autouse=True, scope="module")
def _fresh():
    """What other tests of this process have compiled counts for nothing here."""
    torch._dynamo.reset()


def programs() -> int:
    """How many torch has compiled in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def predicted(unet: Any, batch: int = 1, side: int = 8) -> Tensor:
    source = torch.Generator().manual_seed(batch)
    latents = torch.randn(batch, 4, side, side, generator=source)
    words = torch.randn(batch, 5, unet.config.cross_attention_dim, generator=source)
    with torch.inference_mode():
        return unet(latents, 3, words, return_dict=False)[0]


def compiled_as_plain(module: Any, **sizes: int) -> int:
    """Compare a view that is compiled with the module; gives how many programs that took."""
    plain = predicted(private_view(module), **sizes)
    view, before = private_view(module), programs()
    compilation = compile_view(view, "regions")
    assert torch.allclose(predicted(view, **sizes), plain, atol=CLOSE)
    assert compilation.notices() == ()
    return programs() - before


def styled(checkpoint: Checkpoint, folder: Path, seed: int, strength: float) -> Checkpoint:
    factors = random_factors(checkpoint.build("unet"), lambda name: "attn" in name, seed)
    path = save_peft(folder / f"style{seed}.safetensors", {"unet": factors})
    return checkpoint.with_adapter(open_lora(checkpoint, path, strength))


def test_all_runs_and_models_share_what_was_compiled_once(
    cache: ModelCache, family: Callable[..., Checkpoint], tmp_path: Path
):
    plain = family("sd15")
    with plain.use(cache, "unet") as unet:
        before = {name: dict(vars(part)) for name, part in unet.named_modules()}
        assert compiled_as_plain(unet) > 0
        assert compiled_as_plain(unet) == 0
        assert all(vars(part) == before[name] for name, part in unet.named_modules()), "the cache's own was changed"
    with family("sd15", 1).use(cache, "unet") as other:
        assert compiled_as_plain(other) == 0

    drawn = []
    for seed, strength, more in ((1, 0.5, None), (2, 0.5, 0), (2, 0.9, 0)):
        with styled(plain, tmp_path, seed, strength).use(cache, "unet") as unet:
            took = compiled_as_plain(unet)
            assert more is None or took == more, f"LoRA {seed} at {strength} was compiled anew"
            drawn.append(predicted(unet))
    with plain.use(cache, "unet") as unet:
        assert compiled_as_plain(unet) == 0
        drawn.append(predicted(unet))
        weights = [weakref.ref(parameter) for parameter in unet.parameters()]
    assert all(not torch.allclose(one, other) for one, other in pairwise(drawn)), "no LoRA was seen"
    del unet, other, before
    cache.unload()
    gc.collect()
    assert not any(weight() is not None for weight in weights), "the compiler holds weights of a model that was dropped"


def test_another_batch_and_size_are_compiled_once_more(cache: ModelCache, family: Callable[..., Checkpoint]):
    with family("sd15").use(cache, "unet") as unet:
        compiled_as_plain(unet)
        compiled_as_plain(unet, batch=2)
        assert compiled_as_plain(unet, batch=3) == 0
        compiled_as_plain(unet, batch=3, side=16)
        assert compiled_as_plain(unet, batch=4, side=24) == 0


def test_without_repeated_blocks_the_whole_is_compiled_and_its_hooks_are_not():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        cross_attention_dim=8,
        down_block_types=("DownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()
    unet.requires_grad_(False)
    view: Any = private_view(unet)
    calls = []
    view.register_forward_pre_hook(lambda *_: calls.append(len(calls)))
    before = programs()
    compilation = compile_view(view, "regions")
    assert (compilation.whole, compilation.regions) == (True, 1)
    for _ in range(3):
        assert torch.allclose(predicted(view), predicted(unet), atol=CLOSE)
    assert calls == [0, 1, 2]
    assert programs() == before + 1
    with pytest.raises(ValueError, match=r"expected a UNet2DConditionModel that runs whole.* got one with a cache"):
        compile_view(view, "regions")


@pytest.mark.parametrize("name", FAMILY_FOLDERS)
def test_every_family_has_blocks_that_repeat(family: Callable[..., Checkpoint], name: str):
    checkpoint = family(name)
    denoiser = skeleton(checkpoint.components["unet" if checkpoint.has("unet") else "transformer"])
    blocks = repeated_blocks(denoiser)
    assert blocks
    assert all("lock" in type(block).__name__ for block in blocks)


def test_cuda_graphs_and_unknown_ways_are_refused(family: Callable[..., Checkpoint]):
    view = private_view(family("sd15").build("unet"))
    with pytest.raises(ValueError, match="expected an NVIDIA GPU for CUDA graphs, got cpu"):
        compile_view(view, "cuda graphs")
    with pytest.raises(ValueError, match="expected to compile by regions or cuda graphs, got 'fast'"):
        compile_view(view, "fast")
    assert all(part._compiled_call_impl is None for part in view.modules())


_WITHOUT_COMPILER = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
from pathlib import Path
from pipeline.acceleration.compiling import compile_view
from pipeline.private_views import private_view
from pipeline.checkpoints import open_checkpoint
from tests.pipeline.test_compiling import predicted
import torch
unet = open_checkpoint(Path(sys.argv[1])).build("unet")
for _ in range(2):
    view = private_view(unet)
    compilation = compile_view(view, "regions")
    assert torch.equal(predicted(view), predicted(unet))
    print("NOTICE", *compilation.notices())
"""


def test_without_a_compiler_it_runs_as_it_is_and_says_so_once(family: Callable[..., Checkpoint], tmp_path: Path):
    nowhere = {
        "CXX": str(tmp_path / "no-such-compiler"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "empty"),  # or it might find what was compiled before
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", _WITHOUT_COMPILER, str(family("sd15").folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | nowhere, timeout=500)
    assert done.returncode == 0, done.stderr
    warned = [line for line in done.stdout.splitlines() if line.startswith("WARNING torch.compile failed")]
    noticed = [
        line for line in done.stdout.splitlines() if line.startswith("NOTICE not compiled: BasicTransformerBlock")
    ]
    assert (len(warned), len(noticed)) == (1, 2), done.stdout


def test_a_denoiser_in_8_bits_is_compiled_too_and_still_moves(cache: ModelCache, family: Callable[..., Checkpoint]):
    with use_quantised(cache, family("sd15"), "unet", "int8") as unet:
        assert compiled_as_plain(unet) > 0
        assert compiled_as_plain(unet) == 0
        before = predicted(unet)
        # As Module.to does, which swaps tensors of torchao, while the compiler watches them by weak references.
        with torch.inference_mode(False):
            unet._apply(lambda tensor: tensor.clone())
        assert torch.equal(predicted(unet), before)
        assert compiled_as_plain(unet) == 0


def test_a_step_cache_on_the_blocks_is_no_part_of_what_is_compiled(family: Callable[..., Checkpoint]):
    transformer: Any = family("flux_schnell").build("transformer")
    source = torch.Generator().manual_seed(0)
    places = torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], dim=1)
    told = {
        "pooled_projections": torch.randn(1, transformer.config.pooled_projection_dim, generator=source),
        "encoder_hidden_states": torch.randn(1, 5, transformer.config.joint_attention_dim, generator=source),
        "txt_ids": torch.zeros(5, 3),
        "img_ids": places,
    }
    start = torch.randn(1, 16, transformer.config.in_channels, generator=source)

    def drawn(view: Any) -> tuple[Tensor, list[int]]:
        """Latents after four steps, and how many programs each took."""
        latents, took = start, []
        with torch.inference_mode():
            for step in range(4):
                before, time = programs(), torch.tensor([1 - step / 4])
                latents = latents - view(hidden_states=latents, timestep=time, return_dict=False, **told)[0] / 4
                took.append(programs() - before)
        return latents, took

    work = Work()
    view = with_step_cache(transformer, 0.1, 4, work)
    assert compile_view(view, "regions").notices() == ()
    latents, took = drawn(view)
    assert took[0] > 0
    assert took[1:] == [0, 0, 0], "each step was compiled for itself"
    assert torch.allclose(latents, drawn(with_step_cache(transformer, 0.1, 4, Work()))[0], atol=CLOSE)
    assert work.steps_computed + work.steps_from_cache == 4
