"""Models in single files, chosen in the real host. The files have true headers of full size and no bytes on disk."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.pipeline import single_files as layouts
from tests.pipeline.test_single_file import full_size, header_only
from tests.rig.client import Client, Prompt, PromptRefusedError, Run
from tests.rig.host import ComfyServer


@pytest.fixture
def models(host: ComfyServer) -> Iterator[Path]:
    root = host.base / "models"
    before = set(root.rglob("*.safetensors"))
    yield root
    for path in set(root.rglob("*.safetensors")) - before:
        path.unlink()


def put(models: Path, name: str, layout: str, component: str, write: Callable | None = None) -> Path:
    path = models / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return header_only(path, full_size(layout, component, "", write))


def chosen(client: Client, model: str, **further: str) -> Run:
    load = {"class_type": "DuetLoadModel", "inputs": {"model": model, **further}}
    prompt: Prompt = {
        "load": load,
        "cache": {"class_type": "DuetModelCache", "inputs": {"action": "report", "after": ["load", 0]}},
    }
    return client.run(prompt)


def test_the_parts_of_a_file_are_found_by_what_they_are(client: Client, models: Path):
    put(models, "diffusion_models/flux/dev.safetensors", "flux", "transformer")
    model = "diffusion_models/flux/dev.safetensors"
    told = chosen(client, model)
    assert told.error["exception_message"].strip().startswith("Load model: ")
    assert "usually t5xxl_fp16.safetensors in models/text_encoders" in told.error["exception_message"]
    put(models, "text_encoders/of clip.safetensors", "flux", "text_encoder")
    put(models, "text_encoders/of t5.safetensors", "flux", "text_encoder_2")
    put(models, "text_encoders/other.safetensors", "sdxl", "text_encoder_2", layouts.clip)
    put(models, "vae/of flux.safetensors", "flux", "vae")
    found = chosen(client, model)
    assert found.succeeded, found.error
    assert sorted(found.outputs["load"]["duet_notices"]) == [
        "text_encoder: of clip.safetensors, the only file that fits",
        "text_encoder_2: of t5.safetensors, the only file that fits",
        "vae: of flux.safetensors, the only file that fits",
    ]
    put(models, "vae/another.safetensors", "flux", "vae")
    several = chosen(client, model)
    assert "expected a choice of vae for dev.safetensors" in several.error["exception_message"]
    assert "another.safetensors, of flux.safetensors" in several.error["exception_message"]
    named = chosen(client, model, vae="another.safetensors")
    assert named.succeeded, named.error
    assert len(named.outputs["load"]["duet_notices"]) == 2
    wrong = chosen(client, model, vae="another.safetensors", text_encoder="other.safetensors")
    assert "other.safetensors holds nothing that dev.safetensors, of FLUX.1, lacks" in wrong.error["exception_message"]


def test_what_is_no_model_is_refused_with_what_it_is(client: Client, models: Path):
    put(models, "checkpoints/really a vae.safetensors", "flux", "vae")
    told = chosen(client, "checkpoints/really a vae.safetensors")
    assert "is a VAE alone" in told.error["exception_message"]
    page = models / "checkpoints/page.safetensors"
    page.write_text("<!DOCTYPE html><html>Sign in</html>")
    told = chosen(client, "checkpoints/page.safetensors")
    assert told.error["exception_message"].startswith("Load model: ")
    assert "a web page" in told.error["exception_message"]


@pytest.mark.parametrize("name", ["model", "text_encoder", "text_encoder_2", "text_encoder_3", "vae"])
@pytest.mark.parametrize("value", ["checkpoints/../../../etc/passwd.safetensors", "../x.safetensors", "/etc/passwd"])
def test_a_name_that_is_not_listed_is_refused(client: Client, name: str, value: str):
    with pytest.raises(PromptRefusedError) as refusal:
        chosen(client, **{"model": "duet-mini (built in)", name: value})
    assert f"Load model: {name} must be one of" in str(refusal.value.answer["node_errors"])
