import logging
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.model_cache import ModelCache, ModelKey
from pipeline.residency import OutOfDeviceMemory, TorchResidency
from tests.pipeline.devices import FakeDevice

KB = 1024


def key(name: str, size: int = 4 * KB, **changes: object) -> ModelKey:
    return replace(ModelKey(Path("/models") / name, size, 1, "unet", torch.float32), **changes)


class Builder:
    """Counts its calls, and what is left of what it made. Each module weighs ``kilobytes``."""

    def __init__(self, kilobytes: int = 4) -> None:
        self.kilobytes = kilobytes
        self.built = 0
        self.alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def __call__(self) -> nn.Linear:
        self.built += 1
        module = nn.Linear(16, self.kilobytes * 16, bias=False)
        self.alive.add(module)
        return module


@pytest.fixture
def build() -> Builder:
    return Builder()


@pytest.fixture
def cache() -> ModelCache:
    return ModelCache(TorchResidency("cpu"), budget_bytes=8 * KB)


def names(cache: ModelCache) -> list[str]:
    return [entry.key.path.name for entry in cache.stats().entries]


def use(cache: ModelCache, *keys: ModelKey, build: Builder) -> None:
    for each in keys:
        with cache.use(each, build):
            pass


def test_one_key_is_one_module(cache: ModelCache, build: Builder):
    with cache.use(key("a"), build) as first, cache.use(key("a"), build) as second:
        assert first is second
        assert cache.stats().entries[0].pins == 2
    stats = cache.stats()
    assert (build.built, stats.hits, stats.misses, stats.evictions) == (1, 1, 1, 0)
    assert (stats.entries[0].pins, stats.entries[0].hits, stats.entries[0].on_device) == (0, 1, True)
    assert stats.bytes_held == stats.entries[0].bytes == 4 * KB


def test_a_dtype_or_a_component_of_its_own_is_a_model_of_its_own(build: Builder):
    cache = ModelCache(TorchResidency("cpu"), budget_bytes=100 * KB)
    use(cache, key("a"), key("a", dtype=torch.float16), key("a", component="vae"), build=build)
    assert len(cache.stats().entries) == 3


def test_drops_the_least_recently_used_and_says_so(cache: ModelCache, build: Builder, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        use(cache, key("a"), key("b"), key("a"), key("c"), build=build)
    assert names(cache) == ["a", "c"]
    assert cache.stats().evictions == 1
    assert "dropped unet of /models/b as float32 (4096 bytes): over the budget of 8192 bytes" in caplog.text


def test_makes_room_before_it_builds(cache: ModelCache, build: Builder):
    use(cache, key("a"), key("b"), build=build)
    held_while_building = []

    def build_c() -> nn.Module:
        held_while_building.append(cache.stats().bytes_held)
        return build()

    with cache.use(key("c"), build_c):
        pass
    assert held_while_building == [4 * KB]


def test_never_drops_what_is_in_use(cache: ModelCache, build: Builder):
    with cache.use(key("a"), build), cache.use(key("b"), build), cache.use(key("c"), build):
        assert len(names(cache)) == 3
        assert cache.unload() == 0
    assert len(names(cache)) == 2, "and the budget holds again once nothing is"


def test_ten_models_in_turn_stay_within_the_budget(cache: ModelCache, build: Builder):
    for _ in range(5):
        for number in range(10):
            use(cache, key(str(number)), build=build)
            assert cache.stats().bytes_held <= 8 * KB


def test_going_back_and_forth_builds_nothing_again(cache: ModelCache, build: Builder):
    use(cache, key("a"), key("b"), key("a"), key("b"), key("a"), build=build)
    assert build.built == 2


def test_unload_leaves_nothing_alive(cache: ModelCache, build: Builder):
    use(cache, key("a"), key("b"), build=build)
    assert cache.unload() == 8 * KB
    assert (names(cache), cache.stats().bytes_held, len(build.alive)) == ([], 0, 0)


@pytest.mark.parametrize(
    "error", [ValueError("no"), KeyboardInterrupt(), SystemExit()], ids=lambda error: type(error).__name__
)
def test_a_build_that_fails_or_is_cancelled_leaves_nothing_behind(
    cache: ModelCache, build: Builder, error: BaseException
):
    def fail() -> nn.Module:
        raise error

    with pytest.raises(type(error)), cache.use(key("a"), fail):
        pass
    assert names(cache) == []
    with cache.use(key("a"), build):
        assert names(cache) == ["a"]


def test_an_exception_in_the_block_unpins(cache: ModelCache, build: Builder):
    with pytest.raises(KeyboardInterrupt), cache.use(key("a"), build):
        raise KeyboardInterrupt
    assert [entry.pins for entry in cache.stats().entries] == [0]
    assert cache.unload() == 4 * KB


def test_threads_that_ask_at_once_build_once(cache: ModelCache):
    build, everyone = Builder(), threading.Barrier(8)

    def slowly() -> nn.Module:
        time.sleep(0.05)
        return build()

    def ask(_: int) -> int:
        everyone.wait(timeout=10)
        with cache.use(key("a"), slowly) as model:
            return id(model)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ask, range(8)))) == 1
    assert build.built == 1
    assert (cache.stats().hits, cache.stats().misses) == (7, 1)
    assert cache.stats().entries[0].pins == 0


