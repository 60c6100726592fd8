"""Pictures on disk: the host's own bytes in the end, whole at every moment; nothing lost, overwritten or left over."""

import io
import os
import signal
import statistics
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from pipeline import saving
from pipeline.files import png
from pipeline.saving import PictureSaver, Place, sweep

ROOT = Path(__file__).parents[2]
TEXTS = {"prompt": '{"1": "rose"}', "workflow": "w" * 500, "title": "\u73ab\u7470"}


def picture(batch: int = 1, channels: int = 3, height: int = 37, width: int = 53) -> Tensor:
    """With values that lie outside of 0..1, as decoders give them."""
    return 1.2 * torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(batch)) - 0.1


def as_the_host_saves(pixels: Tensor, texts: dict[str, str]) -> bytes:
    """One picture by the lines of the host's Save Image."""
    values = 255.0 * pixels.movedim(0, -1).numpy()
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    file = io.BytesIO()
    Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).save(file, "PNG", pnginfo=info, compress_level=4)
    return file.getvalue()


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("shape", [(3, 37, 53), (4, 37, 53), (3, 1, 1), (3, 2, 30_000), (3, 700, 300)])
def test_the_file_is_the_host_s_own(tmp_path: Path, shape: tuple[int, int, int]):
    pixels = picture(1, *shape)
    saver = PictureSaver(tmp_path)
    (path,) = saver.save(Place(tmp_path, "rose", 1), pixels, texts=TEXTS)
    assert path == tmp_path / "rose_00001_.png"
    assert saver.wait(60)
    assert path.read_bytes() == as_the_host_saves(pixels[0], TEXTS)
    assert names(tmp_path) == ["rose_00001_.png"]


def test_both_libraries_of_checksums_make_the_same_file(monkeypatch):
    pytest.importorskip("zlib_ng")
    rows, info = png.to_bytes(picture(height=300)[0].movedim(0, -1)), png.texts_of(TEXTS)
    assert png.checksums() != (zlib.adler32, zlib.crc32)
    quick = b"".join(png.stored_png(rows, 3, info))
    monkeypatch.setattr(png, "checksums", lambda: (zlib.adler32, zlib.crc32))
    assert b"".join(png.stored_png(rows, 3, info)) == quick


@pytest.mark.parametrize("channels", [3, 4])
def test_it_is_a_whole_picture_before_it_is_compressed(tmp_path: Path, channels: int):
    pixels = picture(2, channels, 300, 200)
    saver = PictureSaver(tmp_path, compress_level=0)
    first, second = saver.save(Place(tmp_path, "a%batch_num%", 7), pixels, texts=TEXTS)
    assert names(tmp_path) == ["a0_00007_.png", "a1_00008_.png"] and not saver.pending
    for path, entry in ((first, pixels[0]), (second, pixels[1])):
        assert path.stat().st_size > entry.numel(), "uncompressed"
        with Image.open(path) as image, Image.open(io.BytesIO(as_the_host_saves(entry, TEXTS))) as expected:
            assert image.mode == expected.mode and image.tobytes() == expected.tobytes()
            assert getattr(image, "text", None) == TEXTS
        Image.open(path).verify()  # the checksums of all chunks


def test_alpha_is_a_fourth_channel(tmp_path: Path):
    pixels, alpha = picture(2), torch.rand(1, 1, 37, 53)
    paths = PictureSaver(tmp_path).save(Place(tmp_path, "a", 1), pixels, alpha)
    for path, entry in zip(paths, pixels, strict=True):
        both = torch.cat([entry, alpha[0]])
        with Image.open(path) as image:
            assert image.mode == "RGBA"
            assert (np.asarray(image) == np.clip(255.0 * both.movedim(0, -1).numpy(), 0, 255).astype(np.uint8)).all()


def test_half_precision_and_strides_are_no_matter(tmp_path: Path):
    pixels = picture().half()
    saver = PictureSaver(tmp_path)
    (path,) = saver.save(Place(tmp_path, "a", 1), pixels.flip(-1))
    saver.wait()
    assert path.read_bytes() == as_the_host_saves(pixels.flip(-1)[0].float(), {})


