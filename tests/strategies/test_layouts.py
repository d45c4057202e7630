"""Layouts and the plain allocator."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from kernelfuzz.strategies.layouts import CONTIGUOUS, Layout, layouts, plain_allocator


def test_minimal(minimal):
    assert minimal(layouts()) == CONTIGUOUS
    assert minimal(layouts(), lambda layout: layout != CONTIGUOUS).extent((2, 2)) > 0
    assert minimal(layouts(), lambda layout: layout.step > 1 and layout.offset > 1) == Layout(2, 0, 2)


@given(layouts(max_offset=1, max_row_gap=0, max_step=1))
def test_narrowed(layout):
    assert layout in (Layout(), Layout(offset=1))


@given(layouts(), st.lists(st.integers(0, 5), max_size=4).map(tuple))
def test_an_allocated_tensor_has_the_layout_and_is_poison(layout, shape):
    for dtype in (torch.float16, torch.int32):
        tensor = plain_allocator("cpu")("x", shape, dtype, layout)
        assert tensor.shape == shape
        assert tensor.dtype == dtype
        assert tensor.storage_offset() == layout.offset
        storage = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
        assert bool(storage.isnan().all() if dtype.is_floating_point else (storage < -(10**9)).all())


@given(layouts(), st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple))
def test_strides(layout, shape):
    tensor = plain_allocator("cpu")("x", shape, torch.float32, layout)
    assert tensor.stride(-1) == layout.step
    if len(shape) > 1:
        assert tensor.stride(-2) == shape[-1] * layout.step + layout.row_gap
    for i in range(len(shape) - 2):
        assert tensor.stride(i) == shape[i + 1] * tensor.stride(i + 1)
    # No two elements share memory.
    tensor.copy_(torch.arange(tensor.numel()).view(shape))
    assert tensor.flatten().tolist() == list(range(tensor.numel()))
