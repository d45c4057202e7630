"""Huge cases: which offsets cross the limit, how much memory they take, and what they keep of an ordinary case."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelfuzz.strategies import fused_moe_lora, huge, lora_shrink_expand
from kernelfuzz.strategies.batches import BASE, Batch, Segment
from kernelfuzz.strategies.case import from_json, to_json
from kernelfuzz.strategies.layouts import CONTIGUOUS, Layout, plain_allocator

TARGETS = (fused_moe_lora, lora_shrink_expand)
SMALL = 2**16


def each_target(function):
    return pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.Case.target)(function)


def huge_tensor(case):
    """Which tensor is the huge one: the only one of more than 10^8 elements."""
    if case.input_layout.row_gap > 10**7:
        return "input"
    if case.target == "lora_shrink_expand":
        return "weights"
    if case.output_gap > 10**7:
        return "output"
    return "lora_a" if case.hidden > case.columns else "lora_b"


def crossing(case):
    """What takes the farthest offset beyond 2^31 that a served pair leads to: the row, adapter or expert alone, a sum,
    or an element inside; or nothing does."""
    adapters, layout = case.batch.token_adapters(), case.input_layout
    if case.target == "fused_moe_lora":
        experts = case.routing.expert_ids(case.size, case.top_k, case.num_experts, case.seed, "cpu")
        served = fused_moe_lora.served_tokens(case)[:, None] & (experts >= 0)
        input_served = served.flatten() if case.mul_routed_weight else served.any(1)
        output = (Layout(row_gap=case.output_gap), served.flatten(), case.output_columns)
        matrix = case.rank * max(case.hidden, case.columns)
        adapter_starts = (adapters[:, None] * case.num_experts * matrix).expand(served.shape)[served]
        expert_starts = (experts * matrix)[served]
        columns = case.hidden
    else:
        input_served = (adapters != BASE).repeat(1 if case.op == "shrink" else len(case.widths))
        matrix = case.rank * max(case.hidden, *case.widths)
        adapter_starts = adapters[adapters != BASE] * matrix
        expert_starts = torch.zeros_like(adapter_starts)
        columns = case.hidden if case.op == "shrink" else case.rank
    match huge_tensor(case):
        case "input":
            return row_crossing(layout, input_served, columns)
        case "output":
            return row_crossing(*output)
    if adapter_starts.numel() == 0:
        return "nothing"
    if (adapter_starts >= huge.BEYOND).any():
        return "adapter"
    if (expert_starts >= huge.BEYOND).any():
        return "expert"
    starts = adapter_starts + expert_starts
    if (starts >= huge.BEYOND).any():
        return "sum"
    return "element" if (starts + matrix > huge.BEYOND).any() else "nothing"


def row_crossing(layout, served, columns):
    rows = served.nonzero().flatten()
    if rows.numel() == 0:
        return "nothing"
    start = int(rows[-1]) * layout.strides((served.numel(), columns))[0]
    if start >= huge.BEYOND:
        return "row"
    return "element" if start + columns * layout.step > huge.BEYOND else "nothing"


@pytest.fixture(scope="module")
def full_size(drawn):
    """Cases of the true size, by target: structures, no tensors."""
    return {target: drawn(target.huge_cases(), 1500) for target in TARGETS}


@pytest.mark.parametrize(
    ("target", "tensor", "ways"),
    [
        (fused_moe_lora, "lora_a", {"adapter", "sum"}),
        (fused_moe_lora, "lora_b", {"adapter", "sum"}),
        (fused_moe_lora, "input", {"row", "element"}),
        (fused_moe_lora, "output", {"row", "element"}),
        (lora_shrink_expand, "weights", {"adapter"}),
        (lora_shrink_expand, "input", {"row", "element"}),
    ],
)
def test_offsets_cross_in_many_cases_and_stay_just_below_in_some(target, tensor, ways, full_size):
    counts = Counter(crossing(case) for case in full_size[target] if huge_tensor(case) == tensor)
    assert ways | {"nothing"} <= set(counts)
    assert counts["nothing"] < counts.total() * 2 / 3
    assert counts.total() > len(full_size[target]) / 8


def test_the_offset_of_an_expert_crosses_alone_with_one_adapter(full_size):
    found = [case for case in full_size[fused_moe_lora] if crossing(case) == "expert"]
    assert found
    assert {case.num_adapters for case in found} == {1}


@each_target
def test_cases_fit_in_memory_and_touch_little(target, full_size):
    for case in full_size[target]:
        assert 2 * huge.BEYOND < target.huge_bytes(case) <= huge.MOST_BYTES
        assert 2 <= case.size <= 4
        assert case.batch.segments[-1].adapter == case.num_adapters - 1
        assert from_json(target.Case, to_json(case)) == case


@each_target
def test_the_memory_that_tensors_take_is_counted(target, drawn):
    beyond = 2**22  # several weights, so that one more or less is not half of it
    for case in drawn(target.huge_cases(beyond=beyond), 100):
        taken = 0

        def allocate(name, shape, dtype, layout=CONTIGUOUS):
            nonlocal taken
            taken += layout.extent(shape) * dtype.itemsize
            return plain_allocator("cpu")(name, shape, dtype, layout)

        target.make_inputs(case, "cpu", allocate)
        if target is fused_moe_lora:
            taken += Layout(row_gap=case.output_gap).extent((case.pairs, case.output_columns)) * 2
        assert taken <= target.huge_bytes(case)
        # Without what is added for the oracle and for small tensors it is still most of it.
        assert taken >= 2 * beyond * 0.8


@pytest.mark.parametrize("tensor", ["x", "lora_a", "lora_b"])
def test_elements_beyond_the_limit_are_used(tensor, drawn):
    def used_beyond(case):
        inputs = fused_moe_lora.make_inputs(case, "cpu")
        values = inputs.x if tensor == "x" else getattr(inputs, tensor)[0]
        places = (~values.isnan()).nonzero() @ torch.tensor(values.stride())
        return bool((places >= SMALL).any())

    cases = drawn(fused_moe_lora.huge_cases(beyond=SMALL), 200)
    assert sum(map(used_beyond, cases)) >= 20


@each_target
def test_the_simplest_case_has_three_tokens_of_the_last_adapter(target, minimal):
    case = minimal(target.huge_cases(beyond=SMALL))
    assert case.seed == 0
    assert case.size == 3
    assert case.contents == "ones"
    assert set(case.batch.active()) == {case.num_adapters - 1}


@settings(max_examples=60)
@given(fused_moe_lora.huge_cases(beyond=SMALL, dtype=("bfloat16",), add_inputs=(True,), aligned=(True,)))
def test_fused_moe_lora_narrowed(case):
    assert case.dtype == "bfloat16"
    assert case.add_inputs
    assert case.aligned


@settings(max_examples=60)
@given(lora_shrink_expand.huge_cases(beyond=SMALL, op=("expand",), float32_input=(False,)))
def test_lora_expand_narrowed(case):
    assert case.op == "expand"
    assert not case.float32_input


@given(fused_moe_lora.huge_cases(beyond=SMALL))
def test_what_must_be_refused_is_not_drawn(case):
    assert "refused_overwrite" not in fused_moe_lora.regimes(case)


@given(st.integers(2, 12), st.integers(1, 300), st.integers(5_000, 2**40), st.data())
def test_the_last_row_begins_around_the_limit(rows, extent, beyond, data):
    gap = data.draw(huge.row_gaps(rows, extent, beyond))
    assert abs((rows - 1) * (extent + gap) - beyond) <= (rows - 1) * (extent + 1)


@given(st.integers(1, 2**22), st.integers(1, 4), st.data())
def test_stacks_are_just_beyond_the_limit_or_just_below(matrix, least_adapters, data):
    adapters, experts = data.draw(huge.stacks(matrix, huge.BEYOND, least_adapters))
    assert adapters >= least_adapters
    assert experts >= 1
    surplus = adapters * experts * matrix - huge.BEYOND
    assert -adapters * matrix < surplus <= (adapters + experts + 1) * matrix


def test_the_last_adapters_keep_their_order_and_the_base_model_its_place():
    batch = Batch((Segment(0, 2), Segment(BASE, 1), Segment(1, 1), Segment(2, 3)))
    assert huge.last_adapters(batch, 2, 40) == Batch(
        (Segment(38, 2), Segment(BASE, 1), Segment(39, 1), Segment(40, 3), Segment(39, 2))
    )


def test_the_largest_weights_are_as_wide_as_real_ones():
    assert 40_000 < huge.side(huge.BEYOND) < 65_536
    assert math.isqrt(SMALL) == huge.side(SMALL)
