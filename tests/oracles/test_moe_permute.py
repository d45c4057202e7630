"""The oracle of moe_permute against plain loops."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kernelfuzz.fuzz.verdict import judge_output
from kernelfuzz.oracles import moe_permute as oracle
from kernelfuzz.strategies import moe_permute as strategy
from kernelfuzz.strategies.routing import Routing

NARROW = {"max_tokens": 9, "max_experts": 12, "max_hidden_vectors": 2, "refusals": False}
PERMUTE = strategy.cases(op=("permute",), **NARROW)
UNPERMUTE = strategy.cases(op=("unpermute",), **NARROW)

# Pairs 0 to 7 go to the experts 2, none, 0, 2, 1, 0, none, none.
IDS = torch.tensor([[2, -1], [0, 2], [1, 0], [3, 1000]], dtype=torch.int32)
PLAIN = strategy.Case(
    seed=1,
    op="permute",
    tokens=4,
    top_k=2,
    num_experts=3,
    routing=Routing("uniform"),
    expert_map="none",
    hidden=8,
    dtype="float16",
    scale_groups=2,
    ids_dtype="int32",
    scratch="none",
    earlier=(),
    spare_tokens=0,
    given_output=False,
    pass_offsets=False,
    contents="signed",
)
JUNK = {"permuted": 7, "permuted_scale": 7, "permuted_idx": -99}


def case_with(**changes):
    return dataclasses.replace(PLAIN, **changes)


def plain_inputs(**changes):
    """Return the inputs of the plain case, routed by IDS."""
    inputs = strategy.make_inputs(case_with(**changes), "cpu")
    inputs.topk_ids.copy_(IDS)
    return inputs


def local_expert(inputs, expert):
    """Return where an expert lives here, or -1."""
    if not 0 <= expert < inputs.case.num_experts:
        return -1
    return expert if inputs.expert_map is None else int(inputs.expert_map[expert])


def permuted_by_loops(inputs, *, reverse_rest=False):
    """Return what a correct permute writes, and how many rows have an expert."""
    case = inputs.case
    members = {expert: [] for expert in range(inputs.num_local_experts)}
    rest = []
    for pair, expert in enumerate(inputs.topk_ids.flatten().tolist()):
        local = local_expert(inputs, expert)
        (members[local] if local >= 0 else rest).append(pair)
    offsets = [0]
    for pairs in members.values():
        offsets.append(offsets[-1] + len(pairs))
    order = [pair for pairs in members.values() for pair in pairs] + (rest[::-1] if reverse_rest else rest)
    written = {
        "permuted": torch.stack([inputs.x[pair // case.top_k] for pair in order]),
        "offsets": torch.tensor(offsets),
        "inverse": torch.tensor([order.index(pair) for pair in range(case.pairs)], dtype=torch.int32),
        "permuted_idx": torch.tensor(order, dtype=torch.int32),
    }
    if inputs.scale is not None:
        written["permuted_scale"] = torch.stack([inputs.scale[pair // case.top_k] for pair in order])
    return written, offsets[-1]


def unpermuted_by_loops(inputs):
    """Return the exact sums, [T, H] as nested lists, and which tokens have an expert."""
    case = inputs.case
    count = case.pairs if inputs.offsets is None else int(inputs.offsets[-1])
    rows, weights, inverse = inputs.rows.tolist(), inputs.topk_weights.tolist(), inputs.inverse.tolist()
    sums, served = [], []
    for token in range(case.tokens):
        places = [(j, inverse[token * case.top_k + j]) for j in range(case.top_k)]
        kept = [(weights[token][j], rows[place]) for j, place in places if place < count]
        sums.append([sum(weight * row[column] for weight, row in kept) for column in range(case.hidden)])
        served.append(bool(kept))
    return sums, served


def unpermuted_in_float32(inputs):
    """Return what a correct unpermute writes: sums in float32 in the order of the choices, rounded once."""
    case = inputs.case
    count = case.pairs if inputs.offsets is None else int(inputs.offsets[-1])
    output = torch.zeros(case.tokens, case.hidden)
    for token in range(case.tokens):
        for j in range(case.top_k):
            place = int(inputs.inverse[token * case.top_k + j])
            if place < count:
                output[token] += inputs.topk_weights[token, j] * inputs.rows[place].float()
    return output.to(inputs.rows.dtype)


def judged(expectation, inputs, written):
    """Return (kind, output, clause) of every failure that the engine finds in what was written."""
    initial, expected = expectation(oracle, inputs)
    assert expected.error is None
    assert set(written) == set(expected.outputs)
    found = []
    for name, actual in written.items():
        assert actual.shape == initial[name].shape
        assert actual.dtype == initial[name].dtype
        failures, ratio = judge_output(name, actual, initial[name], expected.outputs[name], from_sentinel=False)
        assert failures or ratio <= 1
        found += [(failure.kind, failure.output, failure.clause) for failure in failures]
    return found


@settings(max_examples=200)
@given(PERMUTE, st.booleans())
def test_a_loop_permutes_as_expected(expectation, case, reverse_rest):
    inputs = strategy.make_inputs(case, "cpu")
    written, count = permuted_by_loops(inputs, reverse_rest=reverse_rest)
    # What has no expert may hold anything, but for the positions, which the loop's other order has changed.
    for name in set(written) & set(JUNK):
        written[name][count:] = JUNK[name]
    assert judged(expectation, inputs, written) == []


@settings(max_examples=200)
@given(PERMUTE)
def test_clauses_of_a_permutation(expectation, clauses, case):
    inputs = strategy.make_inputs(case, "cpu")
    _, expected = expectation(oracle, inputs)
    written, count = permuted_by_loops(inputs)
    without = case.pairs - count
    for name, with_expert in (
        ("permuted", "valid_row"),
        ("permuted_idx", "source_pair"),
        ("permuted_scale", "valid_row"),
    ):
        if name in expected.outputs:
            width = written[name][0].numel()
            names = [with_expert] * count * width + ["row_without_expert"] * without * width
            assert clauses(expected.outputs[name]) == names
            assert expected.outputs[name].mask("free").sum() == without * width
    assert set(clauses(expected.outputs["offsets"])) == {"offset"}
    inverse = expected.outputs["inverse"]
    positions = written["inverse"].tolist()
    assert clauses(inverse) == ["position" if place < count else "position_without_expert" for place in positions]
    # A group for each pair with an expert, one for all others.
    groups = inverse.groups.tolist()
    assert len(set(groups)) == count + (without > 0)
    assert bool(inverse.mask("write").all())
    assert all(output.bound is None for output in expected.outputs.values())


def swapped(tensor, first, second):
    result = tensor.clone()
    result[first], result[second] = tensor[second], tensor[first]
    return result


# Rows are those of the pairs 2, 5 | 4 | 0, 3 | 1, 6, 7.
@pytest.mark.parametrize(
    ("name", "change", "clause"),
    [
        ("permuted", lambda right: swapped(right, 0, 1), "valid_row"),  # not stable
        ("permuted", lambda right: right.roll(1, 0), "valid_row"),
        ("permuted_scale", lambda right: swapped(right, 0, 2), "valid_row"),
        ("permuted_idx", lambda right: swapped(right, 0, 1), "source_pair"),
        ("permuted_idx", lambda right: right.roll(3), "source_pair"),  # invalid ids first
        ("inverse", lambda right: swapped(right, 2, 5), "position"),
        ("inverse", lambda right: (right + 3) % 8, "position"),  # invalid ids first
        ("inverse", lambda right: swapped(right, 0, 1), "position"),
        ("inverse", lambda right: torch.where(right == 7, 6, right), "position_without_expert"),
        ("inverse", lambda right: torch.where(right == 7, 8, right), "position_without_expert"),
        ("offsets", lambda right: right + 1, "offset"),
        ("offsets", lambda right: torch.cat([right[:-1], torch.tensor([8])]), "offset"),  # counts what has no expert
        ("offsets", lambda right: swapped(right, 1, 2), "offset"),
    ],
)
def test_a_wrong_permutation_is_noticed(expectation, name, change, clause):
    inputs = plain_inputs()
    written, count = permuted_by_loops(inputs)
    assert count == 5
    assert judged(expectation, inputs, written) == []
    written[name] = change(written[name])
    assert ("wrong_value", name, clause) in judged(expectation, inputs, written)


def test_a_map_moves_and_drops_experts(expectation):
    inputs = plain_inputs(expert_map="identity")
    inputs.expert_map.copy_(torch.tensor([1, -1, 0], dtype=torch.int32))
    inputs = dataclasses.replace(inputs, num_local_experts=2)
    _, expected = expectation(oracle, inputs)
    assert expected.outputs["offsets"].values.tolist() == [0, 2, 4]
    assert expected.outputs["permuted_idx"].values[:4].tolist() == [0, 3, 2, 5]
    written, _ = permuted_by_loops(inputs, reverse_rest=True)
    assert judged(expectation, inputs, written) == []


def test_float8_rows_are_compared_as_bytes(expectation):
    inputs = plain_inputs(dtype="float8_e4m3fn", hidden=16)
    written, _ = permuted_by_loops(inputs)
    assert oracle.outputs(inputs)["permuted"].dtype == torch.uint8
    assert judged(expectation, inputs, written) == []
    written["permuted"][2, 3] ^= 1
    assert judged(expectation, inputs, written) == [("wrong_value", "permuted", "valid_row")]


@settings(max_examples=200)
@given(UNPERMUTE)
def test_sums_are_those_of_a_loop(expectation, clauses, case):
    inputs = strategy.make_inputs(case, "cpu")
    _, expected = expectation(oracle, inputs)
    output = expected.outputs["output"]
    sums, served = unpermuted_by_loops(inputs)
    for found, wanted in zip(output.values.tolist(), sums):
        assert found == pytest.approx(wanted, rel=1e-12, abs=1e-300)
    names = ["weighted_sum" if has_expert else "token_without_expert" for has_expert in served]
    assert clauses(output) == [name for name in names for _ in range(case.hidden)]
    assert bool(output.mask("write").all())
    assert bool(output.bound.isfinite().all())
    assert judged(expectation, inputs, {"output": unpermuted_in_float32(inputs)}) == []


def unpermuting(**changes):
    """Return inputs of unpermute in which every kind of mistake shows, and the right output."""
    case = case_with(op="unpermute", tokens=12, scale_groups=0, routing=Routing("uniform", "minus_one"), **changes)
    inputs = strategy.make_inputs(dataclasses.replace(case, pass_offsets=True), "cpu")
    return inputs, unpermuted_in_float32(inputs)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_one_step_of_the_rows_dtype_is_outside_the_bound(expectation, dtype):
    inputs, right = unpermuting(dtype=dtype, top_k=2)
    _, served = unpermuted_by_loops(inputs)
    assert judged(expectation, inputs, {"output": right}) == []
    token = served.index(True)
    steps = 8 if dtype == "float32" else 2  # float32 is what the sum itself is rounded to
    wrong = right.clone()
    wrong[token] *= 1 + steps * torch.finfo(right.dtype).eps
    assert ("wrong_value", "output", "weighted_sum") in judged(expectation, inputs, {"output": wrong})


@pytest.mark.parametrize(
    "mistake",
    [
        lambda inputs: dataclasses.replace(inputs, topk_weights=inputs.topk_weights.half().float()),
        lambda inputs: dataclasses.replace(inputs, topk_weights=torch.ones_like(inputs.topk_weights)),
        lambda inputs: dataclasses.replace(inputs, topk_weights=inputs.topk_weights.flip(1)),
        lambda inputs: dataclasses.replace(inputs, inverse=inputs.inverse.flip(0)),
        lambda inputs: dataclasses.replace(inputs, offsets=None),
        lambda inputs: dataclasses.replace(inputs, offsets=inputs.offsets - 1),
        lambda inputs: dataclasses.replace(inputs, offsets=inputs.offsets + 1),
    ],
    ids=["rounded_weights", "no_weights", "swapped_weights", "inverse", "no_offsets", "one_less", "one_more"],
)
def test_a_wrong_sum_is_noticed(expectation, mistake):
    inputs, _ = unpermuting(dtype="float32", top_k=3)
    wrong = unpermuted_in_float32(mistake(inputs))
    assert ("wrong_value", "output", "weighted_sum") in judged(expectation, inputs, {"output": wrong})


def test_a_token_without_expert_is_zero(expectation):
    inputs, right = unpermuting(top_k=1)
    _, served = unpermuted_by_loops(inputs)
    token = served.index(False)
    assert right[token].tolist() == [0] * 8
    for wrong in (6e-8, float("nan")):
        right[token, 5] = wrong
        assert judged(expectation, inputs, {"output": right}) == [("wrong_value", "output", "token_without_expert")]


@pytest.mark.parametrize(("dtype", "hidden"), [("float16", 12), ("float32", 2), ("float8_e4m3fn", 8)])
@pytest.mark.parametrize("op", ["permute", "unpermute"])
def test_rows_that_are_not_whole_vectors_must_be_refused(expectation, op, dtype, hidden):
    if op == "unpermute" and dtype == "float8_e4m3fn":
        dtype, hidden = "bfloat16", 9
    case = case_with(op=op, dtype=dtype, hidden=hidden)
    _, expected = expectation(oracle, strategy.make_inputs(case, "cpu"))
    assert expected.error is not None
    assert expected.error.clause == "rows_are_whole_vectors"
    assert expected.error.text == "align to 16B"
    assert "refused" in strategy.regimes(case)


@pytest.mark.parametrize("groups", [0, 2])
def test_outputs(groups):
    inputs = strategy.make_inputs(case_with(scale_groups=groups), "cpu")
    shapes = {name: (spec.shape, spec.dtype) for name, spec in oracle.outputs(inputs).items()}
    scale = {"permuted_scale": ((8, 2), torch.float32)} if groups else {}
    assert shapes == scale | {
        "permuted": ((8, 8), torch.float16),
        "offsets": ((4,), torch.int64),
        "inverse": ((8,), torch.int32),
        "permuted_idx": ((8,), torch.int32),
    }
    specs = oracle.outputs(strategy.make_inputs(case_with(op="unpermute", dtype="bfloat16"), "cpu"))
    assert {name: (spec.shape, spec.dtype) for name, spec in specs.items()} == {"output": ((4, 8), torch.bfloat16)}
    assert specs["output"].initial is None


class NoMasksOnMeta(TorchDispatchMode):
    """Refuses masks as indices on torch's device without contents, where whatever reads an element raises anyway."""

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        if operation.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_):
            indices = [index for index in arguments[1] if index is not None]
            if arguments[0].device.type == "meta":
                assert all(index.dtype == torch.int64 and index.device.type == "meta" for index in indices)
        return operation(*arguments, **(options or {}))


@settings(max_examples=60)
@given(strategy.cases())
def test_nothing_waits_for_the_device(case):
    with NoMasksOnMeta():
        inputs = strategy.make_inputs(case, "meta")
        expected = oracle.expect(inputs, {})
        for output in expected.outputs.values():
            assert output.mask("write").device.type == "meta"
