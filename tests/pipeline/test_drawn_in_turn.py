"""Several runs in one job: each is decoded while the next is denoised, and is what it would be alone."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import drawing as drawings
from pipeline import grid as grids
from pipeline.checkpoints import Checkpoint, open_checkpoint
from pipeline.conditioning import FusedConditioning, Pictures
from pipeline.fusion import fuse
from pipeline.generation import OnStep, drawn_in_turn, generate, planned
from pipeline.grid import draw_variants
from pipeline.model_cache import ModelCache
from pipeline.text_encoder import encode_prompt

from .family_folders import save_family
from .folders import save_stable_diffusion

SMALL: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 2}
SEEDS = (3, 4, 5)
Cue = tuple[ModelCache, Checkpoint, FusedConditioning]


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(save_stable_diffusion(tmp_path_factory.mktemp("sd") / "tiny-sd"))


@pytest.fixture(params=["built in", "Stable Diffusion"])
def cue(request, warm: ModelCache, shipped: Checkpoint, stable_diffusion: Checkpoint) -> Cue:
    model = shipped if request.param == "built in" else stable_diffusion
    return warm, model, fuse(warm, model, encode_prompt(warm, model, "a red rose"), None)


def in_turn(cue: Cue, *, on_step: OnStep | None = None) -> Iterator[Pictures]:
    return drawn_in_turn((planned(*cue, seed=seed, on_step=on_step, **SMALL) for seed in SEEDS), beside=True)


def alone(cue: Cue) -> list[Pictures]:
    return [generate(*cue, seed=seed, **SMALL) for seed in SEEDS]


def nothing_is_pinned(cache: ModelCache) -> bool:
    return all(entry.pins == 0 for entry in cache.stats().entries)


def test_each_is_what_it_is_alone_bit_for_bit(cue: Cue):
    generate(*cue, seed=0, **SMALL)  # the models are read
    for one, other in zip(in_turn(cue), alone(cue), strict=True):
        assert torch.equal(one.pixels, other.pixels) and torch.equal(one.alpha, other.alpha)
        assert one.latents is not None and other.latents is not None and torch.equal(one.latents, other.latents)
        assert one.notices == other.notices
        assert one.report.steps_computed == other.report.steps_computed >= 2
        assert (one.report.cache_hits, one.report.cache_misses) == (other.report.cache_hits, 0)
        assert list(one.milliseconds) == ["generation", "decode"]
    assert nothing_is_pinned(cue[0])


def test_the_next_is_denoised_meanwhile(cue: Cue, monkeypatch: pytest.MonkeyPatch):
    steps, walked, decoded = threading.Semaphore(0), [], []
    real = drawings.decode_or_tile

    def decode(*arguments: Any) -> Any:
        if len(decoded) < len(SEEDS) - 1:  # the last one has nothing beside it
            for _ in range(2):
                assert steps.acquire(timeout=60), "nothing was denoised while this was decoded"
        decoded.append(True)
        return real(*arguments)

    def on_step(step: int, total: int, preview: Any) -> None:
        walked.append(threading.current_thread())
        if len(walked) > 2:
            steps.release()

    monkeypatch.setattr(drawings, "decode_or_tile", decode)
    assert len(list(in_turn(cue, on_step=on_step))) == len(SEEDS)
    assert set(walked) == {threading.current_thread()}, "progress is told on the caller's own thread"


def test_models_are_brought_on_the_callers_own_thread(cue: Cue, monkeypatch: pytest.MonkeyPatch):
    """Hosts keep lists of their models that one thread may touch."""
    threads = set()
    for name in ("acquire", "release"):
        real = getattr(cue[0].residency, name)

        def seen(resident: Any, _real: Any = real) -> None:
            threads.add(threading.current_thread())
            _real(resident)

        monkeypatch.setattr(cue[0].residency, name, seen)
    list(in_turn(cue))
    assert threads == {threading.current_thread()}


def test_a_decoder_that_keeps_notes_on_itself_is_not_shared(
    warm: ModelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One of films does, and previews of the next run ask the same module."""
    model = open_checkpoint(save_family("qwen_image", tmp_path / "qwen"))
    cue = warm, model, fuse(warm, model, encode_prompt(warm, model, "a red rose"), None)
    real, seen = drawings.decode_or_tile, []

    def decode(decoder: Any, *arguments: Any) -> Any:
        seen.append(decoder)
        return real(decoder, *arguments)

    monkeypatch.setattr(drawings, "decode_or_tile", decode)
    drawn = list(in_turn(cue))
    monkeypatch.undo()
    with model.use(warm, "vae") as vae:
        assert len(seen) == len(SEEDS) and not any(decoder is vae for decoder in seen[:-1])
    assert all(torch.equal(one.pixels, other.pixels) for one, other in zip(drawn, alone(cue), strict=True))


