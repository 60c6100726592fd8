"""Checks of nodes/host under the host's memory modes, in its own process and with its own memory management.

Run as a script with the host's folder, a scratch folder and the host's flags; prints one JSON object, from each check's
name to its traceback, or null where it passed. The device is the CPU under its other name, "cpu:0", which the host is
told to be a GPU with room for three layers and a half: so all that decides who is moved is the host's own code.
"""

# pyright: reportMissingImports=false
# The host is no package that a checker could find: it is the program that loads us.
# ruff: noqa: E402, F401, I001
# It wants its paths and its arguments before its modules, and these in an order of its own.

import importlib
import importlib.util
import json
import logging
import sys
import traceback
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOST, SCRATCH, FLAGS = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
PACK = "ComfyUI-Duet"

sys.path[0] = str(HOST)
sys.argv = ["main.py", "--base-directory", str(SCRATCH), *FLAGS]

import comfy.options

comfy.options.enable_args_parsing()

from comfy.cli_args import args

asked_for_cpu = args.cpu
args.cpu = True  # or the host stops where there is no GPU; the flags count all the same, see below

import utils.extra_config
import comfy.model_management as memory
import torch
from torch import nn

LAYER_BYTES = 64 * 64 * 4
CAPACITY = int(3.5 * LAYER_BYTES)
GPU = torch.device("cpu", 0)


def free_bytes() -> int:
    return CAPACITY - sum(entry.model_loaded_memory() for entry in memory.current_loaded_models if entry.device == GPU)


def _free(device=None, torch_free_too=False):
    free = free_bytes() if device in (None, GPU) else 2**40
    return (free, free) if torch_free_too else free


if not asked_for_cpu:
    args.cpu = False
    memory.cpu_state = memory.CPUState.GPU
    # As the host itself decides where it finds a GPU.
    memory.vram_state = memory.VRAMState.HIGH_VRAM if args.highvram or args.gpu_only else memory.set_vram_to
    memory.get_torch_device = lambda: GPU
    memory.is_device_cpu = lambda device: device == torch.device("cpu")
    memory.get_free_memory = _free
    memory.minimum_inference_memory = lambda: 0
    memory.extra_reserved_memory = lambda: 0
    memory.soft_empty_cache = lambda force=False: None

if getattr(args, "enable_dynamic_vram", False):
    # As the host's main.py does where comfy-aimdo finds a GPU: its own models are then moved layer by layer on demand.
    import comfy.memory_management
    import comfy.model_patcher

    comfy.memory_management.aimdo_enabled = True
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic

spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
assert spec and spec.loader
sys.modules[PACK] = pack = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
host = importlib.import_module(f"{PACK}.nodes.host")
ModelCache = importlib.import_module(f"{PACK}.pipeline.model_cache").ModelCache
ModelKey = importlib.import_module(f"{PACK}.pipeline.model_cache").ModelKey


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []
        logging.getLogger(host.__name__).addHandler(self)
        logging.getLogger(host.__name__).setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())


def new_cache():
    memory.unload_all_models()
    return ModelCache(host.ComfyResidency(), budget_bytes=2**30)


def key(name: str):
    return ModelKey(Path(name), LAYER_BYTES, 1, "unet", torch.float32)


def layer() -> nn.Module:
    return nn.Linear(64, 64, bias=False).requires_grad_(False)


def use(cache, names: str) -> None:
    for name in names:
        with cache.use(key(name), layer):
            (held,) = (entry for entry in cache.stats().entries if entry.key.path.name == name)
            assert held.on_device, f"{name} is used while it is off the device"


def whole_or_nothing() -> None:
    for entry in memory.current_loaded_models:
        assert entry.model_loaded_memory() in (0, LAYER_BYTES), "a part of a model was left behind"
        assert not entry.model.model.model_lowvram


def on_device(cache) -> list[str]:
    return sorted(entry.key.path.name for entry in cache.stats().entries if entry.on_device)


def check_a_second_round_reads_nothing_from_disk():
    cache = new_cache()
    use(cache, "abacbcabc")
    whole_or_nothing()
    stats = cache.stats()
    assert (stats.misses, stats.hits, stats.evictions) == (3, 6, 0)


def check_the_device_never_holds_more_than_it_has():
    cache = new_cache()
    use(cache, "abcdefabcdef")
    whole_or_nothing()
    assert cache.stats().misses == 6
    if not asked_for_cpu:
        assert free_bytes() >= 0 and 1 <= len(on_device(cache)) <= 3


def check_what_is_moved_off_is_told_with_its_bytes_and_reason():
    cache, lines = new_cache(), Lines()
    use(cache, "abcdef")
    moved = [line for line in lines.told if line.startswith("moved unet of ")]
    if asked_for_cpu or args.gpu_only:
        assert moved == [], "there is nowhere else to be"
        return
    assert f"({LAYER_BYTES} bytes) off cpu:0: unet of " in moved[0] and f"needs {LAYER_BYTES} bytes there" in moved[0]
    assert len(moved) == 6 - len(on_device(cache)), (moved, on_device(cache))


def check_the_host_may_take_the_room_and_says_so():
    cache, lines = new_cache(), Lines()
    use(cache, "ab")
    here = on_device(cache)
    memory.free_memory(1e30, memory.get_torch_device())
    assert "b" in here and on_device(cache) == []
    told = [line for line in lines.told if "the host asked for it" in line]
    assert len(told) == (0 if asked_for_cpu or args.gpu_only else len(here)), lines.told
    use(cache, "ab")
    assert cache.stats().misses == 2, "and nothing is read again"


def check_what_is_in_use_stays():
    cache = new_cache()
    with ExitStack() as stack:
        for name in "abc":
            stack.enter_context(cache.use(key(name), layer))
            assert on_device(cache) == sorted("abc"[: "abc".index(name) + 1])
    assert [entry.pins for entry in cache.stats().entries] == [0] * 3


def check_what_lies_idle_makes_room():
    cache = new_cache()
    with cache.use(key("a"), layer):
        use(cache, "bc")
        idle = 0 if asked_for_cpu else len(on_device(cache)) - 1  # without smart memory it holds one at a time
        assert cache.residency.make_room() == idle * LAYER_BYTES
        assert asked_for_cpu or on_device(cache) == ["a"]
    whole_or_nothing()


def check_what_is_moved_off_lies_on_the_cpu():
    residency = host.ComfyResidency()
    expected = GPU if args.gpu_only and not asked_for_cpu else torch.device("cpu")
    assert residency.adopt(layer(), "a").patcher.offload_device == expected


def check_dropping_the_cache_frees_the_device():
    cache = new_cache()
    use(cache, "abc")
    assert cache.unload() == 3 * LAYER_BYTES
    assert memory.current_loaded_models == []
    assert asked_for_cpu or free_bytes() == CAPACITY


def main() -> None:
    outcomes = {}
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            try:
                check()
                outcomes[name] = None
            except Exception:
                outcomes[name] = traceback.format_exc()
    outcomes["state"] = memory.vram_state.name
    sys.stdout.write(f"\n{json.dumps(outcomes)}\n")


main()
