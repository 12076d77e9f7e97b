"""Values go into the memory of one device or several, and come back as they were."""

from __future__ import annotations

import numpy as np
import pytest
from tinygrad import Device

from tinygpt.runtime import buffers

VALUES = np.arange(48, dtype=np.float32).reshape(4, 6, 2)
SEVERAL = tuple(Device.canonicalize(f"{Device.DEFAULT}:{i}") for i in range(2))


@pytest.mark.parametrize("place", [None, SEVERAL[1], SEVERAL])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_what_is_written_is_read(place, axis):
    made = buffers.tensor(VALUES, place, axis)
    assert made.shape == VALUES.shape
    assert made.device == (place or Device.DEFAULT)
    np.testing.assert_array_equal(buffers.read(made), VALUES.reshape(-1))
    np.testing.assert_array_equal(made.numpy(), VALUES)
    buffers.write(made, VALUES + 1)
    np.testing.assert_array_equal(buffers.read(made), VALUES.reshape(-1) + 1)
    np.testing.assert_array_equal((made * 2).numpy(), VALUES * 2 + 2)


def test_each_of_several_devices_has_all_or_its_part():
    whole, part = buffers.tensor(VALUES, SEVERAL), buffers.tensor(VALUES, SEVERAL, 1)
    assert whole.uop.shard_shape == (4, 6, 2)
    assert part.uop.shard_shape == (4, 3, 2)
    held = [buffer.numpy() for buffer in part.uop.base.buffer.bufs]
    np.testing.assert_array_equal(held[1].reshape(4, 3, 2), VALUES[:, 3:])


def test_what_each_of_several_devices_has_goes_to_one():
    for axis in (None, 0):
        moved = buffers.moved(buffers.tensor(VALUES, SEVERAL, axis), SEVERAL[1])
        np.testing.assert_array_equal(moved.numpy(), VALUES)
        assert moved.device == SEVERAL[1]
