"""Kernel tests as users write them, right ones and wrong ones: `test_pytest_plugin.py` copies this file and runs it."""

import ctypes
import threading

import pytest
import torch
from hypothesis import assume, example, settings
from hypothesis import strategies as st

from kernelfuzz.fuzz import Expected, OutputSpec, TensorSpec, kernel_test, tensors
from kernelfuzz.kernels.examples import bgmv
from kernelfuzz.oracles.rounding import accumulate, cast, exact, multiply
from kernelfuzz.strategies import bgmv as bgmv_cases
from kernelfuzz.strategies.layouts import layouts

FEW = settings(max_examples=25, database=None, derandomize=True)


@st.composite
def rows(draw, dtypes=("float16", "float32"), most=20):
    shape = draw(st.integers(1, 4)), draw(st.integers(1, most))
    return {"x": draw(tensors(shape, draw(st.sampled_from(dtypes)))), "factor": draw(st.sampled_from((1.0, 0.5, 3.0)))}


def scaled(inputs):
    return cast(multiply(exact(inputs.x), exact(torch.tensor(inputs.factor))), inputs.x.dtype)


# Right ones.


@FEW
@kernel_test(cases=rows(), oracle=scaled)
def test_right(inputs, outputs):
    outputs.output.copy_(inputs.x.float() * inputs.factor)


@FEW
@kernel_test(target="bgmv")
def test_of_a_target(inputs, outputs):
    bgmv.load(None, torch.device("cpu")).launch(inputs, outputs)


@FEW
@kernel_test(target="bgmv", cases=bgmv_cases.cases(op=("shrink",), max_rank=4))
def test_of_a_target_with_fewer_cases(inputs, outputs):
    assert inputs.case.op == "shrink"
    assert inputs.case.rows <= 6
    bgmv.load(None, torch.device("cpu")).launch(inputs, outputs)


def row_sums(inputs):
    return cast(accumulate(exact(inputs.x), 1), torch.float32)


class TestOfAClass:
    scale = 1.0

    @FEW
    @kernel_test(cases=rows(("float32",)), oracle=row_sums)
    def test_method(self, inputs, outputs):
        outputs.output.copy_(inputs.x.sum(1, keepdim=True) * self.scale)


@pytest.fixture(scope="module")
def module_fixture():
    return 2


@pytest.mark.parametrize("block", [1, 3])
@FEW
@example(case={"x": TensorSpec((2, 2), "float16"), "factor": 2.0}, times=1)
@kernel_test(cases=rows(), oracle=scaled, times=st.integers(1, 3))
def test_with_more_arguments(inputs, outputs, block, times, module_fixture):
    assert module_fixture == 2
    for _ in range(times):
        for start in range(0, inputs.x.shape[1], block):
            columns = slice(start, start + block)
            outputs.output[:, columns] = inputs.x[:, columns].float() * inputs.factor


def added(inputs, initial):
    return {"total": exact((initial["total"].double() + inputs.x.double()).to(torch.float32))}


def totals(inputs):
    return {"total": OutputSpec(tuple(inputs.x.shape), torch.float32, initial=torch.ones(inputs.x.shape))}


@FEW
@kernel_test(
    cases=st.fixed_dictionaries({"x": tensors((2, 5), style=("small_integers",))}), oracle=added, outputs=totals
)
def test_adds_to_what_is_there(inputs, outputs):
    outputs.total += inputs.x


