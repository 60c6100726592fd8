"""In the real host: what a run cost, as text and as JSON, and what lies between two pictures."""

import math
from typing import Any

import pytest

from tests.nodes.prompts import graph
from tests.rig.client import Client, Prompt, Run
from tests.rig.page import ComfyPage

SPEED_PLAN: dict[str, Any] = {
    "preset": "exact",
    "steps": 0,
    "guidance_scale": -1.0,
    "shift": 0.0,
    "step_cache": -1.0,
    "unet_cache": 0,
    "decoder": "the model's own",
    "preview": "the model's own",
    "measure_loss": False,
} | dict.fromkeys(("scheduler", "compile", "quantisation", "dtype", "memory_format"), "as the preset")


def reported(**links: Any) -> Prompt:
    return graph() | {"told": {"class_type": "DuetReport", "inputs": links}}


def colour(value: int, width: int = 32, height: int = 24, batch_size: int = 1) -> dict[str, Any]:
    inputs = {"width": width, "height": height, "batch_size": batch_size, "color": value * 0x10101}
    return {"class_type": "EmptyImage", "inputs": inputs}


def told(client: Client, prompt: Prompt) -> tuple[str, dict[str, Any]]:
    """What is shown on the node, and the same as JSON."""
    run = client.run(prompt)
    assert run.succeeded, run.error
    ui = run.outputs["told"]
    assert ui["text"] == ui["duet_summary"]
    return ui["text"][0], ui["duet_report"][0]


def refused(client: Client, prompt: Prompt) -> str:
    run: Run = client.run(prompt)
    assert run.ended == "execution_error"
    return run.error["exception_message"]


def measured(**images: dict[str, Any]) -> Prompt:
    prompt: Prompt = {name: image for name, image in images.items()}
    prompt["told"] = {"class_type": "DuetReport", "inputs": {name: [name, 0] for name in images}}
    return prompt


def test_a_run_is_told(client: Client):
    client.free()
    prompt = reported(report=["draw", 3])
    prompt["draw"]["inputs"] |= {"steps": 3, "seed": 5}
    text, found = told(client, prompt)
    assert (found["plan"], found["steps_computed"], found["steps_skipped"]) == ("exact", 3, 0)
    assert list(found["milliseconds"]) == ["generation", "decode"] and min(found["milliseconds"].values()) > 0
    assert found["cache_misses"] >= 2 and found["model_bytes"] > 2**20  # the denoiser and the decoder, just read
    assert (found["dtype"], found["retries"]) == ("float32", []) and "loss" not in found
    lines = text.splitlines()
    assert lines[0] == "plan: exact" and "steps: 3 of 3 computed in full, 0 skipped in whole or part" in lines
    spent = sum(found["milliseconds"].values())
    whole = next(line for line in lines if line.startswith("in all: "))
    assert float(whole.split()[2].replace(",", "")) == pytest.approx(spent, abs=0.1)
    assert any(line.startswith("models: ") and " times at hand, " in line for line in lines)

    prompt["draw"]["inputs"]["seed"] = 6
    _, again = told(client, prompt)
    assert again["cache_misses"] == 0 and again["cache_hits"] >= 2 and again["model_bytes"] == found["model_bytes"]


def test_the_loss_of_a_plan_is_told(client: Client):
    prompt = reported(report=["draw", 3])
    prompt["plan"] = {"class_type": "DuetSpeedPlan", "inputs": SPEED_PLAN | {"measure_loss": True}}
    prompt["draw"]["inputs"] |= {"steps": 8, "speed_plan": ["plan", 0]}
    text, found = told(client, prompt)
    assert "loss" not in found and "against" not in text  # there is none to measure

    prompt["plan"]["inputs"] = SPEED_PLAN | {"measure_loss": True, "step_cache": 0.5}
    text, found = told(client, prompt)
    assert found["steps_skipped"] > 0 and found["steps_computed"] + found["steps_skipped"] == 8
    assert 0 < found["loss"]["psnr"] < 150 and found["loss"]["ssim"] <= 1 and not found["loss"]["equal"]
    assert f"PSNR {found['loss']['psnr']:.2f} dB, SSIM {found['loss']['ssim']:.4f}" in text
    assert found["shortcuts"] and found["shortcuts"][0] in text.splitlines()[0]


