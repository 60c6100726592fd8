"""Whatever lets a model go says so, in bytes and with its reason; no thread ever sees a model that is half there."""

import logging
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.model_cache import ModelCache, ModelKey
from pipeline.residency import TorchResidency
from tests.pipeline.devices import FakeDevice

BYTES = 4096


def key(name: str, **changes: object) -> ModelKey:
    return replace(ModelKey(Path("/models") / name, BYTES, 1, "unet", torch.float32), **changes)


def layer() -> nn.Linear:
    return nn.Linear(16, 64, bias=False)


def use(cache: ModelCache, *keys: ModelKey) -> None:
    for each in keys:
        with cache.use(each, layer):
            pass


def too_large() -> nn.Module:
    return nn.Linear(2**30, 2**30)


def over_budget(cache: ModelCache) -> None:
    use(cache, key("a"), key("b"), key("c"))


def unloaded(cache: ModelCache) -> None:
    use(cache, key("a"))
    cache.unload()


def file_replaced(cache: ModelCache) -> None:
    use(cache, key("a"), key("a", mtime_ns=2))


def file_replaced_in_use(cache: ModelCache) -> None:
    with cache.use(key("a"), layer):
        use(cache, key("a", mtime_ns=2))


def out_of_memory(cache: ModelCache) -> None:
    use(cache, key("a"))
    with pytest.raises(torch.OutOfMemoryError), cache.use(key("large"), too_large):
        pass


WAYS = {
    over_budget: "over the budget of 8192 bytes",
    unloaded: "unload was asked for",
    file_replaced: "its file was replaced",
    file_replaced_in_use: "its file was replaced",
    out_of_memory: "out of memory",
}


@pytest.mark.parametrize(("way", "reason"), WAYS.items(), ids=lambda way: getattr(way, "__name__", ""))
def test_every_way_out_is_told(way: Callable[[ModelCache], None], reason: str, caplog: pytest.LogCaptureFixture):
    cache = ModelCache(TorchResidency("cpu"), budget_bytes=2 * BYTES)
    with caplog.at_level(logging.INFO):
        way(cache)
    assert f"dropped unet of /models/a as float32 ({BYTES} bytes): {reason}" in caplog.messages
    (gone,) = cache.stats().recent_evictions
    assert (gone.key, gone.bytes, gone.reason) == (key("a"), BYTES, reason)
    assert cache.stats().evictions == 1


@pytest.mark.parametrize("limit", ["budget", "capacity"])
def test_what_is_moved_off_a_device_is_told(limit: str, caplog: pytest.LogCaptureFixture):
    device = FakeDevice(budget_bytes=BYTES) if limit == "budget" else FakeDevice(capacity=BYTES)
    cache = ModelCache(device, budget_bytes=100 * BYTES)
    with caplog.at_level(logging.INFO):
        use(cache, key("a"), key("b"))
    reason = "over budget" if limit == "budget" else "out of memory"
    assert f"moved unet of /models/a as float32 ({BYTES} bytes) off xpu: {reason}" in caplog.messages
    assert (cache.stats().evictions, device.used) == (0, BYTES)


def test_only_the_latest_evictions_are_kept_but_all_are_counted():
    cache = ModelCache(TorchResidency("cpu"), budget_bytes=BYTES)
    use(cache, *(key(str(number)) for number in range(100)))
    stats = cache.stats()
    assert stats.evictions == 99 and len(stats.recent_evictions) < 50
    assert stats.recent_evictions[-1].key == key("98")


def test_how_long_each_has_been_idle_is_counted_in_uses():
    cache = ModelCache(TorchResidency("cpu"), budget_bytes=100 * BYTES)
    use(cache, key("a"), key("b"), key("a"), key("c"), key("c"))
    assert {entry.key.path.name: entry.idle for entry in cache.stats().entries} == {"a": 2, "b": 3, "c": 0}
    assert cache.stats().budget_bytes == 100 * BYTES


def test_no_thread_sees_a_model_that_is_half_read():
    cache = ModelCache(FakeDevice(budget_bytes=2 * BYTES), budget_bytes=2 * BYTES)

    def read_slowly(value: int) -> nn.Linear:
        module = layer()
        rows = module.weight.data
        rows.fill_(-1)
        for row in rows:
            row.fill_(value)
            if value % 2:
                time.sleep(0.0002)
        return module

    def work(seed: int) -> None:
        for number in (torch.randperm(30, generator=torch.Generator().manual_seed(seed)) % 4).tolist():
            with cache.use(key(str(number)), lambda number=number: read_slowly(number)) as module:
                assert module.weight.eq(number).all()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert cache.stats().evictions > 0, "they were to push each other out"


def test_a_file_replaced_between_two_prompts_at_once_keeps_them_apart():
    cache = ModelCache(TorchResidency("cpu"), budget_bytes=100 * BYTES)
    both = threading.Barrier(2, timeout=10)

    def prompt(mtime_ns: int) -> bool:
        def build() -> nn.Linear:
            both.wait()
            module = layer()
            nn.init.constant_(module.weight, mtime_ns)
            return module

        with cache.use(key("a", mtime_ns=mtime_ns), build) as module:
            both.wait()
            return bool(module.weight.eq(mtime_ns).all())

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(prompt, (1, 2))) == [True, True]
    use(cache, key("a", mtime_ns=2))
    assert [entry.key.mtime_ns for entry in cache.stats().entries][-1] == 2


def test_log_lines_say_bytes_as_numbers(caplog: pytest.LogCaptureFixture):
    cache = ModelCache(FakeDevice(budget_bytes=BYTES), budget_bytes=2 * BYTES)
    with caplog.at_level(logging.INFO):
        use(cache, *(key(name) for name in "abcabc"))
        cache.unload()
    told = [line for line in caplog.messages if line.startswith(("dropped", "moved"))]
    assert told and [line for line in told if not re.search(r"\(\d+ bytes\).*: \w", line)] == []
