"""A LoRA amounts to weights with the product of its factors added, on diffusers' real classes, and leaves no trace."""

import json
import threading
from collections.abc import Callable
from functools import cache as once
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.adapters.lora import open_lora
from pipeline.checkpoints import Checkpoint, CheckpointError, open_checkpoint
from pipeline.fusion import fuse
from pipeline.generation import generate
from pipeline.model_cache import ModelCache
from pipeline.store.embedding_store import EmbeddingStore
from pipeline.store.recall import recalled
from pipeline.text_encoder import encode_prompt
from tests.pipeline.adapter_files import merged, random_factors, save_kohya, save_peft
from tests.pipeline.family_folders import FAMILY_FOLDERS, save_family
from tests.pipeline.test_single_file import opened

CLOSE = 1e-4


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    root = tmp_path_factory.mktemp("families")

    @once
    def saved(name: str) -> Checkpoint:
        return open_checkpoint(save_family(name, root / name))

    return saved


def denoiser_of(checkpoint: Checkpoint) -> str:
    return "unet" if checkpoint.has("unet") else "transformer"


def is_attention(name: str) -> bool:
    return "attn" in name or "attention" in name


def factors_for(checkpoint: Checkpoint, wanted: Callable[[str], bool] = is_attention, seed: int = 0) -> Any:
    return random_factors(checkpoint.build(denoiser_of(checkpoint)), wanted, seed)


def words_of(cache: ModelCache, checkpoint: Checkpoint) -> Any:
    return fuse(cache, checkpoint, encode_prompt(cache, checkpoint, "a red rose", "a car"), None)


def drawn(cache: ModelCache, checkpoint: Checkpoint, words: Any = None, **options: Any) -> torch.Tensor:
    options = {"seed": 3, "num_inference_steps": 2, "guidance_scale": 2.0, "width": 64, "height": 64} | options
    return generate(cache, checkpoint, words or words_of(cache, checkpoint), **options).pixels


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, atol=CLOSE)


@pytest.mark.parametrize("name", FAMILY_FOLDERS)
def test_it_amounts_to_merged_weights(warm: ModelCache, family: Callable[[str], Checkpoint], tmp_path: Path, name: str):
    plain = family(name)
    denoiser = denoiser_of(plain)
    factors = {denoiser: factors_for(plain)}
    path = save_peft(tmp_path / "style.safetensors", factors)
    words, before = words_of(warm, plain), drawn(warm, plain)
    styled = plain.with_adapter(open_lora(plain, path, 0.7))
    by_lora = drawn(warm, styled, words)
    assert not same(by_lora, before)
    by_weights = merged(plain, tmp_path / plain.folder.name, factors, 0.7)
    assert same(by_lora, drawn(warm, by_weights))
    assert torch.equal(drawn(warm, plain, words), before)
    off = plain.with_adapter(open_lora(plain, path, 0.0))
    assert torch.equal(drawn(warm, off, words), before)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_kohyas_layout_reaches_denoiser_and_encoders(
    warm: ModelCache, family: Callable[[str], Checkpoint], tmp_path: Path, name: str
):
    plain = family(name)
    layers = ("to_q", "to_out.0", "proj_in", "ff.net.2", "conv1", "downsamplers.0.conv")
    denoiser = factors_for(plain, lambda layer: layer.endswith(layers) and "time" not in layer)
    assert any(down.ndim == 4 and down.shape[-1] == 3 for down, _ in denoiser.values())
    encoders = {
        component: random_factors(plain.build(component), lambda layer: layer.endswith(("q_proj", "fc1")), seed=1)
        for component in plain.components
        if component.startswith("text_encoder")
    }
    prefixes = {"text_encoder": "lora_te1" if name == "sdxl" else "lora_te", "text_encoder_2": "lora_te2"}
    kohya = {"lora_unet": denoiser}
    for component, factors in encoders.items():
        # Kohya's names are older than the transformers that dropped this one.
        kohya[prefixes[component]] = {
            f"text_model.{key.removeprefix('text_model.')}": pair for key, pair in factors.items()
        }
    lora = open_lora(plain, save_kohya(tmp_path / "k.safetensors", kohya, alpha=1.0), 1.5)
    assert lora.notices == ()
    styled = plain.with_adapter(lora)
    by_weights = merged(plain, tmp_path / plain.folder.name, {"unet": denoiser, **encoders}, 1.5 * 1.0 / 2)
    assert same(words_of(warm, styled).tokens, words_of(warm, by_weights).tokens)
    assert not same(words_of(warm, styled).tokens, words_of(warm, plain).tokens)
    assert same(drawn(warm, styled), drawn(warm, by_weights))


