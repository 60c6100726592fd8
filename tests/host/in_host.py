"""Checks of nodes/host that run inside the host's own process: its modules are imported, its server is not started.

Run as a script with the host's folder and a scratch folder; prints one JSON object, from each check's name to its
traceback, or null where it passed.
"""

# pyright: reportMissingImports=false
# The host is no package that a checker could find: it is the program that loads us.
# ruff: noqa: E402, F401, I001
# It wants its paths and its arguments before its modules, and these in an order of its own.

import importlib
import importlib.util
import json
import os
import sys
import time
import traceback
import types
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HOST, SCRATCH = Path(sys.argv[1]), Path(sys.argv[2])
PACK = "ComfyUI-Duet"  # the host, too, loads the pack under a name that no import statement could spell

sys.path[0] = str(HOST)
sys.argv = ["main.py", "--cpu", "--base-directory", str(SCRATCH)]

import comfy.options

comfy.options.enable_args_parsing()

import utils.extra_config  # the host imports it first, before any other package named utils
import comfy.model_management as memory
import comfy.utils
import execution
import torch
from PIL import Image
from torch import nn

spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
assert spec and spec.loader
sys.modules[PACK] = pack = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
host = importlib.import_module(f"{PACK}.nodes.host")
api = importlib.import_module(f"{PACK}.nodes.host.api")
stores = importlib.import_module(f"{PACK}.nodes.host.stores")
ModelCache = importlib.import_module(f"{PACK}.pipeline.model_cache").ModelCache
ModelKey = importlib.import_module(f"{PACK}.pipeline.model_cache").ModelKey
OutOfDeviceMemory = importlib.import_module(f"{PACK}.pipeline.residency").OutOfDeviceMemory

LAYER_BYTES = 64 * 64 * 4


def new_cache():
    return ModelCache(host.ComfyResidency(), budget_bytes=2**30)


def key(name: str):
    return ModelKey(Path(name), LAYER_BYTES, 1, "unet", torch.float32)


def layer() -> nn.Module:
    return nn.Linear(64, 64, bias=False).requires_grad_(False)


def ours() -> list:
    """What the host counts as loaded, of ours."""
    return [entry for entry in memory.current_loaded_models if type(entry.model.model).__name__ == "DuetModel"]


def on_device(cache) -> list[bool]:
    return [entry.on_device for entry in cache.stats().entries]


@contextmanager
def free(available: int) -> Iterator[None]:
    """The host finds ``available`` bytes free: what it measures, whatever runs beside these checks changes."""
    measure = memory.get_free_memory
    memory.get_free_memory = lambda *_, torch_free_too=False: (available, available) if torch_free_too else available
    try:
        yield
    finally:
        memory.get_free_memory = measure


class Refusing(nn.Linear):
    """Fits on no device, the first ``refusals`` times."""

    def __init__(self, refusals: int) -> None:
        super().__init__(64, 64, bias=False)
        self.refusals = refusals

    def to(self, *arguments, **options):
        if self.refusals:
            self.refusals -= 1
            raise torch.OutOfMemoryError("tried to allocate")
        return super().to(*arguments, **options)


def check_the_host_counts_the_bytes_we_hold():
    cache = new_cache()

    def tied() -> nn.Module:
        model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64, bias=False))
        model[1].weight = model[0].weight
        return model

    with cache.use(key("a"), layer), cache.use(key("tied"), tied):
        assert cache.stats().bytes_held == 2 * LAYER_BYTES
        assert [entry.model_memory() for entry in ours()] == [LAYER_BYTES] * 2
        assert [entry.model_loaded_memory() for entry in ours()] == [LAYER_BYTES] * 2


