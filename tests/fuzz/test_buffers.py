"""Guarded buffers: what they hold before a launch, and what they notice after it."""

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kernelfuzz.fuzz.buffers import REDZONE, Buffers, StrayWrite, buffers, sentinel, watch
from kernelfuzz.oracles.expectation import OutputSpec
from kernelfuzz.strategies.layouts import POISON_INTEGER, Layout, layouts

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DTYPES = (*FLOATS, torch.int32, torch.int64)
SHAPES = ((), (5,), (3, 4), (2, 3, 2), (0, 4), (3, 0))
GAPPED = Layout(offset=3, row_gap=2, step=2)
SMALL_BLOCK = 40

# How the memory of a launch's tensors is got and watched, and the module constants that bring it about.
MODES = {
    "shared chunks": {},
    "memory of their own": {"CHUNK_BYTES": 1},
    "guard pages": {},
    "exact": {},
    "digests": {"DIGEST_BYTES": 0, "BLOCK": SMALL_BLOCK},
    "guard pages and digests": {"DIGEST_BYTES": 0, "BLOCK": SMALL_BLOCK},
}
in_every_mode = pytest.mark.parametrize("mode", MODES)


@contextmanager
def constants(**values: int) -> Iterator[None]:
    """Gives constants of the engine, by name, other values for a while."""
    with pytest.MonkeyPatch.context() as context:
        for name, value in values.items():
            context.setattr(watch if name == "BLOCK" else buffers, name, value)
        yield


@contextmanager
def launch_in(mode: str, seed: int = 1) -> Iterator[Buffers]:
    """Gives the buffers of a launch in one of the modes, which lasts as long."""
    with constants(**MODES[mode]):
        yield Buffers("cpu", seed, "exact" if mode == "exact" else "guarded" if "guard pages" in mode else "shared")


def storage_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of the memory that a tensor lies in, 1-D."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.as_strided((size,), (1,), 0)


def places_of(tensor: torch.Tensor) -> list[int]:
    """Return the indices in the storage of a tensor's elements."""
    storage = torch.arange(storage_of(tensor).numel())
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).flatten().tolist()


def flip(storage: torch.Tensor, index: int) -> None:
    """Change one bit of one element."""
    storage.view(torch.uint8)[index * storage.element_size()] ^= 1


