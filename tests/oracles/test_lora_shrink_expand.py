"""The oracle of lora_shrink and lora_expand against plain loops."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings

from kernelfuzz.oracles import lora_shrink_expand as oracle
from kernelfuzz.strategies import lora_shrink_expand as strategy
from kernelfuzz.strategies.batches import BASE, Batch, Segment
from kernelfuzz.strategies.layouts import CONTIGUOUS

SMALL = {"max_rank": 5, "max_hidden": 9, "max_columns": 5, "max_segments": 4, "max_length": 3}
SHRINK = strategy.cases(op=("shrink",), **SMALL)
EXPAND = strategy.cases(op=("expand",), **SMALL)

PLAIN_SHRINK = strategy.Case(
    seed=1,
    op="shrink",
    batch=Batch((Segment(0, 1),)),
    num_adapters=1,
    hidden=9,
    rank=2,
    widths=(1,),
    dtype="float16",
    float32_input=False,
    contents="ones",
    scale=1.0,
    add_inputs=False,
    column_offset=0,
    column_tail=0,
    weights_4d=True,
    visit_all=False,
    block_n=64,
    block_k=64,
    split_k=1,
    input_layout=CONTIGUOUS,
)
PLAIN_EXPAND = dataclasses.replace(PLAIN_SHRINK, op="expand", hidden=1, widths=(1, 1))


def float32(number: float) -> float:
    """The scale as the kernels take it."""
    return torch.tensor(number, dtype=torch.float32).item()


def matrix(weight, adapter):
    """Return one adapter's matrix as lists."""
    return (weight[:, 0] if weight.ndim == 4 else weight)[adapter].tolist()


def product(rows, vector):
    return [sum(w * v for w, v in zip(row, vector)) for row in rows]


def assert_values(expected, numbers):
    for number, value in zip(numbers, expected.values.flatten().tolist()):
        assert number is None or value == pytest.approx(number, rel=1e-12, abs=1e-11)


@settings(max_examples=120)
@given(SHRINK)
def test_shrink_is_what_a_loop_computes(expectation, clauses, worst_ratio, case):
    inputs = strategy.make_inputs(case, "cpu")
    _, expectations = expectation(oracle, inputs)
    expected = expectations.outputs["output"]
    names, numbers, actual = [], [], []
    for weight in inputs.weights:
        for token, adapter in enumerate(inputs.token_adapters.tolist()):
            row = [0.0] * case.rank
            if adapter >= 0:
                row = [float32(case.scale) * y for y in product(matrix(weight, adapter), inputs.x[token].tolist())]
            actual += row
            numbers += row
            base = "no_lora_in_batch" if case.no_lora else "base_model_row_is_zero"
            names += [base if adapter < 0 else "product"] * case.rank
    assert expected.values.shape == (len(case.widths), case.batch.num_tokens, case.rank)
    assert clauses(expected) == names
    assert_values(expected, numbers)
    assert worst_ratio(torch.tensor(actual, dtype=torch.float32).view_as(expected.values), expected) <= 1


def test_shrink_writes_exact_zeros_to_base_rows_and_is_free_without_lora(expectation):
    case = dataclasses.replace(PLAIN_SHRINK, batch=Batch((Segment(0, 2), Segment(BASE, 1))))
    _, expectations = expectation(oracle, strategy.make_inputs(case, "cpu"))
    expected = expectations.outputs["output"]
    assert expected.mask("write").all()
    assert expected.values[0, 2].tolist() == expected.bound[0, 2].tolist() == [0.0] * case.rank

    base = dataclasses.replace(case, batch=Batch((Segment(BASE, 2),)))
    _, expectations = expectation(oracle, strategy.make_inputs(base, "cpu"))
    assert expectations.outputs["output"].mask("free").all()


