"""PNG as fast as memory allows, uncompressed, and the same picture compressed later.

After the PNG specification (ISO/IEC 15948) and stored blocks of deflate (RFC 1951, 3.2.4): any reader opens both.
"""

import functools
import io
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {3: 2, 4: 6}  # channels -> RGB, RGBA
_LONGEST_BLOCK = 65_535  # what a stored block can hold
_BAND = 2**17  # values that are converted at a time, so that they stay in a core's own cache
_BITS_OF_255 = np.float32(255).view(np.uint32)
LARGEST = 2_000_000_000  # bytes of pixels that one chunk can hold

Part = bytes | bytearray | memoryview


def texts_of(texts: Mapping[str, str]) -> PngInfo:
    """Keyword and text, for both writers; text beyond Latin-1 goes into an iTXt chunk."""
    info = PngInfo()
    for keyword, text in texts.items():
        info.add_text(keyword, text)
    return info


def to_bytes(picture: Tensor) -> np.ndarray:
    """(H, W, C) in 0..1 -> uint8 by cutting off, as the host's Save Image has it; what lies outside is clamped.

    C is 3 or 4. Each row has a zero before it, which is PNG's mark of a row that is not filtered: (H, 1 + W * C).
    Raises ValueError where a value is no number.
    """
    height, width, channels = picture.shape
    # By NumPy: torch converts to 8 bits one value at a time, and takes five times as long.
    flat = picture.detach().float().cpu().contiguous().view(height, width * channels).numpy()
    rows = np.empty((height, 1 + width * channels), np.uint8)
    rows[:, 0] = 0
    step = max(1, _BAND // (width * channels))
    band = np.empty((min(step, height), width * channels), np.float32)
    for start in range(0, height, step):
        part = flat[start : start + step]
        with np.errstate(over="ignore"):  # which the next lines see
            values = np.multiply(part, 255, out=band[: len(part)])
        # Their bits, as whole numbers, are above those of 255 for what is above it, below 0, infinite or no number.
        if values.view(np.uint32).max() > _BITS_OF_255:
            checked = torch.from_numpy(values)
            if not torch.stack(torch.aminmax(checked)).isfinite().all():
                raise ValueError("expected finite pixel values, got NaN or infinity in the picture")
            checked.clamp_(0, 255)
        np.copyto(rows[start : start + step, 1:], values, casting="unsafe")
    return rows


def stored_png(rows: np.ndarray, channels: int, info: PngInfo) -> list[Part]:
    """A whole file of rows as ``to_bytes`` gives them, uncompressed, in parts to write one after the other."""
    height, width = rows.shape[0], (rows.shape[1] - 1) // channels
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    parts: list[Part] = [_SIGNATURE, _chunk(b"IHDR", header)]
    parts += [_chunk(kind, data) for kind, data, *_ in info.chunks]
    data, (adler32, crc32) = rows.data.cast("B"), checksums()
    body: list[Part] = [b"\x78\x01", *_blocks(data), struct.pack(">I", adler32(data))]
    length, check = 0, crc32(b"IDAT")
    for part in body:
        length, check = length + len(part), crc32(part, check)
    return [*parts, struct.pack(">I", length) + b"IDAT", *body, struct.pack(">I", check), _chunk(b"IEND", b"")]


@functools.cache
def checksums() -> tuple[Callable[..., int], Callable[..., int]]:
    """adler32 and crc32: zlib-ng's, in a tenth of zlib's time, where the optional group ``saving`` brought it."""
    try:
        from zlib_ng import zlib_ng as library
    except ImportError:
        library = zlib
    return library.adler32, library.crc32


def compressed_png(stored: bytes, info: PngInfo, compress_level: int) -> bytes:
    """What Pillow writes for the picture in a file of ``stored_png``: the host's own bytes, when it has the same texts.

    Raises ValueError where it is none.
    """
    chunks = dict(_chunks(stored))
    if not {b"IHDR", b"IDAT"} <= chunks.keys():
        raise ValueError("expected a PNG of one IDAT chunk, got another file")
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    channels = {kind: count for count, kind in _COLOUR_TYPES.items()}.get(colour, 0)
    try:
        rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + width * channels)
    except (ValueError, zlib.error) as error:
        raise ValueError(f"expected {width}x{height} uncompressed values, got other data: {error}") from error
    if depth != 8 or rows[:, 0].any():
        raise ValueError("expected 8 bits without a filter, got another kind of PNG")
    pixels = np.ascontiguousarray(rows[:, 1:]).reshape(height, width, channels)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", pnginfo=info if info.chunks else None, compress_level=compress_level)
    return file.getvalue()


def _blocks(data: memoryview) -> Iterator[Part]:
    for start in range(0, len(data), _LONGEST_BLOCK):
        block = data[start : start + _LONGEST_BLOCK]
        last = start + _LONGEST_BLOCK >= len(data)
        yield struct.pack("<BHH", last, len(block), len(block) ^ 0xFFFF)
        yield block


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


def _chunks(file: bytes) -> Iterator[tuple[bytes, memoryview]]:
    place, view = len(_SIGNATURE), memoryview(file)
    while place + 8 <= len(file):
        (length,) = struct.unpack_from(">I", file, place)
        yield bytes(view[place + 4 : place + 8]), view[place + 8 : place + 8 + length]
        place += 12 + length
