"""The oracle of bgmv against plain loops."""

import dataclasses

import pytest
import torch
from hypothesis import assume, given, settings

from kernelfuzz.oracles import bgmv as oracle
from kernelfuzz.strategies import bgmv as strategy
from kernelfuzz.strategies.batches import BASE, Batch, Segment

SMALL = strategy.cases(max_rank=5, max_hidden=9, max_columns=12, max_segments=4, max_length=3)

PLAIN = strategy.Case(
    seed=1,
    layer="wrapper",
    op="expand",
    batch=Batch((Segment(0, 1), Segment(BASE, 1))),
    num_adapters=1,
    width=2,
    rows=3,
    columns=3,
    slice_offset=0,
    slice_size=0,
    dtype="float16",
    float32_input=False,
    float32_output=False,
    contents="ones",
    scale=1.0,
    accumulate=False,
    weights_4d=False,
)


def float32(number: float) -> float:
    """The scale as the kernels take it."""
    return torch.tensor(number, dtype=torch.float32).item()


def case_with(**changes):
    return dataclasses.replace(PLAIN, **changes)


def matrix(weights, adapter):
    return (weights[:, 0] if weights.ndim == 4 else weights)[adapter].tolist()


def by_loops(inputs, before):
    """Return the clause and the value of each element, in memory order."""
    case = inputs.case
    names, numbers = [], []
    for token, adapter in enumerate(inputs.indices.tolist()):
        for column in range(case.columns):
            row = column - case.slice_offset
            inside = 0 <= row < (case.slice_size if case.op == "expand_slice" else case.rows)
            if adapter < 0:
                from_zeros = case.op == "shrink" and not case.accumulate
                names.append("row_without_adapter_is_zero" if from_zeros else "row_without_adapter")
                numbers.append(0.0 if from_zeros else None)
            elif not inside:
                names.append("columns_outside_weights")
                numbers.append(None)
            else:
                weights = matrix(inputs.weights, adapter)[row]
                total = sum(w * x for w, x in zip(weights, inputs.x[token].tolist()))
                total *= float32(case.scale) if case.op == "shrink" else 1
                names.append("product")
                numbers.append(total + (float(before[token, column]) if case.accumulate else 0))
    return names, numbers


def correct_kernel(inputs, before, *, round_input, round_product):
    case, output = inputs.case, before.clone()
    for token, adapter in enumerate(inputs.indices.tolist()):
        if adapter < 0:
            continue
        x = inputs.x[token]
        x = (x.to(inputs.weights.dtype) if round_input else x).float()
        delta = torch.tensor(matrix(inputs.weights, adapter)) @ x
        if case.op == "shrink":
            delta = delta * case.scale
        if round_product:
            delta = delta.to(output.dtype)
        start = case.slice_offset
        size = min(delta.numel(), case.columns - start)
        old = before[token, start : start + size] if case.accumulate else 0
        output[token, start : start + size] = (old + delta[:size]).to(output.dtype)
    return output


@settings(max_examples=250)
@given(SMALL)
def test_legal_calls_are_what_a_loop_computes(expectation, clauses, worst_ratio, case):
    assume(case.refusal is None)
    inputs = strategy.make_inputs(case, "cpu")
    initial, expectations = expectation(oracle, inputs)
    before, expected = initial["output"], expectations.outputs["output"]
    names, numbers = by_loops(inputs, before)
    assert expectations.error is None
    assert clauses(expected) == names
    for number, value in zip(numbers, expected.values.flatten().tolist()):
        assert number is None or value == pytest.approx(number, rel=1e-12, abs=1e-11)
    for round_input in (True, False):
        for round_product in (True, False):
            actual = correct_kernel(inputs, before, round_input=round_input, round_product=round_product)
            assert worst_ratio(actual, expected) <= 1


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"op": "shrink", "rows": 4}, "must match lora_a_weights.size(-2)"),
        ({"op": "expand", "rows": 4}, "lora_b_weights.size(-2) must match slice_size"),
        ({"op": "expand", "rows": 2}, "lora_b_weights.size(-2) must match slice_size"),
        ({"op": "expand_slice", "slice_size": 2}, "lora_b_weights.size(-2) must match slice_size"),
        ({"op": "expand_slice", "slice_size": 3, "slice_offset": 1}, "out of bounds for output dimension"),
    ],
)
def test_the_operator_must_refuse_shapes_that_do_not_match(expectation, changes, text):
    case = case_with(layer="operator", **changes)
    _, expected = expectation(oracle, strategy.make_inputs(case, "cpu"))
    assert expected.error is not None
    assert expected.error.clause == "shapes_are_checked"
    assert text in expected.error.text
    assert "refused" in strategy.regimes(case)


