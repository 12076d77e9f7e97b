"""Large buffers of the CPU lie in memory of this process alone, which goes back when they do."""

from __future__ import annotations

import mmap
import sys

import numpy as np
import pytest
from tinygrad import Device, Tensor

from tinygpt.runtime import buffers, cpu_memory, device

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or Device.DEFAULT != "CPU", reason="a CPU under Linux"
)


@pytest.mark.parametrize("count", [cpu_memory._LEAST_BYTES // 4 - 1, cpu_memory._LEAST_BYTES // 4])
def test_a_buffer_holds_what_is_written_whatever_memory_it_has(count):
    device.select()
    values = np.arange(count, dtype=np.float32)
    made = buffers.tensor(values)
    assert np.array_equal(made.numpy(), values)
    assert np.array_equal((made + 1).numpy(), values + 1)


def test_memory_that_is_not_there_is_told_in_a_way_that_has_tinygrad_give_back_what_it_keeps():
    device.select()
    with pytest.raises(MemoryError, match=r"Allocation of .* failed on CPU"):
        Device["CPU"].allocator.alloc(1_048_576_000 << 20)


def test_a_large_buffers_memory_is_private_and_goes_back_with_it():
    def private_kb() -> int:
        with open("/proc/self/smaps_rollup", encoding="utf-8") as file:
            return next(int(x.split()[1]) for x in file if x.startswith("Anonymous:"))

    device.select()
    before = private_kb()
    made: Tensor | None = buffers.tensor(np.ones(16 << 20, np.float32))
    memory = made.uop.buffer._buf.meta
    assert isinstance(memory, mmap.mmap)
    assert private_kb() - before > 60_000
    del memory
    made = None
    assert private_kb() - before < 30_000


def test_a_buffer_that_is_dropped_waits_for_no_kernel_and_none_loses_its_memory(monkeypatch):
    """Where garbage is collected in the thread that runs kernels, it would wait for itself."""
    device.select()
    waits: list[int] = []
    synchronize = Device["CPU"].synchronize
    monkeypatch.setattr(Device["CPU"], "synchronize", lambda *a, **k: waits.append(1))
    product = None
    for _ in range(8):
        made = buffers.tensor(np.ones(1 << 18, np.float32)).reshape(512, 512)
        product = (made @ made).realize()
        waits.clear()
        del made
        assert not waits
    monkeypatch.setattr(Device["CPU"], "synchronize", synchronize)
    assert product is not None
    assert (product.numpy() == 512).all()
