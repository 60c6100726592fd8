"""Variants and Grid in the real host: the single blocks' own pictures, in one job that counts, stops and is bounded."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.nodes.prompts import graph, pictures_of
from tests.rig.client import Client, Prompt, PromptRefusedError, Run

HOW = {"steps": 2, "guidance_scale": 1.0, "width": 64, "height": 64, "at_once": 3}
ROSE = "\u73ab\u7470"


def variants(**changes: Any) -> Prompt:
    prompt = graph()
    inputs = {"model": ["load", 0], "conditioning": ["fuse", 0], "seed": 5, "count": 5, **HOW, **changes}
    prompt["draw"] = {"class_type": "DuetVariants", "inputs": inputs}
    return prompt


def grid(**changes: Any) -> Prompt:
    prompt = graph()
    inputs = {"model": ["load", 0], "prompts": f"rose\n\n{ROSE}\n", "seed": 5, "seeds": 2, "strengths": "0.2, 0.5"}
    inputs |= {"image": ["image", 0], **HOW, **changes}
    prompt["draw"] = {"class_type": "DuetGrid", "inputs": inputs}
    for unused in ("text", "look", "fuse"):
        del prompt[unused]
    return prompt


def with_text(prompt: Prompt) -> Prompt:
    prompt["legend"] = {"class_type": "PreviewAny", "inputs": {"source": ["draw", 3]}}
    prompt["sheet"] = {"class_type": "PreviewImage", "inputs": {"images": ["draw", 2]}}
    return prompt


def values(client: Client, run: Run, node: str = "save") -> list[np.ndarray]:
    assert run.succeeded, run.error
    found = [client.fetch_image(image) for image in run.outputs[node]["images"]]
    return [np.asarray(Image.open(io.BytesIO(picture))).astype(int) for picture in found]


def one(client: Client, **changes: Any) -> np.ndarray:
    (picture,) = pictures_of(client, client.run(graph(draw__steps=2, **changes)))
    return np.asarray(picture).astype(int)


def test_each_variant_is_generate_s_picture(client: Client):
    run = client.run(with_text(variants()))
    drawn = values(client, run)
    assert len(drawn) == 5
    for number, picture in enumerate(drawn):
        # Eight bits by cutting off: a millionth more or less may be one level.
        assert abs(picture - one(client, draw__seed=5 + number)).max() <= 1
    assert run.outputs["legend"]["text"][0].splitlines() == [f"{n + 1}: seed {5 + n}" for n in range(5)]
    (sheet,) = values(client, run, "sheet")
    assert sheet.shape[1] > 3 * 64 and sheet.shape[0] > 2 * 64
    assert {entry["stage"] for node, entry in run.stages() if node == "draw"} == {"generation", "decode"}


def test_each_cell_is_the_single_blocks_picture(client: Client):
    run = client.run(with_text(grid()))
    drawn = values(client, run)
    cells = [(text, seed, strength) for text in ("rose", ROSE) for seed in (5, 6) for strength in (0.2, 0.5)]
    assert len(drawn) == len(cells)
    for picture, (text, seed, strength) in zip(drawn, cells, strict=True):
        single = one(client, text__prompt=text, draw__seed=seed, fuse__strength=strength)
        assert abs(picture - single).max() <= 1
    lines = run.outputs["legend"]["text"][0].splitlines()
    assert lines[-8:] == [
        f"{n}: {text}, seed {seed}, strength {strength:g}" for n, (text, seed, strength) in enumerate(cells, 1)
    ]
    numbered = lines[:-8]  # where no font of the machine has them
    assert numbered in ([], [f"row 3: seed 5: {ROSE}", f"row 4: seed 6: {ROSE}"])
    (sheet,) = values(client, run, "sheet")
    assert sheet.shape[0] > 4 * 64 and sheet.shape[1] > 2 * 64


def test_without_a_picture_strengths_have_no_effect(client: Client):
    prompt = grid(strengths="0, 1")
    del prompt["draw"]["inputs"]["image"]
    assert len(values(client, client.run(prompt))) == 4


def test_progress_counts_over_the_whole_and_cancelling_stops_it(client: Client):
    told: list[tuple[int, int]] = []

    def look(kind: str, data: dict) -> None:
        if kind == "progress" and data.get("node") == "draw":
            told.append((data["value"], data["max"]))

    assert client.run(variants(seed=100, count=7), listener=look).succeeded
    # Newer hosts leave out some that follow one another closely, but never the first and the last.
    assert told == sorted(set(told)) and (told[0], told[-1]) == ((1, 6), (6, 6))

    def stop(kind: str, data: dict) -> None:
        if kind == "progress" and data.get("node") == "draw" and data["value"] >= 2:
            client.interrupt()

    run = client.run(variants(seed=200, count=600, at_once=2), listener=stop)
    assert run.ended == "execution_interrupted"
    report = client.run({"cache": {"class_type": "DuetModelCache", "inputs": {"action": "report"}}})
    assert not any(entry["pins"] for entry in report.outputs["cache"]["duet_cache"][0]["entries"])
    assert len(values(client, client.run(variants(seed=200, count=3)))) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": " \n\n\t\n"}, "Grid: expected at least one prompt, got none"),
        ({"strengths": ""}, "Grid: expected at least one strength for the picture, got none"),
        ({"strengths": "0.5, half"}, "Grid: expected strengths such as 0.25, 0.5, 0.75, each from 0 to 1, got 'half'"),
        ({"strengths": "0.5 2"}, "Grid: expected strengths such as 0.25, 0.5, 0.75, each from 0 to 1, got '2'"),
        ({"prompts": "a\n" * 50, "seeds": 100}, "Grid: expected 1 to 1024 pictures in one job"),
        ({"seeds": 100, "width": 4096, "height": 4096}, "Grid: expected at most 268,435,456 pixels in one job"),
        ({"prompts": "x" * 20_001}, "Grid: expected a prompt of at most 20,000 characters, got 20,001"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(client: Client, changes: dict, message: str):
    run = client.run(grid(**changes))
    assert (run.ended, run.error["node_type"]) == ("execution_error", "DuetGrid")
    assert run.error["exception_message"].startswith(message)


def test_numbers_out_of_range_are_refused(client: Client):
    for changes in ({"count": 0}, {"count": 10_000}, {"at_once": 0}, {"at_once": 65}, {"seed": -1}):
        with pytest.raises(PromptRefusedError):
            client.run(variants(**changes))
    with pytest.raises(PromptRefusedError, match="Grid: method must be one of"):
        client.run(grid(method="../../etc/passwd"))


def test_a_batch_of_conditions_is_refused(client: Client):
    prompt = variants()
    prompt["image"]["inputs"]["batch_size"] = 2
    run = client.run(prompt)
    assert run.error["exception_message"].startswith("Variants: expected one condition, got a batch of 2")
