"""The memory of restored histories: whose it is, and that it is used again."""

import gc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from krul import _core

MIB = 1 << 20


def address(memory):
    return np.frombuffer(memory, np.uint8).ctypes.data


def test_what_was_let_go_last_is_used_again():
    memory = _core.Memory(64 * MIB)
    first = address(memory)
    del memory
    memory = _core.Memory(50 * MIB)
    assert address(memory) == first
    beside = _core.Memory(50 * MIB)
    assert abs(address(beside) - first) >= 50 * MIB


def test_much_too_large_or_too_small_memory_is_left():
    memory = _core.Memory(64 * MIB)
    first = address(memory)
    del memory
    small, large = _core.Memory(8 * MIB), _core.Memory(80 * MIB)
    ends = (first, first + 64 * MIB)
    assert not ends[0] <= address(small) < ends[1]
    assert not ends[0] <= address(large) < ends[1]
    assert address(_core.Memory(64 * MIB)) == first


def test_a_tensor_keeps_it():
    tensor = torch.frombuffer(_core.Memory(4 * MIB), dtype=torch.uint8)
    view = tensor[MIB:].fill_(7)
    del tensor
    gc.collect()
    other = torch.frombuffer(_core.Memory(4 * MIB), dtype=torch.uint8).fill_(1)
    assert bool((view == 7).all())
    assert bool((other == 1).all())


@given(st.lists(st.integers(0, 3 * MIB), min_size=1, max_size=12), st.data())
def test_no_byte_belongs_to_two(sizes, data):
    held = []
    for number, n_bytes in enumerate(sizes):
        memory = np.frombuffer(_core.Memory(n_bytes), np.uint8)
        assert memory.size == n_bytes
        memory[:] = number
        held.append((number, memory))
        if data.draw(st.booleans()):
            held.pop(data.draw(st.integers(0, len(held) - 1)))
        for mine, other in held:
            assert (other == mine).all()


@pytest.mark.parametrize("n_bytes", [-1, (1 << 63) - 1])
def test_sizes_that_cannot_be(n_bytes):
    with pytest.raises(ValueError, match=f"n_bytes is {n_bytes} but must be from 0 to"):
        _core.Memory(n_bytes)


def test_more_than_there_is():
    with pytest.raises(MemoryError, match="no memory for"):
        _core.Memory(1 << 61)
