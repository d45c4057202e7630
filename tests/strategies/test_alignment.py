"""Block alignment against a plain loop."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelfuzz.strategies.alignment import align_row, padded_capacity
from kernelfuzz.strategies.contents import hash_bits, seeds
from kernelfuzz.strategies.routing import routings


@st.composite
def routed_pairs(draw):
    """(expert of each pair, which pairs are chosen, number of experts, block size)."""
    pairs = draw(st.integers(0, 120))
    num_experts = draw(st.integers(1, 40))
    seed = draw(seeds())
    expert_ids = draw(routings()).expert_ids(pairs, 1, num_experts, seed, "cpu").flatten()
    chosen = hash_bits(seed, "chosen", pairs, "cpu") % 3 != 0
    return expert_ids, chosen | draw(st.booleans()), num_experts, draw(st.sampled_from((1, 2, 7, 16, 64)))


def aligned_by_a_loop(expert_ids, chosen, num_experts, block_size):
    tokens, experts = [], []
    for expert in range(num_experts):
        group = [i for i, (e, c) in enumerate(zip(expert_ids.tolist(), chosen.tolist())) if c and e == expert]
        while group:
            block, group = group[:block_size], group[block_size:]
            tokens += block + [expert_ids.numel()] * (block_size - len(block))
            experts.append(expert)
    return tokens, experts


@settings(max_examples=300)
@given(routed_pairs())
def test_align_row_does_what_a_loop_does(drawn):
    row = align_row(*drawn)
    tokens, experts = aligned_by_a_loop(*drawn)
    assert row.tokens.tolist() == tokens
    assert row.experts.tolist() == experts
    assert row.padded_total == len(tokens) == len(experts) * drawn[3]
    assert row.tokens.dtype == row.experts.dtype == torch.int64


@settings(max_examples=300)
@given(routed_pairs(), st.booleans())
def test_the_capacity_suffices(drawn, rounded):
    expert_ids, _, num_experts, block_size = drawn
    capacity = padded_capacity(expert_ids.numel(), num_experts, block_size, rounded=rounded)
    assert align_row(*drawn).padded_total <= capacity
    assert capacity <= expert_ids.numel() + (num_experts + 1) * (block_size - 1)
    if rounded:
        assert capacity % block_size == 0


def test_the_capacity_is_needed():
    for num_experts, block_size in ((1, 16), (5, 7), (8, 64)):
        pairs = num_experts  # one pair an expert pads most
        row = align_row(torch.arange(pairs), torch.ones(pairs, dtype=torch.bool), num_experts, block_size)
        assert row.padded_total == padded_capacity(pairs, num_experts, block_size, rounded=False)
        assert row.padded_total == padded_capacity(pairs, num_experts + 1, block_size, rounded=False)
