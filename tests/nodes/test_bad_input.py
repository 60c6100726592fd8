"""What bad input gets, in the real host: an error that names the node, what was expected and what came, and a cache
that holds what it held before. And input that is only odd, which must simply work.
"""

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from pipeline.mini import MODEL_FOLDER
from tests.nodes.prompts import finished, graph, pixels_of
from tests.rig.client import Client, Prompt, PromptRefusedError
from tests.rig.host import ComfyServer

ODD_TEXTS = json.loads(Path(__file__).with_name("odd_texts.json").read_text(encoding="utf-8"))


def held(client: Client) -> list[tuple]:
    """What the cache says that it holds, without its counts of use."""
    run = client.run({"cache": {"class_type": "DuetModelCache", "inputs": {"action": "report"}}})
    assert run.succeeded, run.error
    (cache,) = run.outputs["cache"]["duet_cache"]
    return sorted((entry["path"], entry["dtype"], entry["bytes"], entry["pins"]) for entry in cache["entries"])


def unseen(colour: int) -> Prompt:
    """The good prompt with words and a picture that no store of embeddings can know, so that every part is loaded."""
    return graph(text__prompt=f"rose {colour}", image__color=colour)


@pytest.fixture(scope="module")
def warm(client: Client) -> list[tuple]:
    """The cache after a good run: what must still be held after a bad one."""
    client.free()
    assert client.run(unseen(0x0088FF)).succeeded
    return held(client)


@pytest.fixture
def fails(client: Client, warm: list[tuple]) -> Callable[..., str]:
    """Run a prompt, expect a node of this kind to fail, and give its message; the cache must be as it was."""

    def run(prompt: Prompt, node: str) -> str:
        done = client.run(prompt)
        assert done.ended == "execution_error", f"{done.ended}: {done.outputs}"
        assert (done.error["node_type"], done.error["exception_type"].rpartition(".")[2]) == (node, "ValueError")
        assert held(client) == warm
        return done.error["exception_message"].strip()

    return run


@pytest.fixture
def refused(client: Client, warm: list[tuple]) -> Callable[..., str]:
    """Queue a prompt that the host must refuse for a node of this kind; gives what it says about that node."""

    def queue(prompt: Prompt, node: str) -> str:
        with pytest.raises(PromptRefusedError) as refusal:
            client.run(prompt)
        (told,) = (entry for entry in refusal.value.answer["node_errors"].values() if entry["class_type"] == node)
        assert held(client) == warm
        return "; ".join(f"{error['message']}: {error['details']}" for error in told["errors"])

    return queue


@pytest.fixture
def broken_model(host: ComfyServer) -> Iterator[Path]:
    """A copy of the built-in model in the host's models/diffusers, to be broken."""
    folder = host.base / "models" / "diffusers" / "broken"
    shutil.copytree(MODEL_FOLDER, folder)
    yield folder
    shutil.rmtree(folder)


# --- models on disk ---


def truncate(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-1000])


def put_a_pickle_in_place(weights: Path) -> None:
    weights.write_bytes(pickle.dumps({"weight": [1.0] * 1000}))


def put_a_page_in_place(weights: Path) -> None:
    weights.write_text("<!DOCTYPE html><html><body>Sign in</body></html>", encoding="utf-8")


@pytest.mark.parametrize("damage", [Path.unlink, truncate, put_a_pickle_in_place, put_a_page_in_place])
@pytest.mark.parametrize("component", ["text_encoder", "unet"])
def test_broken_weights_are_named(fails, broken_model: Path, component: str, damage: Callable[[Path], None]):
    (weights,) = (broken_model / component).glob("*.safetensors")
    damage(weights)
    message = fails(graph(load__model="broken"), "DuetLoadModel")
    assert message.startswith("Load model: ")
    assert str(weights.parent) in message and "expected" in message


def test_a_folder_without_an_index_is_no_model(refused, host: ComfyServer):
    (host.base / "models" / "diffusers" / "empty").mkdir()
    assert "'empty'" in refused(graph(load__model="empty"), "DuetLoadModel")


@pytest.mark.parametrize(
    "name",
    ["no such model", "../../etc/passwd", "/etc/passwd", "..\\..\\windows", "", "duet-mini", "a\0b", "x" * 10_000],
)
def test_a_model_that_is_not_listed_is_refused(refused, name: str):
    message = refused(graph(load__model=name), "DuetLoadModel")
    assert "Load model: model must be one of duet-mini (built in)" in message
    assert repr(name[:80]) in message


@pytest.mark.parametrize(
    ("place", "node", "title"),
    [
        ("look__encoder", "DuetImageFeatures", "Image features"),
        ("fuse__method", "DuetFuse", "Fuse"),
    ],
)
def test_a_choice_that_is_not_listed_is_refused(refused, place: str, node: str, title: str):
    message = refused(graph(**{place: "../../etc/passwd"}), node)
    assert f"{title}: {place.partition('__')[2]} must be one of" in message and "'../../etc/passwd'" in message


# --- sizes ---