def test_a_shrink_without_scale_is_outside_the_bound(expectation, worst_ratio):
    case = dataclasses.replace(PLAIN_SHRINK, contents="signed", scale=-1.75)
    inputs = strategy.make_inputs(case, "cpu")
    _, expectations = expectation(oracle, inputs)
    expected = expectations.outputs["output"]
    assert worst_ratio((expected.values / -1.75).float(), expected) > 1
    assert worst_ratio(expected.values.float(), expected) <= 1


def expanded_by_loops(inputs, before):
    """Return the clause and the value of each element, in memory order."""
    case = inputs.case
    names, numbers = [], []
    for token, adapter in enumerate(inputs.token_adapters.tolist()):
        row_names = ["columns_outside_slices"] * before.shape[1]
        row = [None] * before.shape[1]
        start = case.column_offset
        for s, width in enumerate(case.widths):
            if adapter >= 0:
                row_names[start : start + width] = ["product"] * width
                row[start : start + width] = product(matrix(inputs.weights[s], adapter), inputs.x[s, token].tolist())
            start += width
        if case.add_inputs:
            row = [None if y is None else y + old for y, old in zip(row, before[token].tolist())]
        names += ["base_model_row"] * len(row) if adapter < 0 else row_names
        numbers += row
    return names, numbers


def correct_expand(inputs, before, *, round_input):
    case, output = inputs.case, before.clone()
    for token, adapter in enumerate(inputs.token_adapters.tolist()):
        start = case.column_offset
        for s, width in enumerate(case.widths):
            columns = slice(start, start + width)
            start += width
            if adapter < 0:
                continue
            y = inputs.x[s, token]
            y = (y.to(output.dtype) if round_input else y).float()
            delta = (torch.tensor(matrix(inputs.weights[s], adapter)) @ y).to(output.dtype)
            output[token, columns] = before[token, columns] + delta if case.add_inputs else delta
    return output


@settings(max_examples=120)
@given(EXPAND)
def test_expand_is_what_a_loop_computes(expectation, clauses, worst_ratio, case):
    inputs = strategy.make_inputs(case, "cpu")
    initial, expectations = expectation(oracle, inputs)
    before, expected = initial["output"], expectations.outputs["output"]
    names, numbers = expanded_by_loops(inputs, before)
    assert before.shape[1] == case.column_offset + sum(case.widths) + case.column_tail
    assert clauses(expected) == names
    assert_values(expected, numbers)
    for round_input in (True, False):
        assert worst_ratio(correct_expand(inputs, before, round_input=round_input), expected) <= 1


def test_expand_starts_from_values_only_where_it_adds():
    for add_inputs in (True, False):
        inputs = strategy.make_inputs(dataclasses.replace(PLAIN_EXPAND, add_inputs=add_inputs), "cpu")
        spec = oracle.outputs(inputs)["output"]
        assert (spec.initial is not None) == add_inputs
        assert spec.dtype == torch.float16


@pytest.mark.parametrize(("factor", "overflows"), [(1.0, False), (60000.0, True)])
@pytest.mark.parametrize("add_inputs", [False, True])
def test_expanded_elements_that_may_overflow_are_free(expectation, clauses, factor, overflows, add_inputs):
    case = dataclasses.replace(PLAIN_EXPAND, add_inputs=add_inputs)
    inputs = strategy.make_inputs(case, "cpu")
    inputs.weights[1] *= factor
    _, expectations = expectation(oracle, inputs)
    assert clauses(expectations.outputs["output"]) == ["product", "overflow" if overflows else "product"]


def test_a_float32_input_that_overflows_the_weights_dtype_frees_its_row(expectation, clauses):
    case = dataclasses.replace(PLAIN_EXPAND, float32_input=True)
    inputs = strategy.make_inputs(case, "cpu")
    inputs.x[:] = torch.tensor([70000.0, -70000.0])  # their sum is 0
    _, expectations = expectation(oracle, inputs)
    assert clauses(expectations.outputs["output"]) == ["overflow", "overflow"]
