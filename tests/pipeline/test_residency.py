import logging

import pytest
import torch
from torch import nn

from pipeline.residency import OutOfDeviceMemory, TorchResidency, module_bytes
from tests.pipeline.devices import FakeDevice

KB = 1024


def layer(kilobytes: int) -> nn.Linear:
    return nn.Linear(16, kilobytes * 16, bias=False)


def test_tied_weights_count_once():
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8))
    apart = module_bytes(model)
    model[1].weight = model[0].weight
    assert apart - module_bytes(model) == 8 * 4 * 4
    assert apart == 2 * 8 * 4 * 4 + 4 * 8 * 4 + 8  # two matrices, scale and shift and two running means, one counter


def test_a_cpu_copies_nothing():
    residency = TorchResidency("cpu", budget_bytes=1)
    model = layer(4)
    place = model.weight.data_ptr()
    resident = residency.adopt(model, "model")
    assert resident.on_device
    residency.acquire(resident)
    assert model.weight.data_ptr() == place
    residency.release(resident)
    residency.forget(resident)
    assert model.weight.data_ptr() == place


def test_moves_the_least_recently_used_off_first(caplog: pytest.LogCaptureFixture):
    residency = FakeDevice(budget_bytes=8 * KB)
    a, b, c = (residency.adopt(layer(4), name) for name in "abc")
    with caplog.at_level(logging.INFO):
        for resident in (a, b, a, c):
            residency.acquire(resident)
            residency.release(resident)
    assert [resident.on_device for resident in (a, b, c)] == [True, False, True]
    assert "moved b (4096 bytes) off" in caplog.text
    assert "over budget" in caplog.text


def test_never_moves_a_pinned_module_even_over_budget():
    residency = FakeDevice(budget_bytes=4 * KB)
    a, b = (residency.adopt(layer(4), name) for name in "ab")
    residency.acquire(a)
    residency.acquire(b)
    assert a.on_device and b.on_device
    residency.release(a)
    residency.acquire(residency.adopt(layer(4), "c"))
    assert not a.on_device and b.on_device


def test_a_module_already_there_is_not_moved_again():
    residency = FakeDevice()
    resident = residency.adopt(layer(4), "model")
    for _ in range(3):
        residency.acquire(resident)
        residency.release(resident)
    assert len(residency.moves) == 1


def test_out_of_memory_evicts_the_others_and_tries_once_more():
    residency = FakeDevice(capacity=10 * KB)
    a, b, c = (residency.adopt(layer(4), name) for name in "abc")
    for resident in (a, b):
        residency.acquire(resident)
        residency.release(resident)
    residency.acquire(c)
    assert [resident.on_device for resident in (a, b, c)] == [False, False, True]
    assert residency.used == 4 * KB


def test_all_that_is_not_pinned_makes_room():
    residency = FakeDevice()
    a, b = (residency.adopt(layer(4), name) for name in "ab")
    residency.acquire(a)
    residency.acquire(b)
    residency.release(b)
    assert residency.make_room() == b.bytes
    assert a.on_device and not b.on_device
    assert residency.make_room() == 0


def test_out_of_memory_twice_is_an_error_with_sizes_and_leaves_nothing_there():
    residency = FakeDevice(capacity=3 * 2**20)
    a, b, large = (residency.adopt(layer(size), name) for size, name in ((1024, "a"), (1024, "b"), (2560, "unet")))
    residency.acquire(a)
    residency.acquire(b)
    residency.release(b)
    with pytest.raises(OutOfDeviceMemory) as raised:
        residency.acquire(large)
    for part in ("unet needs 2.5 MB", "1.0 MB of other models made way", "1.0 MB are in use and stay"):
        assert part in str(raised.value)
    assert isinstance(raised.value, torch.OutOfMemoryError)  # the host treats these in its own way
    assert [resident.on_device for resident in (a, b, large)] == [True, False, False]
    assert residency.used == 2**20
    assert large.pins == 0
    residency.release(a)
    residency.acquire(large)
    assert large.on_device and not a.on_device


def test_an_interrupt_while_loading_leaves_nothing_there():
    residency = FakeDevice()
    resident = residency.adopt(layer(4), "model")
    residency.interrupt_next_move = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        residency.acquire(resident)
    assert (resident.on_device, resident.pins, residency.used) == (False, 0, 0)


def test_weights_moved_in_inference_mode_can_still_be_refined():
    residency = TorchResidency("meta")
    resident = residency.adopt(layer(4), "model")
    with torch.inference_mode():
        residency.acquire(resident)
    weight = next(resident.module.parameters())
    assert weight.device.type == "meta"
    assert not weight.is_inference()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_filled_and_freed():
    residency = TorchResidency("cuda", budget_bytes=8 * KB)
    a, b, c = (residency.adopt(layer(4), name) for name in "abc")
    for resident in (a, b, c):
        residency.acquire(resident)
        assert next(resident.module.parameters()).is_cuda
        residency.release(resident)
    assert not next(a.module.parameters()).is_cuda
