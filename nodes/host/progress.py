"""Progress, previews and the wish to cancel."""

# pyright: reportMissingImports=false, reportMissingModuleSource=false

import time
from collections.abc import Callable

import comfy.model_management as memory
import comfy.utils
from comfy.cli_args import LatentPreviewMethod, args
from PIL import Image
from server import PromptServer

_TEXT_EVERY_S = 0.1
_LONG_S = 1.0


def steps(total: int) -> Callable[[int, Image.Image | None], None]:
    """A callback for ``generate``: ``on_step(done, preview)`` moves this node's progress bar and shows the preview.

    Raises the host's InterruptProcessingException as soon as the user has cancelled.
    """
    bar = comfy.utils.ProgressBar(total)

    def on_step(done: int, preview: Image.Image | None = None) -> None:
        memory.throw_exception_if_processing_interrupted()
        # JPEG knows no alpha, and an error while the server encodes a preview ends the server.
        shown = None if preview is None else ("JPEG", preview.convert("RGB"), min(args.preview_size, max(preview.size)))
        bar.update_absolute(done, total, shown)

    return on_step


def previews_wanted() -> bool:
    """Whether the host was told to show previews; by itself it shows none."""
    return args.preview_method != LatentPreviewMethod.NoPreviews


def text_progress(total: int, node_id: str) -> Callable[[int, str], None]:
    """A callback for ``direct_prompt``: ``on_text(tokens, text)`` shows on the node what is written so far.

    Raises the host's InterruptProcessingException as soon as the user has cancelled.
    """
    bar = comfy.utils.ProgressBar(total)
    told = 0.0

    def on_text(tokens: int, text: str) -> None:
        nonlocal told
        memory.throw_exception_if_processing_interrupted()
        bar.update_absolute(min(tokens, total), total)
        if time.monotonic() - told > _TEXT_EVERY_S:
            _tell(text, node_id)
            told = time.monotonic()

    return on_text


def _tell(text: str, node_id: str) -> None:
    """On the page whose prompt this is: unless one is named, the host shows it on every page that is open."""
    server = PromptServer.instance
    if server.client_id is not None:
        server.send_progress_text(text, node_id, sid=server.client_id)


def reading(name: str, size: int) -> Callable[[int], None]:
    """A watch for ``Digests``: after a second the node that asked says what is read, and how far it is.

    Raises the host's InterruptProcessingException as soon as the user has cancelled.
    """
    started = told = time.monotonic()
    bar = None

    def on_read(read: int) -> None:
        nonlocal bar, told
        memory.throw_exception_if_processing_interrupted()
        now = time.monotonic()
        if now - started < _LONG_S:
            return
        bar = bar or comfy.utils.ProgressBar(size)
        bar.update_absolute(read, size)
        server = getattr(PromptServer, "instance", None)
        node_id = getattr(server, "last_node_id", None)
        if server is not None and node_id is not None and now - told > _TEXT_EVERY_S:
            gigabytes = f"{read / 1e9:.1f} of {size / 1e9:.1f} GB"
            _tell(f"Reading {name} once, to know it again: {gigabytes}", node_id)
            told = now

    return on_read
