"""The four targets' cases: what is simplest, what arguments narrow, and which regimes are reached."""

from collections import Counter

import pytest
from hypothesis import given, settings

from kernelfuzz.strategies import bgmv, fused_moe_lora, lora_shrink_expand, moe_lora_align
from kernelfuzz.strategies.batches import BASE, Batch, Segment
from kernelfuzz.strategies.layouts import CONTIGUOUS
from kernelfuzz.strategies.routing import Routing

TARGETS = (fused_moe_lora, lora_shrink_expand, bgmv, moe_lora_align)
ONE_TOKEN = Batch((Segment(0, 1),))

# What a person expects of the simplest case of each target; fields that only choose among equals are left out.
SIMPLEST = {
    fused_moe_lora: {
        "disabled": (),
        "num_experts": 1,
        "top_k": 1,
        "routing": Routing(),
        "hidden": 1,
        "rank": 1,
        "columns": 1,
        "slices": 1,
        "contents": "ones",
        "path": "small_batch",
        "mul_routed_weight": False,
        "column_offset": 0,
        "input_layout": CONTIGUOUS,
        "output_gap": 0,
    },
    lora_shrink_expand: {
        "op": "shrink",
        "hidden": 1,
        "rank": 1,
        "widths": (1,),
        "contents": "ones",
        "scale": 1.0,
        "split_k": 1,
        "input_layout": CONTIGUOUS,
    },
    bgmv: {
        "layer": "wrapper",
        "op": "shrink",
        "width": 1,
        "rows": 1,
        "columns": 1,
        "contents": "ones",
        "scale": 1.0,
        "accumulate": False,
        "refusal": None,
    },
    moe_lora_align: {
        "disabled": (),
        "num_experts": 1,
        "top_k": 1,
        "routing": Routing(),
        "expert_map": "none",
        "block_size": 16,
    },
}


def each_target(function):
    return pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.Case.target)(function)


def fields(case, names):
    return {name: getattr(case, name) for name in names}


def two_adapters_and_base(case):
    active = case.batch.active()
    return BASE in active and len(active) > 2


@each_target
def test_the_simplest_case_is_one_token_and_ones(target, minimal):
    case = minimal(target.cases())
    assert case.seed == 0
    assert case.batch == ONE_TOKEN
    assert case.num_adapters == 1
    assert fields(case, SIMPLEST[target]) == SIMPLEST[target]


@each_target
def test_the_simplest_mixed_case_has_three_tokens_and_is_simplest_otherwise(target, minimal):
    case = minimal(target.cases(), two_adapters_and_base)
    assert sorted(segment.adapter for segment in case.batch.segments) == [BASE, 0, 1]
    assert case.batch.num_tokens == 3
    assert fields(case, SIMPLEST[target]) == SIMPLEST[target]


@pytest.mark.parametrize(
    ("target", "condition", "changed"),
    [
        (fused_moe_lora, lambda case: case.path == "one_shot" and not case.aligned, {"rank": 65, "path": "one_shot"}),
        (lora_shrink_expand, lambda case: len(set(case.widths)) > 1, {"op": "expand", "widths": (1, 2)}),
        (bgmv, lambda case: case.op == "expand" and case.rows > case.columns, {"op": "expand", "rows": 2}),
        (bgmv, lambda case: case.op == "expand" and case.rows < case.columns, {"op": "expand", "columns": 2}),
        (moe_lora_align, lambda case: 64 < case.num_experts < 993, {"num_experts": 65}),
    ],
    ids=["one_shot", "unequal_slices", "truncated_weights", "padded_columns", "many_experts"],
)
def test_one_demand_changes_nothing_else(target, condition, changed, minimal):
    case = minimal(target.cases(), condition)
    wanted = SIMPLEST[target] | changed
    assert case.batch == ONE_TOKEN
    assert fields(case, wanted) == wanted


@each_target
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_500_examples_reach_every_regime_and_no_unknown_one(target, seed, drawn):
    counts = Counter(name for case in drawn(target.cases(), 500, seed) for name in target.regimes(case))
    assert set(counts) == set(target.REGIMES)
    assert len(set(target.REGIMES)) == len(target.REGIMES)


def fits(batch, *, max_segments, max_length):
    return len(batch.segments) <= max_segments and all(segment.length <= max_length for segment in batch.segments)


@settings(max_examples=60)
@given(
    fused_moe_lora.cases(
        dtype=("bfloat16",),
        add_inputs=(True,),
        max_rank=8,
        max_hidden=20,
        max_columns=9,
        max_segments=2,
        max_length=3,
    )
)
def test_fused_moe_lora_narrowed(case):
    assert case.dtype == "bfloat16"
    assert case.add_inputs
    assert 1 <= case.rank <= 8
    assert 1 <= case.hidden <= 20
    assert 1 <= case.columns <= 9
    assert fits(case.batch, max_segments=2, max_length=3)


@settings(max_examples=60)
@given(
    lora_shrink_expand.cases(
        op=("expand",), dtype=("float16",), max_rank=8, max_hidden=20, max_columns=9, max_segments=2, max_length=3
    )
)
def test_lora_expand_narrowed(case):
    assert case.op == "expand"
    assert case.dtype == "float16"
    assert 1 <= case.rank <= 8
    assert all(1 <= width <= 9 for width in case.widths)
    assert fits(case.batch, max_segments=2, max_length=3)


@settings(max_examples=60)
@given(lora_shrink_expand.cases(op=("shrink",), max_hidden=20))
def test_lora_shrink_narrowed(case):
    assert case.op == "shrink"
    assert 1 <= case.hidden <= 20


@settings(max_examples=100)
@given(
    bgmv.cases(
        layer=("operator",),
        op=("shrink", "expand_slice"),
        dtype=("float16",),
        accumulating_shrink=(True,),
        max_rank=8,
        max_hidden=20,
        max_columns=9,
        max_segments=2,
        max_length=3,
    )
)
def test_bgmv_narrowed(case):
    assert case.layer == "operator"
    assert case.op in ("shrink", "expand_slice")
    assert case.dtype == "float16"
    assert fits(case.batch, max_segments=2, max_length=3)
    if case.op == "shrink":
        assert case.accumulate
        assert 1 <= case.width <= 20
        assert 1 <= case.rows <= 8
    else:
        assert 1 <= case.width <= 8
        assert 1 <= case.rows <= 9


@settings(max_examples=60)
@given(
    moe_lora_align.cases(
        max_experts=8,
        max_segments=2,
        max_length=3,
        block_size=(4, 7),
        expert_maps=("holes",),
        refusals=False,
    )
)
def test_moe_lora_align_narrowed(case):
    assert 1 <= case.num_experts <= 8
    assert case.block_size in (4, 7)
    assert case.expert_map == "holes"
    assert fits(case.batch, max_segments=2, max_length=3)
    assert "refused" not in moe_lora_align.regimes(case)
