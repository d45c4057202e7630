"""Palettes: most cases share what their kernels are compiled for."""

from collections import Counter

import pytest
from hypothesis import given, settings

from kernelfuzz.strategies import fused_moe_lora, lora_shrink_expand

TARGETS = [fused_moe_lora, lora_shrink_expand]


def classes(case, target):
    return tuple(getattr(case, name) for name in target.SPECIALISED)


def each_target(function):
    return pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.Case.target)(function)


@each_target
def test_nearly_all_cases_share_the_classes_of_a_palette_and_all_of_it_is_used(target, drawn):
    palette = tuple(drawn(target.cases(), 12))
    cases = drawn(target.cases(palette=palette), 600)
    compiled = Counter(classes(case, target) for case in cases)
    of_palette = {classes(case, target) for case in palette}
    assert sum(count for each, count in compiled.items() if each not in of_palette) <= 12
    assert of_palette <= compiled.keys()
    assert max(compiled[each] for each in of_palette) < 200


@each_target
def test_cases_of_a_palette_differ_in_what_is_not_compiled_for(target, drawn):
    palette = tuple(drawn(target.cases(), 4))
    # What is drawn from one seed depends on the modules that are loaded: more than 30 of 80, on the average of twelve.
    runs = [drawn(target.cases(palette=palette), 80, seed) for seed in range(12)]
    assert sum(len({(case.batch, case.contents, case.seed) for case in cases}) for cases in runs) > 12 * 30


@each_target
def test_simplest_case_does_not_come_from_the_palette(target, minimal, drawn):
    palette = tuple(drawn(target.cases(), 3))
    assert minimal(target.cases(palette=palette)) == minimal(target.cases())


@each_target
def test_case_of_a_palette_is_a_whole_case(target, drawn):
    """Its tensors can be made, and it is in regimes that there are."""
    palette = tuple(drawn(target.cases(max_rank=20, max_hidden=40, max_columns=40), 5))

    @settings(max_examples=60)
    @given(target.cases(palette=palette))
    def check(case):
        assert target.make_inputs(case, "cpu").case == case
        assert target.regimes(case) <= set(target.REGIMES)

    check()