def test_two_pictures_are_measured(client: Client):
    text, found = told(client, measured(image=colour(26), reference=colour(0)))
    ratio = -20 * math.log10(26 / 255)
    likeness = 1e-4 / ((26 / 255) ** 2 + 1e-4)  # without variance only the means count
    assert found["measured"]["psnr"] == pytest.approx(ratio, abs=1e-3)
    assert found["measured"]["ssim"] == pytest.approx(likeness, abs=1e-4)
    assert text == f"image against reference: PSNR {ratio:.2f} dB, SSIM {likeness:.4f}"
    assert told(client, measured(image=colour(0), reference=colour(26)))[1]["measured"] == found["measured"]


def test_equal_pictures_are_told_so_in_plain_json(client: Client):
    text, found = told(client, measured(image=colour(9), reference=colour(9, batch_size=1)))
    assert found["measured"] == {"psnr": None, "ssim": pytest.approx(1), "equal": True}
    assert text == "image against reference: no difference"


def test_a_batch_is_told_picture_by_picture(client: Client):
    prompt = measured(reference=colour(0, batch_size=2))
    prompt |= {"one": colour(0), "other": colour(51)}
    prompt["both"] = {"class_type": "ImageBatch", "inputs": {"image1": ["one", 0], "image2": ["other", 0]}}
    prompt["told"]["inputs"]["image"] = ["both", 0]
    text, found = told(client, prompt)
    assert [each["equal"] for each in found["pictures"]] == [True, False]
    assert found["pictures"][1]["psnr"] == pytest.approx(20 * math.log10(5), abs=1e-3)
    assert found["measured"]["psnr"] == pytest.approx(20 * math.log10(5) + 10 * math.log10(2), abs=1e-3)
    whole, first, second = text.splitlines()
    assert "PSNR 16.99 dB" in whole and first == "  picture 1: no difference" and "PSNR 13.98 dB" in second


def test_both_are_told_at_once_and_the_text_goes_on(client: Client):
    prompt = reported(report=["draw", 3], image=["draw", 0], reference=["draw", 0])
    prompt["draw"]["inputs"]["seed"] = 77
    prompt["next"] = {"class_type": "PreviewAny", "inputs": {"source": ["told", 0]}}
    run = client.run(prompt)
    assert run.succeeded, run.error
    (text,) = run.outputs["told"]["text"]
    assert text.startswith("plan: exact\n") and text.endswith("\nimage against reference: no difference")
    assert run.outputs["next"]["text"] == [text] or run.outputs["next"]["text"] == (text,)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (measured(), "Report: expected the report of Generate, or an image and a reference; nothing is connected"),
        (measured(image=colour(1)), "Report: expected both an image and a reference"),
        (measured(reference=colour(1)), "got reference, but no image"),
        (
            measured(image=colour(1, 32, 24), reference=colour(1, 40, 24)),
            "expected image and reference of one size and number, got 1 of 32x24 and 1 of 40x24",
        ),
        (measured(image=colour(1), reference=colour(1, batch_size=2)), "got 1 of 32x24 and 2 of 32x24"),
        (measured(image=colour(1, 8, 8), reference=colour(1, 8, 8)), "expected pictures of at least 11 x 11 pixels"),
    ],
    ids=["nothing", "no reference", "no image", "sizes", "numbers", "small"],
)
def test_what_cannot_be_told_is_refused(client: Client, prompt: Prompt, said: str):
    assert said in refused(client, prompt)


def test_the_text_is_on_the_node(page: ComfyPage):
    page.page.wait_for_function("() => window.duetReady")
    prompt = measured(image=colour(51), reference=colour(0))
    page.page.evaluate("(prompt) => window.app.loadApiJson(prompt, 'report')", prompt)
    answer = page.run()
    assert answer["kind"] == "execution_success", answer
    lines = page.page.evaluate("""() => window.app.graph.nodes.find((node) => node.type === "DuetReport")
        .widgets.find((widget) => widget.name === "duet_line").element.innerText""")
    assert "image against reference: PSNR 13.98 dB, SSIM 0.0025" in lines.splitlines()
    assert page.pack_errors() == []
