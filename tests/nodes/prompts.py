"""The whole chain as an API prompt, small, and the pixels that come out."""

import io
from typing import Any

from PIL import Image

from tests.rig.client import Client, Prompt, Run


def graph(**changes: Any) -> Prompt:
    """Words and an orange picture to an image, saved. changes: node__input=value."""
    prompt: Prompt = {
        "load": {"class_type": "DuetLoadModel", "inputs": {"model": "duet-mini (built in)"}},
        "text": {"class_type": "DuetEmbedText", "inputs": {"model": ["load", 0], "prompt": "rose"}},
        "image": {
            "class_type": "EmptyImage",
            "inputs": {"width": 48, "height": 40, "batch_size": 1, "color": 0xFF8800},
        },
        "look": {"class_type": "DuetImageFeatures", "inputs": {"model": ["load", 0], "image": ["image", 0]}},
        "fuse": {"class_type": "DuetFuse", "inputs": {"model": ["load", 0], "method": "concat", "strength": 0.5}},
        "draw": {"class_type": "DuetGenerate", "inputs": {"model": ["load", 0], "conditioning": ["fuse", 0]}},
        "save": {"class_type": "PreviewImage", "inputs": {"images": ["draw", 0]}},
    }
    prompt["look"]["inputs"]["encoder"] = "model"
    prompt["fuse"]["inputs"] |= {"prompt_embeds": ["text", 0], "image_features": ["look", 0]}
    prompt["draw"]["inputs"] |= {"seed": 0, "steps": 1, "guidance_scale": 1.0}
    prompt["draw"]["inputs"] |= {"width": 64, "height": 64, "batch_size": 1}
    for place, value in changes.items():
        node, _, name = place.partition("__")
        prompt[node]["inputs"][name] = value
    return prompt


FINISH = {"width": 0, "height": 0, "fit": "pad", "background": "transparent", "lift_off_white": True}


def finished(prompt: Prompt, **settings: Any) -> Prompt:
    """The prompt with its picture through Finish image before it is saved. settings: its inputs, where not as usual."""
    inputs = {"image": ["draw", 0], "mask": ["draw", 1], **FINISH, **settings}
    prompt["finish"] = {"class_type": "DuetFinishImage", "inputs": inputs}
    prompt["save"]["inputs"]["images"] = ["finish", 0]
    return prompt


def pictures_of(client: Client, run: Run) -> list[Image.Image]:
    assert run.succeeded, run.error
    return [Image.open(io.BytesIO(client.fetch_image(image))) for image in run.images()]


def pixels_of(client: Client, run: Run) -> list[bytes]:
    """For comparing: the files also hold the prompt."""
    return [picture.tobytes() for picture in pictures_of(client, run)]
