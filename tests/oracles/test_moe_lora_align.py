"""The oracle of moe_lora_align against plain loops."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelfuzz.oracles import moe_lora_align as oracle
from kernelfuzz.strategies import moe_lora_align as strategy
from kernelfuzz.strategies.batches import BASE, Batch, Segment
from kernelfuzz.strategies.contents import seeds
from kernelfuzz.strategies.layouts import plain_allocator
from kernelfuzz.strategies.routing import Routing

OUTPUTS = ("sorted_token_ids", "expert_ids", "num_tokens_post_pad")
SMALL = strategy.cases(max_experts=12, max_length=8, refusals=False)

PLAIN = strategy.Case(
    seed=1,
    batch=Batch((Segment(0, 3), Segment(BASE, 1), Segment(1, 1), Segment(3, 1))),
    num_adapters=3,
    disabled=(),
    descending_ids=False,
    num_experts=2,
    top_k=2,
    routing=Routing("uniform"),
    expert_map="none",
    block_size=4,
    rounded_capacity=True,
    ids_dtype="int32",
)


def case_with(**changes):
    return dataclasses.replace(PLAIN, **changes)


def local_expert(inputs, expert):
    """Return where an expert lives here, or -1."""
    if not 0 <= expert < inputs.case.num_experts:
        return -1
    return expert if inputs.expert_map is None else int(inputs.expert_map[expert])


def row_by_loops(inputs, adapter):
    """Return one adapter's (group, token) entries, its blocks' experts, and its padded total."""
    case = inputs.case
    members = {expert: [] for expert in range(case.num_experts)}
    for pair, expert in enumerate(inputs.topk_ids.flatten().tolist()):
        local = local_expert(inputs, expert)
        if int(inputs.token_adapters[pair // case.top_k]) == adapter and local >= 0:
            members[local].append(pair)
    tokens, experts = [], []
    for expert, pairs in members.items():
        blocks = -(-len(pairs) // case.block_size)
        tokens += [(expert, pair) for pair in pairs]
        tokens += [(expert, case.pairs)] * (blocks * case.block_size - len(pairs))
        experts += [expert] * blocks
    total = len(tokens)
    tokens += [("unused", case.pairs)] * (case.capacity - total)
    return tokens, experts + [-1] * (case.max_blocks - len(experts)), total


@settings(max_examples=200)
@given(SMALL)
def test_rows_are_those_of_a_loop(expectation, clauses, case):
    inputs = strategy.make_inputs(case, "cpu")
    _, expected = expectation(oracle, inputs)
    assert expected.error is None
    assert tuple(expected.outputs) == OUTPUTS
    sorted_ids, experts, totals = (expected.outputs[name] for name in OUTPUTS)
    active = set(inputs.token_adapters.tolist())
    seen_groups = set()
    for adapter in range(case.num_adapters):
        row = slice(adapter * case.capacity, (adapter + 1) * case.capacity)
        blocks = slice(adapter * case.max_blocks, (adapter + 1) * case.max_blocks)
        name = "active_adapter_row" if adapter in active else "inactive_adapter_row"
        if adapter in active and adapter in case.disabled:
            name = "disabled_adapter_row"
        found = {*clauses(sorted_ids)[row], *clauses(experts)[blocks], clauses(totals)[adapter]}
        assert found == {name}
        if name != "active_adapter_row":
            continue
        wanted_tokens, wanted_experts, total = row_by_loops(inputs, adapter)
        assert int(totals.values[adapter]) == total
        assert experts.values[blocks].tolist() == wanted_experts
        # The same label for the same group and no other, in this row and no other.
        groups, labels = sorted_ids.groups[row].tolist(), [group for group, _ in wanted_tokens]
        assert len(set(zip(groups, labels))) == len(set(groups)) == len(set(labels))
        assert not seen_groups & set(groups)
        seen_groups |= set(groups)
        assert sorted(zip(groups, sorted_ids.values[row].tolist())) == sorted(
            zip(groups, (token for _, token in wanted_tokens))
        )


@settings(max_examples=150)
@given(SMALL, st.lists(seeds(), min_size=1, max_size=4))
def test_a_stack_expects_of_each_item_what_its_case_expects_alone(expectation, case, several):
    stack = strategy.make_inputs(case, "cpu", seeds=several)
    _, together = expectation(oracle, stack)
    assert together.error is None
    groups = []
    for i in range(len(several)):
        _, alone = expectation(oracle, stack.item(i))
        for name in OUTPUTS:
            item, single = together.outputs[name], alone.outputs[name]
            assert item.values[i].shape == item.region[i].shape == single.values.shape
            assert item.clauses == single.clauses
            assert item.region[i].tolist() == single.region.tolist()
            assert item.values[i].tolist() == single.values.tolist()
        groups += [(i, group) for group in alone.outputs["sorted_token_ids"].groups.tolist()]
    # The same number for the same group of the same seed, and for no other.
    numbers = together.outputs["sorted_token_ids"].groups.flatten().tolist()
    assert len(set(zip(numbers, groups))) == len(set(numbers)) == len(set(groups))


@settings(max_examples=60)
@given(SMALL, st.integers(2, 5))
def test_outputs_of_a_stack_lie_apart(case, count):
    stack = strategy.make_inputs(case, "cpu", seeds=range(count))
    alone = oracle.outputs(stack.item(0))
    for name, spec in oracle.outputs(stack).items():
        length = alone[name].shape[0]
        assert spec.shape == (count, length)
        assert spec.dtype == alone[name].dtype
        output = plain_allocator("cpu")(name, spec.shape, spec.dtype, spec.layout)
        assert all(item.is_contiguous() for item in output)
        if length:
            assert output.stride(0) - length >= 128
            assert output.stride(0) * output.itemsize % 64 == 0


def test_disabled_inactive_and_out_of_range_adapters_keep_their_rows(expectation, clauses):
    _, expected = expectation(oracle, strategy.make_inputs(case_with(disabled=(1,)), "cpu"))
    for name in OUTPUTS:
        output = expected.outputs[name]
        rows = [set(row) for row in zip(*[iter(clauses(output))] * (output.region.numel() // 3))]
        assert rows == [{"active_adapter_row"}, {"disabled_adapter_row"}, {"inactive_adapter_row"}]
        assert output.mask("write").tolist() == [name == "active_adapter_row" for name in clauses(output)]
        assert output.bound is None


def test_pairs_with_an_invalid_expert_are_dropped(expectation):
    inputs = strategy.make_inputs(PLAIN, "cpu")
    inputs.topk_ids.copy_(torch.tensor([[0, 1], [-1, 2], [1, 1000], [0, 0], [0, 0], [0, 0]]))
    _, expected = expectation(oracle, inputs)
    row = expected.outputs["sorted_token_ids"].values[: PLAIN.capacity].tolist()
    assert row[:8] == [0, 12, 12, 12, 1, 4, 12, 12]
    assert set(row[8:]) == {12}
    assert expected.outputs["num_tokens_post_pad"].values[0] == 8
    assert expected.outputs["expert_ids"].values[: PLAIN.max_blocks].tolist()[:3] == [0, 1, -1]


def test_an_expert_map_gives_local_ids(expectation):
    inputs = strategy.make_inputs(case_with(expert_map="identity"), "cpu")
    inputs.topk_ids.zero_()
    inputs.expert_map.copy_(torch.tensor([1, -1]))
    _, expected = expectation(oracle, inputs)
    assert expected.outputs["expert_ids"].values[:2].tolist() == [1, 1]
    inputs.expert_map.copy_(torch.tensor([-1, 0]))
    _, expected = expectation(oracle, inputs)
    assert expected.outputs["expert_ids"].values[:2].tolist() == [-1, -1]
    assert expected.outputs["num_tokens_post_pad"].values[0] == 0


def test_output_shapes(expectation):
    case = case_with(rounded_capacity=False)
    specs = oracle.outputs(strategy.make_inputs(case, "cpu"))
    assert case.capacity == 12 + 2 * 3
    assert {name: spec.shape for name, spec in specs.items()} == {
        "sorted_token_ids": (3 * 18,),
        "expert_ids": (3 * 5,),
        "num_tokens_post_pad": (3,),
    }
    assert {spec.dtype for spec in specs.values()} == {torch.int32}
    assert all(spec.initial is None for spec in specs.values())


@pytest.mark.parametrize(
    ("changes", "clause", "text"),
    [
        ({"block_size": 0}, "block_size_is_positive", "block_size should be greater than 0"),
        ({"block_size": -1}, "block_size_is_positive", "block_size should be greater than 0"),
        ({"num_experts": 993}, "at_most_992_experts", "padded_num_experts must be less than 1024"),
    ],
)
def test_bad_arguments_must_be_refused(expectation, changes, clause, text):
    case = case_with(**changes)
    for inputs in (strategy.make_inputs(case, "cpu"), strategy.make_inputs(case, "cpu", seeds=(1, 2))):
        _, expected = expectation(oracle, inputs)
        assert expected.error is not None
        assert expected.error.clause == clause
        assert expected.error.text == text
    assert "refused" in strategy.regimes(case)


def test_992_experts_are_legal(expectation):
    case = case_with(num_experts=992)
    _, expected = expectation(oracle, strategy.make_inputs(case, "cpu"))
    assert expected.error is None
    assert "refused" not in strategy.regimes(case)
