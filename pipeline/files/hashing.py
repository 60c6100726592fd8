"""SHA-256 of parts of files, on several threads side by side; whoever asks may follow it, and end it."""

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from .safetensors_files import CheckpointError

_CHUNK = 4 * 2**20
_PIECE = 64 * 2**20
_THREADS = 8
_EVERY_S = 0.1


@dataclass(frozen=True)
class Span:
    """Bytes ``start`` to ``stop`` of a file."""

    path: Path
    start: int
    stop: int


def pieces_of(path: Path) -> list[Span]:
    """A whole file, in pieces that threads can share."""
    size = path.stat().st_size
    return [Span(path, start, min(size, start + _PIECE)) for start in range(0, size, _PIECE)]


def hash_spans(spans: Sequence[Span], on_read: Callable[[int], None] | None = None) -> list[str]:
    """The digest of each. on_read: is told the bytes read so far, every tenth of a second, by the calling thread.

    What it raises ends the reading at once, and is raised here when no thread reads any more. Raises CheckpointError
    for a file that ends too early.
    """
    lock, stopped, read = threading.Lock(), threading.Event(), 0

    def digest_of(span: Span) -> str:
        nonlocal read
        digest = hashlib.sha256()  # processors have instructions for it, and it frees the interpreter's lock
        with open(span.path, "rb") as file:
            file.seek(span.start)
            left = span.stop - span.start
            while left > 0 and not stopped.is_set() and (chunk := file.read(min(_CHUNK, left))):
                digest.update(chunk)
                left -= len(chunk)
                with lock:
                    read += len(chunk)
        if left and not stopped.is_set():
            raise CheckpointError(f"{span.path} is truncated: {left:,} bytes are missing since it was opened")
        return digest.hexdigest()

    pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1))
    try:
        asked = [pool.submit(digest_of, span) for span in spans]
        waiting = set(asked)
        while waiting:
            done, waiting = wait(waiting, timeout=_EVERY_S, return_when=FIRST_EXCEPTION)
            for each in done:
                each.result()
            if on_read is not None:
                on_read(read)
        return [each.result() for each in asked]
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)