@pytest.mark.parametrize(
    "changes",
    [
        {"op": "shrink"},
        {"op": "expand"},
        {"op": "expand_slice", "slice_size": 3},
        {"op": "expand_slice", "slice_size": 3, "slice_offset": 2, "columns": 5},
    ],
)
def test_the_operator_must_accept_shapes_that_match(expectation, changes):
    _, expected = expectation(oracle, strategy.make_inputs(case_with(layer="operator", **changes), "cpu"))
    assert expected.error is None
    assert expected.outputs["output"].mask("write").any()


def test_the_wrapper_must_accept_any_padding(expectation, clauses):
    for rows in (1, 2):
        _, expected = expectation(oracle, strategy.make_inputs(case_with(rows=rows), "cpu"))
        first_row = clauses(expected.outputs["output"])[:3]
        assert first_row == ["product"] * rows + ["columns_outside_weights"] * (3 - rows)
    _, expected = expectation(oracle, strategy.make_inputs(case_with(rows=5), "cpu"))
    assert expected.error is None
    assert clauses(expected.outputs["output"])[:3] == ["product"] * 3


@pytest.mark.parametrize("op", ["shrink", "expand"])
@pytest.mark.parametrize("accumulate", [True, False])
def test_what_the_output_starts_from(op, accumulate):
    inputs = strategy.make_inputs(case_with(op=op, accumulate=accumulate, float32_output=True), "cpu")
    spec = oracle.outputs(inputs)["output"]
    assert spec.dtype == torch.float32
    assert spec.shape == (2, 3)
    if accumulate:
        assert bool((spec.initial != 0).all())
    elif op == "shrink":
        assert bool((spec.initial == 0).all())
    else:
        assert spec.initial is None


@pytest.mark.parametrize("accumulate", [True, False])
def test_elements_that_may_overflow_are_free(expectation, clauses, accumulate):
    inputs = strategy.make_inputs(case_with(accumulate=accumulate), "cpu")
    inputs.weights[:, 1] = 60000
    _, expected = expectation(oracle, inputs)
    assert clauses(expected.outputs["output"])[:3] == ["product", "overflow", "product"]


def test_a_sum_with_the_old_output_may_overflow(expectation, clauses):
    inputs = strategy.make_inputs(case_with(accumulate=True), "cpu")
    initial, _ = expectation(oracle, inputs)
    initial["output"][0] = torch.tensor([65504.0, -65504.0, 0.0])
    inputs.weights.fill_(16)
    expected = oracle.expect(inputs, initial).outputs["output"]
    assert clauses(expected)[:3] == ["overflow", "product", "product"]


def test_a_float32_input_that_overflows_the_weights_dtype_frees_its_row(expectation, clauses):
    inputs = strategy.make_inputs(case_with(float32_input=True, float32_output=True), "cpu")
    inputs.x[0] = torch.tensor([70000.0, -70000.0])  # their sum is 0
    _, expected = expectation(oracle, inputs)
    assert clauses(expected.outputs["output"])[:3] == ["overflow"] * 3