def sentinels(count: int, dtype: torch.dtype, seed: int, name: str) -> torch.Tensor:
    """Return what the storage of an output holds: sentinels, repeated after a block."""
    block = sentinel(min(count, watch.BLOCK), dtype, seed, name, "cpu")
    return block.repeat(-(-count // watch.BLOCK))[:count]


def report_of(tensor: torch.Tensor, index: int, *, is_input: bool, by_block: bool) -> list[StrayWrite]:
    """Return what must be reported of `tensor`, called t, when one element of its storage changed."""
    places = places_of(tensor)
    if index in places and not is_input:
        return []
    inside = index in places
    if inside and by_block:
        index = min(place for place in places if place // watch.BLOCK == index // watch.BLOCK)
    return [StrayWrite("t", is_input, inside, 1, (index - tensor.storage_offset(),))]


@in_every_mode
@given(layouts(), st.sampled_from(SHAPES), st.sampled_from(DTYPES))
def test_views_have_the_promised_layout(mode, layout, shape, dtype):
    with launch_in(mode) as launch:
        for tensor in (
            launch.allocate("x", shape, dtype, layout),
            launch.output("y", OutputSpec(shape, dtype, layout)),
        ):
            assert (tensor.shape, tensor.dtype, tensor.stride()) == (shape, dtype, layout.strides(shape))
            before = tensor.storage_offset()
            after = storage_of(tensor).numel() - max(places_of(tensor), default=before - 1) - 1
            if "guard pages" in mode:
                assert before >= REDZONE
                assert after == 0
            else:
                assert before == REDZONE + layout.offset
                assert after == (0 if mode == "exact" else REDZONE)
                # A kernel that takes 16-byte alignment for granted meets memory that has it, but for the offset.
                assert (tensor.data_ptr() - layout.offset * tensor.element_size()) % 16 == 0 or 0 in shape


@in_every_mode
@given(layouts(), st.sampled_from(SHAPES), st.sampled_from(DTYPES))
def test_writing_an_output_and_nothing_else_is_no_stray_write(mode, layout, shape, dtype):
    with launch_in(mode) as launch:
        inputs = launch.allocate("x", shape, dtype, layout)
        inputs.fill_(3)
        output = launch.output("y", OutputSpec(shape, dtype, layout))
        launch.freeze()
        assert launch.stray_writes() == []
        output.copy_(inputs)
        assert launch.stray_writes() == []


@in_every_mode
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (0, 4)])
@pytest.mark.parametrize("layout", [Layout(), GAPPED])
@pytest.mark.parametrize(("is_input", "dtype"), [(False, torch.float16), (True, torch.int64)])
def test_every_bit_that_must_stay_is_watched(mode, is_input, layout, shape, dtype):
    with launch_in(mode) as launch:
        if is_input:
            tensor = launch.allocate("t", shape, dtype, layout).fill_(3)
        else:
            tensor = launch.output("t", OutputSpec(shape, dtype, layout))
        launch.freeze()
        storage = storage_of(tensor)
        near = range(max(0, tensor.storage_offset() - REDZONE - 3), storage.numel())
        seen = {}
        for index in near:
            flip(storage, index)
            seen[index] = launch.stray_writes()
            flip(storage, index)
        assert seen == {
            index: report_of(tensor, index, is_input=is_input, by_block="digests" in mode) for index in near
        }


@given(
    layout=layouts(max_offset=60, max_row_gap=90, max_step=3),
    shape=st.sampled_from([(), (7,), (1, 9), (4, 30), (3, 2, 5), (0, 4), (60, 1)]),
    dtype=st.sampled_from([torch.float8_e5m2, torch.bfloat16, torch.float64]),
    words=st.integers(2, 40),
    is_input=st.booleans(),
    data=st.data(),
)
def test_digests_see_a_change_wherever_blocks_cut_the_rows(layout, shape, dtype, words, is_input, data):
    with constants(DIGEST_BYTES=0, BLOCK=8 * words):
        launch = Buffers("cpu", 1)
        if is_input:
            tensor = launch.allocate("t", shape, dtype, layout).fill_(3)
        else:
            tensor = launch.output("t", OutputSpec(shape, dtype, layout))
        launch.freeze()
        assert launch.stray_writes() == []
        index = data.draw(st.sampled_from(places_of(tensor) or [0]) | st.integers(0, storage_of(tensor).numel() - 1))
        flip(storage_of(tensor), index)
        assert launch.stray_writes() == report_of(tensor, index, is_input=is_input, by_block=True)


@pytest.mark.parametrize("dtype", FLOATS)
def test_inputs_are_compared_bit_for_bit(dtype):
    launch = Buffers("cpu", 1)
    tensor = launch.allocate("x", (3,), dtype)
    tensor.copy_(torch.tensor([0.0, float("nan"), 1.0]))
    launch.freeze()
    tensor[0] = -0.0
    (write,) = launch.stray_writes()
    assert (write.inside, write.count, write.offsets) == (True, 1, (0,))
    flip(storage_of(tensor), tensor.storage_offset() + 1)
    assert tensor[1].isnan(), "another NaN"
    (write,) = launch.stray_writes()
    assert (write.count, write.offsets) == (2, (0, 1))


@in_every_mode
def test_writes_inside_and_outside_an_input_are_told_apart(mode):
    with launch_in(mode) as launch:
        tensor = launch.allocate("x", (2, 2), torch.float32, Layout(row_gap=1)).fill_(1)
        launch.output("y", OutputSpec((4,), torch.float32))
        launch.freeze()
        tensor.as_strided((6,), (1,), tensor.storage_offset() - 1).zero_()
        inside, outside = launch.stray_writes()
        assert (inside.name, inside.is_input, inside.inside) == ("x", True, True)
        if "digests" in mode:
            assert 0 in inside.offsets, "the first element of its block that is the input's"
        else:
            assert (inside.count, inside.offsets) == (4, (0, 1, 3, 4))
        assert outside == StrayWrite("x", True, False, 2, (-1, 2))


@in_every_mode
def test_outputs_are_reported_before_inputs_and_in_the_order_of_their_allocation(mode):
    with launch_in(mode) as launch:
        inputs = [launch.allocate(name, (3,), torch.int32).fill_(0) for name in "ab"]
        outputs = [launch.output(name, OutputSpec((3,), torch.int32)) for name in "cd"]
        launch.freeze()
        for tensor in inputs + outputs:
            flip(storage_of(tensor), tensor.storage_offset() - 1)
        assert launch.stray_writes() == [StrayWrite(name, name in "ab", False, 1, (-1,)) for name in "cdab"]


@in_every_mode
def test_only_the_first_offsets_are_kept_and_all_are_counted(mode):
    with launch_in(mode) as launch:
        output = launch.output("y", OutputSpec((8,), torch.float32))
        launch.freeze()
        storage_of(output).zero_()
        (write,) = launch.stray_writes()
        first = -output.storage_offset()
        assert (write.count, write.offsets) == (storage_of(output).numel() - 8, tuple(range(first, first + 4)))


def test_what_lies_between_tensors_goes_to_the_nearest_before_it_and_redzones_to_their_own():
    launch = Buffers("cpu", 1)
    output = launch.output("first", OutputSpec((5,), torch.float16))
    tensor = launch.allocate("second", (3,), torch.float64).fill_(1)
    launch.freeze()
    start, middle, end = (
        output.untyped_storage().data_ptr(),
        tensor.untyped_storage().data_ptr(),
        tensor.untyped_storage().data_ptr() + tensor.untyped_storage().nbytes(),
    )
    own = range(output.data_ptr(), output.data_ptr() + 5 * 2)
    assert end - start > storage_of(output).nbytes + storage_of(tensor).nbytes, "they lie in one chunk, with slack"
    for address in (*range(start, end), end, end + 50_000):
        byte = ctypes.c_uint8.from_address(address)
        byte.value ^= 0x80
        writes = launch.stray_writes()
        byte.value ^= 0x80
        nearest = output if address < middle else tensor
        offset = (address - nearest.data_ptr()) // nearest.element_size()
        name, inside = ("first", False) if address < middle else ("second", 0 <= offset < 3)
        assert writes == ([] if address in own else [StrayWrite(name, nearest is tensor, inside, 1, (offset,))])


def test_memory_that_no_tensor_has_taken_holds_nothing_that_was_there_before():
    tensor = Buffers("cpu", 1).allocate("x", (3,), torch.float32)
    end = tensor.untyped_storage().data_ptr() + tensor.untyped_storage().nbytes()
    behind = (ctypes.c_float * 20_000).from_address(end)
    assert torch.tensor(list(behind)).isnan().all()


@given(st.lists(st.tuples(st.integers(0, 5000), st.sampled_from(DTYPES), st.booleans()), max_size=12))
def test_tensors_that_share_memory_are_apart_and_aligned(sizes):
    with constants(CHUNK_BYTES=2**14):
        launch = Buffers("cpu", 1)
        tensors = [
            launch.allocate("x", (size,), dtype) if is_input else launch.output("x", OutputSpec((size,), dtype))
            for size, dtype, is_input in sizes
        ]
        spans = sorted((storage.data_ptr(), storage.nbytes()) for storage in (t.untyped_storage() for t in tensors))
        assert all(begin % 64 == 0 for begin, _ in spans)
        assert all(begin + size <= following for (begin, size), (following, _) in zip(spans, spans[1:]))
        for number, tensor in enumerate(tensors):
            tensor.fill_(number)
        assert all((tensor == number).all() for number, tensor in enumerate(tensors))


class Operations(TorchDispatchMode):
    """Counts the operations that read or write memory, and those among them that wait for the device."""

    VIEWS = ("view", "slice", "as_strided", "split", "detach", "alias")
    WAITS = ("_local_scalar_dense", "nonzero", "equal", "item", "masked_select", "_unique2")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(function.__name__.partition(".")[0])
        return function(*arguments, **(keywords or {}))

    @property
    def count(self):
        return sum(name not in self.VIEWS for name in self.names)

    @property
    def waits(self):
        return sum(name in self.WAITS for name in self.names)


@pytest.mark.parametrize("inputs", [1, 50])
def test_a_launch_without_stray_writes_takes_few_operations_however_many_tensors_it_has(inputs):
    launch = Buffers("cpu", 1)
    for number in range(inputs):
        launch.allocate(f"x{number}", (100,), torch.float32).fill_(1)
    launch.output("y", OutputSpec((100,), torch.float32))
    with Operations() as operations:
        launch.freeze()
        assert launch.stray_writes() == []
    assert operations.waits == 1
    assert operations.count <= 8


@pytest.mark.parametrize("tensors", [1, 9])
def test_digests_wait_for_the_device_once(tensors):
    with constants(DIGEST_BYTES=0, BLOCK=SMALL_BLOCK):
        launch = Buffers("cpu", 1)
        for number in range(tensors):
            launch.allocate(f"x{number}", (30, 5), torch.float32, GAPPED).fill_(1)
            launch.output(f"y{number}", OutputSpec((30, 5), torch.float32, GAPPED))
        with Operations() as operations:
            launch.freeze()
            assert launch.stray_writes() == []
        assert operations.waits == 1


SIGN_BIT = torch.iinfo(torch.int64).min


def digested(contents: torch.Tensor) -> tuple[Buffers, torch.Tensor]:
    """Return frozen buffers with one input that is watched by one digest, and the input."""
    launch = Buffers("cpu", 1)
    tensor = launch.allocate("x", tuple(contents.shape), contents.dtype).copy_(contents)
    launch.freeze()
    return launch, tensor


@pytest.mark.parametrize("start", [0, -1])
@pytest.mark.parametrize("bit", [0, 15, 31, 32, 47, 61, 62, 63])
def test_a_digest_sees_the_same_bit_flipped_in_any_two_elements(bit, start):
    with constants(DIGEST_BYTES=0):
        launch, tensor = digested(torch.full((16,), start, dtype=torch.int64))
        for i in range(16):
            for j in range(i):
                tensor[[i, j]] ^= SIGN_BIT if bit == 63 else 1 << bit
                assert [write.inside for write in launch.stray_writes()] == [True]
                tensor[[i, j]] = start
        assert launch.stray_writes() == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_digest_sees_two_elements_that_changed_places(dtype):
    with constants(DIGEST_BYTES=0):
        launch, tensor = digested(
            torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, 0.5, 3.0, float("inf")], dtype=dtype).repeat(3)
        )
        for i in range(24):
            for j in range(i):
                before = watch.bits(tensor.clone())
                tensor[[i, j]] = tensor[[j, i]]
                changed = not torch.equal(watch.bits(tensor), before)
                assert [write.inside for write in launch.stray_writes()] == [True] * changed
                watch.bits(tensor).copy_(before)


