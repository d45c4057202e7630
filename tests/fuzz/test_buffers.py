"""Guarded buffers: what they hold before a launch, and what they notice after it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernelfuzz.fuzz.buffers import REDZONE, Buffers, StrayWrite, sentinel
from kernelfuzz.oracles.expectation import OutputSpec
from kernelfuzz.strategies.layouts import POISON_INTEGER, Layout, layouts

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DTYPES = (*FLOATS, torch.int32, torch.int64)
SHAPES = ((), (5,), (3, 4), (2, 3, 2), (0, 4), (3, 0))
GAPPED = Layout(offset=3, row_gap=2, step=2)


def storage_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of the memory that a tensor lies in, 1-D."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.as_strided((size,), (1,), 0)


def places_of(tensor: torch.Tensor) -> set[int]:
    """Return the indices in the storage of a tensor's elements."""
    storage = torch.arange(storage_of(tensor).numel())
    return set(storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).flatten().tolist())


def flip(storage: torch.Tensor, index: int) -> None:
    """Change one bit of one element."""
    storage.view(torch.uint8)[index * storage.element_size()] ^= 1


@given(layouts(), st.sampled_from(SHAPES), st.sampled_from(DTYPES))
def test_views_have_the_promised_layout(layout, shape, dtype):
    buffers = Buffers("cpu", 1)
    for tensor in (buffers.allocate("x", shape, dtype, layout), buffers.output("y", OutputSpec(shape, dtype, layout))):
        assert (tensor.shape, tensor.dtype, tensor.stride()) == (shape, dtype, layout.strides(shape))
        assert tensor.storage_offset() == REDZONE + layout.offset
        before, after = tensor.storage_offset(), storage_of(tensor).numel() - max(places_of(tensor), default=0) - 1
        assert min(before, after) >= REDZONE
        # A kernel that takes 16-byte alignment for granted meets memory that has it but for the layout's offset.
        assert (tensor.data_ptr() - layout.offset * tensor.element_size()) % 16 == 0 or 0 in shape


@given(layouts(), st.sampled_from(SHAPES), st.sampled_from(DTYPES))
def test_writing_an_output_and_nothing_else_is_no_stray_write(layout, shape, dtype):
    buffers = Buffers("cpu", 1)
    inputs = buffers.allocate("x", shape, dtype, layout)
    inputs.fill_(3)
    output = buffers.output("y", OutputSpec(shape, dtype, layout))
    buffers.freeze()
    assert buffers.stray_writes() == []
    output.copy_(inputs)
    assert buffers.stray_writes() == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (0, 4)])
@pytest.mark.parametrize("layout", [Layout(), GAPPED])
@pytest.mark.parametrize("is_input", [False, True])
def test_every_bit_that_must_stay_is_watched(is_input, layout, shape, dtype):
    buffers = Buffers("cpu", 1)
    if is_input:
        tensor = buffers.allocate("t", shape, dtype, layout).fill_(3)
    else:
        tensor = buffers.output("t", OutputSpec(shape, dtype, layout))
    buffers.freeze()
    storage, inside = storage_of(tensor), places_of(tensor)
    seen = {}
    for index in range(storage.numel()):
        flip(storage, index)
        seen[index] = buffers.stray_writes()
        flip(storage, index)
    for index, writes in seen.items():
        if index in inside and not is_input:
            assert writes == []
        else:
            offset = index - tensor.storage_offset()
            assert writes == [StrayWrite("t", is_input, index in inside, 1, (offset,))]


@pytest.mark.parametrize("dtype", FLOATS)
def test_inputs_are_compared_bit_for_bit(dtype):
    buffers = Buffers("cpu", 1)
    tensor = buffers.allocate("x", (3,), dtype)
    tensor.copy_(torch.tensor([0.0, float("nan"), 1.0]))
    buffers.freeze()
    tensor[0] = -0.0
    (write,) = buffers.stray_writes()
    assert (write.inside, write.count, write.offsets) == (True, 1, (0,))
    flip(storage_of(tensor), tensor.storage_offset() + 1)
    assert tensor[1].isnan(), "another NaN"
    (write,) = buffers.stray_writes()
    assert (write.count, write.offsets) == (2, (0, 1))


def test_writes_inside_and_outside_an_input_are_told_apart():
    buffers = Buffers("cpu", 1)
    tensor = buffers.allocate("x", (2, 2), torch.float32, Layout(row_gap=1)).fill_(1)
    buffers.output("y", OutputSpec((4,), torch.float32))
    buffers.freeze()
    tensor.as_strided((7,), (1,), tensor.storage_offset() - 1).zero_()
    inside, outside = buffers.stray_writes()
    assert inside == StrayWrite("x", True, True, 4, (0, 1, 3, 4))
    assert outside == StrayWrite("x", True, False, 3, (-1, 2, 5))


def test_only_the_first_offsets_are_kept_and_all_are_counted():
    buffers = Buffers("cpu", 1)
    output = buffers.output("y", OutputSpec((8,), torch.float32))
    buffers.freeze()
    storage_of(output).zero_()
    (write,) = buffers.stray_writes()
    assert (write.count, write.offsets) == (2 * REDZONE, tuple(range(-REDZONE, -REDZONE + 4)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_start_as_poison_and_so_does_what_is_around_them(dtype):
    tensor = Buffers("cpu", 1).allocate("x", (2, 3), dtype, GAPPED)
    everything = storage_of(tensor)
    if dtype.is_floating_point:
        assert everything.isnan().all()
    else:
        assert (everything == torch.tensor(POISON_INTEGER).to(dtype)).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", DTYPES)
def test_sentinel_is_a_seeded_mixture_of_two_finite_patterns(dtype, seed):
    values = sentinel(64, dtype, seed, "y", "cpu")
    first, second = values.unique().tolist()
    assert values.dtype == dtype
    assert min((values == first).sum(), (values == second).sum()) >= 8
    assert torch.tensor([first, second], dtype=torch.float64).isfinite().all()
    assert torch.equal(values, sentinel(64, dtype, seed, "y", "cpu"))
    assert not torch.equal(values, sentinel(64, dtype, seed + 1, "y", "cpu"))
    assert not torch.equal(values, sentinel(64, dtype, seed, "z", "cpu"))


def test_output_without_initial_values_is_all_sentinel():
    output = Buffers("cpu", 7).output("y", OutputSpec((4, 4), torch.float32, GAPPED))
    everything = storage_of(output)
    assert torch.equal(everything, sentinel(everything.numel(), torch.float32, 7, "y", "cpu"))


def test_output_with_initial_values_holds_them_between_sentinels():
    initial = torch.arange(12.0).view(3, 4)
    output = Buffers("cpu", 7).output("y", OutputSpec((3, 4), torch.float32, GAPPED, initial))
    assert torch.equal(output, initial)
    outside = torch.tensor(sorted(set(range(storage_of(output).numel())) - places_of(output)))
    expected = sentinel(storage_of(output).numel(), torch.float32, 7, "y", "cpu")
    assert torch.equal(storage_of(output)[outside], expected[outside])


def test_frozen_contents_do_not_follow_later_writes():
    buffers = Buffers("cpu", 1)
    buffers.allocate("x", (2,), torch.float32)
    initial = torch.arange(6.0).view(2, 3)
    output = buffers.output("y", OutputSpec((2, 3), torch.float32, GAPPED, initial))
    frozen = buffers.freeze()
    output.zero_()
    assert list(frozen) == ["y"]
    assert torch.equal(frozen["y"], initial)
