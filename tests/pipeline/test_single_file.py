"""Models in single files: what the loader converts is what the diffusers folder of the same weights holds."""

import functools
import json
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.checkpoints import Checkpoint, CheckpointError, open_checkpoint
from pipeline.files.components import Component
from pipeline.files.safetensors_files import check_weights
from pipeline.files.single_file import CONFIGS, fitting_files
from pipeline.files.single_file_weights import CONVERTERS
from pipeline.fusion import fuse
from pipeline.generation import generate
from pipeline.model_cache import ModelCache
from pipeline.text_encoder import encode_prompt
from tests.pipeline import single_files as layouts
from tests.pipeline.family_folders import save_family
from tests.pipeline.single_files import stored, write

UNET, VAE = "model.diffusion_model.", "first_stage_model."


def config_of(folder: Path, component: str) -> dict:
    return json.loads((folder / component / "config.json").read_text())


def part(folder: Path, component: str, prefix: str, layout: Callable) -> tuple[str, layouts.Tensors]:
    return prefix, layout(stored(folder, component), config_of(folder, component))


def stable_diffusion(folder: Path, path: Path) -> list[Path]:
    clip = part(folder, "text_encoder", "cond_stage_model.transformer.", layouts.clip)
    return [_ldm(folder, path, text_encoder=clip)]


def stable_diffusion_2(folder: Path, path: Path) -> list[Path]:
    clip = part(folder, "text_encoder", "cond_stage_model.model.", layouts.open_clip)
    return [_ldm(folder, path, text_encoder=clip)]


def stable_diffusion_xl(folder: Path, path: Path) -> list[Path]:
    first = part(folder, "text_encoder", "conditioner.embedders.0.transformer.", layouts.clip)
    second = part(folder, "text_encoder_2", "conditioner.embedders.1.model.", layouts.open_clip)
    return [_ldm(folder, path, text_encoder=first, text_encoder_2=second)]


def _ldm(folder: Path, path: Path, **encoders: tuple[str, layouts.Tensors]) -> Path:
    unet, vae = part(folder, "unet", UNET, layouts.ldm_unet), part(folder, "vae", VAE, layouts.ldm_vae)
    return write(path, unet=unet, vae=vae, **encoders)


def stable_diffusion_3(folder: Path, path: Path) -> list[Path]:
    return [
        write(
            path,
            transformer=part(folder, "transformer", UNET, layouts.sd3),
            vae=part(folder, "vae", VAE, layouts.ldm_vae),
            text_encoder=part(folder, "text_encoder", "text_encoders.clip_l.transformer.", layouts.clip),
            text_encoder_2=part(folder, "text_encoder_2", "text_encoders.clip_g.transformer.", layouts.clip),
            text_encoder_3=part(folder, "text_encoder_3", "text_encoders.t5xxl.transformer.", layouts.as_is),
        )
    ]


def flux_2(folder: Path, path: Path) -> list[Path]:
    return _apart(folder, path, layouts.flux2, layouts.ldm_vae, prefix="")


def qwen_image(folder: Path, path: Path) -> list[Path]:
    return _apart(folder, path, layouts.as_is, layouts.wan_vae, prefix=UNET)


def z_image(folder: Path, path: Path) -> list[Path]:
    return _apart(folder, path, layouts.z_image, layouts.ldm_vae, prefix=UNET)


def pixart(folder: Path, path: Path) -> list[Path]:
    return _apart(folder, path, layouts.pixart, layouts.ldm_vae, prefix="")


def pixart_in_diffusers_names(folder: Path, path: Path) -> list[Path]:
    return _apart(folder, path, layouts.as_is, layouts.ldm_vae, prefix="")


def flux_in_diffusers_names(folder: Path, path: Path) -> list[Path]:
    main, *others = _apart(folder, path, layouts.as_is, layouts.ldm_vae, prefix="")
    t5 = path.with_name("t5.safetensors")
    return [main, *others, write(t5, encoder=part(folder, "text_encoder_2", "", layouts.as_is))]


