"""A picture is heard beside the words as diffusers' own loader has it, on its real classes, and leaves no trace."""

from collections.abc import Callable
from functools import cache as once
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipeline.adapters.ip_adapter import IPAdapter, open_ip_adapter, show_picture
from pipeline.adapters.lora import open_lora
from pipeline.checkpoints import Checkpoint, CheckpointError, open_checkpoint
from pipeline.denoising.diffusers_generation import draw
from pipeline.denoising.diffusers_pipelines import assemble
from pipeline.fusion import fuse
from pipeline.generation import generate
from pipeline.model_cache import ModelCache
from pipeline.text_encoder import encode_prompt
from pipeline.vision.image_encoders import open_image_encoder
from tests.pipeline.adapter_files import random_factors, save_peft
from tests.pipeline.devices import FakeDevice
from tests.pipeline.family_folders import FAMILY_FOLDERS, save_family
from tests.pipeline.folders import edit_index
from tests.pipeline.ip_adapter_files import HIDDEN, PROJECTED, adapter_tensors, save_adapter, save_encoder, split

FRAME: dict[str, Any] = {"seed": 3, "num_inference_steps": 2, "guidance_scale": 2.0, "width": 64, "height": 64}
FAMILIES = ["sd15", "sd2", "sd_turbo", "sdxl", "lcm", "kolors", "flux_dev", "flux_schnell"]
CLOSE = 1e-4


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    root = tmp_path_factory.mktemp("families")

    @once
    def opened(name: str) -> Checkpoint:
        return open_checkpoint(save_family(name, root / name))

    return opened


@pytest.fixture(scope="module")
def eye(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return open_image_encoder(save_encoder(tmp_path_factory.mktemp("eye") / "clip"))


def denoiser_of(checkpoint: Checkpoint) -> str:
    return "unet" if checkpoint.has("unet") else "transformer"


def tensors_for(checkpoint: Checkpoint, **options: Any) -> dict[str, torch.Tensor]:
    return adapter_tensors(checkpoint.build(denoiser_of(checkpoint)), **options)


def picture(count: int = 1) -> torch.Tensor:
    return torch.rand(count, 3, 40, 56, generator=torch.Generator().manual_seed(0))


def words_of(cache: ModelCache, checkpoint: Checkpoint) -> Any:
    return fuse(cache, checkpoint, encode_prompt(cache, checkpoint, "a red rose", "a car"), None)


def drawn(cache: ModelCache, checkpoint: Checkpoint, words: Any, **options: Any) -> torch.Tensor:
    latents = generate(cache, checkpoint, words, **FRAME | options).latents
    assert latents is not None
    return latents


def by_diffusers(
    cache: ModelCache, checkpoint: Checkpoint, words: Any, files: list[dict[str, torch.Tensor]], scale: float
) -> Callable[[Checkpoint], torch.Tensor]:
    """The same by diffusers' loader and pipeline, on modules of their own, for what a checkpoint shows."""
    name = denoiser_of(checkpoint)
    denoiser: Any = checkpoint.build(name)
    denoiser._load_ip_adapter_weights([split(tensors) for tensors in files], low_cpu_mem_usage=False)
    denoiser.requires_grad_(False)
    tasks = checkpoint.family.tasks
    assert tasks is not None
    assemble(checkpoint, tasks.text_to_image, {name: denoiser}).set_ip_adapter_scale([scale] * len(files))

    def run(shown: Checkpoint) -> torch.Tensor:
        pairs = [adapter.shown() for adapter in shown.adapters]
        with checkpoint.use(cache, "vae") as vae, torch.inference_mode():
            embeds = [pair[0] for pair in pairs if pair], [pair[1] for pair in pairs if pair]
            options = dict(FRAME, source=None, on_step=lambda *_: None, image_embeds=embeds)
            return draw(checkpoint, denoiser, vae, words, **options)

    return run


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, atol=CLOSE)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_picture_is_heard(warm: ModelCache, family: Callable[[str], Checkpoint], eye: Any, tmp_path: Path, name: str):
    plain = family(name)
    tensors = tensors_for(plain)
    file = open_ip_adapter(plain, save_adapter(tmp_path / "ip.safetensors", tensors))
    words = words_of(warm, plain)
    before = drawn(warm, plain, words)
    with plain.use(warm, denoiser_of(plain)) as denoiser:
        processors = dict(denoiser.attn_processors)
    shown = show_picture(warm, plain, file, eye, picture(), scale=0.6)
    heard = drawn(warm, shown, words)
    assert not same(heard, before)
    assert same(heard, by_diffusers(warm, plain, words, [tensors], 0.6)(shown))
    hidden = show_picture(warm, plain, file, eye, picture(), scale=0.0)
    assert torch.equal(drawn(warm, hidden, words), before)
    assert torch.equal(drawn(warm, plain, words), before)
    with plain.use(warm, denoiser_of(plain)) as denoiser:
        assert all(denoiser.attn_processors[key] is value for key, value in processors.items())
        assert denoiser.config.get("encoder_hid_dim_type") != "ip_image_proj"