@pytest.mark.filterwarnings("error")
def test_the_ends_of_the_range_are_cut_off_as_the_host_cuts_them_off(tmp_path: Path):
    above = float(np.nextafter(np.float32(1), np.float32(2)))
    values = torch.tensor([0.0, -0.0, 1.0, above, 1e-45, -1e-45, 254.999 / 255, -3e35, 1e36])
    pixels = torch.stack([values.roll(shift) for shift in range(3)])[None, :, None].expand(1, 3, 5, 9)
    saver = PictureSaver(tmp_path)
    (path,) = saver.save(Place(tmp_path, "a", 1), pixels)
    saver.wait()
    assert path.read_bytes() == as_the_host_saves(pixels[0], {})
    with pytest.raises(ValueError, match="expected finite pixel values"):  # it is none when it is brought to 0..255
        saver.save(Place(tmp_path, "a", 1), torch.full((1, 3, 2, 2), 1e37))
    assert names(tmp_path) == [path.name]


def test_compressing_begins_when_a_prompt_has_had_the_time_to_end(tmp_path: Path):
    saver, pixels = PictureSaver(tmp_path), picture()
    before = time.monotonic()
    (path,) = saver.save(Place(tmp_path, "a", 1), pixels)
    stored = path.stat().st_ino
    while path.stat().st_ino == stored:  # until the compressed one takes its place
        assert time.monotonic() - before < 30
        time.sleep(0.001)
    assert time.monotonic() - before > saving._BEGINS_AFTER_S
    assert saver.wait(30)


def test_a_number_that_is_taken_is_passed_over(tmp_path: Path):
    (tmp_path / "a_00002_.png").write_text("mine")
    paths = PictureSaver(tmp_path).save(Place(tmp_path, "a", 1), picture(3))
    assert [path.name for path in paths] == ["a_00001_.png", "a_00003_.png", "a_00004_.png"]
    assert (tmp_path / "a_00002_.png").read_text() == "mine"