def test_sdxl_in_the_numbers_of_its_first_code(warm: ModelCache, family: Callable[[str], Checkpoint], tmp_path: Path):
    plain = family("sdxl")
    names = {
        "input_blocks_1_1": "down_blocks.0.attentions.0",
        "middle_block_1": "mid_block.attentions.0",
        "output_blocks_2_1": "up_blocks.1.attentions.0",
    }
    layer = "transformer_blocks.0.attn2.to_k"
    factors = factors_for(plain, lambda name: name in {f"{block}.{layer}" for block in names.values()})
    kohya = {f"{old}.{layer}": factors[f"{new}.{layer}"] for old, new in names.items()}
    lora = open_lora(plain, save_kohya(tmp_path / "k.safetensors", {"lora_unet": kohya}, alpha=2.0), 1.0)
    assert set(lora.targets["unet"].values()) == factors.keys() and lora.notices == ()
    by_weights = merged(plain, tmp_path / plain.folder.name, {"unet": factors}, 1.0)
    assert same(drawn(warm, plain.with_adapter(lora)), drawn(warm, by_weights))


def test_flux_in_the_layers_of_its_first_code(warm: ModelCache, family: Callable[[str], Checkpoint], tmp_path: Path):
    """One layer there makes what are three layers here."""
    plain = family("flux_dev")
    source = torch.Generator().manual_seed(0)
    down, up = (torch.randn(shape, generator=source) for shape in ((2, 32), (96, 2)))
    kohya = {"lora_unet": {"double_blocks.0.img_attn.qkv": (down, up)}}
    lora = open_lora(plain, save_kohya(tmp_path / "k.safetensors", kohya, alpha=1.0), 1.0)
    three = (f"transformer_blocks.0.attn.to_{side}" for side in "qkv")
    factors = {name: (down, part) for name, part in zip(three, up.chunk(3), strict=True)}
    by_weights = merged(plain, tmp_path / plain.folder.name, {"transformer": factors}, 0.5)
    by_lora = drawn(warm, plain.with_adapter(lora))
    assert same(by_lora, drawn(warm, by_weights)) and not same(by_lora, drawn(warm, plain))


def test_alphas_of_diffusers_metadata_count(warm: ModelCache, family: Callable[[str], Checkpoint], tmp_path: Path):
    plain = family("flux_dev")
    factors = {"transformer": factors_for(plain)}
    first = next(iter(factors["transformer"]))
    settings = {"transformer.r": 2, "transformer.lora_alpha": 1, "transformer.alpha_pattern": {first: 1}}
    path = save_peft(tmp_path / "a.safetensors", factors, lora_adapter_metadata=json.dumps(settings))
    by_lora = drawn(warm, plain.with_adapter(open_lora(plain, path, 1.0)))
    assert same(by_lora, drawn(warm, merged(plain, tmp_path / plain.folder.name, factors, 0.5)))


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux_dev"])
def test_a_model_in_a_single_file_takes_it_as_its_folder_does(warm: ModelCache, tmp_path: Path, name: str):
    folder, single = opened(name, tmp_path)
    factors = {denoiser_of(folder): factors_for(folder)}
    path = save_peft(tmp_path / "style.safetensors", factors)
    words = words_of(warm, single)
    styled = drawn(warm, single.with_adapter(open_lora(single, path, 0.7)), words)
    by_folder = drawn(warm, folder.with_adapter(open_lora(folder, path, 0.7)))
    assert same(styled, by_folder) and not same(styled, drawn(warm, single, words))


def test_two_add_up(warm: ModelCache, family: Callable[[str], Checkpoint], tmp_path: Path):
    plain = family("sd15")
    one, two = factors_for(plain), factors_for(plain, lambda name: name.endswith("to_k"), seed=5)
    styled = plain.with_adapter(open_lora(plain, save_peft(tmp_path / "1.safetensors", {"unet": one}), 0.5))
    styled = styled.with_adapter(open_lora(plain, save_peft(tmp_path / "2.safetensors", {"unet": two}), -0.8))
    both = merged(merged(plain, tmp_path / "m", {"unet": one}, 0.5), tmp_path / "mm", {"unet": two}, -0.8)
    words = words_of(warm, plain)
    assert same(drawn(warm, styled, words), drawn(warm, both))


# --- no trace ---


