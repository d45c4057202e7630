"""Cases and tensors of moe_permute."""

import dataclasses
import json
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelfuzz.strategies import moe_permute as strategy
from kernelfuzz.strategies.case import from_json, to_json
from kernelfuzz.strategies.devices import Placement, placements
from kernelfuzz.strategies.layouts import CONTIGUOUS, Layout, plain_allocator
from kernelfuzz.strategies.routing import Routing

NARROW = strategy.cases(max_hidden_vectors=2, max_tokens=9, max_experts=12)
PLACED = strategy.cases(placement=placements("cpu"))
FEW_WAYS = {"invalid_ids": ("none",), "expert_maps": ("none",), "refusals": False}

SIMPLEST = strategy.Case(
    seed=0,
    op="permute",
    tokens=1,
    top_k=1,
    num_experts=1,
    routing=Routing(),
    expert_map="none",
    hidden=8,
    dtype="float16",
    scale_groups=0,
    ids_dtype="int32",
    scratch="none",
    earlier=(),
    spare_tokens=0,
    given_output=False,
    pass_offsets=False,
    contents="ones",
    placement=Placement(),
)


def simplest_with(**changes):
    return dataclasses.replace(SIMPLEST, **changes)


def tensors_of(inputs):
    """Return every tensor of the inputs, by name."""
    found = {}
    for field in dataclasses.fields(inputs):
        value = getattr(inputs, field.name)
        if isinstance(value, torch.Tensor):
            found[field.name] = value
        elif isinstance(value, list):
            found |= {f"{field.name}[{i}]": tensor for i, tensor in enumerate(value)}
    return found


def bytes_of(inputs):
    return {
        name: (tensor.dtype, tensor.shape, tensor.view(torch.uint8).tolist())
        for name, tensor in tensors_of(inputs).items()
    }


def is_nan(rows):
    """Return which rows are NaN throughout, and assert that no other has one; bytes are those of float8."""
    nan = rows == 0x7F if rows.dtype == torch.uint8 else rows.isnan()
    assert bool((nan.any(1) == nan.all(1)).all())
    return nan.all(1).tolist()


def test_the_simplest_case_permutes_one_token_of_one_vector(minimal):
    assert minimal(strategy.cases()) == SIMPLEST


@pytest.mark.parametrize(
    ("condition", "changes"),
    [
        (lambda case: case.op == "unpermute", {"op": "unpermute"}),
        (lambda case: case.scratch != "none", {"scratch": "metadata"}),
        (lambda case: case.scratch == "rows" and case.earlier, {"scratch": "rows", "earlier": (1,)}),
        (lambda case: case.dtype == "float32", {"dtype": "float32", "hidden": 4}),
        (lambda case: case.dtype == "float8_e4m3fn", {"dtype": "float8_e4m3fn", "hidden": 16}),
        (lambda case: case.scale_groups, {"scale_groups": 1}),
        (lambda case: case.refused, {"hidden": 1}),
        (lambda case: "wide_rows" in strategy.regimes(case) and not case.refused, {"hidden": 257 * 8}),
    ],
    ids=["unpermute", "scratch", "reused_scratch", "float32", "float8", "scale", "refused", "wide_rows"],
)
def test_one_demand_changes_nothing_else(condition, changes, minimal):
    assert minimal(strategy.cases(), condition) == simplest_with(**changes)


def test_what_may_drop_pairs_needs_offsets(minimal):
    case = minimal(strategy.cases(op=("unpermute",)), lambda case: case.expert_map != "none")
    assert case == simplest_with(op="unpermute", expert_map="identity", pass_offsets=True)


@pytest.fixture(scope="module")
def thousand(drawn):
    return drawn(PLACED, 1000, 1)


def test_1000_examples_reach_every_regime_and_no_unknown_one(thousand):
    counts = Counter(name for case in thousand for name in strategy.regimes(case))
    assert set(counts) == set(strategy.REGIMES)
    assert len(set(strategy.REGIMES)) == len(strategy.REGIMES)
    assert min(counts.values()) >= 10


def test_about_one_case_in_twenty_is_refused(thousand):
    assert 40 <= sum(case.refused for case in thousand) <= 90


