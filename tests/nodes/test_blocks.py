"""What the blocks do together in the real host: the ends of the dial, transparency, sizes, and what they tell."""

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from pipeline.mini import MODEL_FOLDER
from tests.nodes.prompts import finished, graph, pictures_of, pixels_of
from tests.rig.client import Client, Prompt
from tests.rig.host import ComfyServer


def largest_difference(one: Image.Image, other: Image.Image) -> int:
    """In levels of 255."""
    return max(abs(a - b) for a, b in zip(one.tobytes(), other.tobytes(), strict=True))


def without(prompt: Prompt, name: str) -> Prompt:
    del prompt["fuse"]["inputs"][name]
    return prompt


@pytest.mark.parametrize("method", ["concat", "weighted", "gated"])
def test_the_ends_of_the_dial_are_text_alone_and_picture_alone(client: Client, method: str):
    text = pixels_of(client, client.run(without(graph(), "image_features")))
    picture = pixels_of(client, client.run(without(graph(), "prompt_embeds")))
    ends = [pixels_of(client, client.run(graph(fuse__method=method, fuse__strength=end))) for end in (0.0, 1.0)]
    middle = pixels_of(client, client.run(graph(fuse__method=method)))
    assert ends == [text, picture]
    assert middle not in ends


def test_text_alone_runs_no_picture_block(client: Client):
    run = client.run(without(graph(text__prompt=uuid.uuid4().hex), "image_features"))
    assert "look" not in run.outputs and "draw" in run.outputs


def test_a_batch_is_its_single_runs(client: Client):
    together = pictures_of(client, client.run(graph(draw__batch_size=2, draw__seed=5)))
    apart = [pictures_of(client, client.run(graph(draw__seed=seed)))[0] for seed in (5, 6)]
    assert [largest_difference(*pair) <= 1 for pair in zip(together, apart, strict=True)] == [True, True]


def test_a_transparent_picture_is_saved_with_its_alpha(client: Client):
    (picture,) = pictures_of(client, client.run(finished(graph(), width=96)))
    assert (picture.mode, picture.size) == ("RGBA", (96, 96))
    assert len(set(picture.getchannel("A").tobytes())) > 1


def test_what_is_padded_gets_the_background(client: Client):
    prompt = finished(graph(), width=128, height=64, background="#ff8000")
    (picture,) = pictures_of(client, client.run(prompt))
    assert (picture.mode, picture.size) == ("RGB", (128, 64))
    assert [picture.getpixel(corner) for corner in ((0, 0), (127, 63))] == [(255, 128, 0)] * 2


def test_over_white_and_off_again_is_what_generate_showed(client: Client):
    (shown,) = pictures_of(client, client.run(graph()))
    (back,) = pictures_of(client, client.run(finished(graph(), background="white")))
    assert largest_difference(shown, back) <= 2


def test_prepare_image_varies_by_its_seed(client: Client):
    def prepared(**changes: object) -> list[bytes]:
        prompt = graph(save__images=["prepare", 0], image__batch_size=2)
        settings = {
            "size": 32,
            "fit": "pad",
            "normalise": "none",
            "rotate_degrees": 45.0,
            "flip": True,
            "scale_range": 0.2,
        }
        prompt["prepare"] = {"class_type": "DuetPrepareImage", "inputs": {"image": ["image", 0], **settings, **changes}}
        pictures = pictures_of(client, client.run(prompt))
        assert [picture.size for picture in pictures] == [(32, 32)] * 2
        return [picture.tobytes() for picture in pictures]

    first = prepared(seed=1)
    assert first[0] != first[1], "each of a batch is varied on its own"
    assert prepared(seed=2) != first
    assert prepared(seed=1) == first
    still = prepared(seed=1, rotate_degrees=0.0, flip=False, scale_range=0.0)
    assert still[0] == still[1]


def test_a_stage_tells_its_time_and_where_its_model_came_from(client: Client):
    client.free()
    told = []
    for seed in (1, 2):
        run = client.run(graph(text__prompt=uuid.uuid4().hex, image__color=0x13579B, draw__seed=seed, draw__steps=100))
        assert run.succeeded, run.error
        assert 2 <= run.previews < 100, "one every tenth of a second"
        told.append({stage["stage"]: stage for _, stage in run.stages()})
    for stages in told:
        for stage in stages.values():
            assert stage.keys() == {"stage", "milliseconds", "model"} and stage["milliseconds"] >= 0
    assert {"text", "features", "fusion", "generation", "decode"} <= told[0].keys()
    assert [told[0][stage]["model"] for stage in ("text", "features", "fusion", "generation")] == ["loaded"] * 4
    assert [told[1][stage]["model"] for stage in ("text", "fusion", "generation")] == ["warm"] * 3


@pytest.fixture
def copied_model(host: ComfyServer) -> Iterator[Path]:
    folder = host.base / "models" / "diffusers" / "copied"
    shutil.copytree(MODEL_FOLDER, folder)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["merges.txt", "spiece.model", "chat_template.jinja", "tokenizer.json"])
def test_words_replaced_on_disk_are_noticed(client: Client, copied_model: Path, name: str):
    """What tokenizers read; the same prompt would be other tokens."""
    file = copied_model / "tokenizer" / name
    text = file.read_text("utf-8") if file.exists() else ""
    file.write_text(text, "utf-8")
    prompt = graph(load__model="copied")
    assert client.run(prompt).succeeded and "load" in client.run(prompt).cached
    file.write_text(text + " ", "utf-8")
    assert "load" not in client.run(prompt).cached


def test_a_model_replaced_on_disk_is_noticed(client: Client, copied_model: Path):
    prompt = graph(load__model="copied")
    first = pixels_of(client, client.run(prompt))
    assert "load" in client.run(prompt).cached
    weights = next((copied_model / "fusion").glob("*.safetensors"))
    changed = bytearray(weights.read_bytes())
    half = len(changed) // 2  # layers are among it, whatever else a few bytes may be: one drawing that is remembered
    changed[-half:] = bytes(half)
    weights.write_bytes(changed)
    run = client.run(prompt)
    assert "load" not in run.cached
    assert pixels_of(client, run) != first