def test_a_waiting_thread_builds_when_the_first_one_fails(cache: ModelCache, build: Builder):
    started, go_on = threading.Event(), threading.Event()

    def fail() -> nn.Module:
        started.set()
        go_on.wait(timeout=10)
        raise OSError("the disk")

    def first() -> None:
        with pytest.raises(OSError), cache.use(key("a"), fail):
            pass

    with ThreadPoolExecutor(2) as pool:
        failing = pool.submit(first)
        assert started.wait(timeout=10)
        waiting = pool.submit(use, cache, key("a"), build=build)
        go_on.set()
        failing.result(timeout=10)
        waiting.result(timeout=10)
    assert names(cache) == ["a"]


def test_stats_answer_while_a_model_is_built(cache: ModelCache, build: Builder):
    def build_and_look() -> nn.Module:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(cache.stats).result(timeout=10).entries == ()
        return build()

    with cache.use(key("a"), build_and_look):
        pass


def test_many_threads_on_few_models_keep_every_promise():
    device = FakeDevice(budget_bytes=8 * KB)
    cache = ModelCache(device, budget_bytes=12 * KB)

    def work(seed: int) -> None:
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed)) % 5
        for number in order.tolist():
            with cache.use(key(str(number)), Builder()):
                held = {entry.key.path.name: entry for entry in cache.stats().entries}
                assert held[str(number)].pins >= 1 and held[str(number)].on_device

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    stats = cache.stats()
    assert stats.bytes_held <= 12 * KB
    assert [entry.pins for entry in stats.entries] == [0] * len(stats.entries)
    assert stats.hits + stats.misses == 6 * 40
    cache.unload()
    assert device.used == 0


def test_a_file_replaced_on_disk_is_another_model_and_the_old_one_goes(
    cache: ModelCache, build: Builder, caplog: pytest.LogCaptureFixture
):
    old, new = key("a"), key("a", mtime_ns=2)
    use(cache, old, key("b"), build=build)
    with caplog.at_level(logging.INFO), cache.use(new, build):
        assert [entry.key for entry in cache.stats().entries] == [key("b"), new]
    assert "its file was replaced" in caplog.text


def test_a_replaced_model_that_is_in_use_goes_when_it_is_done(cache: ModelCache, build: Builder):
    old, new = key("a"), key("a", size=5 * KB)
    with cache.use(old, build) as before:
        with cache.use(new, build) as after:
            assert before is not after
        assert len(cache.stats().entries) == 2
    assert [entry.key for entry in cache.stats().entries] == [new]


def test_no_device_memory_leaves_the_model_unpinned_and_the_next_small_one_fits():
    device = FakeDevice(capacity=6 * KB)
    cache = ModelCache(device, budget_bytes=100 * KB)
    use(cache, key("small"), build=Builder(4))
    with pytest.raises(OutOfDeviceMemory, match="unet of /models/large"), cache.use(key("large"), Builder(8)):
        pass
    assert {entry.key.path.name: (entry.pins, entry.on_device) for entry in cache.stats().entries} == {
        "small": (0, False),
        "large": (0, False),
    }
    with cache.use(key("small"), Builder(4)):
        assert device.used == 4 * KB


def test_no_memory_to_build_drops_the_others_and_tries_once_more(cache: ModelCache, build: Builder):
    def build_when_alone() -> nn.Module:
        return build() if len(build.alive) == 1 else build_too_large()

    def build_too_large() -> nn.Module:
        return nn.Linear(2**30, 2**30)

    with cache.use(key("in use"), build):
        use(cache, key("idle"), build=build)
        with cache.use(key("a"), build_when_alone):
            assert names(cache) == ["in use", "a"]
        with pytest.raises(OutOfDeviceMemory) as raised, cache.use(key("b", size=2**20), build_too_large):
            pass
        assert "unet of /models/b as float32 needs 1.0 MB on cpu" in str(raised.value)
        assert names(cache) == ["in use"]


def test_fifty_uses_leave_memory_level(cache: ModelCache, build: Builder):
    for number in range(50):
        use(cache, key(str(number % 3)), build=build)
    assert len(build.alive) == len(cache.stats().entries) == 2
