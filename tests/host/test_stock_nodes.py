"""Duet's blocks and the host's own nodes in one graph, on one Stable Diffusion 1.5 of full size with random weights.

Both read the same folder and start from the same noise; what they draw must be the same. The folder's schedule of
"leading" steps with an offset is, for three steps, the host's "simple" one: timesteps 999, 666 and 333.
"""

import logging
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.host.clip_vision_large import save_clip_vision_large
from tests.host.stable_diffusion_15 import save_scheduler, save_stable_diffusion_15
from tests.rig.client import Client, Prompt, Run
from tests.rig.host import COMPARE, ComfyServer

pytestmark = pytest.mark.full_size
log = logging.getLogger(__name__)

WORDS, UNWANTED = "a red rose in a glass vase, oil on canvas", "blurred"
SIDE, STEPS, SEED = 64, 3, 7
AGREE = 1e-4  # of pictures in 0..1
TELLING = 1e-2  # what a difference that matters is larger than


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """The host with 2.7 GB of weights in its models folder, which go when the tests are done."""
    base = tmp_path_factory.mktemp("full-size")
    folder = save_stable_diffusion_15(base / "models" / "diffusers" / "sd15")
    save_scheduler(folder, timestep_spacing="leading", steps_offset=1000 // STEPS)
    save_clip_vision_large(base / "models" / "clip_vision" / "vit-l.safetensors")
    try:
        # On the CPU even beside a GPU, where Duet's weights would be halved.
        with ComfyServer(base, beside=(COMPARE,), arguments=("--cpu", "--force-fp32")) as server:
            yield Client(server.url)
    finally:
        shutil.rmtree(base / "models")


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """Inputs that are a string with a slash are links: "node/0"."""
    links = {
        name: [value.split("/")[0], int(value.split("/")[1])] if _is_link(value) else value
        for name, value in inputs.items()
    }
    return {"class_type": kind, "inputs": links}


def _is_link(value: Any) -> bool:
    return isinstance(value, str) and value.partition("/")[2].isdigit()


def both_sides() -> Prompt:
    """The same words read by Duet's Embed text ("words") and by the host's CLIP Text Encode ("said", "unwanted")."""
    return {
        "duet": node("DuetLoadModel", model="sd15"),
        "stock": node("DiffusersLoader", model_path="sd15"),
        "words": node("DuetEmbedText", model="duet/0", prompt=WORDS, negative_prompt=UNWANTED),
        "fuse": node("DuetFuse", model="duet/0", prompt_embeds="words/0", method="concat", strength=0.5),
        "said": node("CLIPTextEncode", clip="stock/1", text=WORDS),
        "unwanted": node("CLIPTextEncode", clip="stock/1", text=UNWANTED),
        "empty": node("EmptyLatentImage", width=SIDE, height=SIDE, batch_size=1),
    }


def generate(conditioning: str, scale: float, **changes: Any) -> dict[str, Any]:
    inputs = {"steps": STEPS, "seed": SEED, "width": SIDE, "height": SIDE, "batch_size": 1} | changes
    return node("DuetGenerate", model="duet/0", conditioning=conditioning, guidance_scale=scale, **inputs)


def sample(positive: str, negative: str, scale: float, scheduler: str = "simple") -> dict[str, Any]:
    settings = {"seed": SEED, "steps": STEPS, "cfg": scale, "sampler_name": "euler", "scheduler": scheduler}
    sides = {"positive": positive, "negative": negative}
    return node("KSampler", model="stock/0", latent_image="empty/0", denoise=1.0, **sides, **settings)


def compare(one: str, other: str) -> dict[str, Any]:
    return node("DuetCompare", one=one, other=other)


def reports(run: Run) -> dict[str, dict[str, Any]]:
    assert run.succeeded, run.error
    found = {name: ui["duet_compare"][0] for name, ui in run.outputs.items() if "duet_compare" in ui}
    log.info("%s", {name: (report["apart"], report["deviation"]) for name, report in found.items()})
    assert all(report["finite"] and report["shapes"][0] == report["shapes"][1] for report in found.values()), found
    return found


@pytest.fixture(scope="module")
def guided(client: Client) -> dict[str, dict[str, Any]]:
    """With guidance: Duet's own way, the host's own way, and the two ways that cross over."""
    prompt = both_sides() | {
        "ours": generate("fuse/0", 5.0),
        "sampled": sample("said/0", "unwanted/0", 5.0),
        "theirs": node("VAEDecode", samples="sampled/0", vae="stock/2"),
        "taken": node("DuetConditionFromStock", model="duet/0", positive="said/0", negative="unwanted/0"),
        "from stock": generate("taken/1", 5.0),
        "given": node("DuetConditionToStock", conditioning="fuse/0", stock_model="stock/0"),
        "sampled ours": sample("given/0", "given/1", 5.0),
        "lent": node("DuetModelToStock", model="duet/0"),
        "to stock": node("VAEDecode", samples="sampled ours/0", vae="lent/1"),
        "the picture": compare("ours/0", "theirs/0"),
        "the latents": compare("ours/2", "sampled/0"),
        "CLIP Text Encode, then Generate": compare("from stock/0", "ours/0"),
        "Fuse, then KSampler": compare("to stock/0", "ours/0"),
    }
    return reports(client.run(prompt, timeout=900))


def test_with_guidance_the_pictures_agree(guided: dict):
    assert guided["the picture"]["apart"] < AGREE
    assert guided["the picture"]["deviation"] > 0.05, "a picture that shows nothing agrees with everything"


def test_the_latents_are_the_hosts(guided: dict):
    assert guided["the latents"]["apart"] < AGREE * guided["the latents"]["deviation"]


@pytest.mark.parametrize("way", ["CLIP Text Encode, then Generate", "Fuse, then KSampler"])
def test_one_feeds_the_other(guided: dict, way: str):
    assert guided[way]["apart"] < AGREE


def test_without_guidance_the_pictures_agree_and_the_words_and_steps_count(client: Client):
    prompt = both_sides() | {
        "ours": generate("fuse/0", 1.0),
        "sampled": sample("said/0", "unwanted/0", 1.0),
        "theirs": node("VAEDecode", samples="sampled/0", vae="stock/2"),
        "other words": node("DuetEmbedText", model="duet/0", prompt="a blue car", negative_prompt=""),
        "other fuse": node("DuetFuse", model="duet/0", prompt_embeds="other words/0", method="concat", strength=0.5),
        "of other words": generate("other fuse/0", 1.0),
        "in one step": generate("fuse/0", 1.0, steps=1),
        "the picture": compare("ours/0", "theirs/0"),
        "the words": compare("of other words/0", "ours/0"),
        "the steps": compare("in one step/0", "ours/0"),
    }
    found = reports(client.run(prompt, timeout=900))
    assert found["the picture"]["apart"] < AGREE
    assert found["the picture"]["deviation"] > 0.05
    assert found["the words"]["apart"] > TELLING
    assert found["the steps"]["apart"] > TELLING


def test_along_a_schedule_of_the_host_the_pictures_agree(client: Client):
    """Sigmas between whole timesteps, which the folder's own schedule could not give."""
    prompt = both_sides() | {
        "schedule": node("BasicScheduler", model="stock/0", scheduler="karras", steps=STEPS, denoise=1.0),
        "ours": generate("fuse/0", 1.0, steps=1, sigmas="schedule/0"),
        "sampled": sample("said/0", "unwanted/0", 1.0, scheduler="karras"),
        "theirs": node("VAEDecode", samples="sampled/0", vae="stock/2"),
        "sampled otherwise": sample("said/0", "unwanted/0", 1.0),
        "otherwise": node("VAEDecode", samples="sampled otherwise/0", vae="stock/2"),
        "the picture": compare("ours/0", "theirs/0"),
        "the schedule": compare("otherwise/0", "theirs/0"),
    }
    found = reports(client.run(prompt, timeout=900))
    assert found["the picture"]["apart"] < AGREE
    assert found["the schedule"]["apart"] > TELLING


def test_the_encoders_agree(client: Client):
    prompt = both_sides() | {
        "lent": node("DuetModelToStock", model="duet/0"),
        "by ours": node("CLIPTextEncode", clip="lent/0", text=WORDS),
        "by clip": node("DuetEmbedTextByClip", model="duet/0", clip="stock/1", prompt=WORDS, negative_prompt=UNWANTED),
        "Embed text": compare("words/0", "said/0"),
        "CLIP Text Encode with Duet's encoder": compare("by ours/0", "said/0"),
        "Embed text by CLIP": compare("by clip/0", "said/0"),
        "other words": compare("words/0", "unwanted/0"),
    }
    found = reports(client.run(prompt))
    assert found.pop("other words")["apart"] > TELLING
    assert {name: report["apart"] < AGREE for name, report in found.items()} == dict.fromkeys(found, True)


def two_colours(width: int, height: int) -> Prompt:
    """A picture, "drawn"."""
    return {
        "picture": node("EmptyImage", width=width, height=height, batch_size=1, color=0xFF8800),
        "split": node("EmptyImage", width=width, height=height // 2, batch_size=1, color=0x0044CC),
        "drawn": node(
            "ImageCompositeMasked", destination="picture/0", source="split/0", x=8, y=24, resize_source=False
        ),
    }


@pytest.mark.parametrize(("layer", "name"), [(-1, "last_hidden_state"), (-2, "penultimate_hidden_states")])
def test_the_image_encoders_agree(client: Client, layer: int, name: str):
    looking = {"region": "white", "style_statistics": False, "batch": "keep"}
    prompt: Prompt = {
        "duet": node("DuetLoadModel", model="duet-mini (built in)"),
        **two_colours(224, 224),
        "load": node("CLIPVisionLoader", clip_name="vit-l.safetensors"),
        "seen": node("CLIPVisionEncode", clip_vision="load/0", image="drawn/0", crop="none"),
        "taken": node("DuetFeaturesFromStock", vision="seen/0", layer=name, encoder="vit-l"),
        "given": node("DuetFeaturesToStock", image_features="taken/0"),
        "ours": node(
            "DuetImageFeatures", model="duet/0", image="drawn/0", encoder="vit-l.safetensors", layer=layer, **looking
        ),
        "ours given": node("DuetFeaturesToStock", image_features="ours/0"),
        "tokens": compare("taken/0", "ours/0"),
        "pooled": compare("given/0", "seen/0"),
    }
    if layer == -1:  # of an earlier layer Duet takes the mean of the tokens
        prompt["our pooled"] = compare("ours given/0", "seen/0")
    found = reports(client.run(prompt))
    assert found.pop("pooled")["apart"] == 0
    assert all(report["apart"] < AGREE and report["deviation"] > 0.05 for report in found.values()), found


def test_the_vaes_agree_both_ways(client: Client):
    prompt = both_sides() | {
        "lent": node("DuetModelToStock", model="duet/0"),
        **two_colours(SIDE + 12, SIDE),
        "ours": node("VAEEncode", pixels="drawn/0", vae="lent/1"),
        "theirs": node("VAEEncode", pixels="drawn/0", vae="stock/2"),
        "our picture": node("VAEDecode", samples="theirs/0", vae="lent/1"),
        "their picture": node("VAEDecode", samples="theirs/0", vae="stock/2"),
        "in tiles": node(
            "VAEDecodeTiled",
            samples="theirs/0",
            vae="lent/1",
            tile_size=512,
            overlap=64,
            temporal_size=64,
            temporal_overlap=8,
        ),
        "encode": compare("ours/0", "theirs/0"),
        "decode": compare("our picture/0", "their picture/0"),
        "tiled": compare("in tiles/0", "our picture/0"),
    }
    found = reports(client.run(prompt))
    assert all(report["apart"] < AGREE for report in found.values()), found
    assert found["encode"]["deviation"] > 0.05
    assert found["decode"]["deviation"] > 0.01


MINI = {
    "mini": node("DuetLoadModel", model="duet-mini (built in)"),
    "mini words": node("DuetEmbedText", model="mini/0", prompt="a rose", negative_prompt=""),
    "mini fuse": node("DuetFuse", model="mini/0", prompt_embeds="mini words/0", method="concat", strength=0.5),
}


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        (
            {"last": node("DuetConditionToStock", conditioning="mini words/0", stock_model="stock/0")},
            ["expected a condition 768 wide", "duet-mini/text_encoder"],
        ),
        ({"last": node("DuetConditionToStock", conditioning="mini fuse/0")}, ["a first picture", "duet-mini/fusion"]),
        (
            {"last": node("DuetConditionFromStock", model="mini/0", positive="said/0")},
            ["duet-mini", "its own encoder", "768 wide"],
        ),
        (
            {
                "part": node("ConditioningSetArea", conditioning="said/0", width=64, height=64, x=0, y=0, strength=1.0),
                "last": node("DuetConditionFromStock", model="duet/0", positive="part/0"),
            },
            ["positive", "area"],
        ),
        (
            {
                "pair": node("ConditioningCombine", conditioning_1="said/0", conditioning_2="unwanted/0"),
                "last": node("DuetConditionFromStock", model="duet/0", positive="pair/0"),
            },
            ["got 2 side by side", "ConditioningConcat"],
        ),
        (
            {
                "lent": node("DuetModelToStock", model="duet/0"),
                "skipped": node("CLIPSetLastLayer", clip="lent/0", stop_at_clip_layer=-2),
                "last": node("CLIPTextEncode", clip="skipped/0", text="a"),
            },
            ["layer -2"],
        ),
    ],
    ids=["width", "first picture", "other model", "area", "pair", "layer"],
)
def test_what_does_not_fit_is_refused_naming_both(client: Client, nodes: Prompt, said: list[str]):
    # Nodes that lead to no output are not run.
    run = client.run(both_sides() | MINI | nodes | {"end": compare("last/0", "last/0")})
    assert run.ended == "execution_error"
    message = run.error["exception_message"]
    assert [part for part in said if part not in message] == [], message
