"""Load LoRA and IP-Adapter in the real host, on a tiny Stable Diffusion."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline.checkpoints import open_checkpoint
from tests.nodes.prompts import pictures_of
from tests.pipeline.adapter_files import random_factors, save_kohya
from tests.pipeline.family_folders import save_family
from tests.pipeline.ip_adapter_files import adapter_tensors, save_adapter, save_encoder
from tests.rig.client import Client, Prompt, PromptRefusedError
from tests.rig.host import ComfyServer


@pytest.fixture(scope="module", autouse=True)
def installed(host: ComfyServer) -> Iterator[None]:
    """In folders of the host: a tiny model, LoRAs and IP-Adapters that fit it and that do not, two image encoders."""
    models = host.base / "models"
    kinds = {kind: models / kind / "adapted" for kind in ("diffusers", "loras", "ipadapter", "clip_vision")}
    for folder in kinds.values():
        folder.mkdir(parents=True)
    unet: Any = open_checkpoint(save_family("sd15", kinds["diffusers"] / "sd15")).build("unet")
    layers = random_factors(unet, lambda name: "attn" in name)
    save_kohya(kinds["loras"] / "style.safetensors", {"lora_unet": layers}, alpha=2.0)
    nowhere = {"up_blocks.7.attentions.0.proj_in": (torch.zeros(2, 16), torch.zeros(16, 2))}
    save_kohya(kinds["loras"] / "part.safetensors", {"lora_unet": layers | nowhere}, alpha=2.0)
    xl = {"input_blocks.4.1.transformer_blocks.0.attn2.to_k": (torch.zeros(4, 2048), torch.zeros(640, 4))}
    save_kohya(kinds["loras"] / "xl.safetensors", {"lora_unet": xl}, alpha=4.0)
    save_adapter(kinds["ipadapter"] / "base.safetensors", adapter_tensors(unet))
    real = {"image_proj.proj.weight": torch.zeros(8192, 2)}
    real |= {f"ip_adapter.{number}.to_k_ip.weight": torch.zeros(1, 2048) for number in range(1, 141, 2)}
    save_file(real, kinds["ipadapter"] / "xl.safetensors")
    save_encoder(kinds["clip_vision"] / "fits")
    save_encoder(kinds["clip_vision"] / "narrow", projection=12)
    yield
    for folder in kinds.values():
        shutil.rmtree(folder)


def graph() -> Prompt:
    """The plain model draws into "save"; what is laid over it in ``laid`` draws the same into "other"."""

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    drawn = {"seed": 1, "steps": 2, "guidance_scale": 2.0, "width": 64, "height": 64, "batch_size": 1}
    return {
        "load": node("DuetLoadModel", model="adapted/sd15"),
        "text": node("DuetEmbedText", model=["load", 0], prompt="a red rose", negative_prompt="blue"),
        "fuse": node("DuetFuse", model=["load", 0], method="concat", strength=0.5, prompt_embeds=["text", 0]),
        "draw": node("DuetGenerate", model=["load", 0], conditioning=["fuse", 0], **drawn),
        "save": node("PreviewImage", images=["draw", 0]),
        "orange": node("EmptyImage", width=48, height=40, batch_size=1, color=0xFF8800),
    }


def laid(lora: str | None = None, adapter: str | None = None, *, amount: float = 1.0, encoder: str = "fits") -> Prompt:
    prompt = graph()
    if lora is not None:
        inputs: dict[str, Any] = {"model": ["load", 0], "lora": lora, "strength": amount}
        prompt["lay"] = {"class_type": "DuetLoadLora", "inputs": inputs}
    else:
        inputs = {"model": ["load", 0], "image": ["orange", 0], "ip_adapter": adapter, "scale": amount}
        inputs["image_encoder"] = encoder if encoder == "model" else f"adapted/{encoder}"
        prompt["lay"] = {"class_type": "DuetIPAdapter", "inputs": inputs}
    prompt["redraw"] = {"class_type": "DuetGenerate", "inputs": prompt["draw"]["inputs"] | {"model": ["lay", 0]}}
    prompt["other"] = {"class_type": "PreviewImage", "inputs": {"images": ["redraw", 0]}}
    return prompt


def both(client: Client, prompt: Prompt) -> tuple[bytes, bytes]:
    """The pixels of "save" and of "other"."""
    run = client.run(prompt)
    assert run.succeeded, run.error
    outputs, found = run.outputs, []
    for place in ("save", "other"):
        run.outputs = {place: outputs[place]}
        found.append(_pixels(pictures_of(client, run)))
    return found[0], found[1]


def _pixels(pictures: list[Image.Image]) -> bytes:
    (picture,) = pictures
    assert len(set(picture.tobytes())) > 10, "a flat picture"
    return picture.tobytes()


@pytest.mark.parametrize(
    "options", [{"lora": "adapted/style.safetensors"}, {"adapter": "adapted/base.safetensors"}], ids=["lora", "adapter"]
)
def test_it_changes_its_own_branch_alone(client: Client, options: dict[str, Any]):
    plain, changed = both(client, laid(**options))
    assert changed != plain
    assert both(client, laid(**options, amount=0.0)) == (plain, plain)
    assert both(client, laid(**_none(options))) == (plain, plain)


def _none(options: dict[str, Any]) -> dict[str, Any]:
    return dict.fromkeys(options, "none")


def test_chained_on_one_model(client: Client):
    prompt = laid("adapted/style.safetensors")
    prompt["hear"] = laid(adapter="adapted/base.safetensors")["lay"]
    prompt["hear"]["inputs"]["model"] = ["lay", 0]
    prompt["redraw"]["inputs"]["model"] = ["hear", 0]
    plain, changed = both(client, prompt)
    assert len({plain, changed, both(client, laid("adapted/style.safetensors"))[1]}) == 3


def test_cancelling_leaves_the_model_as_it_was(client: Client):
    before = both(client, laid("adapted/style.safetensors"))

    def stop(kind: str, data: dict) -> None:
        if kind == "progress" and data.get("node") == "redraw" and data["value"] >= 1:
            client.interrupt()

    prompt = laid("adapted/style.safetensors")
    prompt["redraw"]["inputs"] = prompt["redraw"]["inputs"] | {"steps": 100}
    assert client.run(prompt, listener=stop).ended == "execution_interrupted"
    again = laid("adapted/style.safetensors")
    for place in ("draw", "redraw"):  # of another size first, so that the host has nothing kept
        again[place]["inputs"] = again[place]["inputs"] | {"width": 96}
    assert client.run(again).succeeded
    assert both(client, laid("adapted/style.safetensors")) == before
    report = client.run({"cache": {"class_type": "DuetModelCache", "inputs": {"action": "report"}}})
    assert not any(entry["pins"] for entry in report.outputs["cache"]["duet_cache"][0]["entries"])


def test_layers_that_are_not_there_are_told(client: Client):
    run = client.run(laid("adapted/part.safetensors"))
    assert run.succeeded, run.error
    (told,) = run.outputs["lay"]["duet_notices"]
    assert told.startswith("part.safetensors: 32 of 33 layers are in the model")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"lora": "adapted/xl.safetensors"},
            "Load LoRA: xl.safetensors is a LoRA of Stable Diffusion XL, cross-attention 2048 wide: expected one of "
            "Stable Diffusion, cross-attention 32 wide, for sd15",
        ),
        (
            {"adapter": "adapted/xl.safetensors"},
            "IP-Adapter: xl.safetensors is an IP-Adapter of Stable Diffusion XL, for words 2048 wide in 70 layers: "
            "expected one of Stable Diffusion, for words 32 wide in 4 layers as in sd15",
        ),
        (
            {"adapter": "adapted/base.safetensors", "encoder": "narrow"},
            "IP-Adapter: base.safetensors hears an embedding 24 wide: expected the image encoder that it was trained "
            "with, got narrow, whose are 12 wide",
        ),
        (
            {"adapter": "adapted/base.safetensors", "encoder": "model"},
            "IP-Adapter: expected an image encoder for base.safetensors, since sd15 has none of its own",
        ),
    ],
    ids=["lora of SDXL", "adapter of SDXL", "narrow encoder", "no encoder"],
)
def test_what_does_not_fit_is_refused_by_both_names(client: Client, options: dict[str, Any], said: str):
    run = client.run(laid(**options))
    assert run.ended == "execution_error"
    assert run.error["exception_message"].strip() == said


@pytest.mark.parametrize("options", [{"lora": "../diffusers/x"}, {"adapter": "/etc/passwd"}], ids=["lora", "adapter"])
def test_a_name_that_leads_elsewhere_is_refused(client: Client, options: dict[str, Any]):
    prompt = laid(**options)
    del prompt["save"]  # or the host would draw what it can
    with pytest.raises(PromptRefusedError, match="must be one of none"):
        client.run(prompt)
