"""Speed plan and what Generate says of it, in the real host."""

import re
from typing import Any

import pytest

from tests.nodes.prompts import graph, pixels_of
from tests.rig.client import Client, Prompt, PromptRefusedError, Run

DIALS: dict[str, Any] = {
    "preset": "exact",
    "steps": 0,
    "guidance_scale": -1.0,
    "scheduler": "as the preset",
    "shift": 0.0,
    "step_cache": -1.0,
    "unet_cache": 0,
    "compile": "as the preset",
    "quantisation": "as the preset",
    "decoder": "the model's own",
    "preview": "the model's own",
    "dtype": "as the preset",
    "memory_format": "as the preset",
    "measure_loss": False,
}


def planned(asked: int = 6, **dials: Any) -> Prompt:
    prompt = graph(draw__steps=asked)
    prompt["plan"] = {"class_type": "DuetSpeedPlan", "inputs": {**DIALS, **dials}}
    prompt["draw"]["inputs"]["speed_plan"] = ["plan", 0]
    return prompt


def summary(run: Run, node: str = "draw") -> str:
    assert run.succeeded, run.error
    (line,) = run.outputs[node]["duet_summary"]
    return line


def test_the_exact_plan_is_no_plan(client: Client):
    plain, exact = client.run(graph(draw__steps=6)), client.run(planned())
    assert pixels_of(client, exact) == pixels_of(client, plain)
    assert summary(exact, "plan") == "exact: every step whole, as Generate says"
    for run in (plain, exact):
        assert summary(run).startswith("exact · 6 of 6 steps computed in full · float32 on cpu · models ")


def test_a_preset_skips_steps_and_says_what_it_costs(client: Client):
    run = client.run(planned(preset="balanced", measure_loss=True))
    line = summary(run)
    assert line.startswith("balanced · 2 of 6 steps computed in full · UNet cache, every 3 steps · ")
    assert re.search(r" · loss: \d+\.\d dB, SSIM [01]\.\d+", line)
    assert [stage["stage"] for node, stage in run.stages() if node == "draw"] == ["generation", "decode", "comparison"]
    assert pixels_of(client, run) != pixels_of(client, client.run(planned()))


def test_a_dial_goes_before_the_preset(client: Client):
    run = client.run(planned(preset="lightning", steps=2, dtype="bfloat16"))
    assert summary(run, "plan") == "custom: steps 2, scheduler automatic, dtype bfloat16"
    assert summary(run).startswith("custom · 2 of 2 steps computed in full · bfloat16 on cpu · ")


def test_what_does_not_fit_is_refused_by_hand_and_left_out_by_a_preset(client: Client):
    left_out = client.run(planned(asked=1, preset="balanced"))
    assert summary(left_out).startswith("balanced · 1 of 1 steps computed in full · float32 on cpu")
    assert any("UNet cache left out: expected 5 steps" in notice for notice in left_out.outputs["draw"]["duet_notices"])
    refused = client.run(planned(asked=1, preset="balanced", unet_cache=2))
    assert refused.ended == "execution_error"
    assert refused.error["exception_message"].startswith("Generate: expected 5 steps or more for a UNet cache")
    again = client.run(planned(scheduler="lcm"))
    assert again.error["exception_message"].startswith("Generate: duet-mini: expected its own scheduler")
    both = client.run(planned(unet_cache=2, step_cache=0.5))
    assert both.error["exception_message"].startswith("Speed plan: expected a step cache or a UNet cache")


@pytest.mark.parametrize(
    ("dials", "said"),
    [
        ({"preset": "fastest"}, "preset must be one of lightning, balanced, exact; got 'fastest'"),
        ({"scheduler": "../../etc/passwd"}, "scheduler must be one of as the preset"),
        ({"decoder": "vae/../../secret.safetensors"}, "decoder must be one of the model's own"),
        ({"dtype": "float64"}, "dtype must be one of as the preset"),
        ({"steps": 101}, "Value 101 bigger than max of 100"),
        ({"unet_cache": -1}, "Value -1 smaller than min of 0"),
    ],
)
def test_values_that_no_dial_has_are_refused(client: Client, dials: dict[str, Any], said: str):
    with pytest.raises(PromptRefusedError, match=said):
        client.run(planned(**dials))


def test_a_number_between_off_and_as_the_preset_is_refused(client: Client):
    run = client.run(planned(step_cache=-0.5))
    assert run.error["exception_message"].strip() == "Speed plan: step cache of a speed plan must be 0 to 1, got -0.5"
