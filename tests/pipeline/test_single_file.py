"""Models in single files: what the loader converts is what the diffusers folder of the same weights holds."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.checkpoints import Checkpoint, open_checkpoint
from pipeline.model_cache import ModelCache
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


def flux_in_diffusers_names(folder: Path, path: Path) -> list[Path]:
    main, *others = _apart(folder, path, layouts.as_is, layouts.ldm_vae, prefix="")
    t5 = path.with_name("t5.safetensors")
    return [main, *others, write(t5, encoder=part(folder, "text_encoder_2", "", layouts.as_is))]


def _apart(folder: Path, path: Path, transformer: Callable, vae: Callable, prefix: str) -> list[Path]:
    """As the host's users keep them: the denoiser in diffusion_models, the rest in text_encoders and vae."""
    encoder = layouts.clip if (folder / "tokenizer_2").is_dir() else in_models
    return [
        write(path, transformer=part(folder, "transformer", prefix, transformer)),
        write(path.with_name("encoder.safetensors"), encoder=part(folder, "text_encoder", "", encoder)),
        write(path.with_name("vae.safetensors"), vae=part(folder, "vae", "", vae)),
    ]


def in_models(tensors: layouts.Tensors, config: dict) -> layouts.Tensors:
    """As language models are published: everything but the head, and the eyes, under model."""
    return {
        name if name.startswith(("model.", "lm_head.", "visual.")) else f"model.{name}": tensor
        for name, tensor in tensors.items()
    }


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
