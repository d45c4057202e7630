"""What a user's oracle may return, and what is made of it."""

import pytest
import torch

from kernelfuzz.oracles import own
from kernelfuzz.oracles.expectation import OutputSpec
from kernelfuzz.oracles.own import Expected
from kernelfuzz.oracles.rounding import Approximation, add, cast, exact
from kernelfuzz.strategies.errors import KernelfuzzError

X = torch.tensor([[1.0, 2.0], [3.0, 65504.0]], dtype=torch.float16)


def expectation(returned):
    outputs = own.by_output(returned)
    return own.expectation(outputs, own.output_specs(outputs)).outputs


def test_one_output_is_called_output_and_has_the_dtype_of_the_last_cast():
    outputs = own.by_output(cast(exact(X), torch.bfloat16))
    assert own.output_specs(outputs) == {"output": OutputSpec((2, 2), torch.bfloat16)}


def test_an_approximation_brings_its_bound():
    approximation = cast(exact(X[0]), torch.bfloat16)
    (expected,) = expectation({"y": approximation}).values()
    assert expected.mask("write").all()
    assert expected.bound is not None
    assert torch.equal(expected.bound, approximation.error)
    assert torch.equal(expected.values, approximation.value)


def test_what_may_overflow_is_free():
    (expected,) = expectation(cast(add(exact(X), exact(X)), torch.float16)).values()
    assert expected.mask("free").tolist() == [[False, False], [False, True]]


@pytest.mark.parametrize("values", [torch.tensor([float("nan"), 1.0]), torch.tensor([float("inf"), 1.0])])
@pytest.mark.parametrize("make", [exact, lambda values: Expected(values, bound=0.5)])
def test_what_is_not_finite_is_free(make, values):
    (expected,) = expectation(make(values)).values()
    assert expected.mask("free").tolist() == [True, False]


def test_integers_must_be_equal():
    (expected,) = expectation(torch.tensor([1, 2], dtype=torch.int32)).values()
    assert expected.bound is None
    assert expected.values.dtype == torch.int64


def test_masks_say_what_is_kept_and_what_is_free():
    written = torch.tensor([[True, False], [True, True]])
    free = torch.tensor([[False, False], [True, False]])
    (expected,) = expectation(Expected(X, bound=1.0, written=written, free=free)).values()
    assert expected.mask("keep").tolist() == [[False, True], [False, False]]
    assert expected.mask("free").tolist() == [[False, False], [True, False]]
    assert expected.mask("write").tolist() == [[True, False], [False, True]]
    assert expected.bound is not None
    assert expected.bound.tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_dtype_may_be_another_one_than_that_of_the_values():
    outputs = own.by_output(Expected(X.double(), bound=0.0, dtype=torch.float16))
    assert own.output_specs(outputs)["output"].dtype == torch.float16


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        ({}, "returned no output"),
        (None, "the oracle's output is a NoneType"),
        ({"y": [1.0]}, "the oracle's y is a list"),
        (X, r"has no bound: .* exact\(values\) if not a bit may differ"),
        (add(exact(X), exact(X)), r"output has no dtype: end with cast"),
        (Expected(exact(X), bound=1.0), "two bounds"),
        (Expected(X, bound=-1.0), "bound of output is negative or NaN"),
        (Expected(X, bound=float("nan")), "bound of output is negative or NaN"),
        (Expected(X, bound=1.0, written=torch.ones(2, 2)), "written of output is no tensor of bools"),
        (Expected(exact(X), dtype=torch.int32), "an Approximation, which no torch.int32 can hold"),
        (torch.tensor([True]), r"of bools: return it as torch.uint8.*outputs.output.view\(torch.bool\)"),
        (torch.ones(2, dtype=torch.complex64), "complex"),
        (Expected(X, bound=torch.ones(3)), r"bound of output has shape \[3\], not \[2, 2\]"),
        (Expected(X, bound=1.0, written=torch.ones(2, dtype=torch.bool)), r"written of output has shape \[2\]"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(returned, text):
    with pytest.raises(KernelfuzzError, match=text) as caught:
        own.by_output(returned)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("specs", "text"),
    [
        ({"z": OutputSpec((2, 2), torch.float16)}, "different outputs: y, z"),
        ({"y": OutputSpec((2, 3), torch.float16)}, r"the oracle's y has shape \[2, 2\], not \[2, 3\]"),
    ],
)
def test_outputs_must_be_the_oracles(specs, text):
    with pytest.raises(KernelfuzzError, match=text):
        own.expectation(own.by_output({"y": exact(X)}), specs)


def test_approximations_know_what_they_were_last_rounded_into():
    assert exact(X).dtype == torch.float16
    assert cast(exact(X), torch.float32).dtype == torch.float32
    assert add(exact(X), exact(X)).dtype is None
    assert Approximation(X.double(), X.double()).dtype is None
