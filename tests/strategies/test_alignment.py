"""Block alignment against a plain loop."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelfuzz.strategies.alignment import align_rows, padded_capacity
from kernelfuzz.strategies.contents import hash_bits, seeds
from kernelfuzz.strategies.routing import routings

BLOCK_SIZES = st.sampled_from((1, 2, 7, 16, 64))


@st.composite
def routed_pairs(draw):
    """(experts [seeds, pairs], row of each pair, number of rows, number of experts, block size, capacity)."""
    pairs, num_rows, num_experts = draw(st.integers(0, 120)), draw(st.integers(1, 5)), draw(st.integers(1, 40))
    several = draw(st.lists(seeds(), min_size=1, max_size=4))
    expert_ids = draw(routings()).expert_ids(pairs, 1, num_experts, several, "cpu").flatten(1)
    rows = hash_bits(draw(seeds()), "rows", pairs, "cpu") % (num_rows + 2) - 1
    block_size = draw(BLOCK_SIZES)
    capacity = padded_capacity(pairs, num_experts, block_size, rounded=draw(st.booleans()))
    return expert_ids, rows, num_rows, num_experts, block_size, capacity


def row_by_a_loop(expert_ids, rows, row, num_experts, block_size):
    """Return one row's tokens and their groups, block by block, and the blocks' experts, all as lists."""
    tokens, groups, experts = [], [], []
    for expert in range(num_experts):
        group = [i for i, (e, r) in enumerate(zip(expert_ids.tolist(), rows.tolist())) if r == row and e == expert]
        while group:
            block, group = group[:block_size], group[block_size:]
            tokens += block + [expert_ids.numel()] * (block_size - len(block))
            groups += [expert] * block_size
            experts.append(expert)
    return tokens, groups, experts


@settings(max_examples=300)
@given(routed_pairs())
def test_align_rows_does_what_a_loop_does(drawn):
    expert_ids, rows, num_rows, num_experts, block_size, capacity = drawn
    seeds, pairs = expert_ids.shape
    blocks = -(-capacity // block_size)
    aligned = align_rows(*drawn)
    assert aligned.tokens.shape == aligned.groups.shape == (seeds, num_rows, capacity)
    assert aligned.experts.shape == (seeds, num_rows, blocks)
    assert aligned.totals.shape == (seeds, num_rows)
    assert {each.dtype for each in vars(aligned).values()} == {torch.int64}
    wanted_groups = []
    for s in range(seeds):
        for row in range(num_rows):
            tokens, groups, experts = row_by_a_loop(expert_ids[s], rows, row, num_experts, block_size)
            assert aligned.tokens[s, row].tolist() == tokens + [pairs] * (capacity - len(tokens))
            assert aligned.experts[s, row].tolist() == experts + [-1] * (blocks - len(experts))
            assert aligned.totals[s, row] == len(tokens)
            wanted_groups += [(s, row, group) for group in groups + ["unused"] * (capacity - len(groups))]
    # The same number for the same group of the same row of the same seed, and for no other.
    numbers = aligned.groups.flatten().tolist()
    assert len(set(zip(numbers, wanted_groups))) == len(set(numbers)) == len(set(wanted_groups))


@settings(max_examples=300)
@given(routed_pairs(), st.booleans())
def test_the_capacity_suffices(drawn, rounded):
    expert_ids, rows, num_rows, num_experts, block_size, _ = drawn
    pairs = expert_ids.shape[1]
    capacity = padded_capacity(pairs, num_experts, block_size, rounded=rounded)
    assert bool((align_rows(expert_ids, rows, num_rows, num_experts, block_size, capacity).totals <= capacity).all())
    assert capacity <= pairs + (num_experts + 1) * (block_size - 1)
    if rounded:
        assert capacity % block_size == 0


def test_the_capacity_is_needed():
    for num_experts, block_size in ((1, 16), (5, 7), (8, 64)):
        pairs = num_experts  # one pair an expert pads most
        needed = padded_capacity(pairs, num_experts, block_size, rounded=False)
        one_row = torch.zeros(pairs, dtype=torch.int64)
        aligned = align_rows(torch.arange(pairs)[None], one_row, 1, num_experts, block_size, needed)
        assert aligned.totals.tolist() == [[needed]]
        assert needed == padded_capacity(pairs, num_experts + 1, block_size, rounded=False)
