"""Save pictures in the real host: the files of Save Image, at once, and compressed while the next prompt runs."""

import io
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.nodes.prompts import graph
from tests.rig.client import Client, Prompt
from tests.rig.host import ComfyServer

WORKFLOW = {"nodes": [{"id": 1, "title": "\u73ab\u7470"}], "version": 0.4}


class PageClient(Client):
    """Queues as the page does, with the workflow beside the prompt."""

    def queue(self, prompt: Prompt) -> str:
        body = {"prompt": prompt, "client_id": self.client_id, "extra_data": {"extra_pnginfo": {"workflow": WORKFLOW}}}
        return self.post("/prompt", body)["prompt_id"]


@pytest.fixture
def page_client(host: ComfyServer) -> PageClient:
    return PageClient(host.url)


def flat(side: int, prefix: str, colour: int = 0x336699, batch: int = 1, **settings: Any) -> Prompt:
    """A picture of one colour, saved."""
    size = {"width": side, "height": side, "batch_size": batch, "color": colour}
    inputs = {"image": ["image", 0], "filename_prefix": prefix, **settings}
    return {
        "image": {"class_type": "EmptyImage", "inputs": size},
        "save": {"class_type": "DuetSavePictures", "inputs": inputs},
    }


def compressed(path: Path, less_than: int) -> bytes:
    deadline = time.monotonic() + 60
    while path.stat().st_size >= less_than:
        assert time.monotonic() < deadline, f"{path} is not compressed"
        time.sleep(0.02)
    return path.read_bytes()


def test_the_files_are_save_image_s_own(page_client: PageClient, host: ComfyServer):
    prompt = graph(draw__batch_size=3)
    prompt["save"] = {"class_type": "SaveImage", "inputs": {"images": ["draw", 0], "filename_prefix": "same/stock"}}
    prompt["ours"] = {
        "class_type": "DuetSavePictures",
        "inputs": {"image": ["draw", 0], "filename_prefix": "same/ours"},
    }
    run = page_client.run(prompt)
    assert run.succeeded, run.error
    stock, ours = (run.outputs[node]["images"] for node in ("save", "ours"))
    assert [(image["filename"], image["subfolder"], image["type"]) for image in ours] == [
        (image["filename"].replace("stock", "ours"), "same", "output") for image in stock
    ]
    for theirs, mine in zip(stock, ours, strict=True):
        expected = page_client.fetch_image(theirs)
        with Image.open(io.BytesIO(page_client.fetch_image(mine))) as shown, Image.open(io.BytesIO(expected)) as wanted:
            assert shown.tobytes() == wanted.tobytes()
            assert getattr(shown, "text", None) == getattr(wanted, "text", None)
            assert set(getattr(shown, "text", {})) == {"prompt", "workflow"}
        assert compressed(host.output / "same" / mine["filename"], 64 * 64 * 3) == expected
    assert run.stages()[-1][1]["stage"] == "save"


def test_numbers_go_on_and_names_are_filled_in(client: Client, host: ComfyServer):
    for number in (1, 2):
        run = client.run(flat(16, "names/%width%x%height%_%batch_num%", colour=number, batch=2))
        assert run.succeeded, run.error
        first = 2 * number - 1
        expected = [f"16x16_%_{first:05}_.png".replace("%", "0"), f"16x16_%_{first + 1:05}_.png".replace("%", "1")]
        found = [image["filename"] for image in run.images()]
        # The host counts on by the name before %batch_num% is filled in, and so begins anew: no name is taken twice.
        assert found == expected or len({*found, *expected}) == 4
    assert len(list((host.output / "names").glob("*.png"))) == 4


def test_a_date_is_filled_in_as_in_save_image(client: Client):
    run = client.run(flat(16, "dated/%date:yyyy-MM-dd%"))
    assert run.succeeded, run.error
    (image,) = run.images()
    assert image["subfolder"] == "dated" and re.fullmatch(r"20\d\d-[01]\d-[0-3]\d_00001_\.png", image["filename"])


def test_the_next_prompt_runs_while_the_last_is_compressed(client: Client, host: ComfyServer):
    side = 4096
    uncompressed = side * (1 + 3 * side)
    assert client.run(flat(16, "warm")).succeeded
    started = time.perf_counter()
    first = client.run(flat(side, "large"))
    took = time.perf_counter() - started
    assert first.succeeded, first.error
    path = host.output / first.images()[0]["filename"]
    second = client.run(graph(draw__seed=77))
    assert second.succeeded, second.error
    assert path.stat().st_size > uncompressed, f"it was compressed before the next prompt had ended; saved in {took} s"
    with Image.open(io.BytesIO(client.fetch_image(first.images()[0]))) as shown:
        assert shown.size == (side, side) and shown.getpixel((side - 1, side - 1)) == (0x33, 0x66, 0x99)
    with Image.open(io.BytesIO(compressed(path, uncompressed))) as kept:
        assert kept.size == (side, side) and kept.getpixel((side - 1, side - 1)) == (0x33, 0x66, 0x99)
    assert list(host.output.rglob("*.partial")) == []