def test_an_interrupt_leaves_the_shared_module_as_it_was(
    family: Callable[[str], Checkpoint], tmp_path: Path, cache: ModelCache
):
    plain = family("sd15")
    styled = plain.with_adapter(
        open_lora(plain, save_peft(tmp_path / "s.safetensors", {"unet": factors_for(plain)}), 1.0)
    )
    words = words_of(cache, plain)
    before, wanted = drawn(cache, plain, words), drawn(cache, styled, words)

    def stop(step: int, total: int, preview: object) -> None:
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            drawn(cache, styled, words, on_step=stop)
    assert [entry.pins for entry in cache.stats().entries if entry.pins] == []
    with plain.use(cache, "unet") as unet:
        assert not any(module._forward_hooks for module in unet.modules())
    assert torch.equal(drawn(cache, plain, words), before)
    assert torch.equal(drawn(cache, styled, words), wanted)


def test_two_prompts_at_a_time_never_see_each_others(
    family: Callable[[str], Checkpoint], tmp_path: Path, cache: ModelCache
):
    """Both are in the middle of denoising on one shared module when each takes its next step."""
    plain = family("sd15")
    styled = plain.with_adapter(
        open_lora(plain, save_peft(tmp_path / "s.safetensors", {"unet": factors_for(plain)}), 1.0)
    )
    words = words_of(cache, plain)
    models = {"plain": plain, "styled": styled}
    wanted = {name: drawn(cache, model, words) for name, model in models.items()}
    meeting, found = threading.Barrier(2, timeout=60), {}

    def run(name: str) -> None:
        found[name] = drawn(cache, models[name], words, on_step=lambda *_: meeting.wait())

    threads = [threading.Thread(target=run, args=(name,)) for name in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: torch.equal(found[name], wanted[name]) for name in models} == {"plain": True, "styled": True}
    assert not torch.equal(wanted["plain"], wanted["styled"])


def test_the_weights_of_the_model_are_held_once(family: Callable[[str], Checkpoint], tmp_path: Path, cache: ModelCache):
    plain = family("sd15")
    path = save_peft(tmp_path / "s.safetensors", {"unet": factors_for(plain)})
    words = words_of(cache, plain)
    drawn(cache, plain, words)
    before = cache.stats()
    for strength in (0.5, 1.0):
        drawn(cache, plain.with_adapter(open_lora(plain, path, strength)), words)
    after = cache.stats()
    factors = sum(tensor.nbytes for tensor in load_file(path).values())
    assert after.misses - before.misses == 1 and after.bytes_held - before.bytes_held == factors


def test_the_store_of_embeddings_tells_them_apart(
    warm: ModelCache, family: Callable[[str], Checkpoint], tmp_path: Path
):
    plain = family("sd15")
    encoder = random_factors(plain.build("text_encoder"), lambda name: name.endswith("q_proj"))
    reads = save_peft(tmp_path / "te.safetensors", {"text_encoder": encoder})
    draws = save_peft(tmp_path / "unet.safetensors", {"unet": factors_for(plain)})
    store = EmbeddingStore(tmp_path / "store", 2**30)
    models = [plain, *(plain.with_adapter(open_lora(plain, reads, strength)) for strength in (0.5, 1.0))]
    models.append(plain.with_adapter(open_lora(plain, draws, 1.0)))
    tokens = [recalled(store, encode_prompt, warm, model, "a red rose").tokens for model in models]
    assert (store.misses, store.hits) == (3, 1)  # one that changes the denoiser alone reads as the plain model does
    assert torch.equal(tokens[0], tokens[3]) and not same(tokens[0], tokens[1]) and not same(tokens[1], tokens[2])


# --- what does not fit ---


def kohya_of(width: int, block: str) -> dict[str, torch.Tensor]:
    stem = f"lora_unet_{block}_transformer_blocks_0_attn2_to_k"
    return {
        f"{stem}.lora_down.weight": torch.zeros(4, width),
        f"{stem}.lora_up.weight": torch.zeros(640, 4),
        f"{stem}.alpha": torch.tensor(4.0),
    }


OTHERS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "Stable Diffusion XL": (kohya_of(2048, "input_blocks_4_1"), "cross-attention 2048 wide"),
    "Stable Diffusion 2": (kohya_of(1024, "down_blocks_1_attentions_0"), "cross-attention 1024 wide"),
    "Stable Diffusion 1": (kohya_of(768, "up_blocks_1_attentions_0"), "cross-attention 768 wide"),
    "FLUX.1": (
        {
            "lora_unet_double_blocks_0_img_mlp_0.lora_down.weight": torch.zeros(4, 3072),
            "lora_unet_double_blocks_0_img_mlp_0.lora_up.weight": torch.zeros(12288, 4),
        },
        "",
    ),
    "FLUX.2": (
        {
            "diffusion_model.double_blocks.0.img_mlp.0.lora_A.weight": torch.zeros(4, 3072),
            "diffusion_model.double_blocks.0.img_mlp.0.lora_B.weight": torch.zeros(18432, 4),
        },
        "",
    ),
    "Stable Diffusion 3": ({"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": torch.zeros(4, 1536)}, ""),
    "Qwen-Image": ({"transformer.transformer_blocks.0.img_mlp.net.2.lora_A.weight": torch.zeros(4, 12288)}, ""),
    "Z-Image": ({"diffusion_model.noise_refiner.0.attention.to_q.lora_A.weight": torch.zeros(4, 3840)}, ""),
}