def test_the_table_names_the_families_that_are_tested():
    table = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    (head,) = (line for line in table.splitlines() if line.startswith("| family | text to image"))
    assert head.endswith("| LoRA: `test_it_amounts_to_merged_weights` | IP-Adapter: `test_a_picture_is_heard` |")
    rows = table[table.index(head) :].partition("\n\n")[0].splitlines()[2:]
    for name, row in zip(FAMILY_FOLDERS, rows, strict=True):
        assert row.strip("| ").split(" | ")[-2:] == [f"`[{name}]`", f"`[{name}]`" if name in FAMILIES else "none"]


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux_dev"])
def test_it_is_heard_beside_a_picture_that_is_drawn_from(
    warm: ModelCache, family: Callable[[str], Checkpoint], eye: Any, tmp_path: Path, name: str
):
    plain = family(name)
    file = open_ip_adapter(plain, save_adapter(tmp_path / "ip.safetensors", tensors_for(plain)))
    shown, words = show_picture(warm, plain, file, eye, picture()), words_of(warm, plain)
    source = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 64, 64)
    mask[..., 32:] = 1
    for task in ({"image": source}, {"image": source, "mask": mask}):
        assert not same(drawn(warm, shown, words, **task), drawn(warm, plain, words, **task))


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux_dev"])
def test_each_of_a_batch_equals_its_own_run(
    warm: ModelCache, family: Callable[[str], Checkpoint], eye: Any, tmp_path: Path, name: str
):
    plain = family(name)
    file = open_ip_adapter(plain, save_adapter(tmp_path / "ip.safetensors", tensors_for(plain)))
    shown, words = show_picture(warm, plain, file, eye, picture(3)), words_of(warm, plain)
    both = drawn(warm, shown, words, batch_size=2)
    assert same(both[1], drawn(warm, shown, words, seed=4)[0])
    one = show_picture(warm, plain, file, eye, picture(3)[:1])
    assert not same(both[:1], drawn(warm, one, words))  # all three pictures are heard


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_plus_hears_all_tokens(
    warm: ModelCache, family: Callable[[str], Checkpoint], eye: Any, tmp_path: Path, name: str
):
    plain = family(name)
    tensors = tensors_for(plain, plus=True)
    file = open_ip_adapter(plain, save_adapter(tmp_path / "plus.safetensors", tensors))
    assert (file.hears_tokens, file.image_width) == (True, HIDDEN)
    shown, words = show_picture(warm, plain, file, eye, picture(), scale=0.6), words_of(warm, plain)
    adapter = shown.adapters[0]
    assert isinstance(adapter, IPAdapter) and adapter.image_embeds.shape == (1, 1, 1 + 4 * 4, HIDDEN)
    assert not same(adapter.image_embeds, adapter.negative)
    assert same(drawn(warm, shown, words), by_diffusers(warm, plain, words, [tensors], 0.6)(shown))


@pytest.mark.parametrize("name", ["sd15", "flux_dev"])
def test_two_are_heard_together(
    warm: ModelCache, family: Callable[[str], Checkpoint], eye: Any, tmp_path: Path, name: str
):
    plain = family(name)
    files = [tensors_for(plain, seed=seed) for seed in (0, 1)]
    shown = plain
    for number, tensors in enumerate(files):
        file = open_ip_adapter(plain, save_adapter(tmp_path / f"{number}.safetensors", tensors))
        shown = show_picture(warm, shown, file, eye, picture() ** (number + 1), scale=0.5)
    words = words_of(warm, plain)
    assert same(drawn(warm, shown, words), by_diffusers(warm, plain, words, files, 0.5)(shown))


