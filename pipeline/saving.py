"""Pictures -> PNG files: whole and at once while a graph runs, compressed when it has gone on.

Compressing takes a hundred times as long as all else about a picture. So each is first written uncompressed, under the
name that it keeps, and replaced by the same picture compressed, in a thread of lower priority. A file appears, and is
replaced, in one step: whoever reads it finds one or the other, and nothing is lost if the process is killed.
"""

import contextlib
import errno
import logging
import math
import os
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .files.png import LARGEST, Part, compressed_png, stored_png, texts_of, to_bytes

log = logging.getLogger(__name__)

_PREFIX, _SUFFIX = ".duet-", ".partial"
_LEFT_AFTER_S = 60  # a file under way is renamed within milliseconds of its last byte
_SWEEP_WITHIN_S = 10.0
_BEGINS_AFTER_S = 0.1  # when the prompt that saves has ended, which would share the interpreter with the thread
_MOST_PARTS = 512  # of one call to the system, which takes 1024 on Linux
_MOST_PENDING = 2**27  # bytes of pixels: some forty pictures of 1024x1024, twenty seconds of one core


@dataclass(frozen=True)
class Place:
    """Where pictures go. name: what stands before the number, with %batch_num% for a picture's place in its batch."""

    folder: Path
    name: str
    first: int  # the number to try first

    def path(self, entry: int, number: int) -> Path:
        return self.folder / f"{self.name.replace('%batch_num%', str(entry))}_{number:05}_.png"


@dataclass(frozen=True)
class _Job:
    """A file to compress, and what it was when it was written: one that was changed since is left alone."""

    path: Path
    status: tuple[int, int, int]
    info: PngInfo
    bytes: int