def _apart(folder: Path, path: Path, transformer: Callable, vae: Callable, prefix: str) -> list[Path]:
    """As the host's users keep them: the denoiser in diffusion_models, the rest in text_encoders and vae."""
    class_name = config_of(folder, "text_encoder")["architectures"][0]
    encoder = {"CLIPTextModel": layouts.clip, "T5EncoderModel": layouts.as_is}.get(class_name, in_models)
    return [
        write(path, transformer=part(folder, "transformer", prefix, transformer)),
        write(path.with_name("encoder.safetensors"), encoder=part(folder, "text_encoder", "", encoder)),
        write(path.with_name("vae.safetensors"), vae=part(folder, "vae", "", vae)),
    ]


def in_models(tensors: layouts.Tensors, config: dict) -> layouts.Tensors:
    """As language models are published: everything but the head, and the eyes, under model."""
    written = {}
    for name, tensor in tensors.items():
        name = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        written[name if name.startswith(("model.", "lm_head.", "visual.")) else f"model.{name}"] = tensor
    return written


WRITERS: dict[str, Callable[[Path, Path], list[Path]]] = {
    "sd15": stable_diffusion,
    "sd2": stable_diffusion_2,
    "lcm": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "flux_dev": flux_in_diffusers_names,
    "flux2_klein": flux_2,
    "qwen_image": qwen_image,
    "z_image": z_image,
    "pixart_alpha": pixart,
    "pixart_sigma": pixart,
}


def opened(name: str, tmp_path: Path) -> tuple[Checkpoint, Checkpoint]:
    folder = save_family(name, tmp_path / "folder")
    path, *further = WRITERS[name](folder, tmp_path / f"{name}.safetensors")
    return open_checkpoint(folder), open_checkpoint(path, further, config=folder)


@pytest.mark.parametrize("name", WRITERS)
def test_a_single_file_holds_what_its_folder_holds(tmp_path: Path, cache: ModelCache, name: str):
    folder, single = opened(name, tmp_path)
    assert single.family == folder.family
    assert set(single.components) == set(folder.components)
    for component, expected in folder.components.items():
        if not expected.weights:
            continue
        with folder.use(cache, component) as ours, single.use(cache, component) as theirs:
            assert type(ours) is type(theirs)
            before, after = ours.state_dict(), theirs.state_dict()
            assert before.keys() == after.keys()
            for key, tensor in before.items():
                assert torch.equal(tensor, after[key]), f"{component}: {key}"
            assert not any(tensor.is_meta for tensor in (*theirs.parameters(), *theirs.buffers()))
    assert single.scheduler().config == folder.scheduler().config
    assert single.tokenizer()("a red rose")["input_ids"] == folder.tokenizer()("a red rose")["input_ids"]


def test_the_denoiser_draws_what_its_folder_draws(tmp_path: Path, cache: ModelCache):
    folder, single = opened("sd15", tmp_path)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens = torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), folder.use(cache, "unet") as ours, single.use(cache, "unet") as theirs:
        expected = ours(latents, 500, encoder_hidden_states=tokens).sample
        assert torch.equal(theirs(latents, 500, encoder_hidden_states=tokens).sample, expected)


def test_a_component_is_read_without_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = save_family("sd15", tmp_path / "folder")
    single = open_checkpoint(stable_diffusion(folder, tmp_path / "sd15.safetensors")[0], config=folder)
    read: list[str] = []

    class Recorded:
        """The real file, with a note of what is asked for."""

        def __init__(self, *arguments, **options):
            self.file = safe_open(*arguments, **options)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *raised):
            return self.file.__exit__(*raised)

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr("pipeline.files.single_file_weights.safe_open", Recorded)
    single.build("vae")
    assert read and all(name.startswith(VAE) for name in read)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sdxl", "z_image"])
def test_a_dtype_can_be_chosen(tmp_path: Path, name: str, dtype: torch.dtype):
    folder, single = opened(name, tmp_path)
    for component, expected in folder.components.items():
        if expected.weights:
            ours, theirs = folder.build(component, dtype), single.build(component, dtype)
            for (key, tensor), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
                assert tensor.dtype == other.dtype and torch.equal(tensor, other), f"{component}: {key}"
            tables = dict(theirs.named_buffers())
            for key, buffer in ours.named_buffers():
                assert buffer.dtype == tables[key].dtype and torch.equal(buffer, tables[key]), f"{component}: {key}"


