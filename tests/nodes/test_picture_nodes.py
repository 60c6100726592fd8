"""Image features, Fuse and Refine with what lies in the host's folders, in the real host."""

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.nodes.prompts import graph, pictures_of, pixels_of
from tests.rig.client import Client, Prompt, PromptRefusedError
from tests.rig.host import ComfyServer


@pytest.fixture(scope="module")
def clip_vision(host: ComfyServer) -> Iterator[Path]:
    """models/clip_vision with a folder, the same as a single file, and a link that leads out."""
    root = host.base / "models" / "clip_vision"
    folder = root / "duet-test" / "tiny"
    torch.manual_seed(0)
    config = transformers.SiglipVisionConfig(
        hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=1, image_size=28, patch_size=14
    )
    transformers.SiglipVisionModel(config).save_pretrained(folder)
    save_file(load_file(folder / "model.safetensors"), root / "duet-test" / "tiny.safetensors")
    (root / "duet-test" / "out.safetensors").symlink_to(host.base / "elsewhere.safetensors")
    save_file({"a": torch.zeros(1)}, host.base / "elsewhere.safetensors")
    yield root
    shutil.rmtree(root / "duet-test")


def refined(**changes: object) -> Prompt:
    """As ``graph``, with Refine between Fuse and Generate."""
    prompt = graph()
    inputs = {"model": ["load", 0], "conditioning": ["fuse", 0], "image_features": ["look", 0]}
    inputs |= {"radius": 0.5, "steps": 4, "seconds": 300.0, **changes}
    prompt["refine"] = {"class_type": "DuetRefine", "inputs": inputs}
    prompt["draw"]["inputs"]["conditioning"] = ["refine", 0]
    return prompt


def test_refine_shows_its_progress_its_curve_and_its_gain(client: Client):
    run = client.run(refined())
    assert run.succeeded, run.error
    assert run.previews >= 4, "one after each step"
    ui = run.outputs["refine"]
    assert ui["images"][0]["type"] == "temp" and client.fetch_image(ui["images"][0]).startswith(b"\x89PNG")
    (told,) = ui["duet_notices"]
    before, after = (float(word) for word in told.split() if word[0] == "0")
    assert after > before
    assert ui["duet_stage"][0]["stage"] == "refinement"
    picture = client.fetch_image(run.outputs["save"]["images"][0])
    plain = client.run(graph())
    assert picture != client.fetch_image(plain.outputs["save"]["images"][0])


def test_a_radius_of_zero_changes_nothing(client: Client):
    assert pixels_of(client, client.run(graph())) == _saved(client, refined(radius=0.0, steps=1))


def _saved(client: Client, prompt: Prompt) -> list[bytes]:
    run = client.run(prompt)
    assert run.succeeded, run.error
    run.outputs = {"save": run.outputs["save"]}  # Refine shows a picture too
    return [picture.tobytes() for picture in pictures_of(client, run)]


def test_refining_is_cancelled_within_a_step(client: Client):
    def stop(kind: str, data: dict) -> None:
        if kind == "progress" and data.get("node") == "refine" and data["value"] >= 2:
            client.interrupt()

    run = client.run(refined(steps=500), listener=stop)
    assert run.ended == "execution_interrupted"
    report = client.run({"cache": {"class_type": "DuetModelCache", "inputs": {"action": "report"}}})
    assert not any(entry["pins"] for entry in report.outputs["cache"]["duet_cache"][0]["entries"])
    assert client.run(refined()).succeeded


def test_the_time_is_kept_and_told(client: Client):
    run = client.run(refined(steps=500, seconds=0.1, radius=0.4))
    assert run.succeeded, run.error
    assert any("of 500 steps" in notice for notice in run.outputs["refine"]["duet_notices"])


@pytest.mark.parametrize("name", ["duet-test/tiny", "duet-test/tiny.safetensors"])
def test_an_encoder_of_the_host_s_folder(client: Client, clip_vision: Path, name: str):
    options = client.object_info()["DuetImageFeatures"]["input"]["required"]["encoder"][1]["options"]
    assert {"duet-test/tiny", "duet-test/tiny.safetensors"} <= set(options)
    run = client.run(graph(look__encoder=name))
    assert run.ended == "execution_error" and run.error["node_type"] == "DuetFuse"
    assert "duet-mini/image_encoder" in run.error["exception_message"] and "tiny@" in run.error["exception_message"]