def first_half(inputs):
    written = torch.zeros(inputs.x.shape, dtype=torch.bool)
    written[:, : inputs.x.shape[1] // 2] = True
    free = torch.zeros_like(written)
    free[:, -1] = True
    return {
        "half": Expected(inputs.x, bound=0.0, written=written, free=free),
        "count": torch.tensor([inputs.x.numel()]),
    }


@FEW
@kernel_test(cases=rows(), oracle=first_half)
def test_masks_and_integers(inputs, outputs):
    half = inputs.x.shape[1] // 2
    outputs["half"][:, :half] = inputs.x[:, :half]
    outputs.half[:, -1] = 7
    outputs.count[0] = inputs.x.numel()


@FEW
@kernel_test(
    cases=st.fixed_dictionaries(
        {"x": tensors((3, 4), layout=layouts()), "index": tensors((3,), "int32", low=0, high=4)}
    ),
    oracle=lambda inputs: inputs.index.long().clone(),
)
def test_layouts_and_indices(inputs, outputs):
    assert inputs.x.shape == (3, 4)
    assert 0 <= int(inputs.index.min()) <= int(inputs.index.max()) < 4
    outputs.output.copy_(inputs.index)


@FEW
@kernel_test(cases=rows(), oracle=scaled)
def test_some_cases_are_not_offered(inputs, outputs):
    assume(inputs.x.shape[1] > 2)
    if inputs.x.shape[0] == 4:
        pytest.skip("four rows are too many")
    outputs.output.copy_(inputs.x.float() * inputs.factor)


@FEW
@kernel_test(cases=rows(), oracle=scaled, devices=("cuda",))
def test_for_another_device(inputs, outputs):
    raise AssertionError("there is none")


# Wrong ones.


@FEW
@kernel_test(cases=rows(most=60), oracle=scaled, times=st.integers(1, 3))
def test_forgets_the_tail(inputs, outputs, times):
    columns = inputs.x.shape[1]
    written = columns if columns < 8 else columns - columns % 8
    outputs.output[:, :written] = inputs.x[:, :written].float() * inputs.factor


@FEW
@kernel_test(cases=rows(("float32",)), oracle=scaled)
def test_rounds_too_early(inputs, outputs):
    outputs.output.copy_((inputs.x.half() * inputs.factor).float())


@FEW
@kernel_test(cases=rows(), oracle=scaled)
def test_writes_to_its_input(inputs, outputs):
    outputs.output.copy_(inputs.x.float() * inputs.factor)
    if inputs.x.shape[0] > 1:
        inputs.x.mul_(0)


@FEW
@kernel_test(cases=rows(), oracle=scaled)
def test_ends_its_process(inputs, outputs):
    if inputs.x.shape[0] > 2:
        ctypes.string_at(0)
    outputs.output.copy_(inputs.x.float() * inputs.factor)


@FEW
@kernel_test(cases=rows(), oracle=scaled)
def test_has_two_bugs(inputs, outputs):
    if inputs.x.shape[0] == 2:
        raise ValueError("two rows")
    if inputs.x.shape[0] == 3:
        raise IndexError("three rows")
    outputs.output.copy_(inputs.x.float() * inputs.factor)


def no_bound(inputs):
    return inputs.x * inputs.factor


@FEW
@kernel_test(cases=rows(), oracle=no_bound)
def test_has_no_bound(inputs, outputs):
    outputs.output.copy_(inputs.x * inputs.factor)


def fails(inputs):
    return inputs.missing


@FEW
@kernel_test(cases=rows(), oracle=fails)
def test_has_a_wrong_oracle(inputs, outputs):
    outputs.output.copy_(inputs.x)


@pytest.fixture(scope="module")
def lock():
    return threading.Lock()


@FEW
@kernel_test(cases=rows(), oracle=scaled)
def test_with_what_cannot_be_sent(inputs, outputs, lock):
    with lock:
        outputs.output.copy_(inputs.x.float() * inputs.factor)


def changes_its_inputs(inputs):
    values = exact(inputs.x)
    inputs.x.zero_()
    return values


@FEW
@kernel_test(cases=rows(("float64",)), oracle=changes_its_inputs)
def test_of_an_oracle_that_changes_its_inputs(inputs, outputs):
    outputs.output.copy_(inputs.x)


@FEW
@kernel_test(cases=rows(), oracle=scaled)
def test_offers_nothing(inputs, outputs):
    pytest.skip("not written yet")


@FEW
@kernel_test(cases=rows(), oracle=scaled)
def test_puts_another_tensor_in_place(inputs, outputs):
    outputs.output = inputs.x * inputs.factor


@FEW
@kernel_test(cases=rows(), oracle=scaled)
def test_fails_by_itself(inputs, outputs):
    pytest.fail("never mind")
