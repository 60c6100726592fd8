"""Tiny decoders from every layout that users have make the pixels that diffusers makes, and bad files are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.acceleration.decoders import TinyDecoder, open_tiny_decoder
from pipeline.checkpoints import Checkpoint, CheckpointError, open_checkpoint
from pipeline.denoising.latents import decode_latents, decode_or_tile, preview
from pipeline.model_cache import ModelCache
from pipeline.residency import module_bytes
from tests.pipeline.family_folders import save_family

LAYOUTS = ("folder", "decoder alone", "both", "host", "diffusers file")


def original(module: Any, prefix: str, offset: int) -> dict[str, Tensor]:
    """Names as in the original repository, which counts the decoder's clamp as its first layer."""
    named = {}
    for name, tensor in module.layers.state_dict().items():
        number, _, rest = name.partition(".")
        named[f"{prefix}{int(number) + offset}.{rest}"] = tensor.contiguous()
    return named


@pytest.fixture(scope="module")
def tiny() -> Any:
    torch.manual_seed(0)
    return AutoencoderTiny().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def layouts(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("decoders")
    tiny.save_pretrained(root / "folder")
    files = {
        "decoder alone": ("taesd_decoder", original(tiny.decoder, "", 1)),
        "both": ("taesd", original(tiny.decoder, "decoder.", 1) | original(tiny.encoder, "encoder.", 0)),
        "host": (
            "host",
            original(tiny.decoder, "taesd_decoder.", 1)
            | original(tiny.encoder, "taesd_encoder.", 0)
            | {"vae_scale": torch.tensor(0.18215), "vae_shift": torch.tensor(0.0)},
        ),
        "encoder alone": ("taesd_encoder", original(tiny.encoder, "", 0)),
    }
    paths = {"folder": root / "folder", "diffusers file": root / "folder" / "diffusion_pytorch_model.safetensors"}
    for name, (stem, tensors) in files.items():
        paths[name] = root / f"{stem}.safetensors"
        save_file(tensors, paths[name])
    return paths


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(save_family("sd15", tmp_path_factory.mktemp("models") / "sd15"))


def latents(channels: int = 4) -> Tensor:
    return torch.randn(2, channels, 6, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_makes_the_pixels_that_diffusers_makes(cache: ModelCache, tiny: Any, layouts: dict[str, Path], layout: str):
    decoder = open_tiny_decoder(layouts[layout])
    assert (decoder.latent_channels, decoder.downscale) == (4, 8)
    with torch.inference_mode():
        expected = ((tiny.decode(latents()).sample + 1) / 2).clamp(0, 1)
    assert expected.std() > 0.01
    with decoder.use(cache) as network, torch.inference_mode():
        pixels, alpha = decode_latents(network, latents())
        assert torch.allclose(pixels, expected, atol=1e-5)
        assert alpha.min() == 1
        assert preview(network, latents()).shape == (3, 48, 40)
        assert torch.equal(decode_or_tile(network, latents())[0], pixels)
        assert module_bytes(network) == module_bytes(tiny.decoder)
    (entry,) = cache.stats().entries
    assert entry.bytes == module_bytes(tiny.decoder)
    with decoder.use(cache):
        assert cache.stats().hits == 1


def test_half_a_file_of_weights_is_read_as_asked(cache: ModelCache, layouts: dict[str, Path]):
    decoder = open_tiny_decoder(layouts["decoder alone"])
    with decoder.use(cache) as whole, decoder.use(cache, torch.float16) as half:
        assert module_bytes(half) * 2 == module_bytes(whole)
        assert not any(parameter.requires_grad or parameter.is_inference() for parameter in half.parameters())


@pytest.mark.parametrize("channels", [16, 32])
def test_sizes_are_told_by_the_tensors(cache: ModelCache, tmp_path: Path, channels: int):
    torch.manual_seed(0)
    small: Any = AutoencoderTiny(
        latent_channels=channels,
        decoder_block_out_channels=(8, 8, 8),
        num_decoder_blocks=(1, 2, 1),
        out_channels=4,
    )
    path = tmp_path / "small_decoder.safetensors"
    save_file(original(small.decoder, "", 1), path)
    decoder = open_tiny_decoder(path)
    assert (decoder.latent_channels, decoder.downscale) == (channels, 4)
    with decoder.use(cache) as network, torch.inference_mode():
        pixels, alpha = decode_latents(network, latents(channels))
        assert (pixels.shape, alpha.shape) == ((2, 3, 24, 20), (2, 1, 24, 20))


def test_it_must_fit_the_latents(layouts: dict[str, Path], sd15: Checkpoint, shipped: Checkpoint, tmp_path: Path):
    decoder = open_tiny_decoder(layouts["decoder alone"])
    decoder.check_fits(sd15)
    with pytest.raises(ValueError, match=r"taesd_decoder\.safetensors decodes latents of 4 .* 16, as duet-mini"):
        decoder.check_fits(shipped)
    other = Path(shutil.copy(layouts["decoder alone"], tmp_path / "taesdxl_decoder.safetensors"))
    with pytest.raises(ValueError, match=r"taesdxl_.* of Stable Diffusion XL, scaled by 0\.13025: .* by 0\.18215"):
        open_tiny_decoder(other).check_fits(sd15)
    shallow: Any = AutoencoderTiny(decoder_block_out_channels=(8, 8), num_decoder_blocks=(1, 1))
    save_file(original(shallow.decoder, "", 1), tmp_path / "shallow.safetensors")
    with pytest.raises(ValueError, match=r"shallow\.safetensors makes 2 pixels a side of one latent: expected 8"):
        open_tiny_decoder(tmp_path / "shallow.safetensors").check_fits(sd15)


@pytest.mark.parametrize(("name", "fits"), [("qwen_image", False), ("flux2_klein", False), ("flux_schnell", True)])
def test_families_whose_latents_are_read_otherwise_have_none(tmp_path: Path, name: str, fits: bool):
    checkpoint = open_checkpoint(save_family(name, tmp_path / name))
    part = checkpoint.components["vae"]
    config = json.loads(part.config.read_text())
    channels = config.get("latent_channels", config.get("z_dim"))
    tiny: Any = AutoencoderTiny(
        latent_channels=channels, decoder_block_out_channels=(8,) * 4, num_decoder_blocks=(1,) * 4
    )
    save_file(original(tiny.decoder, "", 1), tmp_path / "tiny.safetensors")
    decoder = open_tiny_decoder(tmp_path / "tiny.safetensors")
    if fits:
        decoder.check_fits(checkpoint)
        return
    with pytest.raises(ValueError, match=f"expected no tiny decoder for {name}, .* {part.class_name} reads"):
        decoder.check_fits(checkpoint)


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        open_tiny_decoder(path)
    assert path.name in str(error.value)
    return str(error.value)


def test_an_encoder_alone_is_refused(layouts: dict[str, Path]):
    assert "found an encoder alone" in refused(layouts["encoder alone"])


def test_other_files_are_refused(layouts: dict[str, Path], sd15: Checkpoint, tmp_path: Path):
    assert "expected the tensors of a tiny decoder" in refused(sd15.components["vae"].weights[0])
    assert "expected an AutoencoderTiny, found 'AutoencoderKL'" in refused(sd15.components["vae"].folder)
    (tmp_path / "taesd_decoder.pth").write_bytes(b"PK\x03\x04")
    assert "expected a tiny decoder's folder or a .safetensors file" in refused(tmp_path / "taesd_decoder.pth")
    (tmp_path / "pickled.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    assert "zip archive" in refused(tmp_path / "pickled.safetensors")
    whole = layouts["decoder alone"].read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-1000])
    assert "truncated" in refused(tmp_path / "cut.safetensors")
    assert "no such file" in refused(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda tensors: tensors.pop("3.conv.2.bias"), r"1 are missing.*decoder\.layers\.2\.conv\.2\.bias"),
        (lambda tensors: tensors.update({"3.pool.0.weight": torch.zeros(2, 2)}), r"too many.*2\.pool\.0\.weight"),
        (lambda tensors: tensors.update({"7.weight": torch.zeros(64, 32, 3, 3)}), r"another shape.*6\.weight"),
        (lambda tensors: tensors.update({"1.weight": torch.zeros(64)}), "begins and ends with a convolution"),
        (
            lambda tensors: tensors.update({"19.weight": torch.zeros(7, 64, 3, 3), "19.bias": torch.zeros(7)}),
            "out_channels 3, or 4 with alpha, found 7",
        ),
    ],
)
def test_other_layers_are_refused(layouts: dict[str, Path], tmp_path: Path, spoil: Any, said: str):
    tensors = load_file(layouts["decoder alone"])
    spoil(tensors)
    path = tmp_path / "spoilt.safetensors"
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=said):
        open_tiny_decoder(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_decoder_blocks": [3, 3, 3, 10**9]}, "expected num_decoder_blocks to suit"),
        ({"num_decoder_blocks": "many"}, "expected num_decoder_blocks to suit"),
        ({"decoder_block_out_channels": [2**30] * 4}, "expected decoder_block_out_channels to suit"),
        ({"decoder_block_out_channels": [64]}, "expected the configuration of an AutoencoderTiny"),
        ({"latent_channels": 16}, "another shape"),
        ({"latent_channels": "four"}, "expected the configuration of an AutoencoderTiny"),
        ({"act_fn": "os.system"}, "expected the configuration of an AutoencoderTiny"),
        ({"upsampling_scaling_factor": 0}, "expected upsampling_scaling_factor 1 to 8"),
    ],
)
def test_a_bad_configuration_is_refused(layouts: dict[str, Path], tmp_path: Path, change: dict[str, Any], said: str):
    folder = Path(shutil.copytree(layouts["folder"], tmp_path / "spoilt"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=said):
        open_tiny_decoder(folder)


def test_a_file_replaced_after_it_was_opened_leaves_nothing(
    cache: ModelCache, layouts: dict[str, Path], tmp_path: Path
):
    path = Path(shutil.copy(layouts["decoder alone"], tmp_path / "decoder.safetensors"))
    decoder = open_tiny_decoder(path)
    assert isinstance(decoder, TinyDecoder)
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if name != "1.bias"}, path)
    with pytest.raises(CheckpointError, match="expected weights of a tiny decoder"), decoder.use(cache):
        pass
    path.unlink()
    with pytest.raises(CheckpointError, match="which was there before"), decoder.use(cache):
        pass
    assert cache.stats().entries == ()
