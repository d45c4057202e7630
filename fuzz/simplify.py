"""Simpler contents for the smallest case of a failure: what Hypothesis, which sees a case's fields only, cannot try."""

import typing
from collections.abc import Iterator
from dataclasses import replace

from kernelfuzz.strategies.case import Case
from kernelfuzz.strategies.reduction import Reduced, Reducible


def simpler(case: Case, reducible: Reducible) -> Iterator[Case]:
    """Yield cases of the same structure whose contents are a step simpler: the seed 0, a simpler style, one more of the
    `reducible` tensors constant or one-hot."""
    if case.seed != 0:
        yield replace(case, seed=0)
    contents = typing.get_type_hints(type(case)).get("contents")
    if contents is None:
        return
    styles = typing.get_args(contents)  # simplest first
    now = styles.index(case.contents)  # type: ignore[attr-defined]
    for style in styles[:now]:
        yield replace(case, contents=style)  # type: ignore[call-arg]
    done = {each.tensor for each in case.reduced}
    for tensor, patterns in reducible.items() if now > 0 else ():
        for pattern in patterns if tensor not in done else ():
            yield replace(case, reduced=(*case.reduced, Reduced(tensor, pattern)))