@pytest.mark.parametrize("links", [True, False])
def test_prompts_at_the_same_time_never_share_a_name(tmp_path: Path, monkeypatch, links: bool):
    if not links:

        def link(*_: object) -> None:
            raise PermissionError(1, "no links here")

        monkeypatch.setattr(saving.os, "link", link)
    savers = [PictureSaver(tmp_path) for _ in range(4)]  # as four processes
    found: list[list[Path]] = []
    threads = [
        threading.Thread(target=lambda s=s, n=n: found.append(s.save(Place(tmp_path, "a", 1), picture(n + 1))))
        for n, s in enumerate(savers)
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(saver.wait(60) for saver in savers)
    paths = [path for some in found for path in some]
    assert len(paths) == len(set(paths)) == 3 * (1 + 2 + 3 + 4)
    assert names(tmp_path) == sorted(path.name for path in paths)
    for some in found:
        for path, entry in zip(some, picture(len(some)), strict=True):
            assert path.read_bytes() == as_the_host_saves(entry, {})


def test_whoever_reads_finds_a_whole_picture(tmp_path: Path):
    pixels = picture(1, 3, 300, 400)
    values = np.clip(255.0 * pixels[0].movedim(0, -1).numpy(), 0, 255).astype(np.uint8).tobytes()
    saver = PictureSaver(tmp_path)
    sizes = set()
    for number in range(1, 9):
        (path,) = saver.save(Place(tmp_path, "a", number), pixels)
        while True:
            left = saver.pending
            with Image.open(path) as image:
                assert image.tobytes() == values
            sizes.add(path.stat().st_size)
            if not left:
                break
    assert len(sizes) == 2, "uncompressed, then compressed"


def test_saving_does_not_wait_for_compressing(tmp_path: Path):
    pixels = picture(1, 3, 1024, 1024)
    saver = PictureSaver(tmp_path)
    saver.save(Place(tmp_path, "a", 1), pixels[..., :8, :8])
    saver.wait()
    shares = []
    for number in range(2, 7):  # by turns, and the median counts: one measurement meets whatever else the machine does
        before = time.thread_time()
        (path,) = saver.save(Place(tmp_path, "a", number), pixels)
        spent = time.thread_time() - before  # of this thread's own: others may keep the cores busy
        assert saver.pending and path.stat().st_size > pixels.numel()
        saver.wait()
        before = time.thread_time()
        as_the_host_saves(pixels[0], {})
        shares.append(spent / (time.thread_time() - before))
    assert statistics.median(shares) < 0.2


def test_no_more_than_so_much_waits(tmp_path: Path):
    pixels = picture(6, 3, 256, 256)
    saver = PictureSaver(tmp_path, most_pending=2 * 256 * (1 + 3 * 256))
    most, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.is_set():
            most[0] = max(most[0], saver.pending)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    saver.save(Place(tmp_path, "a", 1), pixels)
    saver.save(Place(tmp_path, "large", 1), picture(1, 3, 1024, 512))  # more than all that may wait: alone, then
    saver.wait()
    ended.set()
    watcher.join()
    assert 0 < most[0] <= 1024 * (1 + 3 * 512)
    assert len(names(tmp_path)) == 7


def test_an_interpreter_that_ends_compresses_first(tmp_path: Path):
    done = _run(
        tmp_path,
        """
        import threading
        saver, pictures = PictureSaver(root), torch.linspace(0, 1, 512).expand(3, 3, 512, 512)
        # As the host does, whose prompts run in a daemon: what it starts would be one too.
        prompt = threading.Thread(target=lambda: saver.save(Place(root, "a", 1), pictures), daemon=True)
        prompt.start()
        prompt.join()
        assert saver.pending
        """,
    )
    assert done.returncode == 0, done.stderr
    assert names(tmp_path) == [f"a_0000{number}_.png" for number in (1, 2, 3)]
    uncompressed = 512 * (1 + 3 * 512)
    assert all((tmp_path / name).stat().st_size < uncompressed for name in names(tmp_path))


def test_a_killed_process_loses_nothing(tmp_path: Path):
    done = _run(
        tmp_path,
        """
        import os, signal
        saver = PictureSaver(root)
        saver.save(Place(root, "a", 1), torch.rand(5, 3, 512, 512))
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    assert done.returncode == -signal.SIGKILL
    pictures = [name for name in names(tmp_path) if name.endswith(".png")]
    assert len(pictures) == 5
    for name in pictures:
        with Image.open(tmp_path / name) as image:
            assert image.size == (512, 512)
            image.load()


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    old, young = tmp_path / "sub" / ".duet-0a.partial", tmp_path / ".duet-0b.partial"
    others = [tmp_path / ".duet-notes", tmp_path / "sub" / "mine.partial"]
    for path in (old, young, *others):
        path.write_bytes(b"half")
    for path in (old, *others):
        os.utime(path, (time.time() - 3600, time.time() - 3600))
    saver = PictureSaver(tmp_path)
    saver.save(Place(tmp_path, "a", 1), picture())
    saver.wait()
    assert not old.exists() and young.exists() and all(path.exists() for path in others)
    os.utime(young, (time.time() - 3600, time.time() - 3600))
    sweep(tmp_path)
    assert not young.exists()


@pytest.mark.parametrize("change", ["deleted", "folder deleted", "replaced", "moved"])
def test_what_was_changed_meanwhile_is_left_alone(tmp_path: Path, monkeypatch, change: str):
    folder, go = tmp_path / "sub", threading.Event()
    monkeypatch.setattr(saving, "sweep", lambda _: go.wait(30))  # holds the worker before its first file
    saver = PictureSaver(tmp_path)
    (path,) = saver.save(Place(folder, "a", 1), picture())
    if change == "deleted":
        path.unlink()
    elif change == "folder deleted":
        path.unlink()
        folder.rmdir()
    elif change == "replaced":
        path.write_bytes(b"mine")
    else:
        path.rename(tmp_path / "b.png")
    go.set()
    assert saver.wait(30)
    assert not folder.exists() or names(folder) == (["a_00001_.png"] if change == "replaced" else [])
    if change == "replaced":
        assert path.read_bytes() == b"mine"
    if change == "moved":
        with Image.open(tmp_path / "b.png") as image:
            assert image.size == (53, 37)


def test_a_folder_that_is_gone_is_made_again(tmp_path: Path):
    (path,) = PictureSaver(tmp_path).save(Place(tmp_path / "a" / "b", "c", 1), picture())
    assert path.is_file()


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path):
    """A limit on the size of files is what a disk without room is to a process."""
    done = _run(
        tmp_path,
        """
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        saver = PictureSaver(root, compress_level=0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
        saver.save(Place(root, "small", 1), torch.rand(1, 3, 64, 64))
        try:
            saver.save(Place(root, "large", 1), torch.rand(2, 3, 512, 512))
        except OSError as error:
            print(error.strerror)
        """,
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.startswith("picture 1 of 2 (786,944 bytes) could not be saved in") and str(tmp_path) in done.stdout
    )
    assert names(tmp_path) == ["small_00001_.png"]


def test_a_compression_that_fails_leaves_the_picture_and_goes_on(tmp_path: Path, monkeypatch, caplog):
    real, calls = saving.compressed_png, []

    def fails_once(*arguments: object) -> bytes:
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        return real(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(saving, "compressed_png", fails_once)
    saver = PictureSaver(tmp_path)
    first, second = saver.save(Place(tmp_path, "a", 1), picture(2, 3, 100, 100))
    assert saver.wait(30)
    assert first.stat().st_size > 30_000 and second.read_bytes() == as_the_host_saves(picture(2, 3, 100, 100)[1], {})
    assert "could not compress" in caplog.text and "it stays as it is" in caplog.text
    Image.open(first).verify()
    assert len(names(tmp_path)) == 2


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs to give up the right to write anywhere")
def test_a_folder_that_may_not_be_written_to_is_named(tmp_path: Path):
    folder = tmp_path / "kept"
    folder.mkdir(mode=0o555)
    saver = PictureSaver(tmp_path)
    try:
        os.seteuid(65534)
        with pytest.raises(PermissionError, match=r"picture 1 of 1 .* could not be saved in .*: Permission denied"):
            saver.save(Place(folder, "a", 1), picture())
    finally:
        os.seteuid(0)
    assert names(folder) == [] and not saver.pending


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_picture_of_no_numbers_is_refused_before_anything_is_written(tmp_path: Path, value: float, batch: int):
    pixels = picture(batch)
    pixels[-1, 1, 36, 52] = value
    with pytest.raises(ValueError, match="expected finite pixel values"):
        PictureSaver(tmp_path).save(Place(tmp_path, "a", 1), pixels)
    assert names(tmp_path) == []


@pytest.mark.parametrize("shape", [(1, 2, 8, 8), (1, 5, 8, 8), (3, 8, 8), (0, 3, 8, 8), (1, 3, 0, 8)])
def test_a_shape_that_is_no_picture_is_refused(tmp_path: Path, shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="expected pictures of shape"):
        PictureSaver(tmp_path).save(Place(tmp_path, "a", 1), torch.zeros(shape))
    with pytest.raises(ValueError, match="at most 500,000,000 pixels"):
        PictureSaver(tmp_path).save(Place(tmp_path, "a", 1), torch.zeros(1, 3, 1, 1).expand(1, 3, 30_000, 30_000))
    with pytest.raises(ValueError, match="expected alpha of shape"):
        PictureSaver(tmp_path).save(Place(tmp_path, "a", 1), picture(2), torch.ones(3, 1, 37, 53))


def _run(root: Path, code: str) -> subprocess.CompletedProcess[str]:
    head = "import torch\nfrom pathlib import Path\nfrom pipeline.saving import PictureSaver, Place\n"
    head += f"root = Path({str(root)!r})\n"
    return subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
