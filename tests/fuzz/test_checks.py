"""The engine's checks in tests that call a kernel themselves."""

import pytest
import torch

from kernelfuzz import fuzz
from kernelfuzz.fuzz import Buffers, Expected, OutputSpec, assert_no_stray_writes, assert_within_bound
from kernelfuzz.oracles.rounding import cast, exact, multiply

X = torch.linspace(-1, 1, 12).reshape(3, 4)
PRODUCT = cast(multiply(exact(X), exact(torch.tensor(0.3))), torch.float16)


def right():
    return (X * 0.3).half()


def test_a_right_output_passes_and_says_how_near_it_came():
    assert 0.0 < assert_within_bound(right(), PRODUCT) <= 1.0
    assert assert_within_bound({"a": right(), "n": torch.tensor([3])}, {"a": PRODUCT, "n": torch.tensor([3])}) <= 1.0


def test_a_wrong_element_is_named():
    output = right()
    output[1, 2] += 0.01
    with pytest.raises(AssertionError, match=r"1 of 12 elements of output wrong(.|\n)*\[1, 2\] expected .*err/bound"):
        assert_within_bound(output, PRODUCT)


def test_guarded_outputs_show_what_was_not_written_and_what_must_not_be():
    def launch(output, columns):
        output[:, :columns] = right()[:, :columns]

    written = torch.ones(3, 4, dtype=torch.bool)
    written[:, 3] = False
    expected = Expected(PRODUCT, written=written)
    for columns, problem in ((3, ""), (2, "3 of 12 elements of output never written"), (4, "changed but must be kept")):
        buffers = Buffers("cpu", seed=1)
        output = buffers.output("output", OutputSpec((3, 4), torch.float16))
        initial = buffers.freeze()
        launch(output, columns)
        assert_no_stray_writes(buffers)
        if not problem:
            assert_within_bound(output, expected, initial)
            continue
        with pytest.raises(AssertionError, match=problem):
            assert_within_bound({"output": output}, expected, initial)


def test_a_write_to_an_input_and_one_outside_are_named():
    buffers = Buffers("cpu", seed=0)
    x = buffers.allocate("x", (4,), torch.float32).fill_(1)
    output = buffers.output("output", OutputSpec((4,), torch.float32))
    buffers.freeze()
    output.fill_(2)
    assert_no_stray_writes(buffers)
    x[2] = 0
    with pytest.raises(AssertionError, match=r"1 element.* of x changed, first at element 2: it is an input"):
        assert_no_stray_writes(buffers)
    output.as_strided((1,), (1,), output.storage_offset() + 4).fill_(0)
    with pytest.raises(AssertionError, match="of output changed, first at element 4: outside the tensor"):
        assert_no_stray_writes(buffers)


def test_every_public_name_is_there():
    assert all(getattr(fuzz, name) is not None for name in fuzz.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fuzz.nothing