def test_who_interrupts_waits_for_the_decoder_and_leaves_nothing_pinned(cue: Cue):
    class Stopped(Exception):
        pass

    calls = []

    def on_step(step: int, total: int, preview: Any) -> None:
        calls.append(step)
        if len(calls) == 3:  # the second one's first
            raise Stopped

    with pytest.raises(Stopped):
        list(in_turn(cue, on_step=on_step))
    assert nothing_is_pinned(cue[0])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("duet-decode")]


def test_who_wants_no_more_leaves_nothing_pinned(cue: Cue):
    pictures = in_turn(cue)
    next(pictures)
    pictures.close()  # type: ignore[attr-defined]
    assert nothing_is_pinned(cue[0])


def test_a_decoder_that_ran_out_of_memory_beside_decodes_alone(cue: Cue, monkeypatch: pytest.MonkeyPatch):
    real, failed = drawings.decode_or_tile, []

    def decode(*arguments: Any) -> Any:
        if threading.current_thread().name.startswith("duet-decode") and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(*arguments)

    monkeypatch.setattr(drawings, "decode_or_tile", decode)
    drawn = list(in_turn(cue))
    monkeypatch.undo()
    assert failed
    assert all(torch.equal(one.pixels, other.pixels) for one, other in zip(drawn, alone(cue), strict=True))
    assert nothing_is_pinned(cue[0])


def test_a_denoiser_that_ran_out_of_memory_beside_waits_for_the_decoder(cue: Cue, monkeypatch: pytest.MonkeyPatch):
    real, calls = drawings._denoised, []

    def denoise(*arguments: Any) -> Any:
        calls.append(True)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(*arguments)

    monkeypatch.setattr(drawings, "_denoised", denoise)
    drawn = list(in_turn(cue))
    monkeypatch.undo()
    assert len(calls) == 1 + len(SEEDS)
    for one, other in zip(drawn, alone(cue), strict=True):
        assert torch.equal(one.pixels, other.pixels)
        assert one.report.steps_computed == other.report.steps_computed


def test_one_that_runs_out_of_memory_alone_says_so(cue: Cue, monkeypatch: pytest.MonkeyPatch):
    def denoise(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(drawings, "_denoised", denoise)
    with pytest.raises(torch.OutOfMemoryError, match=r"1 of [0-9x]+ did not fit .* or batch \(CUDA out of"):
        list(in_turn(cue))
    assert nothing_is_pinned(cue[0])


def test_a_decoder_that_fails_beside_is_told_as_if_it_were_not(cue: Cue, monkeypatch: pytest.MonkeyPatch):
    def no_numbers(*arguments: Any) -> Any:
        return torch.full((1, 3, 64, 64), torch.nan), torch.ones(1, 1, 64, 64), False

    monkeypatch.setattr(drawings, "decode_or_tile", no_numbers)
    with pytest.raises(FloatingPointError, match="decoding gave values that are no numbers"):
        list(in_turn(cue))
    assert nothing_is_pinned(cue[0])


def test_variants_on_a_device_are_drawn_so(cue: Cue, monkeypatch: pytest.MonkeyPatch):
    generate(*cue, seed=0, **SMALL)  # the models are read
    expected = draw_variants(*cue, SEEDS, at_once=1, **SMALL)
    asked = []

    def beside(parts: Any, *, beside: bool) -> Iterator[Pictures]:
        asked.append(beside)
        return drawn_in_turn(parts, beside=True)

    monkeypatch.setattr(grids, "drawn_in_turn", beside)
    drawn = draw_variants(*cue, SEEDS, at_once=1, **SMALL)
    assert asked == [False], "on a CPU the two take the cores from each other"
    assert torch.equal(drawn.pixels, expected.pixels)
    assert drawn.report.cache_hits == expected.report.cache_hits


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_they_are_what_they_are_alone(stable_diffusion: Checkpoint, tmp_path: Path):
    from pipeline.residency import TorchResidency

    cache = ModelCache(TorchResidency(torch.device("cuda")), 2**32)
    cue = cache, stable_diffusion, fuse(cache, stable_diffusion, encode_prompt(cache, stable_diffusion, "a rose"), None)
    for one, other in zip(in_turn(cue), alone(cue), strict=True):
        assert torch.equal(one.pixels, other.pixels)
