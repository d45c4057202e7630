"""The oracle of fused_moe_lora against plain loops."""

import dataclasses

import pytest
import torch
from hypothesis import assume, given, settings

from kernelfuzz.oracles import fused_moe_lora as oracle
from kernelfuzz.strategies import fused_moe_lora as strategy
from kernelfuzz.strategies.batches import BASE, Batch, Segment
from kernelfuzz.strategies.layouts import CONTIGUOUS
from kernelfuzz.strategies.routing import Routing

SMALL = strategy.cases(max_rank=5, max_hidden=9, max_columns=4, max_segments=4, max_length=3)
TILES = strategy.Tiles(block_n=32, block_k=32, group_m=1, split_k=1)

PLAIN = strategy.Case(
    seed=1,
    batch=Batch((Segment(0, 1), Segment(1, 1), Segment(BASE, 1), Segment(2, 1))),
    num_adapters=2,
    disabled=(),
    num_experts=2,
    top_k=2,
    routing=Routing("uniform"),
    hidden=9,
    rank=3,
    columns=4,
    slices=2,
    dtype="float16",
    contents="signed",
    aligned=True,
    block_size=16,
    fully_sharded=False,
    mul_routed_weight=False,
    add_inputs=True,
    descending_ids=False,
    visit_all=True,
    column_offset=0,
    compute_units=1,
    shrink=TILES,
    expand=TILES,
    input_layout=CONTIGUOUS,
    output_gap=0,
)


def case_with(**changes):
    return dataclasses.replace(PLAIN, **changes)


def contribution(inputs, s, t, j, column):
    """Return one element's LoRA contribution, in Python's floats."""
    case = inputs.case
    adapter, expert = int(inputs.token_adapters[t]), int(inputs.topk_ids[t, j])
    x = inputs.x[t * case.top_k + j if case.mul_routed_weight else t].tolist()
    a, b = inputs.lora_a[s][adapter, expert].tolist(), inputs.lora_b[s][adapter, expert].tolist()
    total = sum(b[column][r] * sum(a[r][k] * x[k] for k in range(case.hidden)) for r in range(case.rank))
    return total * float(inputs.topk_weights[t, j]) if case.mul_routed_weight else total


def row_clause(inputs, t, j):
    case, adapter = inputs.case, int(inputs.token_adapters[t])
    if adapter < 0:
        return "base_model_row"
    if adapter >= case.num_adapters:
        return "adapter_out_of_range_row"
    if adapter in case.disabled:
        return "disabled_adapter_row"
    return "unrouted_choice" if int(inputs.topk_ids[t, j]) < 0 else "lora_delta"


def by_loops(inputs, before):
    """Return the clause and the value of each element, in memory order."""
    case = inputs.case
    names, numbers = [], []
    for t in range(case.batch.num_tokens):
        for j in range(case.top_k):
            for column in range(before.shape[2]):
                name = row_clause(inputs, t, j)
                s, within = divmod(column - case.column_offset, case.columns)
                if s < 0:
                    name = "columns_of_other_ranks"
                old = float(before[t, j, column]) if case.add_inputs else 0.0
                numbers.append(old + contribution(inputs, s, t, j, within) if name == "lora_delta" else None)
                names.append(name)
    return names, numbers


def correct_kernel(inputs, before, *, round_middle):
    """Compute in float32 and round where the contract allows it."""
    case, dtype = inputs.case, inputs.x.dtype
    output = before.clone()
    for t in range(case.batch.num_tokens):
        for j in range(case.top_k):
            if row_clause(inputs, t, j) != "lora_delta":
                continue
            adapter, expert = int(inputs.token_adapters[t]), int(inputs.topk_ids[t, j])
            x = inputs.x[t * case.top_k + j if case.mul_routed_weight else t].float()
            for s in range(case.slices):
                a, b = inputs.lora_a[s][adapter, expert].float(), inputs.lora_b[s][adapter, expert].float()
                if round_middle:
                    middle = torch.zeros(case.rank, dtype=dtype)
                    for part in range(case.shrink.split_k):
                        middle += (a[:, part :: case.shrink.split_k] @ x[part :: case.shrink.split_k]).to(dtype)
                else:
                    middle = a @ x
                delta = b @ middle.float()
                if case.mul_routed_weight:
                    delta = delta * inputs.topk_weights[t, j]
                start = case.column_offset + s * case.columns
                columns = slice(start, start + case.columns)
                old = before[t, j, columns] if case.add_inputs else 0
                output[t, j, columns] = old + delta.to(dtype)
    return output


@settings(max_examples=120)
@given(SMALL)
def test_regions_and_values_are_those_of_a_loop(expectation, clauses, case):
    assume(case.add_inputs or not case.fully_sharded)
    inputs = strategy.make_inputs(case, "cpu")
    initial, expected = expectation(oracle, inputs)
    assert expected.error is None
    output = expected.outputs["output"]
    names, numbers = by_loops(inputs, initial["output"])
    assert clauses(output) == names
    assert bool(output.values.isfinite().all())
    assert bool(output.bound.isfinite().all())
    for number, value in zip(numbers, output.values.flatten().tolist()):
        assert number is None or value == pytest.approx(number, rel=1e-12, abs=1e-11)