@given(st.integers(0, 99), st.integers(0, 63))
def test_a_digest_sees_every_single_bit(element, bit):
    with constants(DIGEST_BYTES=0):
        launch, tensor = digested(torch.arange(100))
        tensor[element] ^= SIGN_BIT if bit == 63 else 1 << bit
        assert [write.inside for write in launch.stray_writes()] == [True]


MEMORY_PROGRAM = """
import sys
import torch
from kernelfuzz.fuzz.buffers import Buffers, buffers, watch
from kernelfuzz.oracles.expectation import OutputSpec
from kernelfuzz.strategies.layouts import Layout

def peak():  # MiB
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024

torch.set_num_threads(1)
buffers.DIGEST_BYTES, watch.BLOCK = int(sys.argv[2]), 8 * 8191

def watch_one(size):
    launch = Buffers("cpu", 1)
    if sys.argv[1] == "input":
        launch.allocate("x", (size,), torch.float32)
    else:
        launch.output("y", OutputSpec((2, 8), torch.float32, Layout(row_gap=size)))
    launch.freeze()
    assert launch.stray_writes() == []

watch_one(2**20)  # the code and what torch keeps of it
start = peak()
watch_one(2**24)
print(peak() - start - 60)
"""


@pytest.mark.parametrize("group", ["input", "output"])
def test_a_large_storage_is_filled_and_watched_without_a_second_one(group):
    def extra(digest_bytes):
        command = [sys.executable, "-c", MEMORY_PROGRAM, group, str(digest_bytes)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert extra(2**20) < 16, "MiB beside a storage of 64"
    assert extra(2**30) > 48, "and a copy shows in this measure"


@in_every_mode
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_start_as_poison_and_so_does_what_is_around_them(mode, dtype):
    with launch_in(mode) as launch:
        tensor = launch.allocate("x", (2, 3), dtype, GAPPED)
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


@in_every_mode
def test_output_without_initial_values_is_all_sentinel(mode):
    with launch_in(mode, 7) as launch:
        everything = storage_of(launch.output("y", OutputSpec((4, 4), torch.float32, GAPPED)))
        assert torch.equal(everything, sentinels(everything.numel(), torch.float32, 7, "y"))


@in_every_mode
def test_output_with_initial_values_holds_them_between_sentinels(mode):
    with launch_in(mode, 7) as launch:
        initial = torch.arange(12.0).view(3, 4)
        output = launch.output("y", OutputSpec((3, 4), torch.float32, GAPPED, initial))
        assert torch.equal(output, initial)
        outside = torch.tensor(sorted(set(range(storage_of(output).numel())) - set(places_of(output))))
        expected = sentinels(storage_of(output).numel(), torch.float32, 7, "y")
        assert torch.equal(storage_of(output)[outside], expected[outside])


@in_every_mode
def test_frozen_contents_do_not_follow_later_writes_and_are_compact(mode):
    with launch_in(mode) as launch:
        launch.allocate("x", (2,), torch.float32)
        initial = torch.arange(6.0).view(2, 3)
        output = launch.output("y", OutputSpec((2, 3), torch.float32, GAPPED, initial))
        frozen = launch.freeze()
        output.zero_()
        assert launch.stray_writes() == []
        assert list(frozen) == ["y"]
        assert torch.equal(frozen["y"], initial)
        assert frozen["y"].untyped_storage().nbytes() == initial.nbytes


@in_every_mode
def test_a_launch_without_tensors_has_no_stray_writes(mode):
    with launch_in(mode) as launch:
        assert launch.freeze() == {}
        assert launch.stray_writes() == []
