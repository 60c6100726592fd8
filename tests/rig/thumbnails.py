"""Every example workflow run in the real page, its pictures kept beside it as the template browser's thumbnail."""

import io
import json
import math
from typing import Any

from PIL import Image

from ..rig import CACHE, ROOT, RigError
from .client import Client
from .host import ComfyServer
from .page import ComfyPage, open_browser

_SIDE = 400


def make_thumbnails() -> None:
    """Write workflows/<name>.jpg for each workflows/<name>.json."""
    from tests.pipeline.language_models import SMOLLM2, lend, smollm2  # which imports torch

    with ComfyServer(CACHE / "thumbnails") as server, open_browser() as browser:
        client = Client(server.url)
        lend(smollm2(), server.base / "models" / "LLM" / SMOLLM2)
        for path in sorted((ROOT / "workflows").glob("*.json")):
            page = ComfyPage(browser, client)
            page.load(json.loads(path.read_text(encoding="utf-8")))
            end = page.run()
            page.page.close()
            if end["kind"] != "execution_success":
                raise RigError(f"{path.name}: {end.get('exception_message') or end}")
            thumbnail = path.with_suffix(".jpg")
            _sheet(_saved_pictures(client, end["outputs"])).save(thumbnail, quality=85)
            print(thumbnail.relative_to(ROOT), flush=True)


def _saved_pictures(client: Client, outputs: dict[str, dict[str, Any]]) -> list[Image.Image]:
    saved = [image for ui in outputs.values() for image in ui.get("images", []) if image["type"] == "output"]
    return [Image.open(io.BytesIO(client.fetch_image(image))) for image in saved]


def _sheet(pictures: list[Image.Image]) -> Image.Image:
    """One picture alone, or up to four in two columns, each whole and on white."""
    pictures = pictures[:4]
    columns = 1 if len(pictures) == 1 else 2
    cell = _SIDE // columns
    above = (_SIDE - math.ceil(len(pictures) / columns) * cell) // 2
    sheet = Image.new("RGB", (_SIDE, _SIDE), "white")
    for index, picture in enumerate(pictures):
        scale = cell / max(picture.size)
        small = picture.convert("RGBA").resize(
            [max(1, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS
        )
        left = index % columns * cell + (cell - small.width) // 2
        top = above + index // columns * cell + (cell - small.height) // 2
        sheet.paste(small, (left, top), small)
    return sheet