@settings(max_examples=120)
@given(SMALL)
def test_a_correct_kernel_is_within_the_bound(expectation, worst_ratio, case):
    assume(case.add_inputs or not case.fully_sharded)
    inputs = strategy.make_inputs(case, "cpu")
    initial, expected = expectation(oracle, inputs)
    for round_middle in (True, False):
        actual = correct_kernel(inputs, initial["output"], round_middle=round_middle)
        assert worst_ratio(actual, expected.outputs["output"]) <= 1


def test_each_kind_of_row_has_its_clause(expectation, clauses):
    inputs = strategy.make_inputs(case_with(disabled=(1,), column_offset=1, fully_sharded=True), "cpu")
    inputs.topk_ids[0, 1] = -1
    _, expected = expectation(oracle, inputs)
    rows = [clauses(expected.outputs["output"])[i : i + 9] for i in range(0, 4 * 2 * 9, 9)]
    assert {row[0] for row in rows} == {"columns_of_other_ranks"}
    assert [set(row[1:]) for row in rows] == [
        {"lora_delta"},
        {"unrouted_choice"},
        {"disabled_adapter_row"},
        {"disabled_adapter_row"},
        {"base_model_row"},
        {"base_model_row"},
        {"adapter_out_of_range_row"},
        {"adapter_out_of_range_row"},
    ]
    kept = expected.outputs["output"].mask("keep").flatten().tolist()
    assert kept == [name != "lora_delta" for row in rows for name in row]


def test_the_output_starts_from_values_only_where_they_are_added():
    inputs = strategy.make_inputs(case_with(output_gap=3), "cpu")
    spec = oracle.outputs(inputs)["output"]
    assert spec.shape == (4, 2, 8)
    assert spec.dtype == torch.float16
    assert spec.layout.row_gap == 3
    assert spec.initial.shape == spec.shape
    assert oracle.outputs(strategy.make_inputs(case_with(add_inputs=False), "cpu"))["output"].initial is None


def test_added_inputs_count(expectation):
    inputs = strategy.make_inputs(PLAIN, "cpu")
    initial, expected = expectation(oracle, inputs)
    initial["output"] += 1
    shifted = oracle.expect(inputs, initial).outputs["output"]
    written = shifted.mask("write")
    difference = (shifted.values - expected.outputs["output"].values)[written]
    assert bool((difference > 0.9).all())
    assert bool((shifted.bound > 0)[written].all())


@pytest.mark.parametrize(
    ("scale_a", "scale_b", "dtype", "overflows"),
    [
        (1.0, 1.0, "float16", False),
        (60000.0, 1.0, "float16", True),  # in the intermediate
        (1.0, 60000.0, "float16", True),  # in the result
        (60000.0, 1.0, "bfloat16", False),
    ],
)
def test_elements_that_may_overflow_are_free(expectation, clauses, scale_a, scale_b, dtype, overflows):
    case = case_with(contents="ones", dtype=dtype, batch=Batch((Segment(0, 1),)))
    inputs = strategy.make_inputs(case, "cpu")
    for a, b in zip(inputs.lora_a, inputs.lora_b):
        a *= scale_a
        b *= scale_b
    _, expected = expectation(oracle, inputs)
    assert set(clauses(expected.outputs["output"])) == {"overflow" if overflows else "lora_delta"}


def test_parts_of_the_intermediate_that_overflow_are_noticed_though_their_sum_does_not(expectation, clauses):
    case = case_with(contents="ones", hidden=8, batch=Batch((Segment(0, 1),)), fully_sharded=True)
    inputs = strategy.make_inputs(case, "cpu")
    inputs.x[:, :4], inputs.x[:, 4:] = 60000, -60000
    _, whole = expectation(oracle, inputs)
    assert set(clauses(whole.outputs["output"])) == {"lora_delta"}
    split = dataclasses.replace(case, shrink=dataclasses.replace(TILES, split_k=2))
    _, parts = expectation(oracle, dataclasses.replace(inputs, case=split))
    assert set(clauses(parts.outputs["output"])) == {"overflow"}


def test_fully_sharded_must_refuse_to_overwrite(expectation):
    _, expected = expectation(oracle, strategy.make_inputs(case_with(fully_sharded=True, add_inputs=False), "cpu"))
    assert expected.error is not None
    assert expected.error.clause == "fully_sharded_must_add_inputs"
    assert expected.outputs == {}


@pytest.mark.parametrize("wrong", ["neighbour_expert", "lost_k_tail", "lost_weight"])
def test_a_wrong_kernel_is_outside_the_bound(expectation, worst_ratio, wrong):
    case = case_with(mul_routed_weight=True, hidden=65)
    inputs = strategy.make_inputs(case, "cpu")
    initial, expected = expectation(oracle, inputs)
    if wrong == "neighbour_expert":
        inputs.topk_ids.copy_(1 - inputs.topk_ids)
    elif wrong == "lost_k_tail":
        inputs.x[:, 64:] = 0
    else:
        inputs.topk_weights.fill_(1)
    actual = correct_kernel(inputs, initial["output"], round_middle=True)
    ratio = worst_ratio(actual.nan_to_num(100.0), expected.outputs["output"])
    assert ratio > 1