def check_weights_of_8_bits_count_as_what_they_are():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    cache = new_cache()

    def quantised() -> nn.Module:
        model = nn.Sequential(layer())
        quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False))
        return model.requires_grad_(False)

    with cache.use(key("a"), quantised) as model, torch.inference_mode():
        weight = model[0].weight
        parts = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
        size = sum(part.nbytes for part in parts)
        assert parts[0].dtype == torch.int8 and size < LAYER_BYTES / 3
        assert cache.stats().bytes_held == size
        assert [(entry.model_memory(), entry.model_loaded_memory()) for entry in ours()] == [(size, size)]
        assert ours()[0].model_offloaded_memory() == 0
        before = model(torch.ones(1, 64))
    memory.unload_all_models()
    assert on_device(cache) == [False]
    with cache.use(key("a"), quantised) as model, torch.inference_mode():
        assert torch.equal(model(torch.ones(1, 64)), before)
        assert cache.stats().bytes_held == size


def check_a_cpu_copies_nothing():
    cache = new_cache()
    with cache.use(key("a"), layer) as model:
        place = model.weight.data_ptr()
    memory.unload_all_models()
    with cache.use(key("a"), layer) as model:
        assert model.weight.data_ptr() == place


def check_the_host_may_evict_and_the_next_use_loads_again():
    cache = new_cache()
    with torch.inference_mode():
        with cache.use(key("a"), layer):
            pass
        memory.unload_all_models()
        assert (on_device(cache), ours()) == ([False], [])
        with cache.use(key("a"), layer):
            assert on_device(cache) == [True]
    assert cache.stats().misses == 1


def check_it_is_all_or_nothing():
    cache = new_cache()
    with cache.use(key("a"), lambda: nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(4)])):
        pass
    with free(available := 2**30):
        memory.free_memory(available + LAYER_BYTES, memory.get_torch_device())  # one layer would be enough
    assert on_device(cache) == [False]
    patcher = host.ComfyResidency().adopt(nn.Sequential(layer(), layer()), "two").patcher
    patcher.partially_load(patcher.load_device, extra_memory=LAYER_BYTES)
    assert patcher.loaded_size() == 2 * LAYER_BYTES
    assert patcher.partially_unload(patcher.offload_device, 1) == 0
    assert patcher.loaded_size() == 2 * LAYER_BYTES


def check_weights_moved_in_inference_mode_can_still_be_refined():
    model = layer()
    patcher = host.ComfyResidency().adopt(model, "model").patcher
    patcher.offload_device = torch.device("meta")
    with torch.inference_mode():
        patcher.partially_load(patcher.load_device)
        patcher.detach()
    weight = next(model.parameters())
    assert weight.device.type == "meta" and not weight.is_inference()


def check_it_dies_with_its_owner():
    cache = new_cache()
    with cache.use(key("a"), layer) as model:
        alive = weakref.ref(model)
    del model
    assert len(ours()) == 1
    cache.unload()
    assert (alive(), ours()) == (None, [])


def check_out_of_memory_evicts_others_and_tries_once_more():
    cache = new_cache()
    with cache.use(key("a"), layer):
        pass
    with cache.use(key("b"), lambda: Refusing(1)):
        assert on_device(cache) == [False, True]


def check_out_of_memory_twice_is_an_error_and_what_is_in_use_stays():
    cache = new_cache()
    with cache.use(key("a"), layer):
        try:
            with cache.use(key("large"), lambda: Refusing(2)):
                raise AssertionError("it was loaded")
        except OutOfDeviceMemory as error:
            assert "unet of large" in str(error) and "in use and stay" in str(error)
            assert isinstance(error, memory.OOM_EXCEPTION)
        assert on_device(cache) == [True, False]
        assert len(ours()) == 1, "the host still counts the one in use"
    assert [entry.pins for entry in cache.stats().entries] == [0, 0]
    with cache.use(key("large"), layer):
        assert cache.stats().entries[-1].on_device