def test_a_mask_makes_it_transparent(client: Client, host: ComfyServer):
    prompt = flat(32, "alpha", colour=0xFF8040, mask=["mask", 0])
    prompt["mask"] = {"class_type": "SolidMask", "inputs": {"value": 0.5, "width": 32, "height": 32}}
    for lift, colour in ((False, (255, 128, 64)), (True, (255, 1, 0))):
        prompt["save"]["inputs"]["lift_off_white"] = lift
        run = client.run(prompt)
        assert run.succeeded, run.error
        with Image.open(io.BytesIO(client.fetch_image(run.images()[0]))) as shown:
            assert (shown.mode, shown.getpixel((9, 9))) == ("RGBA", (*colour, 127))


def test_an_empty_mask_of_load_image_changes_nothing(client: Client):
    prompt = flat(32, "opaque", mask=["mask", 0])
    prompt["mask"] = {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 64, "height": 64}}
    with Image.open(io.BytesIO(client.fetch_image(client.run(prompt).images()[0]))) as shown:
        assert shown.mode == "RGB"


def test_a_batch_of_rgba_stays_rgba(client: Client):
    prompt = flat(32, "rgba")
    prompt["mask"] = {"class_type": "SolidMask", "inputs": {"value": 0.25, "width": 32, "height": 32}}
    prompt["join"] = {"class_type": "JoinImageWithAlpha", "inputs": {"image": ["image", 0], "alpha": ["mask", 0]}}
    prompt["both"] = {"class_type": "RepeatImageBatch", "inputs": {"image": ["join", 0], "amount": 2}}
    prompt["save"]["inputs"]["image"] = ["both", 0]
    run = client.run(prompt)
    assert run.succeeded and len(run.images()) == 2, run.error
    for image in run.images():
        with Image.open(io.BytesIO(client.fetch_image(image))) as shown:
            assert shown.mode == "RGBA" and shown.getpixel((3, 3))[3] == 191


def failed(client: Client, prompt: Prompt) -> tuple[str, str]:
    run = client.run(prompt)
    assert run.ended == "execution_error" and run.error["node_type"] == "DuetSavePictures", run.outputs
    return run.error["exception_type"].rpartition(".")[2], run.error["exception_message"].strip()


@pytest.mark.parametrize("prefix", ["../out", "a/../../out", "{base}/out", "..", "", " ", "a\0b", "out/link/x"])
def test_a_name_that_leads_out_is_refused(client: Client, host: ComfyServer, prefix: str):
    outside = host.base / "outside"
    outside.mkdir(exist_ok=True)
    (host.output / "out").mkdir(exist_ok=True)
    link = host.output / "out" / "link"
    if not link.is_symlink():
        link.symlink_to(outside)
    kind, message = failed(client, flat(16, prefix.format(base=host.base)))
    assert kind == "ValueError" and message.startswith("Save pictures: ") and "filename_prefix" in message
    assert list(outside.iterdir()) == [] and list(host.base.glob("out_*")) == []


def test_a_folder_that_is_a_file_and_a_name_too_long_are_named(client: Client, host: ComfyServer):
    (host.output / "occupied").write_text("mine")
    kind, message = failed(client, flat(16, "occupied/x"))
    assert kind in ("NotADirectoryError", "FileExistsError") and "Save pictures: " in message
    kind, message = failed(client, flat(16, "x" * 300))
    assert kind == "OSError" and "Save pictures: picture 1 of 1" in message and "too long" in message
    assert list(host.output.rglob("*.partial")) == []


def test_a_picture_that_is_no_number_is_refused(client: Client, host: ComfyServer):
    prompt = flat(16, "nan/x", colour=0)
    prompt["zero"] = {"class_type": "PrimitiveFloat", "inputs": {"value": 0.0}}
    prompt["nan"] = {
        "class_type": "NormalizeImages",
        "inputs": {"images": ["image", 0], "mean": 0.0, "std": ["zero", 0]},
    }
    prompt["save"]["inputs"]["image"] = ["nan", 0]
    kind, message = failed(client, prompt)
    assert (kind, message[:41]) == ("ValueError", "Save pictures: expected finite pixel valu")
    assert list((host.output / "nan").iterdir()) == []


def test_a_mask_of_another_size_is_refused(client: Client):
    prompt = flat(32, "odd", mask=["mask", 0])
    prompt["mask"] = {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 8, "height": 8}}
    assert failed(client, prompt)[1].startswith("Save pictures: expected a mask for the picture")


def test_a_host_that_is_stopped_compresses_first_and_may_leave_the_workflow_out(tmp_path: Path):
    left = tmp_path / "output" / "sub" / ".duet-00.partial"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    os.utime(left, (1e9, 1e9))
    side = 1500
    with ComfyServer(tmp_path, arguments=("--disable-metadata",)) as server:
        client = PageClient(server.url)
        run = client.run(flat(side, "a", batch=3))
        assert run.succeeded, run.error
        paths = [server.output / image["filename"] for image in run.images()]
    assert len(paths) == 3
    for path in paths:
        assert path.stat().st_size < side * 3 * side / 10
        with Image.open(path) as image:
            assert image.size == (side, side) and not getattr(image, "text", None)
    assert list(server.output.rglob("*.partial")) == []
