"""The small model among the host's own nodes: lent to them, fed by them, and what is refused."""

from typing import Any

import pytest

from pipeline.families import FAMILIES
from tests.rig.client import Client, Prompt, PromptRefusedError, Run

from .prompts import graph


def among_stock_nodes(**nodes: tuple[str, dict[str, Any]]) -> Prompt:
    """The chain without its saved picture, and the model's parts lent. nodes: name=(kind, inputs)."""
    prompt = graph(fuse__strength=0.0)
    del prompt["save"]
    prompt["lent"] = {"class_type": "DuetModelToStock", "inputs": {"model": ["load", 0]}}
    return prompt | {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def compare(one: list, other: list) -> tuple[str, dict[str, Any]]:
    return "DuetCompare", {"one": one, "other": other}


def apart(run: Run, name: str = "compare") -> float:
    assert run.succeeded, run.error
    report = run.outputs[name]["duet_compare"][0]
    assert report["finite"] and report["shapes"][0] == report["shapes"][1], report
    return report["apart"]


def message(run: Run) -> str:
    assert run.ended == "execution_error"
    return run.error["exception_message"]


def read_by_stock_node(prompt: Prompt) -> Prompt:
    prompt["read"] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["lent", 0], "text": "rose"}}
    prompt["taken"] = {
        "class_type": "DuetConditionFromStock",
        "inputs": {"model": ["load", 0], "positive": ["read", 0]},
    }
    return prompt


def test_clip_text_encode_reads_with_the_lent_encoder_and_feeds_generate(client: Client):
    prompt = read_by_stock_node(among_stock_nodes(compare=compare(["draw", 0], ["again", 0])))
    del prompt["fuse"]["inputs"]["image_features"]
    prompt["again"] = {
        "class_type": "DuetGenerate",
        "inputs": prompt["draw"]["inputs"] | {"conditioning": ["taken", 1]},
    }
    assert apart(client.run(prompt)) == 0


def test_what_came_from_a_stock_node_meets_a_picture_in_fuse(client: Client):
    prompt = read_by_stock_node(among_stock_nodes(compare=compare(["fuse", 0], ["again", 0])))
    prompt["fuse"]["inputs"]["strength"] = 0.5
    prompt["again"] = {"class_type": "DuetFuse", "inputs": {**prompt["fuse"]["inputs"], "prompt_embeds": ["taken", 0]}}
    assert apart(client.run(prompt)) == 0


def test_words_go_to_the_stock_nodes_and_come_back(client: Client):
    prompt = among_stock_nodes(
        given=("DuetConditionToStock", {"conditioning": ["text", 0]}),
        taken=("DuetConditionFromStock", {"model": ["load", 0], "positive": ["given", 0]}),
        compare=compare(["taken", 0], ["text", 0]),
        silence=compare(["given", 1], ["given", 0]),
    )
    run = client.run(prompt)
    assert apart(run) == 0
    assert apart(run, "silence") > 0.1, "the negative is all zeros"


def test_vae_decode_draws_generates_latent_with_the_lent_vae(client: Client):
    prompt = among_stock_nodes(
        decode=("VAEDecode", {"samples": ["draw", 2], "vae": ["lent", 1]}), compare=compare(["decode", 0], ["draw", 0])
    )
    side = FAMILIES["DuetMiniPipeline"].native_size  # at any other, Generate resizes what it decoded
    prompt["draw"]["inputs"] |= {"width": side, "height": side}
    assert apart(client.run(prompt)) < 1e-5


def test_vae_encode_and_the_tiled_nodes_take_the_lent_vae(client: Client):
    tiles = {"tile_size": 64, "overlap": 0, "temporal_size": 64, "temporal_overlap": 8}
    prompt = among_stock_nodes(
        encode=("VAEEncode", {"pixels": ["image", 0], "vae": ["lent", 1]}),
        decode=("VAEDecode", {"samples": ["encode", 0], "vae": ["lent", 1]}),
        encode_tiled=("VAEEncodeTiled", {"pixels": ["image", 0], "vae": ["lent", 1], **tiles}),
        decode_tiled=("VAEDecodeTiled", {"samples": ["encode_tiled", 0], "vae": ["lent", 1], **tiles}),
        compare=compare(["decode", 0], ["image", 0]),
        tiled=compare(["decode_tiled", 0], ["decode", 0]),
    )
    run = client.run(prompt)
    assert apart(run, "tiled") < 1e-4, "one tile holds it"
    assert apart(run) > 0, "it went through the latents"
    on_average = run.outputs["compare"]["duet_compare"][0]["apart_on_average"]
    assert on_average < 0.1, f"the picture of one colour comes back about as it was: {on_average}"


@pytest.mark.parametrize("layer", ["last_hidden_state", "penultimate_hidden_states"])
def test_image_features_go_to_the_stock_nodes_and_come_back(client: Client, layer: str):
    prompt = among_stock_nodes(
        given=("DuetFeaturesToStock", {"image_features": ["look", 0]}),
        taken=("DuetFeaturesFromStock", {"vision": ["given", 0], "layer": layer, "encoder": "resnet"}),
        compare=compare(["taken", 0], ["look", 0]),
    )
    assert apart(client.run(prompt)) == 0


def test_features_of_another_encoder_are_refused_by_the_name_given(client: Client):
    prompt = among_stock_nodes(
        given=("DuetFeaturesToStock", {"image_features": ["look", 0]}),
        taken=("DuetFeaturesFromStock", {"vision": ["given", 0], "layer": "last_hidden_state", "encoder": "sigmoid"}),
        compare=compare(["fuse", 0], ["fuse", 0]),
    )
    prompt["fuse"]["inputs"]["image_features"] = ["taken", 0]
    said = message(client.run(prompt))
    assert "duet-mini/image_encoder" in said and "sigmoid" in said


def test_a_layer_that_does_not_exist_is_refused(client: Client):
    inputs = {"vision": ["given", 0], "layer": "first", "encoder": "resnet"}
    prompt = among_stock_nodes(
        given=("DuetFeaturesToStock", {"image_features": ["look", 0]}),
        taken=("DuetFeaturesFromStock", inputs),
        compare=compare(["taken", 0], ["taken", 0]),
    )
    with pytest.raises(PromptRefusedError, match="layer must be one of last_hidden_state"):
        client.run(prompt)


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        (
            {"last": ("CLIPSetLastLayer", {"clip": ["lent", 0], "stop_at_clip_layer": -2})},
            "gives the layer that its model was trained on, not layer -2",
        ),
        (
            {
                "schedule": ("KarrasScheduler", {"steps": 4, "sigma_max": 14.6, "sigma_min": 0.03, "rho": 7.0}),
                "last": ("DuetGenerate", {"sigmas": ["schedule", 0]}),
            },
            "Generate: expected no sigmas for Duet mini",
        ),
        (
            {
                "empty": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
                "last": ("VAEDecode", {"samples": ["empty", 0], "vae": ["lent", 1]}),
            },
            "channels in 4 dimensions for duet-mini (Duet mini), got (1, 4, 8, 8)",
        ),
    ],
    ids=["layer", "sigmas", "latents"],
)
def test_what_the_small_model_cannot_do_is_said(client: Client, nodes: dict[str, Any], said: str):
    prompt = among_stock_nodes(**nodes, compare=compare(["last", 0], ["last", 0]))
    if prompt["last"]["class_type"] == "DuetGenerate":
        prompt["last"]["inputs"] = prompt["draw"]["inputs"] | prompt["last"]["inputs"]
    assert said in message(client.run(prompt))