@pytest.mark.parametrize("other", OTHERS)
def test_one_of_another_family_is_refused_by_its_header(
    family: Callable[[str], Checkpoint], tmp_path: Path, other: str
):
    tensors, width = OTHERS[other]
    save_file(tensors, tmp_path / "other.safetensors")
    for name in ("sd15", "sana"):
        checkpoint = family(name)
        with pytest.raises(CheckpointError) as refused:
            open_lora(checkpoint, tmp_path / "other.safetensors", 1.0)
        said = str(refused.value)
        assert f"is a LoRA of {other}" in said and f"expected one of {checkpoint.family.name}" in said
        assert width in said and (name == "sana" or not width or "cross-attention 32 wide" in said)


def test_one_of_a_family_with_equal_names_is_refused_by_its_widths(family: Callable[[str], Checkpoint], tmp_path: Path):
    factors = factors_for(family("sd3"), lambda name: name.endswith("add_q_proj"))
    with pytest.raises(CheckpointError, match=r"was made for another model: expected .* from 32 to 32 values"):
        open_lora(family("flux_dev"), save_peft(tmp_path / "sd3.safetensors", {"transformer": factors}), 1.0)


def test_no_layer_found_is_an_error_and_some_are_told(family: Callable[[str], Checkpoint], tmp_path: Path):
    plain = family("sd15")
    pair = torch.zeros(2, 8), torch.zeros(8, 2)
    with pytest.raises(CheckpointError, match=r"expected layers of sd15, .* found none among its 2 tensors, the first"):
        open_lora(plain, save_peft(tmp_path / "none.safetensors", {"unet": {"nowhere.to_q": pair}}), 1.0)
    factors = factors_for(plain, lambda name: name.endswith("attn1.to_q"))
    some = save_peft(tmp_path / "some.safetensors", {"unet": factors | {"nowhere.to_q": pair}})
    found = len(factors)
    assert open_lora(plain, some, 1.0).notices == (
        f"some.safetensors: {found} of {found + 1} layers are in the model, unet.nowhere.to_q is not",
    )


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"lora_unet_mid_block_attentions_0_proj_in.oft_blocks": torch.zeros(4, 4)}, "found OFT"),
        ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(4, 4)}, "lay it out, got: KeyError"),
        ({"conv_in.weight": torch.zeros(4, 4)}, "found none among its 1 tensors"),
    ],
)
def test_what_is_no_lora_is_refused(
    family: Callable[[str], Checkpoint], tmp_path: Path, tensors: dict[str, torch.Tensor], said: str
):
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match=said):
        open_lora(family("sd15"), tmp_path / "odd.safetensors", 1.0)


def test_a_pickle_and_odd_numbers_are_refused(family: Callable[[str], Checkpoint], tmp_path: Path, cache: ModelCache):
    plain = family("sd15")
    torch.save({"unet": torch.zeros(2)}, tmp_path / "p.safetensors")
    with pytest.raises(CheckpointError, match="a zip archive, as PyTorch writes pickled weights"):
        open_lora(plain, tmp_path / "p.safetensors", 1.0)
    path = save_peft(tmp_path / "s.safetensors", {"unet": factors_for(plain)})
    for strength in (21.0, float("nan")):
        with pytest.raises(ValueError, match="strength must be -20 to 20"):
            open_lora(plain, path, strength)
    styled = plain.with_adapter(open_lora(plain, path, 1.0))
    save_peft(path, {"unet": factors_for(plain, seed=9)})
    with pytest.raises(CheckpointError, match="was replaced since it was chosen"):
        drawn(cache, styled, words_of(cache, plain))
    assert not any(entry.pins or entry.key.path == path.resolve() for entry in cache.stats().entries)


def test_the_small_model_takes_none(shipped: Checkpoint, tmp_path: Path):
    save_file({"unet.conv_in.lora_A.weight": torch.zeros(2, 32, 3, 3)}, tmp_path / "s.safetensors")
    with pytest.raises(CheckpointError, match="expected no LoRA for Duet mini"):
        open_lora(shipped, tmp_path / "s.safetensors", 1.0)