@pytest.mark.parametrize("side", [0, 7, 100_000])
@pytest.mark.parametrize("name", ["width", "height"])
def test_an_impossible_size_is_refused(refused, fails, name: str, side: int):
    assert str(side) in refused(graph(**{f"draw__{name}": side}), "DuetGenerate")
    linked = graph(**{f"draw__{name}": ["number", 0]})
    linked["number"] = {"class_type": "PrimitiveInt", "inputs": {"value": side}}
    message = fails(linked, "DuetGenerate")
    assert message.startswith(f"Generate: {name} must be 16 to 4096") and message.endswith(f"got {side}")


def test_an_impossible_number_of_steps_is_refused(fails):
    linked = graph(draw__steps=["number", 0])
    linked["number"] = {"class_type": "PrimitiveInt", "inputs": {"value": -1}}
    assert fails(linked, "DuetGenerate").startswith("Generate: steps must be 1 to")


# --- pictures ---


def with_mask(batch: int) -> Prompt:
    prompt = graph(image__batch_size=3, look__mask=["mask", 0])
    size = {"width": 48, "height": 40, "batch_size": batch, "color": 0x808080}
    prompt["other"] = {"class_type": "EmptyImage", "inputs": size}
    prompt["mask"] = {"class_type": "ImageToMask", "inputs": {"image": ["other", 0], "channel": "red"}}
    return prompt


def test_masks_that_do_not_match_the_pictures_are_refused(fails, client: Client):
    message = fails(with_mask(2), "DuetImageFeatures")
    assert message.startswith("Image features: expected a mask") and "3" in message and "2" in message
    assert client.run(with_mask(1)).succeeded
    assert client.run(with_mask(3)).succeeded


def test_a_picture_that_is_not_a_number_is_refused(fails):
    prompt = graph(look__image=["nan", 0], image__color=0)
    prompt["zero"] = {"class_type": "PrimitiveFloat", "inputs": {"value": 0.0}}
    prompt["nan"] = {
        "class_type": "NormalizeImages",
        "inputs": {"images": ["image", 0], "mean": 0.0, "std": ["zero", 0]},
    }
    message = fails(prompt, "DuetImageFeatures")
    assert message == "Image features: expected finite pixel values, got NaN or infinity in the picture"


def test_one_pixel_is_a_picture(client: Client):
    assert client.run(graph(image__width=1, image__height=1)).succeeded


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "I;16", "P", "CMYK"])
def test_every_kind_of_file_is_a_picture(client: Client, host: ComfyServer, mode: str):
    suffix = "jpg" if mode == "CMYK" else "png"
    name = f"odd-{mode.replace(';', '')}.{suffix}"
    Image.new(mode, (33, 17), 40).save(host.input / name)
    prompt = graph(look__image=["file", 0], look__mask=["file", 1])
    prompt["file"] = {"class_type": "LoadImage", "inputs": {"image": name}}
    assert client.run(prompt).succeeded


def test_features_of_another_encoder_are_refused_naming_both(fails, client: Client, warm: list[tuple]):
    done = client.run(graph(look__encoder="efficientnet-lite0"))
    assert (done.ended, done.error["node_type"]) == ("execution_error", "DuetFuse")
    message = done.error["exception_message"]
    assert message.startswith("Fuse: expected embeddings of duet-mini/image_encoder")
    assert "efficientnet-lite0" in message
    assert set(held(client)) > set(warm), "the CNN itself was good, and may stay"
    client.free()
    assert client.run(unseen(0x0044FF)).succeeded
    assert held(client) == warm


# --- words ---


@pytest.mark.parametrize("name", ODD_TEXTS)
def test_an_odd_prompt_makes_a_picture(client: Client, name: str):
    text = ODD_TEXTS[name] if name != "10,000 characters" else (ODD_TEXTS[name] * 10_000)[:10_000]
    first, second = (pixels_of(client, client.run(graph(text__prompt=text, draw__seed=seed))) for seed in (7, 8))
    again = pixels_of(client, client.run(graph(text__prompt=text, draw__seed=7)))
    assert first == again != second


def test_a_long_prompt_is_said_to_be_split(client: Client):
    run = client.run(graph(text__prompt="a red rose and " * 200))
    (notice,) = run.outputs["text"]["duet_notices"]
    assert "windows" in notice


def test_a_whole_file_as_prompt_is_refused(fails):
    message = fails(graph(text__prompt="x" * 20_001), "DuetEmbedText")
    assert message == "Embed text: expected a prompt of at most 20,000 characters, got 20,001"


def test_nothing_to_fuse_is_refused(fails):
    prompt = graph()
    del prompt["fuse"]["inputs"]["prompt_embeds"], prompt["fuse"]["inputs"]["image_features"]
    assert fails(prompt, "DuetFuse") == "Fuse: expected prompt embeds, image features or both, got neither"


def test_a_background_that_is_no_colour_is_refused(fails):
    message = fails(finished(graph(), background="nowhere"), "DuetFinishImage")
    assert message.startswith("Finish image: expected a background") and "'nowhere'" in message
