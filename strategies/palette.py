"""Palettes: cases whose compiled kernels many others are run on.

A kernel that is compiled for each class of shapes, dtypes and flags takes a second to build and a millisecond to run. A
campaign builds what a few drawn cases need, and gives most of the others the same classes.
"""

import dataclasses
import functools
from typing import TypeVar

from hypothesis import strategies as st

from kernelfuzz.strategies.case import Case

AnyCase = TypeVar("AnyCase", bound=Case)

_FREE_ONCE_IN = 256


@functools.cache
def templates(palette: tuple[AnyCase, ...]) -> st.SearchStrategy[AnyCase | None]:
    """Draw a case of the palette whose classes another one shares; once in some hundred draws, and always with an empty
    palette, None: the other one is free.

    None is the simplest, so that a failure shrinks beyond the palette. To be drawn before the case itself: Hypothesis
    makes what is drawn late simple now and then.
    """
    if not palette:
        return st.none()
    return st.sampled_from(range(_FREE_ONCE_IN)).flatmap(
        lambda number: st.none() if number == 0 else st.sampled_from(palette)
    )


def share(case: AnyCase, template: AnyCase | None, fields: tuple[str, ...]) -> AnyCase:
    """Return the case with `fields`, those that its kernels are compiled for, taken from the template, if any."""
    if template is None:
        return case
    return dataclasses.replace(case, **{name: getattr(template, name) for name in fields})
