"""Routing and expert maps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernelfuzz.strategies.contents import seeds
from kernelfuzz.strategies.routing import Routing, expert_map, routings


def test_minimal(minimal):
    assert minimal(routings()) == Routing("first_expert", "none")
    assert minimal(routings(), lambda routing: routing.invalid != "none") == Routing("first_expert", "minus_one")
    assert minimal(routings(), lambda routing: routing.style == "skewed") == Routing("skewed", "none")


@given(routings())
def test_the_last_expert_is_left_to_huge_cases(routing):
    assert routing.style != "last_expert"


@given(routings(invalid=("minus_one",)))
def test_narrowed(routing):
    assert routing.invalid == "minus_one"


@given(routings(), st.integers(0, 20), st.integers(1, 8), st.integers(1, 70), seeds())
def test_ids_are_in_range_unless_invalid_ones_are_asked_for(routing, tokens, top_k, experts, seed):
    ids = routing.expert_ids(tokens, top_k, experts, seed, "cpu")
    assert ids.shape == (tokens, top_k)
    assert ids.dtype == torch.int64
    invalid = set(ids[(ids < 0) | (ids >= experts)].tolist())
    beyond = {experts, experts + 1, experts + 2}
    allowed = {"none": set(), "minus_one": {-1}, "beyond": beyond, "both": {-1} | beyond}
    assert invalid <= allowed[routing.invalid]


@pytest.mark.parametrize(("invalid", "kinds"), [("minus_one", {-1}), ("beyond", {9, 10, 11}), ("both", {-1, 9})])
def test_invalid_ids_occur(invalid, kinds):
    ids = Routing("uniform", invalid).expert_ids(100, 4, 9, 0, "cpu")
    assert kinds <= set(ids.flatten().tolist())
    assert ((ids >= 0) & (ids < 9)).float().mean() > 0.5


@given(st.integers(1, 20), st.integers(1, 8), st.integers(0, 60), seeds())
def test_distinct_choices_differ(tokens, top_k, more_experts, seed):
    ids = Routing("distinct").expert_ids(tokens, top_k, top_k + more_experts, seed, "cpu")
    assert all(len(set(row)) == top_k for row in ids.tolist())


def test_styles_spread_as_they_say():
    def share_of_expert(style, expert):
        return (Routing(style).expert_ids(2000, 2, 8, 1, "cpu") == expert).float().mean().item()

    assert share_of_expert("first_expert", 0) == 1
    assert share_of_expert("last_expert", 7) == 1
    assert share_of_expert("skewed", 0) > 0.7
    assert 0 < share_of_expert("skewed", 7) < 0.06
    assert all(abs(share_of_expert("uniform", expert) - 1 / 8) < 0.03 for expert in range(8))


@given(routings(), st.integers(0, 9), st.integers(1, 4), st.integers(1, 20), st.lists(seeds(), min_size=1, max_size=4))
def test_several_seeds_are_routed_as_each_is_alone(routing, tokens, top_k, experts, several):
    ids = routing.expert_ids(tokens, top_k, experts, several, "cpu")
    assert ids.shape == (len(several), tokens, top_k)
    assert ids.tolist() == [routing.expert_ids(tokens, top_k, experts, seed, "cpu").tolist() for seed in several]


@given(st.sampled_from(("identity", "holes", "reversed_holes")), st.integers(1, 200), seeds())
def test_an_expert_map_gives_each_local_expert_one_place(style, experts, seed):
    mapping = expert_map(style, experts, seed, "cpu")
    assert mapping.dtype == torch.int32
    assert mapping.shape == (experts,)
    local = mapping[mapping >= 0].tolist()
    assert sorted(local) == list(range(len(local)))
    assert set(mapping[mapping < 0].tolist()) <= {-1}
    assert local == sorted(local, reverse=style == "reversed_holes")
    if style == "identity":
        assert local == list(range(experts))


def test_a_map_may_be_absent_or_have_holes():
    assert expert_map("none", 7, 0, "cpu") is None
    mapping = expert_map("holes", 64, 0, "cpu")
    assert 0 < (mapping == -1).sum() < 64


def test_expert_maps_are_pinned():
    # A saved case must replay for ever.
    assert expert_map("holes", 9, 3, "cpu").tolist() == [-1, -1, 0, 1, -1, 2, 3, 4, -1]
    assert expert_map("reversed_holes", 9, 3, "cpu").tolist() == [-1, -1, 4, 3, -1, 2, 1, 0, -1]


@given(st.sampled_from(("identity", "holes", "reversed_holes")), st.lists(seeds(), min_size=1, max_size=4))
def test_several_seeds_have_the_maps_that_each_has_alone(style, several):
    maps = expert_map(style, 30, several, "cpu")
    assert maps.tolist() == [expert_map(style, 30, seed, "cpu").tolist() for seed in several]