def check_free_empties_the_cache_between_prompts():
    server = types.SimpleNamespace()
    server.prompt_queue = queue = execution.PromptQueue(server)
    stores.PromptServer.instance = server
    cache = new_cache()
    try:
        stores._when_freed(cache.unload)
    finally:
        del stores.PromptServer.instance
    with cache.use(key("a"), layer):
        pass
    queue.set_flag("unload_models", True)
    assert queue.get_flags() == {"unload_models": True}
    assert len(cache.stats().entries) == 1
    queue.set_flag("free_memory", True)
    assert queue.get_flags() == {"free_memory": True}
    assert queue.get_flags() == {}
    assert cache.stats().entries == ()


def check_there_is_one_cache():
    assert host.model_cache() is host.model_cache()


def check_steps_show_rgb_and_can_be_interrupted():
    shown = []
    before = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(lambda *arguments, **_: shown.append(arguments))
    try:
        on_step = host.steps(2)
        on_step(1, Image.new("RGBA", (64, 32)))
        on_step(2)
        memory.interrupt_current_processing()
        try:
            on_step(2)
            raise AssertionError("it went on")
        except memory.InterruptProcessingException:
            pass
    finally:
        comfy.utils.set_progress_bar_global_hook(before)
    (_, _, (kind, picture, size)), (done, total, nothing) = shown
    assert (kind, picture.mode, size) == ("JPEG", "RGB", 64)
    assert (done, total, nothing) == (2, 2, None)


def check_no_step_is_shown_when_the_picture_is_about_to_be_there():
    generation: Any = importlib.import_module(f"{PACK}.nodes.generation")
    model = types.SimpleNamespace(family=types.SimpleNamespace(tasks=None))
    looks = []

    def look():
        looks.append(clock.now)
        return torch.zeros(3, 8, 8)

    for seconds, expected in ((0.04, []), (0.09, [0.18]), (0.5, [0.5, 1.0, 1.5])):
        clock = types.SimpleNamespace(now=0.0)
        generation.time = types.SimpleNamespace(monotonic=lambda clock=clock: clock.now)
        looks.clear()
        on_step = generation.report_steps(model, generation.EXACT)
        for step in range(1, 5):
            clock.now += seconds
            on_step(step, 4, look)
        assert looks == expected, (seconds, looks)
    generation.time = time


def check_model_names_stay_inside_their_folder():
    models = SCRATCH / "models/diffusers"
    for folder in (models / "sd15/unet", models / "team/tiny", SCRATCH / "outside", models / "a/b/c/d"):
        folder.mkdir(parents=True)
    for folder in (models / "sd15", models / "team/tiny", SCRATCH / "outside", models / "a/b/c/d", models):
        (folder / "model_index.json").write_text("{}")
    (models / "escape").symlink_to(SCRATCH / "outside")
    assert host.diffusers_names() == ["sd15", "team/tiny"]
    assert host.diffusers_folder("sd15") == (models / "sd15").resolve()
    assert host.diffusers_folder("team/tiny") == (models / "team/tiny").resolve()
    out, folder, system = "leads out of", "expected the name of a folder", "cannot name a folder on every system"
    wrong = {
        "../diffusers/sd15": out, "sd15/../../../outside": out, "sd15\\..\\..": out, "/etc": out,
        "\\\\server\\share": out, "C:\\Windows": out, "C:sd15": out, str(models / "sd15"): out,
        "escape": "by a link", "escape/unet": "by a link",
        "": folder, ".": folder, "sd\x0015": folder, "sd15\n": folder, "x" * 10_000: folder,
        "CON": system, "nul.txt": system, "sd15/com1": system, "sd15.": system, "sd15 ": system, "sd15:stream": system,
        "other": "found sd15, team/tiny",
    }  # fmt: skip
    for name, part in wrong.items():
        try:
            found = host.diffusers_folder(name)
        except ValueError as error:
            assert part in str(error) and len(str(error)) < 1000, f"{name!r}: {error}"
        else:
            raise AssertionError(f"{name!r} gave {found}")