def test_earlier_calls_are_larger_and_smaller(drawn):
    reused = [case for case in drawn(strategy.cases(scratch=("rows",)), 200) if case.earlier]
    assert any(max(case.earlier) > case.tokens for case in reused)
    assert any(max(case.earlier) < case.tokens for case in reused)
    assert {len(case.earlier) for case in reused} == {1, 2, 3}
    assert all(case.scratch_tokens == max(case.tokens, *case.earlier) + case.spare_tokens for case in reused)


@settings(max_examples=300)
@given(PLACED)
def test_every_case_is_legal_and_survives_json(case):
    assert from_json(strategy.Case, json.loads(json.dumps(to_json(case)))) == case
    permute = case.op == "permute"
    assert 1 <= case.tokens <= 80
    assert 1 <= case.top_k <= 8
    assert 1 <= case.num_experts <= 160
    assert case.row_bytes <= 260 * 16
    assert case.refused == (case.row_bytes % 16 != 0)
    if not permute:
        assert case.dtype != "float8_e4m3fn"
        assert case.scale_groups == 0
        assert case.scratch == "none"
        assert case.pass_offsets or (case.expert_map == "none" and case.routing.invalid == "none")
    assert not (case.pass_offsets and permute)
    assert not (case.given_output and (not permute or case.scratch == "rows"))
    assert case.scratch != "none" or (case.earlier == () and case.spare_tokens == 0)


@settings(max_examples=60)
@given(
    strategy.cases(
        op=("permute",),
        dtype=("bfloat16",),
        style=("signed",),
        scratch=("metadata",),
        expert_maps=("holes",),
        invalid_ids=("beyond",),
        refusals=False,
        max_tokens=3,
        max_top_k=2,
        max_experts=5,
        max_hidden_vectors=2,
    )
)
def test_narrowed(case):
    assert (case.op, case.dtype, case.contents, case.scratch) == ("permute", "bfloat16", "signed", "metadata")
    assert (case.expert_map, case.routing.invalid, case.refused) == ("holes", "beyond", False)
    assert 1 <= case.tokens <= 3
    assert all(1 <= tokens <= 3 for tokens in case.earlier)
    assert case.top_k <= 2
    assert case.num_experts <= 5
    assert case.hidden in (8, 16)


@settings(max_examples=60)
@given(strategy.cases(**strategy.SMALL))
def test_small_cases_are_small(case):
    assert case.tokens <= 2
    assert case.num_experts <= 3
    assert case.row_bytes <= 32


@settings(max_examples=100)
@given(NARROW)
def test_the_same_case_gives_the_same_bits_from_distinct_names(case):
    asked = []

    def allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout = CONTIGUOUS) -> torch.Tensor:
        assert layout == CONTIGUOUS
        asked.append(name)
        return plain_allocator("cpu")(name, shape, dtype, layout)

    first, second = strategy.make_inputs(case, "cpu", allocate), strategy.make_inputs(case, "cpu")
    assert bytes_of(first) == bytes_of(second)
    assert len(asked) == len(set(asked)) == len(tensors_of(first))
    assert all(tensor.is_contiguous() for tensor in tensors_of(first).values())


def local_experts(case, mapping):
    """Return where the expert of each pair lives, or None, from the routing itself."""
    ids = case.routing.expert_ids(case.tokens, case.top_k, case.num_experts, case.seed, "cpu").flatten().tolist()
    local = [expert if 0 <= expert < case.num_experts else -1 for expert in ids]
    if mapping is not None:
        local = [mapping[expert] if expert >= 0 else -1 for expert in local]
    return [None if expert < 0 else expert for expert in local]


