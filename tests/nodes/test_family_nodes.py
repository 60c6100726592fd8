"""Every family through the nodes in the real host, at tiny sizes: words, a picture and a mask to pictures."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from pipeline.families import FAMILIES
from tests.nodes.prompts import pictures_of
from tests.pipeline.family_folders import FAMILY_FOLDERS, clip, clip_tokenizer, save_family
from tests.rig.client import Client, Prompt, PromptRefusedError, Run
from tests.rig.host import ComfyServer

ORANGE = (255, 136, 0)
WIDTH, HEIGHT = 96, 64
TASKS = {name: FAMILIES[pipeline].tasks for name, (pipeline, _) in FAMILY_FOLDERS.items()}


@pytest.fixture(scope="module", autouse=True)
def installed(host: ComfyServer) -> Iterator[None]:
    """The tiny folders in the host's models/diffusers/tiny, and a text encoder of its own."""
    folder, encoder = host.base / "models" / "diffusers" / "tiny", host.base / "models" / "text_encoders" / "tiny-clip"
    for name in FAMILY_FOLDERS:
        save_family(name, folder / name)
    clip().save_pretrained(str(encoder))
    clip_tokenizer().save_pretrained(str(encoder))
    yield
    shutil.rmtree(folder)
    shutil.rmtree(encoder)


def graph(name: str, **drawn: Any) -> Prompt:
    """drawn: further inputs of Generate."""

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    size = {"width": WIDTH, "height": HEIGHT}
    return {
        "load": node("DuetLoadModel", model=f"tiny/{name}"),
        "text": node("DuetEmbedText", model=["load", 0], prompt="a (red:1.2) rose", negative_prompt="blue"),
        "fuse": node(
            "DuetFuse", model=["load", 0], method="concat", strength=0.5, prompt_embeds=["text", 0]
        ),
        "orange": node("EmptyImage", **size, batch_size=1, color=0xFF8800),
        "nothing": node("SolidMask", value=0.0, **size),
        "half": node("SolidMask", value=1.0, width=WIDTH // 2, height=HEIGHT),
        "right": node(
            "MaskComposite", destination=["nothing", 0], source=["half", 0], x=WIDTH // 2, y=0, operation="add"
        ),
        "draw": node(
            "DuetGenerate",
            model=["load", 0],
            conditioning=["fuse", 0],
            seed=1,
            steps=2,
            guidance_scale=2.0,
            batch_size=1,
            **size,
            **drawn,
        ),
        "save": node("PreviewImage", images=["draw", 0]),
    }  # fmt: skip


def drawn(client: Client, run: Run) -> Image.Image:
    (picture,) = pictures_of(client, run)
    assert picture.size == (WIDTH, HEIGHT)
    assert len(set(picture.crop((WIDTH // 2, 0, WIDTH, HEIGHT)).tobytes())) > 10, "a flat picture"
    return picture


@pytest.mark.parametrize("name", FAMILY_FOLDERS)
def test_words_become_a_picture(client: Client, name: str):
    run = client.run(graph(name))
    drawn(client, run)
    said = " ".join(run.outputs["text"]["duet_notices"])
    hears_weights = FAMILIES[FAMILY_FOLDERS[name][0]].pads_to_window
    assert ("no weighted phrases" in said) != hears_weights


@pytest.mark.parametrize("name", [name for name, tasks in TASKS.items() if tasks and tasks.image_to_image])
def test_a_picture_becomes_another(client: Client, name: str):
    drawn(client, client.run(graph(name, image=["orange", 0], denoise=0.5)))


@pytest.mark.parametrize("name", [name for name, tasks in TASKS.items() if tasks and tasks.inpaint])
def test_what_no_mask_covers_stays(client: Client, name: str):
    picture = drawn(client, client.run(graph(name, image=["orange", 0], mask=["right", 0], denoise=1.0)))
    assert picture.crop((0, 0, WIDTH // 2, HEIGHT)).getcolors() == [(WIDTH // 2 * HEIGHT, ORANGE)]


def test_a_task_that_is_not_there_is_named(client: Client):
    done = client.run(graph("hunyuan_dit", image=["orange", 0]))
    assert done.ended == "execution_error"
    assert done.error["exception_message"].startswith("Generate: expected words alone for HunyuanDiT, since diffusers")


def test_the_words_of_an_encoder_of_its_own_are_refused_by_name(client: Client):
    prompt = graph("sd15")
    inputs = {"text_encoder": "tiny-clip", "prompt": "a red rose", "layer": -1, "chat_template": False}
    prompt["text"] = {"class_type": "DuetTextEncoder", "inputs": inputs}
    done = client.run(prompt)
    assert done.ended == "execution_error" and done.error["node_type"] == "DuetFuse"
    message = done.error["exception_message"]
    assert "sd15/text_encoder@" in message and "tiny-clip@" in message


def test_an_encoder_that_leads_elsewhere_is_refused(client: Client):
    prompt = graph("sd15")
    inputs = {"text_encoder": "../diffusers/tiny/sd15/text_encoder", "prompt": "a", "layer": -1, "chat_template": False}
    prompt["text"] = {"class_type": "DuetTextEncoder", "inputs": inputs}
    with pytest.raises(PromptRefusedError, match="text encoder must be one of tiny-clip"):
        client.run(prompt)
