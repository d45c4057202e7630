"""Palettes: most cases share what their kernels are compiled for."""

import dataclasses

import pytest
from hypothesis import given, settings

from kernelfuzz.strategies import fused_moe_lora, lora_shrink_expand

TARGETS = [fused_moe_lora, lora_shrink_expand]


def classes(case, target):
    return tuple(getattr(case, name) for name in target.SPECIALISED)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.Case.target)
def test_cases_of_a_palette_differ_in_what_is_not_compiled_for(target, drawn):
    palette = tuple(drawn(target.cases(), 4))
    cases = drawn(target.cases(palette=palette), 80)
    compiled = {classes(case, target) for case in palette}
    of_palette = [case for case in cases if classes(case, target) in compiled]
    assert len(of_palette) >= 70
    assert {classes(case, target) for case in of_palette} == compiled
    assert len({(case.batch, case.contents, case.seed) for case in of_palette}) > 30


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.Case.target)
def test_simplest_case_does_not_come_from_the_palette(target, minimal, drawn):
    palette = tuple(drawn(target.cases(), 3))
    assert minimal(target.cases(palette=palette)) == minimal(target.cases())


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.Case.target)
def test_case_of_a_palette_is_a_whole_case(target, drawn):
    """Its tensors can be made and judged: what was taken over fits what was drawn."""
    palette = tuple(drawn(target.cases(max_rank=20, max_hidden=40, max_columns=40), 5))

    @settings(max_examples=60)
    @given(target.cases(palette=palette))
    def check(case):
        inputs = target.make_inputs(dataclasses.replace(case, seed=1), "cpu")
        assert inputs.case.path in ("small_batch", "one_shot", "two_kernel") if hasattr(case, "path") else True
        assert target.regimes(case) <= set(target.REGIMES)

    check()