@settings(max_examples=150)
@given(strategy.cases(op=("permute",), max_hidden_vectors=2, max_tokens=9, max_experts=12))
def test_what_is_permuted(case):
    inputs = strategy.make_inputs(case, "cpu")
    mapping = None if inputs.expert_map is None else inputs.expert_map.tolist()
    local = local_experts(case, mapping)
    fp8 = case.dtype == "float8_e4m3fn"
    assert inputs.x.dtype == (torch.uint8 if fp8 else getattr(torch, case.dtype))
    assert inputs.x.shape == (case.tokens, case.hidden)
    assert inputs.topk_ids.dtype == getattr(torch, case.ids_dtype)
    assert inputs.topk_ids.shape == (case.tokens, case.top_k)
    assert (mapping is None) == (case.expert_map == "none")
    lives_here = case.num_experts if mapping is None else max(1, sum(place >= 0 for place in mapping))
    assert inputs.num_local_experts == lives_here
    unrouted = [all(expert is None for expert in local[t * case.top_k :][: case.top_k]) for t in range(case.tokens)]
    assert is_nan(inputs.x) == unrouted
    assert (inputs.scale is None) == (case.scale_groups == 0)
    if inputs.scale is not None:
        assert inputs.scale.dtype == torch.float32
        assert inputs.scale.shape == (case.tokens, case.scale_groups)
        assert is_nan(inputs.scale) == unrouted
    assert [x.shape for x in inputs.earlier_x] == [(tokens, case.hidden) for tokens in case.earlier]
    assert [ids.shape for ids in inputs.earlier_topk_ids] == [(tokens, case.top_k) for tokens in case.earlier]
    for x, ids in zip(inputs.earlier_x, inputs.earlier_topk_ids):
        assert (x.dtype, ids.dtype) == (inputs.x.dtype, inputs.topk_ids.dtype)
        assert not any(is_nan(x))


@settings(max_examples=150)
@given(strategy.cases(op=("unpermute",), max_hidden_vectors=2, max_tokens=9, max_experts=12))
def test_what_is_unpermuted(case):
    inputs = strategy.make_inputs(case, "cpu")
    mapping = strategy.expert_map(case.expert_map, case.num_experts, case.seed, "cpu")
    local = local_experts(case, None if mapping is None else mapping.tolist())
    valid = [pair for pair, expert in enumerate(local) if expert is not None]
    in_order = sorted(valid, key=lambda pair: (local[pair], pair))
    assert inputs.rows.dtype == getattr(torch, case.dtype)
    assert inputs.rows.shape == (case.pairs, case.hidden)
    assert is_nan(inputs.rows) == [row >= len(valid) for row in range(case.pairs)]
    assert inputs.inverse.dtype == torch.int32
    inverse = inputs.inverse.tolist()
    assert sorted(inverse) == list(range(case.pairs))
    assert [inverse[pair] for pair in in_order] == list(range(len(valid)))
    assert (inputs.offsets is None) == (not case.pass_offsets)
    if inputs.offsets is None:
        assert len(valid) == case.pairs
    else:
        assert inputs.offsets.dtype == torch.int64
        assert inputs.offsets.tolist() == [
            sum(local[pair] < expert for pair in valid) for expert in range(inputs.num_local_experts + 1)
        ]
    assert inputs.topk_weights.dtype == torch.float32
    assert inputs.topk_weights.shape == (case.tokens, case.top_k)


def test_a_map_without_local_experts_leaves_one_place_and_no_valid_pair():
    cases = [simplest_with(seed=seed, expert_map="holes") for seed in range(20)]
    every = [strategy.make_inputs(case, "cpu") for case in cases]
    assert {inputs.num_local_experts for inputs in every} == {1}
    homeless = next(inputs for inputs in every if inputs.expert_map.tolist() == [-1])
    assert is_nan(homeless.x) == [True]


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_pairs_are_sorted_stably_and_invalid_ones_last(ids_dtype):
    topk_ids = torch.tensor([[2, -1], [0, 2], [3, 0]], dtype=ids_dtype)
    pairs = strategy.sorted_pairs(topk_ids, None, 3, 3)
    assert pairs.valid.tolist() == [True, False, True, True, False, True]
    assert pairs.source.tolist() == [2, 5, 0, 3, 1, 4]
    assert pairs.inverse.tolist() == [2, 4, 0, 3, 5, 1]
    assert pairs.offsets.tolist() == [0, 2, 2, 4]
    mapped = strategy.sorted_pairs(topk_ids, torch.tensor([1, 0, -1], dtype=torch.int32), 3, 2)
    assert mapped.source[:2].tolist() == [2, 5]
    assert mapped.offsets.tolist() == [0, 0, 2]


@settings(max_examples=30)
@given(strategy.cases(op=("unpermute",), **FEW_WAYS), st.booleans())
def test_contents_depend_on_the_seed(case, more):
    other = dataclasses.replace(case, seed=case.seed ^ (1 + more), contents="signed")
    case = dataclasses.replace(case, contents="signed")
    rows, others = (strategy.make_inputs(each, "cpu").rows for each in (case, other))
    assert not torch.equal(rows, others)
