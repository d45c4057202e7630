"""The registry of targets: one entry holds everything about one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from kernelfuzz.oracles import bgmv as bgmv_oracle
from kernelfuzz.oracles import fp8_layout as fp8_layout_oracle
from kernelfuzz.oracles import fused_moe_lora as fused_moe_lora_oracle
from kernelfuzz.oracles import lora_shrink_expand as lora_shrink_expand_oracle
from kernelfuzz.oracles import moe_lora_align as moe_lora_align_oracle
from kernelfuzz.oracles import moe_permute as moe_permute_oracle
from kernelfuzz.oracles.expectation import Expectation, OutputSpecs
from kernelfuzz.strategies import (
    bgmv,
    fp8_layout,
    fused_moe_lora,
    lora_shrink_expand,
    moe_lora_align,
    moe_permute,
    own,
)
from kernelfuzz.strategies.case import Case
from kernelfuzz.strategies.errors import KernelfuzzError
from kernelfuzz.strategies.reduction import Reducible, reduce_inputs


@dataclass(frozen=True)
class Target:
    """One kernel contract: how its cases are drawn, made into tensors and judged.

    The functions take the target's own case and inputs types; the engine only passes them on. Where it is `stackable`,
    make_inputs takes several content seeds at once, and outputs and expect take what it makes of them. `specialised`
    names the fields of a case that its kernels are compiled for; where there are any, cases takes a `palette`.
    huge_cases draws the cases of the regime huge, where there is one. `small` are the arguments with which cases draws
    small ones; `reducible` are the input tensors that a case's `reduced` may name, `roundable` the sizes that may be
    raised one by one.
    """

    name: str
    case_type: type[Case]
    cases: Callable[..., st.SearchStrategy[Any]]
    make_inputs: Callable[..., Any]
    regimes: Callable[[Any], set[str]]
    outputs: Callable[[Any], OutputSpecs]
    expect: Callable[[Any, Any], Expectation]
    small: Mapping[str, Any]
    reducible: Reducible = field(default_factory=dict)
    roundable: tuple[str, ...] = ()
    stackable: bool = False
    specialised: tuple[str, ...] = ()
    huge_cases: Callable[..., st.SearchStrategy[Any]] | None = None


def _target(strategy: Any, oracle: Any) -> Target:
    def make_inputs(case: Case, *arguments: Any) -> Any:
        inputs = strategy.make_inputs(case, *arguments)
        reduce_inputs(inputs, case.reduced)
        return inputs

    return Target(
        name=strategy.Case.target,
        case_type=strategy.Case,
        cases=strategy.cases,
        make_inputs=make_inputs,
        regimes=strategy.regimes,
        outputs=oracle.outputs,
        expect=oracle.expect,
        small=strategy.SMALL,
        reducible=getattr(strategy, "REDUCIBLE", {}),
        roundable=getattr(strategy, "ROUNDABLE", ()),
        stackable=getattr(strategy, "STACKABLE", False),
        specialised=getattr(strategy, "SPECIALISED", ()),
        huge_cases=getattr(strategy, "huge_cases", None),
    )


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        _target(fused_moe_lora, fused_moe_lora_oracle),
        _target(lora_shrink_expand, lora_shrink_expand_oracle),
        _target(bgmv, bgmv_oracle),
        _target(moe_lora_align, moe_lora_align_oracle),
        _target(moe_permute, moe_permute_oracle),
        _target(fp8_layout, fp8_layout_oracle),
    )
}
"""Every target by name."""


def get_target(name: str) -> Target:
    """Return the target of that name. Raises KernelfuzzError naming the ones there are."""
    if name not in TARGETS:
        raise KernelfuzzError(f"unknown target {name!r}: expected one of {', '.join(TARGETS)}")
    return TARGETS[name]


def case_type(name: str) -> type[Case]:
    """Return the cases' type of a target, or of the tests of users that have an oracle of their own.

    Raises KernelfuzzError for another name.
    """
    return own.Case if name == own.Case.target else get_target(name).case_type
