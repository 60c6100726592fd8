"""LoHa, LoKr, DoRA and cores amount to weights changed as their papers say, on diffusers' real classes."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.adapters.lora import open_lora
from pipeline.checkpoints import Checkpoint, CheckpointError, open_checkpoint
from pipeline.fusion import fuse
from pipeline.generation import generate
from pipeline.model_cache import ModelCache
from pipeline.speed_plan import SpeedPlan
from pipeline.text_encoder import encode_prompt
from tests.pipeline.family_folders import save_family

RANK, ALPHA = 2, 1.0
LAYERS = ("to_q", "to_out.0", "proj_in", "ff.net.2", "conv1")
Parts = dict[str, Tensor]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(save_family("sd15", tmp_path_factory.mktemp("families") / "sd15"))


def loha(shape: tuple[int, ...], random: Callable[..., Tensor]) -> tuple[Parts, Tensor]:
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    w1_a, w1_b, w2_a, w2_b = random(rows, RANK), random(RANK, columns), random(rows, RANK), random(RANK, columns)
    parts = {"hada_w1_a": w1_a, "hada_w1_b": w1_b, "hada_w2_a": w2_a, "hada_w2_b": w2_b}
    return parts, ALPHA / RANK * ((w1_a @ w1_b) * (w2_a @ w2_b)).reshape(shape)


def loha_with_cores(shape: tuple[int, ...], random: Callable[..., Tensor]) -> tuple[Parts, Tensor]:
    if len(shape) == 2:
        return loha(shape, random)
    parts, products = {}, []
    for side in "12":
        core, left, right = random(RANK, RANK, *shape[2:]), random(RANK, shape[0]), random(RANK, shape[1])
        parts |= {f"hada_t{side}": core, f"hada_w{side}_a": left, f"hada_w{side}_b": right}
        products.append(torch.einsum("ijhw,io,jc->ochw", core, left, right))
    return parts, ALPHA / RANK * products[0] * products[1]


def lokr_of_wholes(shape: tuple[int, ...], random: Callable[..., Tensor]) -> tuple[Parts, Tensor]:
    left, right = random(4, 2), random(shape[0] // 4, shape[1] // 2, *shape[2:])
    change = torch.kron(left.reshape(4, 2, *(1 for _ in shape[2:])), right)
    return {"lokr_w1": left, "lokr_w2": right}, change  # wholes have no rank, and no alpha


def lokr_of_products(shape: tuple[int, ...], random: Callable[..., Tensor]) -> tuple[Parts, Tensor]:
    columns = torch.Size(shape[1:]).numel() // 2
    parts = {
        "lokr_w1_a": random(4, RANK), "lokr_w1_b": random(RANK, 2),
        "lokr_w2_a": random(shape[0] // 4, RANK), "lokr_w2_b": random(RANK, columns),
    }  # fmt: skip
    left, right = (parts[f"lokr_w{side}_a"] @ parts[f"lokr_w{side}_b"] for side in "12")
    return parts, ALPHA / RANK * torch.kron(left, right).reshape(shape)


def lokr_with_a_core(shape: tuple[int, ...], random: Callable[..., Tensor]) -> tuple[Parts, Tensor]:
    if len(shape) == 2:
        return lokr_of_products(shape, random)
    core, a, b = random(RANK, RANK, *shape[2:]), random(RANK, shape[0] // 4), random(RANK, shape[1] // 2)
    left, right = random(4, 2), torch.einsum("ijhw,io,jc->ochw", core, a, b)
    parts = {"lokr_w1": left, "lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b}
    return parts, ALPHA / RANK * torch.kron(left[..., None, None], right.contiguous())


def lora(shape: tuple[int, ...], random: Callable[..., Tensor]) -> tuple[Parts, Tensor]:
    down, up = random(RANK, *shape[1:]), random(shape[0], RANK, *(1 for _ in shape[2:]))
    parts = {"lora_down.weight": down, "lora_up.weight": up}
    return parts, ALPHA / RANK * (up.flatten(1) @ down.flatten(1)).reshape(shape)


def lora_with_a_core(shape: tuple[int, ...], random: Callable[..., Tensor]) -> tuple[Parts, Tensor]:
    if len(shape) == 2:
        return lora(shape, random)
    down, core, up = random(RANK, shape[1], 1, 1), random(RANK, RANK, *shape[2:]), random(shape[0], RANK, 1, 1)
    change = torch.einsum("or,rshw,sc->ochw", up.flatten(1), core, down.flatten(1))
    return {"lora_down.weight": down, "lora_mid.weight": core, "lora_up.weight": up}, ALPHA / RANK * change


FORMS = {
    "LoHa": loha, "LoHa, cores": loha_with_cores, "LoKr, wholes": lokr_of_wholes, "LoKr, products": lokr_of_products,
    "LoKr, core": lokr_with_a_core, "LoRA, core": lora_with_a_core,
}  # fmt: skip


def written(
    plain: Checkpoint, path: Path, form: Callable[..., tuple[Parts, Tensor]], lengths: str = ""
) -> dict[str, Any]:
    """A file of that form as LyCORIS writes it, and by layer what it changes; lengths: of "rows" or "columns"."""
    source = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source) / 3

    tensors, changes = {}, {}
    for name, module in plain.build("unet").named_modules():
        if name.endswith(LAYERS) and "time" not in name and isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            shape = module.weight.shape
            parts, change = form(shape, random)
            if lengths:
                side = (
                    (shape[0], *(1 for _ in shape[1:])) if lengths == "rows" else (1, shape[1], *(1 for _ in shape[2:]))
                )
                parts["dora_scale"] = 1 + torch.rand(side, generator=source)
            stem = f"lora_unet_{name.replace('.', '_')}"
            tensors |= {f"{stem}.{part}": value for part, value in parts.items()} | {
                f"{stem}.alpha": torch.tensor(ALPHA)
            }
            changes[name] = change, parts.get("dora_scale")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return changes


def changed(plain: Checkpoint, folder: Path, changes: dict[str, Any], strength: float) -> Checkpoint:
    """The same model with its weights changed once and for all."""
    shutil.copytree(plain.folder, folder)
    path = folder / "unet" / plain.components["unet"].weights[0].name
    weights: dict[str, Any] = load_file(path)
    for name, (change, lengths) in changes.items():
        before = weights[f"{name}.weight"].float()
        after = before + change
        if lengths is not None:
            across = tuple(axis for axis in range(after.ndim) if axis != (0 if lengths.shape[0] > 1 else 1))
            after = lengths * after / after.square().sum(dim=across, keepdim=True).sqrt()
        weights[f"{name}.weight"] = before + strength * (after - before)
    save_file(weights, path, {"format": "pt"})
    return open_checkpoint(folder)


def drawn(cache: ModelCache, checkpoint: Checkpoint, **options: Any) -> Tensor:
    words = fuse(cache, checkpoint, encode_prompt(cache, checkpoint, "a red rose"), None)
    return generate(cache, checkpoint, words, seed=3, num_inference_steps=2, width=64, height=64, **options).pixels


@pytest.mark.parametrize("form", FORMS)
def test_each_form_amounts_to_changed_weights(warm: ModelCache, plain: Checkpoint, tmp_path: Path, form: str):
    changes = written(plain, tmp_path / "style.safetensors", FORMS[form])
    assert any(change.ndim == 4 and change.shape[-1] == 3 for change, _ in changes.values())
    adapter = open_lora(plain, tmp_path / "style.safetensors", 0.7)
    assert adapter.notices == () and set(adapter.targets["unet"].values()) == changes.keys()
    by_file = drawn(warm, plain.with_adapter(adapter))
    assert not torch.allclose(by_file, drawn(warm, plain), atol=1e-2)
    assert torch.allclose(by_file, drawn(warm, changed(plain, tmp_path / "sd15", changes, 0.7)), atol=1e-4)


@pytest.mark.parametrize("lengths", ["rows", "columns"])
@pytest.mark.parametrize("form", [lora, loha, lokr_of_products])
def test_lengths_beside_them_are_kept_at_any_strength(
    warm: ModelCache, plain: Checkpoint, tmp_path: Path, form: Callable[..., tuple[Parts, Tensor]], lengths: str
):
    changes = written(plain, tmp_path / "dora.safetensors", form, lengths)
    by_file = drawn(warm, plain.with_adapter(open_lora(plain, tmp_path / "dora.safetensors", 0.6)))
    assert not torch.allclose(by_file, drawn(warm, plain), atol=1e-2)
    assert torch.allclose(by_file, drawn(warm, changed(plain, tmp_path / "sd15", changes, 0.6)), atol=1e-4)


def test_order_does_not_matter_and_8_bits_do(warm: ModelCache, plain: Checkpoint, tmp_path: Path):
    pytest.importorskip("torchao")
    written(plain, tmp_path / "dora.safetensors", lora, "rows")
    written(plain, tmp_path / "loha.safetensors", loha)
    dora, other = (open_lora(plain, tmp_path / f"{name}.safetensors", 0.6) for name in ("dora", "loha"))
    both = [plain.with_adapter(one).with_adapter(two) for one, two in ((dora, other), (other, dora))]
    first, second = (drawn(warm, model) for model in both)
    assert torch.allclose(first, second, atol=1e-4)
    in_8_bits = drawn(warm, both[0], plan=SpeedPlan("custom", quantisation="int8"))
    assert torch.allclose(in_8_bits, first, atol=0.05)


def test_half_precision_costs_no_more_than_it_does_without(warm: ModelCache, plain: Checkpoint, tmp_path: Path):
    written(plain, tmp_path / "dora.safetensors", lora, "rows")
    styled, half = plain.with_adapter(open_lora(plain, tmp_path / "dora.safetensors", 1.0)), SpeedPlan(dtype="bfloat16")
    off, usual = ((drawn(warm, model, plan=half) - drawn(warm, model)).abs().mean().item() for model in (styled, plain))
    assert off < 3 * usual


@pytest.mark.parametrize("form", [loha, lokr_of_products])
def test_layers_with_dots_in_their_names_are_found(
    warm: ModelCache, plain: Checkpoint, tmp_path: Path, form: Callable[..., tuple[Parts, Tensor]]
):
    written(plain, tmp_path / "k.safetensors", form)
    names = {name.replace(".", "_"): name for name, _ in plain.build("unet").named_modules()}
    tensors = {}
    for name, tensor in load_file(tmp_path / "k.safetensors").items():
        stem, _, part = name.removeprefix("lora_unet_").partition(".")
        tensors[f"unet.{names[stem]}.{part}"] = tensor
    save_file(tensors, tmp_path / "d.safetensors")
    by_kohya, by_dots = (
        drawn(warm, plain.with_adapter(open_lora(plain, tmp_path / f"{name}.safetensors", 1.0))) for name in "kd"
    )
    assert torch.equal(by_kohya, by_dots)


@pytest.mark.parametrize("form", [lora, lokr_of_products])
@pytest.mark.parametrize("name", ["sd15", "sd3", "flux_dev", "qwen_image", "sana", "pixart_sigma"])
def test_simpletuners_names_are_those_of_any_family(
    warm: ModelCache, tmp_path: Path, name: str, form: Callable[..., tuple[Parts, Tensor]]
):
    model = open_checkpoint(save_family(name, tmp_path / name))
    denoiser = "unet" if model.has("unet") else "transformer"
    source = torch.Generator().manual_seed(0)
    dotted, flat = {}, {}
    for path, module in model.build(denoiser).named_modules():
        if path.endswith(("to_q", "to_out.0")) and isinstance(module, torch.nn.Linear):
            parts, _ = form(module.weight.shape, lambda *shape: torch.randn(shape, generator=source))
            stem = f"lycoris_{path.replace('.', '_')}"
            flat |= {f"{stem}.{part}": value for part, value in parts.items()} | {f"{stem}.alpha": torch.tensor(ALPHA)}
            for part, value in parts.items():
                part = part.replace("lora_down", "lora_A").replace("lora_up", "lora_B")
                scale = ALPHA / RANK if part in ("lora_B.weight", "lokr_w2_a") else 1.0
                dotted[f"{denoiser}.{path}.{part}"] = scale * value
    drawings = []
    for kind, tensors in (("flat", flat), ("dotted", dotted)):
        save_file({each: tensor.contiguous() for each, tensor in tensors.items()}, tmp_path / f"{kind}.safetensors")
        adapter = open_lora(model, tmp_path / f"{kind}.safetensors", 0.8)
        assert adapter.notices == ()
        drawings.append(drawn(warm, model.with_adapter(adapter)))
    assert torch.allclose(*drawings, atol=1e-4)
    assert not torch.allclose(drawings[0], drawn(warm, model), atol=1e-3)


def test_flux_with_kohyas_names_takes_what_is_in_one_piece(warm: ModelCache, tmp_path: Path):
    flux = open_checkpoint(save_family("flux_dev", tmp_path / "flux_dev"))
    weight = flux.build("transformer").get_submodule("transformer_blocks.0.attn.to_out.0").weight
    assert isinstance(weight, Tensor)
    source = torch.Generator().manual_seed(0)
    parts, _ = lokr_of_products(weight.shape, lambda *shape: torch.randn(shape, generator=source))
    stem = "lora_unet_double_blocks_0_img_attn_"
    whole = {f"{stem}proj.{name}": part for name, part in parts.items()} | {f"{stem}proj.alpha": torch.tensor(1.0)}
    save_file(whole, tmp_path / "one.safetensors")
    styled = flux.with_adapter(open_lora(flux, tmp_path / "one.safetensors", 1.0))
    assert not torch.allclose(drawn(warm, styled), drawn(warm, flux), atol=1e-3)
    save_file(
        {f"{stem}qkv.lokr_w1": torch.zeros(3, 1), f"{stem}qkv.lokr_w2": torch.zeros(32, 32)}, tmp_path / "q.safetensors"
    )
    with pytest.raises(
        CheckpointError, match=r"^q.safetensors: expected each layer .* found lokr_w1 of .*qkv, which is in several"
    ):
        open_lora(flux, tmp_path / "q.safetensors", 1.0)


def test_changes_of_norms_are_told_and_left(plain: Checkpoint, tmp_path: Path):
    path = tmp_path / "l.safetensors"
    changes = written(plain, path, lokr_of_products)
    save_file(load_file(path) | {"lora_unet_conv_norm_out.w_norm": torch.zeros(32)}, path)
    (said,) = open_lora(plain, path, 1.0).notices
    assert f"{len(changes)} of {len(changes) + 1} layers are in the model" in said and "w_norm is not" in said


def test_pefts_lengths_are_the_same(warm: ModelCache, plain: Checkpoint, tmp_path: Path):
    """As diffusers saves what it trained by PEFT: one value a row, under another name."""
    written(plain, tmp_path / "k.safetensors", lora, "rows")
    names = {name.replace(".", "_"): name for name, _ in plain.build("unet").named_modules()}
    tensors = {}
    for name, tensor in load_file(tmp_path / "k.safetensors").items():
        stem, _, part = name.removeprefix("lora_unet_").partition(".")
        layer = f"unet.{names[stem]}"
        if part == "dora_scale":
            # Of convolutions PEFT has them beside each other.
            shape = (1, -1, 1, 1) if tensor.ndim == 4 else (-1,)
            tensors[f"{layer}.lora_magnitude_vector.weight"] = tensor.reshape(shape)
        elif part != "alpha":
            side = {"lora_down.weight": ("A", 1.0), "lora_up.weight": ("B", ALPHA / RANK)}[part]
            tensors[f"{layer}.lora_{side[0]}.weight"] = tensor * side[1]
    save_file(tensors, tmp_path / "p.safetensors")
    by_kohya, by_peft = (
        drawn(warm, plain.with_adapter(open_lora(plain, tmp_path / f"{name}.safetensors", 1.0))) for name in "kp"
    )
    assert torch.allclose(by_kohya, by_peft, atol=1e-4)


def test_they_hold_no_more_than_the_file_and_compile(cache: ModelCache, plain: Checkpoint, tmp_path: Path):
    path = tmp_path / "lokr.safetensors"
    written(plain, path, lokr_of_products)
    styled = plain.with_adapter(open_lora(plain, path, 1.0))
    drawn(cache, plain)
    before = cache.stats().bytes_held
    exact = drawn(cache, styled)
    of_file = sum(tensor.nbytes for name, tensor in load_file(path).items() if not name.endswith("alpha"))
    assert cache.stats().bytes_held - before == of_file
    compiled = drawn(cache, styled, plan=SpeedPlan("custom", compile="regions"))
    assert torch.allclose(compiled, exact, atol=1e-4)


def test_what_does_not_fit_is_refused(plain: Checkpoint, tmp_path: Path):
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    loose = {f"{stem}.hada_w1_a": torch.zeros(64, 2), f"{stem}.hada_w1_b": torch.zeros(2, 64)}
    for tensors, said in (
        (loose, "got: KeyError"),
        ({f"{stem}.lokr_w1": torch.zeros(4, 4), f"{stem}.lokr_w2": torch.zeros(3, 3)}, "was made for another model"),
        ({f"{stem}.dora_scale": torch.zeros(64, 1)}, "got: KeyError"),
        ({f"{stem}.oft_blocks": torch.zeros(4, 4, 4)}, "found OFT"),
    ):
        save_file(tensors, tmp_path / "odd.safetensors")
        with pytest.raises(CheckpointError, match=said):
            open_lora(plain, tmp_path / "odd.safetensors", 1.0)


def test_one_that_was_made_for_a_wider_model_is_told_by_its_widths(plain: Checkpoint, tmp_path: Path):
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    wide = {"hada_w1_a": (640, 4), "hada_w1_b": (4, 2048), "hada_w2_a": (640, 4), "hada_w2_b": (4, 2048)}
    save_file({f"{stem}.{name}": torch.zeros(shape) for name, shape in wide.items()}, tmp_path / "xl.safetensors")
    with pytest.raises(CheckpointError, match="is a LoRA of Stable Diffusion XL, cross-attention 2048 wide"):
        open_lora(plain, tmp_path / "xl.safetensors", 1.0)