class PictureSaver:
    """Writes at once, compresses later. Safe to use from several threads.

    root: the folder below which what a killed process left behind is cleared away, once, beside the first compression.
    compress_level: zlib's, 0 to 9; 0 leaves all as it is written. most_pending: bytes of pixels that may wait to be
    compressed; beyond it ``save`` waits. An interpreter that ends waits for what is pending.
    """

    def __init__(self, root: Path, *, compress_level: int = 4, most_pending: int = _MOST_PENDING) -> None:
        self._root, self._level, self._most = root, compress_level, most_pending
        self._jobs: deque[_Job] = deque()
        self._pending = 0  # bytes, of the one that is compressed at this moment too
        self._changed = threading.Condition()
        self._worker: threading.Thread | None = None
        self._swept = False

    def save(
        self, place: Place, pixels: Tensor, alpha: Tensor | None = None, texts: Mapping[str, str] | None = None
    ) -> list[Path]:
        """Write pictures (B, 3 or 4, H, W) in 0..1, with alpha (B or 1, 1, H, W) as a fourth channel, or none.

        texts: keyword -> text for each file. No file is ever overwritten: a number that is taken is passed over. Gives
        the files, in order. Raises ValueError, before anything is written, for shapes that make no PNG and values that
        are no numbers; OSError where the disk refuses, with what was saved until then left as it is.
        """
        pictures = _channels_last(pixels, alpha)
        info, saved, number = texts_of(texts or {}), [], place.first
        for entry, picture in enumerate(pictures):
            rows = to_bytes(picture)
            try:
                parts = stored_png(rows, picture.shape[-1], info)
                path, number = self._write(place, entry, number, parts)
            except OSError as error:
                raise _refusal(error, place, rows.nbytes, entry, len(pictures)) from error
            saved.append(path)
            self._enqueue(path, info, rows.nbytes)
        return saved

    @property
    def pending(self) -> int:
        """Bytes of pixels that wait to be compressed."""
        return self._pending

    def wait(self, seconds: float | None = None) -> bool:
        """Until all is compressed; False if that took longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending, seconds)

    def _write(self, place: Place, entry: int, number: int, parts: Sequence[Part]) -> tuple[Path, int]:
        """Under the first number that is free, which is then taken in the same step; and the number after it."""
        place.folder.mkdir(parents=True, exist_ok=True)  # it was there when it was chosen, and may be gone
        partial = _write_partial(place.folder, parts)
        try:
            while True:
                path = place.path(entry, number)
                number += 1
                if _claim(partial, path):
                    return path, number
        finally:
            partial.unlink(missing_ok=True)

    def _enqueue(self, path: Path, info: PngInfo, size: int) -> None:
        if self._level == 0:
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._pending or self._pending + size <= self._most)
            try:
                self._jobs.append(_Job(path, _status(path), info, size))
            except OSError:  # taken away by someone else already
                return
            self._pending += size
            if self._worker is None:
                # No daemon, as a thread of the host's would be by default: the interpreter waits for it at its end. It
                # ends by itself when nothing is left to do.
                self._worker = threading.Thread(target=self._work, name="duet-compress", daemon=False)
                try:
                    self._worker.start()
                except RuntimeError as error:  # the interpreter is ending
                    log.info("%s stays uncompressed: %s", path, error)
                    self._worker, self._pending = None, 0
                    self._jobs.clear()

    def _work(self) -> None:
        time.sleep(_BEGINS_AFTER_S)
        if sys.platform == "linux":  # where a thread has a priority of its own
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, 0, 10)
        if not self._swept:
            self._swept = True
            sweep(self._root)
        while True:
            with self._changed:
                if not self._jobs:
                    self._worker = None
                    return
                job = self._jobs.popleft()
            try:
                _compress(job, self._level)
            except Exception:  # whatever it was, the picture is there, and the next is compressed
                log.exception("could not compress %s; it stays as it is", job.path)
            finally:
                with self._changed:
                    self._pending -= job.bytes
                    self._changed.notify_all()


def sweep(root: Path) -> None:
    """Delete what a process that was killed left behind below ``root``: a file or two, whole or in part."""
    until, now = time.monotonic() + _SWEEP_WITHIN_S, time.time()
    for folder, _, names in os.walk(root):
        if time.monotonic() > until:
            log.info("did not look for files left behind in all of %s: it has too many folders", root)
            return
        for name in names:
            if name.startswith(_PREFIX) and name.endswith(_SUFFIX):
                with contextlib.suppress(OSError):
                    left = Path(folder, name)
                    if now - left.stat().st_mtime > _LEFT_AFTER_S:
                        left.unlink()
                        log.info("deleted %s, which a process that was killed had left behind", left)


def _channels_last(pixels: Tensor, alpha: Tensor | None) -> Tensor:
    if pixels.ndim != 4 or 0 in pixels.shape or pixels.shape[1] not in (3, 4):
        raise ValueError(f"expected pictures of shape (B, 3 or 4, H, W), got {tuple(pixels.shape)}")
    if 4 * math.prod(pixels.shape[-2:]) > LARGEST:
        raise ValueError(f"expected pictures of at most {LARGEST // 4:,} pixels, got {tuple(pixels.shape)}")
    if alpha is not None:
        size = (pixels.shape[0], 1, *pixels.shape[-2:])
        if alpha.ndim != 4 or alpha.shape[0] not in (1, size[0]) or alpha.shape[1:] != size[1:]:
            raise ValueError(f"expected alpha of shape {size}, or one for all, got {tuple(alpha.shape)}")
        colour = pixels[:, :3]
        pixels = torch.cat([colour, alpha.expand(size).to(colour)], dim=1)
    if pixels.shape[0] > 1 and not all(torch.stack(torch.aminmax(pixels.float())).isfinite().tolist()):
        raise ValueError("expected finite pixel values, got NaN or infinity in one of the pictures")
    return pixels.movedim(1, -1)


def _write_partial(folder: Path, parts: Sequence[Part], *, durable: bool = False) -> Path:
    partial = folder / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"
    try:
        with open(partial, "xb") as file:
            if hasattr(os, "writev"):
                _write_together(file.fileno(), parts)
            else:
                file.writelines(parts)
            if durable:
                file.flush()
                os.fsync(file.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return partial


def _write_together(file: int, parts: Sequence[Part]) -> None:
    """In as few calls to the system as it allows, and without a copy."""
    for start in range(0, len(parts), _MOST_PARTS):
        waiting = [memoryview(part) for part in parts[start : start + _MOST_PARTS]]
        while waiting:
            written = os.writev(file, waiting)
            while waiting and written >= len(waiting[0]):
                written -= len(waiting.pop(0))
            if waiting:  # a disk may take less than it was given
                waiting[0] = waiting[0][written:]


def _claim(partial: Path, path: Path) -> bool:
    """Give the file its name in one step; False if that is taken, by whichever process or prompt."""
    try:
        os.link(partial, path)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL):
            raise
    # A file system without links, such as exFAT: the name is taken first, and its empty file then replaced.
    try:
        path.open("xb").close()
    except FileExistsError:
        return False
    partial.replace(path)
    return True


def _compress(job: _Job, level: int) -> None:
    try:
        if _status(job.path) != job.status:
            return
        data = compressed_png(job.path.read_bytes(), job.info, level)
        # On the disk before it takes the name: a power cut could leave that with nothing behind it.
        partial = _write_partial(job.path.parent, [data], durable=True)
    except FileNotFoundError:  # deleted or moved since, and so is done with
        return
    try:
        if _status(job.path) == job.status:
            partial.replace(job.path)
    except FileNotFoundError:
        return
    finally:
        partial.unlink(missing_ok=True)


def _status(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _refusal(error: OSError, place: Place, size: int, entry: int, count: int) -> OSError:
    told = f"picture {entry + 1} of {count} ({size:,} bytes) could not be saved in {place.folder}: {error.strerror}"
    return type(error)(error.errno, told + ("; those before it are there" if entry else ""))
