"""Pictures side by side on one sheet, with what each row and column is."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_LARGEST_SIDE = 8192  # of the sheet
_LARGEST_CELL = 256
_SMALLEST_CELL = 16
_GAP = 8
_FONT_SIZE = 16
_LONGEST_LABEL = 240  # pixels
_NO_GLYPH = "\U0010ffff"  # no character, so that a font shows for it what it shows for any that it lacks
# Fonts with Chinese, Japanese and Korean as the systems ship them; Pillow knows where each system keeps its fonts.
_WIDE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansSC-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "msyh.ttc",
    "simhei.ttf",
    "simsun.ttc",
    "PingFang.ttc",
    "STHeiti Medium.ttc",
    "Hiragino Sans GB.ttc",
    "Arial Unicode.ttf",
    "DejaVuSans.ttf",
)


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class ContactSheet:
    """pixels: (1, 3, H, W) in 0..1; legend: a line for each row and column that the sheet does not name whole."""

    pixels: Tensor
    legend: tuple[str, ...]


def contact_sheet(
    pixels: Tensor, columns: int, row_labels: Sequence[str] = (), column_labels: Sequence[str] = ()
) -> ContactSheet:
    """Pictures (B, 3, H, W) in 0..1, row by row, on white; each scaled down to at most 256 a side, never up.

    A label that no font on this machine can write is numbered on the sheet, and one that is too long for its place is
    cut short there; the legend has them whole. Raises ValueError where labels are not as many as the rows and columns.
    """
    count, _, height, width = pixels.shape
    rows = -(-count // columns)
    for kind, labels, expected in (("row", row_labels, rows), ("column", column_labels, columns)):
        if labels and len(labels) != expected:
            raise ValueError(f"expected {expected} {kind} labels, got {len(labels)}")
    space = _LARGEST_SIDE // max(rows, columns) - _GAP
    scale = min(1.0, min(_LARGEST_CELL, max(space, _SMALLEST_CELL)) / max(height, width))
    cell = (max(1, round(width * scale)), max(1, round(height * scale)))
    fonts = _fonts_for("".join([*row_labels, *column_labels]))
    at_left = [_label(fonts, text, "row", number, _LONGEST_LABEL) for number, text in enumerate(row_labels, 1)]
    above = [_label(fonts, text, "column", number, cell[0]) for number, text in enumerate(column_labels, 1)]
    left = _GAP + (max(label.width for label in at_left) + _GAP if at_left else 0)
    top = _GAP + (_FONT_SIZE + _GAP if above else 0)
    sheet = Image.new("RGB", (left + columns * (cell[0] + _GAP), top + rows * (cell[1] + _GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, picture in enumerate(pixels):
        row, column = divmod(number, columns)
        values = (255 * picture.float().clamp(0, 1)).round().byte().movedim(0, -1).cpu().numpy()
        small = Image.fromarray(values).resize(cell, Image.Resampling.LANCZOS)
        sheet.paste(small, (left + column * (cell[0] + _GAP), top + row * (cell[1] + _GAP)))
    for row, label in enumerate(at_left):
        draw.text((_GAP, top + row * (cell[1] + _GAP)), label.text, "black", label.font)
    for column, label in enumerate(above):
        draw.text((left + column * (cell[0] + _GAP), _GAP), label.text, "black", label.font)
    values = torch.from_numpy(np.asarray(sheet).copy()).movedim(-1, 0)[None]
    return ContactSheet(values.float() / 255, tuple(label.legend for label in (*at_left, *above) if label.legend))


@dataclass(frozen=True)
class _Label:
    """What stands on the sheet, and what the legend says of it, if anything."""

    text: str
    font: Font
    legend: str = ""

    @property
    def width(self) -> int:
        return round(self.font.getlength(self.text))


def _label(fonts: Sequence[Font], text: str, kind: str, number: int, room: int) -> _Label:
    font = next((font for font in fonts if _has_all(font, text)), None)
    whole = f"{kind} {number}: {text}"
    if font is None:
        return _Label(str(number), fonts[0], whole)
    if font.getlength(text) <= room:
        return _Label(text, font)
    if room < _LONGEST_LABEL:
        return _Label(str(number), font, whole)
    short = text
    while short and font.getlength(f"{short}...") > room:
        short = short[:-1]
    return _Label(f"{short.rstrip()}...", font, whole)


def _fonts_for(text: str) -> list[Font]:
    """Pillow's own; and the system's that may have more, where that lacks a character."""
    fonts: list[Font] = [ImageFont.load_default(_FONT_SIZE)]
    if not _has_all(fonts[0], text):
        for name in _WIDE_FONTS:
            with contextlib.suppress(OSError):
                fonts.append(ImageFont.truetype(name, _FONT_SIZE))
    return fonts


def _has_all(font: Font, text: str) -> bool:
    if not isinstance(font, ImageFont.FreeTypeFont):  # a Pillow without FreeType: a bitmap of Latin-1
        return text.isascii()
    lacking = _shape(font, _NO_GLYPH)
    return all(character.isspace() or _shape(font, character) != lacking for character in set(text))


def _shape(font: ImageFont.FreeTypeFont, character: str) -> bytes:
    tile = Image.new("L", (2 * _FONT_SIZE, 2 * _FONT_SIZE))
    ImageDraw.Draw(tile).text((0, 0), character, 255, font)
    return tile.tobytes()