def test_flux_in_the_layout_of_xlabs(warm: ModelCache, family: Callable[[str], Checkpoint], eye: Any, tmp_path: Path):
    plain, words = family("flux_dev"), words_of(warm, family("flux_dev"))
    tensors = tensors_for(plain)
    renamed = {
        "image_proj.": "ip_adapter_proj_model.",
        "ip_adapter.0.": "double_blocks.0.processor.",
        "to_k_ip": "ip_adapter_double_stream_k_proj",
        "to_v_ip": "ip_adapter_double_stream_v_proj",
    }
    other = {}
    for name, tensor in tensors.items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        other[name] = tensor
    pictures = [
        drawn(warm, show_picture(warm, plain, open_ip_adapter(plain, save_adapter(path, file)), eye, picture()), words)
        for path, file in ((tmp_path / "a.safetensors", tensors), (tmp_path / "x.safetensors", other))
    ]
    assert tensors.keys() != other.keys() and torch.equal(*pictures)


def test_a_lora_and_an_adapter_lie_on_one_model(
    warm: ModelCache, family: Callable[[str], Checkpoint], eye: Any, tmp_path: Path
):
    plain = family("sd15")
    factors = random_factors(plain.build("unet"), lambda name: "attn2" in name)
    lora = open_lora(plain, save_peft(tmp_path / "s.safetensors", {"unet": factors}), 1.0)
    file = open_ip_adapter(plain, save_adapter(tmp_path / "ip.safetensors", tensors_for(plain)))
    one = show_picture(warm, plain.with_adapter(lora), file, eye, picture())
    other = show_picture(warm, plain, file, eye, picture()).with_adapter(lora)
    words = words_of(warm, plain)
    found = drawn(warm, one, words)
    assert torch.equal(found, drawn(warm, other, words))
    for alone in (plain.with_adapter(lora), show_picture(warm, plain, file, eye, picture())):
        assert not same(found, drawn(warm, alone, words))


def test_an_interrupt_leaves_the_shared_module_as_it_was(
    cache: ModelCache, family: Callable[[str], Checkpoint], eye: Any, tmp_path: Path
):
    plain = family("sd15")
    file = open_ip_adapter(plain, save_adapter(tmp_path / "ip.safetensors", tensors_for(plain)))
    shown, words = show_picture(cache, plain, file, eye, picture()), words_of(cache, plain)
    before, wanted = drawn(cache, plain, words), drawn(cache, shown, words)

    def stop(step: int, total: int, preview: object) -> None:
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            drawn(cache, shown, words, on_step=stop)
    assert not any(entry.pins for entry in cache.stats().entries)
    assert torch.equal(drawn(cache, plain, words), before)
    assert torch.equal(drawn(cache, shown, words), wanted)


def test_the_models_own_encoder_looks(warm: ModelCache, family: Callable[[str], Checkpoint], eye: Any, tmp_path: Path):
    folder = save_family("sd15", tmp_path / "with-encoder")
    save_encoder(folder / "image_encoder")
    edit_index(folder, image_encoder=["transformers", "CLIPVisionModelWithProjection"])
    own = open_checkpoint(folder)
    file = open_ip_adapter(own, save_adapter(tmp_path / "ip", tensors_for(own)))
    by_own, by_file = (show_picture(warm, own, file, encoder, picture()).adapters[0] for encoder in (None, eye))
    assert isinstance(by_own, IPAdapter) and isinstance(by_file, IPAdapter)
    assert torch.equal(by_own.image_embeds, by_file.image_embeds)
    with pytest.raises(ValueError, match="expected an image encoder for ip, since sd15 has none of its own"):
        show_picture(warm, family("sd15"), file, None, picture())


# --- what does not fit ---


def test_an_encoder_that_overflows_in_half_precision_looks_once_more(
    warm: ModelCache, family: Callable[[str], Checkpoint], eye: Any, tmp_path: Path
):
    checkpoint, cache = family("sd15"), ModelCache(FakeDevice(), 2**32)
    file = open_ip_adapter(checkpoint, save_adapter(tmp_path / "ip.safetensors", tensors_for(checkpoint)))

    def spoil(dtype: torch.dtype | None) -> None:
        with eye.use(cache, dtype) as network:
            network.vision_model.post_layernorm.register_forward_hook(lambda module, given, output: output * torch.nan)

    def heard(there: ModelCache) -> torch.Tensor:
        (adapter,) = show_picture(there, checkpoint, file, eye, picture()).adapters
        assert isinstance(adapter, IPAdapter)
        return adapter.image_embeds

    assert heard(cache).dtype == torch.float16
    spoil(None)
    torch.testing.assert_close(heard(cache), heard(warm))
    spoil(torch.float32)
    with pytest.raises(FloatingPointError, match=r"clip.*: the image encoder gave values that are no numbers"):
        heard(cache)
    assert not any(entry.pins for entry in cache.stats().entries)