def test_a_file_overwritten_in_place_leaves_the_loaded_model_alone(tmp_path: Path):
    _, single = opened("sd15", tmp_path)
    model = single.build("unet")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = single.components["unet"].weights[0]
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    os.truncate(path, 0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("scale_name", ["scale_weight", "weight_scale"])
def test_scaled_8_bit_weights_are_multiplied_out(tmp_path: Path, scale_name: str):
    folder = save_family("z_image", tmp_path / "folder")
    path, *further = z_image(folder, tmp_path / "z.safetensors")
    weights, expected = load_file(path), {}
    for name, tensor in list(weights.items()):
        if name.endswith("feed_forward.w1.weight"):
            scale = tensor.abs().max() / 448
            small = (tensor / scale).to(torch.float8_e4m3fn)
            weights[name], weights[name.replace("weight", scale_name)] = small, scale
            expected[name.removeprefix(UNET)] = small.float() * scale
    weights["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    save_file(weights, path, metadata={"format": "pt"})
    built = open_checkpoint(path, further, config=folder).build("transformer").state_dict()
    assert len(expected) == 3
    for name, tensor in expected.items():
        assert torch.equal(built[name], tensor)
    weights["layers.0.feed_forward.w1.weight"] = torch.zeros(4, 4, dtype=torch.uint8)
    save_file({UNET + "layers.9.x.weight": torch.zeros(4, 4, dtype=torch.uint8), **weights}, path)
    with pytest.raises(CheckpointError, match=r"found quantised .*layers\.9\.x\.weight"):
        open_checkpoint(path, further, config=folder).build("transformer")


@pytest.mark.parametrize("column", [True, False])
def test_8_bit_integers_with_a_scale_of_each_row_are_multiplied_out(tmp_path: Path, column: bool):
    folder = save_family("z_image", tmp_path / "folder")
    path, *further = z_image(folder, tmp_path / "z.safetensors")
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("layers.0.feed_forward.w1.weight"))
    scale = weights[name].abs().amax(dim=1, keepdim=True) / 127
    rounded = (weights[name] / scale).round().to(torch.int8)
    scale_name = name.replace("weight", "weight_scale")
    small = weights | {name: rounded, scale_name: scale if column else scale[:, 0]}
    save_file(small, path, metadata={"format": "pt"})
    built = open_checkpoint(path, further, config=folder).build("transformer").state_dict()
    assert torch.equal(built[name.removeprefix(UNET)], rounded * scale)
    for unfit in (torch.ones(()), torch.ones(2, 1), scale.to(torch.int32)):
        save_file(small | {scale_name: unfit}, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"a scale of each row, found quantised .*w1\.weight"):
            open_checkpoint(path, further, config=folder).build("transformer")


# --- what is refused ---


def refused(path: Path, *parts: str, further: tuple[Path, ...] = (), config: Path | None = None) -> None:
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(path, further, config)
    for part in (str(path.parent), *parts):
        assert part in str(raised.value)
    assert len(str(raised.value)) < 1000


def test_a_file_that_lacks_parts_names_them_and_where_they_belong(tmp_path: Path):
    path = header_only(tmp_path / "flux1-dev.safetensors", full_size("flux", "transformer", ""))
    refused(
        path,
        "is of FLUX.1 and holds transformer",
        "text_encoder (CLIPTextModel), usually clip_l.safetensors in models/text_encoders",
        "text_encoder_2 (T5EncoderModel), usually t5xxl_fp16.safetensors in models/text_encoders",
        "vae (AutoencoderKL), usually ae.safetensors in models/vae",
    )
    t5 = header_only(tmp_path / "t5xxl.safetensors", full_size("flux", "text_encoder_2", ""))
    clip = header_only(tmp_path / "clip.safetensors", full_size("flux", "text_encoder", ""))
    ae = header_only(tmp_path / "ae.safetensors", full_size("flux", "vae", ""))
    checkpoint = open_checkpoint(path, (t5, ae, clip))
    assert {name: part.weights[0] for name, part in checkpoint.components.items() if part.weights} == {
        "transformer": path,
        "text_encoder": clip,
        "text_encoder_2": t5,
        "vae": ae,
    }
    unfit = header_only(tmp_path / "clip_g.safetensors", full_size("sdxl", "text_encoder_2", "", layouts.clip))
    refused(path, str(unfit), "holds nothing that flux1-dev.safetensors", further=(t5, ae, clip, unfit))
    assert fitting_files(path, [clip, unfit, ae, t5]) == {"text_encoder": [clip], "text_encoder_2": [t5], "vae": [ae]}


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
        (["distilled_guidance_layer.in_proj.bias"], "Chroma"),
        (["attention_y_norm.weight", "y_embedder.y_proj.fc1.weight"], "Sana in one file"),
        (["decoder.conv_in.weight", "encoder.conv_in.weight"], "a VAE alone"),
        (["text_model.embeddings.token_embedding.weight"], "a CLIP text encoder alone"),
        (["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"], "a T5 text encoder alone"),
        (["lora_unet_down_blocks_0.lora_down.weight"], "tensors of a LoRA"),
        (["something.else.weight"], "something.else.weight [2, 3]"),
    ],
)
def test_a_file_of_no_family_is_refused_with_what_it_holds(tmp_path: Path, names: list[str], told: str):
    path = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(2, 3) for name in names}, path)
    refused(path, told, f"{len(names)} tensors")