def test_names_that_lead_elsewhere_are_refused(client: Client, clip_vision: Path):
    for name in ("../elsewhere.safetensors", "/etc/passwd", "duet-test/none.safetensors", "C:\\x", "a\0b"):
        with pytest.raises(PromptRefusedError, match="encoder must be one of"):
            client.run(graph(look__encoder=name))
        with pytest.raises(PromptRefusedError, match="projection must be one of"):
            client.run(graph(fuse__projection=name))
    run = client.run(graph(look__encoder="duet-test/out.safetensors"))
    assert run.ended == "execution_error" and "by a link" in run.error["exception_message"]


def test_an_encoder_replaced_on_disk_is_noticed(client: Client, clip_vision: Path):
    prompt = graph(look__encoder="duet-test/tiny")
    assert client.run(prompt).ended == "execution_error"  # in Fuse; the features are kept
    assert "look" in client.run(prompt).cached
    config = clip_vision / "duet-test" / "tiny" / "config.json"
    config.write_text(config.read_text() + " ")
    assert "look" not in client.run(prompt).cached


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"layer": -1, "region": "white", "batch": "keep", "style_statistics": False}, False),
        ({"style_statistics": True}, False),
        ({"region": "pool", "mask": ["half", 0]}, True),
        ({"region": "white", "mask": ["half", 0]}, True),
    ],
)
def test_what_image_features_is_asked_for_is_drawn(client: Client, changes: dict, differs: bool):
    prompt = graph()
    prompt["image"] = {"class_type": "DuetPrepareImage", "inputs": {"image": ["flat", 0], "size": 64, "fit": "crop"}}
    prompt["image"]["inputs"] |= {
        "normalise": "none",
        "rotate_degrees": 0.0,
        "flip": False,
        "scale_range": 0.0,
        "seed": 0,
    }
    prompt["flat"] = {"class_type": "ImageBlend", "inputs": {"blend_factor": 0.5, "blend_mode": "multiply"}}
    for side, colour in (("image1", 0xFF8800), ("image2", 0x88FF88)):
        prompt[side] = {
            "class_type": "EmptyImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": colour},
        }
        prompt["flat"]["inputs"][side] = [side, 0]
    # Halfway to the picture alone: beside words it may come down to which of its styles the model draws them in.
    prompt["fuse"]["inputs"]["strength"] = 0.75
    plain = pixels_of(client, client.run(prompt))
    prompt["half"] = {"class_type": "MaskComposite", "inputs": {"x": 32, "y": 0, "operation": "add"}}
    for side, value, width in (("destination", 0.0, 64), ("source", 1.0, 32)):
        prompt[side] = {"class_type": "SolidMask", "inputs": {"value": value, "width": width, "height": 64}}
        prompt["half"]["inputs"][side] = [side, 0]
    prompt["look"]["inputs"] |= changes
    assert (pixels_of(client, client.run(prompt)) != plain) == differs


def test_a_batch_is_averaged_and_said_so(client: Client):
    run = client.run(graph(image__batch_size=3, look__batch="average", text__prompt=uuid.uuid4().hex))
    assert len(pictures_of(client, run)) == 1
    assert any("3 pictures" in notice for notice in run.outputs["look"]["duet_notices"])


def test_a_layer_that_is_not_there_is_said(client: Client):
    run = client.run(graph(look__layer=7))
    assert run.ended == "execution_error" and "Image features: layer must be -4 to 3" in run.error["exception_message"]


def test_spherical_has_the_same_ends(client: Client):
    words = graph()
    del words["fuse"]["inputs"]["image_features"]
    image = graph()
    del image["fuse"]["inputs"]["prompt_embeds"]
    alone = [pixels_of(client, client.run(prompt)) for prompt in (words, image)]
    assert alone == [
        pixels_of(client, client.run(graph(fuse__method="spherical", fuse__strength=end))) for end in (0.0, 1.0)
    ]


def test_a_method_of_other_models_is_refused_by_name(client: Client):
    run = client.run(graph(fuse__method="cross-attention"))
    assert run.ended == "execution_error"
    assert "Fuse: duet-mini has a fusion network: expected concat" in run.error["exception_message"]