def test_a_wrong_image_encoder_is_refused_by_both_widths(
    warm: ModelCache, family: Callable[[str], Checkpoint], eye: Any, tmp_path: Path
):
    plain = family("sd15")
    base = open_ip_adapter(plain, save_adapter(tmp_path / "base.safetensors", tensors_for(plain)))
    plus = open_ip_adapter(plain, save_adapter(tmp_path / "plus.safetensors", tensors_for(plain, plus=True)))
    narrow = open_image_encoder(save_encoder(tmp_path / "narrow", projection=12, hidden=8))
    bare = open_image_encoder(save_encoder(tmp_path / "bare", projects=False))
    for file, encoder, wanted, got in (
        (base, narrow, PROJECTED, 12),
        (plus, narrow, HIDDEN, 8),
        (base, bare, PROJECTED, HIDDEN),
    ):
        with pytest.raises(ValueError, match=rf"{wanted} wide: expected .*got {encoder.name}, whose are {got} wide"):
            show_picture(warm, plain, file, encoder, picture())
    for scale in (-0.1, 3.1, float("nan")):
        with pytest.raises(ValueError, match="scale must be 0"):
            show_picture(warm, plain, base, eye, picture(), scale=scale)


def test_one_of_another_family_is_refused_by_its_header(family: Callable[[str], Checkpoint], tmp_path: Path):
    paths = {
        name: save_adapter(tmp_path / f"{name}.safetensors", tensors_for(family(name))) for name in ("sdxl", "flux_dev")
    }
    for name, other, said in (
        (
            "sd15",
            "sdxl",
            "Stable Diffusion, for words 64 wide in 4 layers: expected one of Stable Diffusion, for words 32",
        ),
        (
            "sdxl",
            "flux_dev",
            "FLUX.1, for words 32 wide in 1 layers: expected one of Stable Diffusion XL, for words 64",
        ),
        ("flux_dev", "sdxl", "Stable Diffusion, for words 64 wide in 4 layers: expected one of FLUX.1, for words 32"),
    ):
        with pytest.raises(CheckpointError) as refused:
            open_ip_adapter(family(name), paths[other])
        assert said in str(refused.value)
    real = {"image_proj.proj.weight": torch.zeros(8192, 2)}
    real |= {f"ip_adapter.{number}.to_k_ip.weight": torch.zeros(1, 2048) for number in range(1, 141, 2)}
    save_file(real, tmp_path / "xl.safetensors")
    with pytest.raises(CheckpointError, match="an IP-Adapter of Stable Diffusion XL, for words 2048 wide in 70 layers"):
        open_ip_adapter(family("sd15"), tmp_path / "xl.safetensors")
    with pytest.raises(CheckpointError, match="expected no IP-Adapter for Sana"):
        open_ip_adapter(family("sana"), paths["sdxl"])


def test_what_is_no_adapter_or_hears_faces_is_refused(family: Callable[[str], Checkpoint], tmp_path: Path):
    plain = family("sd15")
    tensors = tensors_for(plain)
    face = {name: tensor for name, tensor in tensors.items() if name.startswith("ip_adapter.")}
    face |= {"image_proj.proj.0.weight": torch.zeros(16, 8), "image_proj.norm.weight": torch.zeros(32)}
    lora = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(2, 16)}
    for odd, said in ((lora, "expected an IP-Adapter's tensors"), (face, "as Face ID has it")):
        with pytest.raises(CheckpointError, match=said):
            open_ip_adapter(plain, save_adapter(tmp_path / "odd.safetensors", odd))
    torch.save(tensors, tmp_path / "pickled.safetensors")
    with pytest.raises(CheckpointError, match="pickled weights"):
        open_ip_adapter(plain, tmp_path / "pickled.safetensors")


def test_a_file_with_a_layer_of_another_shape_leaves_nothing_in_the_cache(
    cache: ModelCache, family: Callable[[str], Checkpoint], eye: Any, tmp_path: Path
):
    plain = family("sd15")
    tensors = tensors_for(plain)
    tensors["ip_adapter.3.to_v_ip.weight"] = torch.zeros(8, 31)
    file = open_ip_adapter(plain, save_adapter(tmp_path / "odd", tensors))
    shown = show_picture(cache, plain, file, eye, picture())
    with pytest.raises(CheckpointError, match="odd: expected an IP-Adapter as its authors lay it out"):
        drawn(cache, shown, words_of(cache, plain))
    assert not any(entry.pins or entry.key.path == file.path.resolve() for entry in cache.stats().entries)