def test_a_unet_of_another_width_is_of_no_family(tmp_path: Path):
    folder = save_family("sd15", tmp_path / "folder")
    path = stable_diffusion(folder, tmp_path / "sd15.safetensors")[0]
    refused(path, "expected the denoiser of", "Stable Diffusion", "of model.diffusion_model")
    refused(path, "expected the denoiser of", config=save_family("z_image", tmp_path / "other"))


def test_files_that_are_no_weights(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    refused(path, "no such file")
    for content, told in ((b"<!DOCTYPE html>", "a web page"), (b"PK\x03\x04" + bytes(99), "a zip archive")):
        path.write_bytes(content)
        refused(path, told)
    folder = save_family("sd15", tmp_path / "folder")
    whole = stable_diffusion(folder, tmp_path / "sd15.safetensors")[0]
    refused(whole, str(path), "a zip archive", further=(path,), config=folder)


def test_weights_that_lack_a_tensor_leave_nothing_in_the_cache(tmp_path: Path, cache: ModelCache):
    folder = save_family("sd15", tmp_path / "folder")
    path = stable_diffusion(folder, tmp_path / "sd15.safetensors")[0]
    weights = load_file(path)
    del weights[f"{UNET}middle_block.0.in_layers.2.bias"]
    weights[f"{VAE}decoder.conv_out.bias"] = torch.zeros(5)
    save_file(weights, path)
    checkpoint = open_checkpoint(path, config=folder)
    for component, told in (("unet", "mid_block.resnets.0.conv1.bias"), ("vae", "decoder.conv_out.bias")):
        expected = f"1 are missing or of another shape, the first being {told}"
        with pytest.raises(CheckpointError, match=expected), checkpoint.use(cache, component):
            pass
    assert cache.stats().entries == ()


# --- the configurations that ship, at their full size: shapes alone, in headers of files that have no bytes on disk ---

# (layout, component): parameters, as published
PARAMETERS = {
    ("sd15", "unet"): 859_520_964,
    ("sd15", "vae"): 83_653_863,
    ("sd15", "text_encoder"): 123_060_480,
    ("sd2", "unet"): 865_910_724,
    ("sd2", "text_encoder"): 340_387_840,
    ("sdxl", "unet"): 2_567_463_684,
    ("sdxl", "text_encoder_2"): 694_659_840,
    ("flux", "transformer"): 11_901_408_320,
    ("flux", "text_encoder_2"): 4_762_310_656,
    ("qwen_image", "transformer"): 20_430_401_088,
    ("qwen_image", "vae"): 126_892_531,
    ("z_image", "transformer"): 6_154_908_736,
    ("pixart_alpha", "transformer"): 611_349_152,
    ("pixart_sigma", "transformer"): 610_856_096,
}
DENOISERS: dict[str, Callable] = {
    "sd15": layouts.ldm_unet,
    "lcm": layouts.ldm_unet,
    "sd2": layouts.ldm_unet,
    "sdxl": layouts.ldm_unet,
    "sd3": layouts.sd3,
    "flux": layouts.flux,
    "flux2_klein_4b": layouts.flux2,
    "flux2_klein_9b": layouts.flux2,
    "qwen_image": layouts.as_is,
    "z_image": layouts.z_image,
    "pixart_alpha": layouts.pixart,
    "pixart_sigma": layouts.pixart,
}


@functools.cache
def module_on_meta(layout: str, component: str) -> torch.nn.Module:
    entry = json.loads((CONFIGS / layout / "model_index.json").read_text())[component]
    config = json.loads((CONFIGS / layout / component / "config.json").read_text())
    model = Component(component, entry[0], entry[1], CONFIGS).load_class()
    with torch.device("meta"):
        if entry[0] == "transformers":
            return model(model.config_class.from_dict(config))
        return model.from_config(config)


def full_size(layout: str, component: str, prefix: str, write: Callable | None = None) -> dict[str, torch.Tensor]:
    config = json.loads((CONFIGS / layout / component / "config.json").read_text())
    if component in ("unet", "transformer"):
        write = DENOISERS[layout]
    elif component == "vae":
        write = layouts.wan_vae if layout == "qwen_image" else layouts.ldm_vae
    elif write is None:
        write = layouts.clip if "num_attention_heads" in config and "vocab_size" in config else layouts.as_is
        write = in_models if "qwen" in config["model_type"] else write
    written = write(module_on_meta(layout, component).state_dict(), config)
    return {f"{prefix}{name}": tensor for name, tensor in written.items()}


def header_only(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A file of the right length, none of which takes room on disk, with a true header."""
    entries, end = {}, 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": "F16",
            "shape": list(tensor.shape),
            "data_offsets": [end, end := end + 2 * tensor.numel()],
        }
    header = json.dumps(entries).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return path


@pytest.mark.parametrize(("layout", "component"), PARAMETERS)
def test_a_configuration_makes_a_network_of_the_published_size(layout: str, component: str):
    parameters = module_on_meta(layout, component).parameters()
    assert sum(parameter.numel() for parameter in parameters) == PARAMETERS[layout, component]


@pytest.mark.parametrize("layout", DENOISERS)
def test_a_file_of_full_size_is_known_by_its_header_and_fits_what_ships(tmp_path: Path, layout: str):
    denoiser = "unet" if (CONFIGS / layout / "unet").is_dir() else "transformer"
    path = header_only(tmp_path / "model.safetensors", full_size(layout, denoiser, UNET))
    index = json.loads((CONFIGS / layout / "model_index.json").read_text())
    others = [name for name in index if name == "vae" or name.startswith("text_encoder")]
    further = [header_only(tmp_path / f"{name}.safetensors", full_size(layout, name, "")) for name in others]
    started = time.perf_counter()
    checkpoint = open_checkpoint(path, further)
    assert time.perf_counter() - started < 5
    assert checkpoint.index.parent.name == layout
    assert {name: checkpoint.components[name].weights[0].stem for name in others} == {name: name for name in others}
    for component in (denoiser, "vae"):
        part = checkpoint.components[component]
        config = json.loads(part.config.read_text()) | dict(part.options)
        prefix = part.prefix
        tensors = {name.removeprefix(prefix): each for name, each in full_size(layout, component, prefix).items()}
        converted = CONVERTERS[part.form](tensors, config)
        wanted = module_on_meta(layout, component).state_dict()
        assert {name: tensor.shape for name, tensor in wanted.items()} == {
            name: tensor.shape for name, tensor in converted.items() if name in wanted
        }
    for name in checkpoint.components:
        if name.startswith("tokenizer"):
            assert checkpoint.tokenizer(name)("a red rose, 1990", truncation=True)["input_ids"]
    assert checkpoint.scheduler().config.num_train_timesteps == 1000


@pytest.mark.parametrize("name", ["sdxl", "z_image"])
def test_the_picture_is_that_of_the_folder(tmp_path: Path, cache: ModelCache, name: str):
    pictures = []
    for checkpoint in opened(name, tmp_path):
        prompt = encode_prompt(cache, checkpoint, "a red rose", "a blue car")
        conditioning = fuse(cache, checkpoint, prompt, None)
        drawn = generate(cache, checkpoint, conditioning, seed=1, num_inference_steps=2, width=64, height=64)
        pictures.append(drawn.pixels)
    assert pictures[0].std() > 0
    assert torch.equal(*pictures)


@pytest.mark.parametrize("bomb", ["90 MB", "a million entries", "trailing bytes"])
def test_a_bomb_costs_neither_time_nor_memory(tmp_path: Path, cache: ModelCache, bomb: str):
    path = tmp_path / "model.safetensors"
    if bomb == "90 MB":
        header, told = b'{"a":"' + b" " * (90 * 2**20) + b'"}', "expected a header of at most 16,777,216 bytes"
    elif bomb == "a million entries":
        entries = b",".join(b'"%d":0' % number for number in range(10**6))
        header, told = b"{" + entries + b"}", "lists 1,000,000 values of 1 tensors"
        del entries
    else:
        header, told = b"{}", "3 bytes after its last tensor"
    data = b"abc" if bomb == "trailing bytes" else b""
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    del header
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=told):
        open_checkpoint(path)
    spent, peak = time.perf_counter() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert spent < 2 and peak < 64 * 2**20, (spent, peak)
    assert cache.stats().entries == ()


# --- what a file says about how its model was trained ---


def encoders_and_vae(tmp_path: Path, layout: str) -> list[Path]:
    index = json.loads((CONFIGS / layout / "model_index.json").read_text())
    names = [name for name in index if name == "vae" or name.startswith("text_encoder")]
    return [header_only(tmp_path / f"{name}.safetensors", full_size(layout, name, "")) for name in names]


@pytest.mark.parametrize("pixels", [256, 512, 1024, 2048])
def test_a_pixart_tells_the_size_it_was_trained_at(tmp_path: Path, pixels: int):
    tensors = full_size("pixart_sigma", "transformer", "")
    tensors["pos_embed"] = torch.empty(1, (pixels // 16) ** 2, 1152, device="meta")
    path = header_only(tmp_path / "sigma.safetensors", tensors)
    checkpoint = open_checkpoint(path, encoders_and_vae(tmp_path, "pixart_sigma"))
    told = checkpoint.components["transformer"].options
    assert (told["sample_size"], told["interpolation_scale"]) == (pixels // 8, pixels / 512)


@pytest.mark.parametrize("kind", ["pixart_alpha", "pixart_sigma"])
def test_a_pixart_in_diffusers_names_is_known_and_read_as_it_is(tmp_path: Path, cache: ModelCache, kind: str):
    folder = save_family(kind, tmp_path / "folder")
    path, *further = pixart_in_diffusers_names(folder, tmp_path / "pixart.safetensors")
    single = open_checkpoint(path, further, config=folder)
    assert single.family.name == {"pixart_alpha": "PixArt-alpha", "pixart_sigma": "PixArt-sigma"}[kind]
    ours, theirs = open_checkpoint(folder).build("transformer"), single.build("transformer")
    for (name, tensor), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    whole = header_only(tmp_path / "whole.safetensors", dict(module_on_meta(kind, "transformer").state_dict()))
    assert open_checkpoint(whole, encoders_and_vae(tmp_path, kind)).index.parent.name == kind


def test_a_pixart_that_diffusers_has_no_network_for_is_refused(tmp_path: Path):
    tensors = full_size("pixart_sigma", "transformer", "")
    tensors["blocks.0.attn.q_norm.weight"] = torch.empty(1152, device="meta")
    refused(header_only(tmp_path / "normed.safetensors", tensors), "PixArt with normalised queries")


def test_schnell_is_known_by_what_it_lacks(tmp_path: Path):
    tensors = full_size("flux", "transformer", "")
    further = encoders_and_vae(tmp_path, "flux")
    dev = open_checkpoint(header_only(tmp_path / "dev.safetensors", tensors), further)
    schnell = {name: tensor for name, tensor in tensors.items() if "guidance" not in name}
    fast = open_checkpoint(header_only(tmp_path / "schnell.safetensors", schnell), further)
    assert (dev.scheduler().config.shift, dev.scheduler().config.use_dynamic_shifting) == (3.0, True)
    assert (fast.scheduler().config.shift, fast.scheduler().config.use_dynamic_shifting) == (1.0, False)
    assert dev.components["transformer"].options["guidance_embeds"]
    assert not fast.components["transformer"].options["guidance_embeds"]


def test_what_a_stable_diffusion_2_predicts_is_seen_in_one_bias(tmp_path: Path):
    path = header_only(tmp_path / "sd2.safetensors", full_size("sd2", "unet", UNET))
    further = encoders_and_vae(tmp_path, "sd2")
    assert open_checkpoint(path, further).scheduler().config.prediction_type == "epsilon"
    entry = check_weights(path).entries[f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"]
    with open(path, "r+b") as file:
        file.seek(entry.start)
        file.write(torch.linspace(-0.5, 0.5, entry.shape[0], dtype=torch.float16).numpy().tobytes())
    assert open_checkpoint(path, further).scheduler().config.prediction_type == "v_prediction"


def test_an_xl_that_predicts_v_says_so(tmp_path: Path):
    folder = save_family("sdxl", tmp_path / "folder")
    path = stable_diffusion_xl(folder, tmp_path / "xl.safetensors")[0]
    assert open_checkpoint(path, config=folder).scheduler().config.prediction_type == "epsilon"
    save_file({**load_file(path), "v_pred": torch.zeros(1)}, path)
    assert open_checkpoint(path, config=folder).scheduler().config.prediction_type == "v_prediction"


def test_an_inpainting_model_has_the_channels_of_its_file(tmp_path: Path):
    tensors = full_size("sd15", "unet", UNET)
    tensors[f"{UNET}input_blocks.0.0.weight"] = torch.empty(320, 9, 3, 3, device="meta")
    path = header_only(tmp_path / "inpainting.safetensors", tensors)
    checkpoint = open_checkpoint(path, encoders_and_vae(tmp_path, "sd15"))
    assert checkpoint.components["unet"].options["in_channels"] == 9
    tensors[f"{UNET}input_blocks.0.0.weight"] = torch.empty(320, 8, 3, 3, device="meta")
    refused(
        header_only(tmp_path / "pix2pix.safetensors", tensors), "expected a denoiser of 4 input channels", "found 8"
    )


def test_a_flux_that_takes_another_picture_is_refused(tmp_path: Path):
    tensors = full_size("flux", "transformer", "")
    tensors["img_in.weight"] = torch.empty(3072, 384, device="meta")
    refused(header_only(tmp_path / "fill.safetensors", tensors), "is FLUX.1 Fill, Depth, Canny or another")


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384}
        | {"qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
        {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192}
        | {"qk_norm": "rms_norm", "dual_attention_layers": ()},
    ],
    ids=["3.5 medium", "3.5 large"],
)
def test_the_sizes_of_stable_diffusion_3_are_read_from_the_header(tmp_path: Path, sizes: dict):
    config = json.loads((CONFIGS / "sd3/transformer/config.json").read_text()) | sizes
    with torch.device("meta"):
        network: Any = diffusers.SD3Transformer2DModel.from_config(config)
    tensors = {f"{UNET}{name}": tensor for name, tensor in layouts.sd3(network.state_dict(), config).items()}
    path = header_only(tmp_path / "sd3.safetensors", tensors)
    checkpoint = open_checkpoint(path, encoders_and_vae(tmp_path, "sd3"))
    assert checkpoint.components["transformer"].options == sizes


def test_flux_in_its_published_names_is_renamed_value_by_value():
    """At the one width that diffusers' converter knows, a layer of each kind. Rows differ, since rows are what it cuts
    and swaps; the columns of a row are alike and take no memory until then."""
    config = json.loads((CONFIGS / "flux/transformer/config.json").read_text())
    config |= {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 64}
    with torch.device("meta"):
        network: Any = diffusers.FluxTransformer2DModel.from_config(config)
        shapes = network.state_dict()
    random = torch.Generator().manual_seed(0)
    expected = {}
    for name, tensor in shapes.items():
        rows = torch.randint(-128, 128, (tensor.shape[0],), dtype=torch.int8, generator=random)
        expected[name] = rows.reshape(-1, *[1] * (tensor.dim() - 1)).expand(tensor.shape)
    converted = CONVERTERS["flux"](layouts.flux(expected, config), config)
    assert converted.keys() == expected.keys()
    for name in expected:
        assert torch.equal(converted.pop(name), expected[name]), name