def check_newer_schema_arguments_are_left_out():
    schema = host.io.Schema(
        node_id="DuetTest",
        search_aliases=["newer"],
        inputs=[host.io.Int.Input("steps", default=4, newer=True), host.io.Custom("DUET_TEST").Input("value", newer=1)],
        outputs=[host.io.Image.Output("image", newer=True)],
    )
    assert [each.id for each in (*schema.inputs, *schema.outputs)] == ["steps", "value", "image"]
    assert schema.inputs[0].default == 4
    assert schema.inputs[1].io_type == "DUET_TEST"
    assert issubclass(pack.nodes.NODES[0], api.host_io.ComfyNode)


def check_nodes_describe_themselves_once_and_anew_for_a_new_file():
    models = SCRATCH / "models"
    for kind in ("checkpoints", "clip_vision", "diffusers", "ipadapter", "LLM", "loras", "style_models"):
        (models / kind).mkdir(parents=True, exist_ok=True)
    for kind in ("text_encoders", "vae", "vae_approx"):
        (models / kind).mkdir(parents=True, exist_ok=True)
    for folder in [models, *models.rglob("*")]:
        os.utime(folder, (0, 0))  # as if nothing had happened there for years
    described = {node: node.INPUT_TYPES() for node in pack.nodes.NODES}
    schemas = {node: node.define_schema() for node in pack.nodes.NODES}
    assert all(node.define_schema() is schema for node, schema in schemas.items())
    for folder in [folder for folder in models.iterdir() if folder.is_dir()]:
        (folder / "new").mkdir()
        for name in ("config.json", "model_index.json", "tokenizer.json"):
            (folder / "new" / name).write_text("{}")
        (folder / "new.safetensors").touch()
    (SCRATCH / "input/new.safetensors").parent.mkdir(exist_ok=True)
    (SCRATCH / "input/new.safetensors").touch()
    changed = set()
    for node, before in described.items():
        fresh = node.define_schema.__func__.__wrapped__(node)
        fresh.finalize()
        now = node.INPUT_TYPES()
        assert now == fresh.get_v1_info(node).input, f"{node.__name__} does not notice a new file"
        changed |= {node.__name__} if now != before else set()
    assert changed == {
        "DuetDirectPrompt", "DuetDoctor", "DuetFuse", "DuetIPAdapter", "DuetImageFeatures", "DuetLoadEmbeddings",
        "DuetLoadLora", "DuetLoadModel", "DuetSpeedPlan", "DuetTextEncoder",
    }  # fmt: skip


def check_dates_are_those_of_the_page():
    dated = importlib.import_module(f"{PACK}.nodes.host.pictures")._dated
    now = datetime(2031, 2, 3, 14, 5, 6)
    assert dated("a/%date:yyyy-MM-dd%/%width%", now) == "a/2031-02-03/%width%"
    assert dated("%date:yy.M.d h.mm.s% of %date:%", now) == "31.2.3 14.05.6 of %date:%"


def check_a_checkpoint_without_a_text_encoder_is_told():
    block = importlib.import_module(f"{PACK}.nodes.stock").DuetEmbedTextByClip
    try:
        block.execute(None, None, "rose")
    except ValueError as error:
        assert str(error).startswith("Embed text by CLIP: expected a CLIP, got none"), error
    else:
        raise AssertionError("nothing was said")


def check_a_preview_that_fails_ends_no_run():
    generation = importlib.import_module(f"{PACK}.nodes.generation")
    model: Any = types.SimpleNamespace(family=types.SimpleNamespace(tasks=None))
    looked = []

    def preview() -> torch.Tensor:
        looked.append(True)
        raise torch.OutOfMemoryError("no room to look")

    on_step = generation.report_steps(model, generation.EXACT)
    for step in (1, 2):
        time.sleep(0.15)
        on_step(step, 1000, preview)
    assert looked == [True], "it is asked for again, where the first one failed"


def main() -> None:
    outcomes = {}
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            try:
                check()
                outcomes[name] = None
            except Exception:
                outcomes[name] = traceback.format_exc()
    sys.stdout.write(f"\n{json.dumps(outcomes)}\n")


main()
