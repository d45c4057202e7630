"""Palettes: cases whose compiled kernels many others are run on.

A kernel that is compiled for each class of shapes, dtypes and flags takes a second to build and a millisecond to run. A
campaign builds what a few drawn cases need, and gives most of the others the same classes.
"""

import dataclasses
from typing import TypeVar

from hypothesis import strategies as st

from kernelfuzz.strategies.case import Case

AnyCase = TypeVar("AnyCase", bound=Case)

_TIMES = 16


@st.composite
def from_palette(draw: st.DrawFn, drawn: AnyCase, palette: tuple[AnyCase, ...], fields: tuple[str, ...]) -> AnyCase:
    """Draw `drawn` with `fields`, those that its kernels are compiled for, from a case of the palette.

    One time in some hundred it is left as it is; that is the simplest draw, so that a failure shrinks beyond the
    palette. With an empty palette it always is.
    """
    if not palette:
        return drawn
    index = draw(st.integers(0, _TIMES * len(palette)))
    if index == 0:
        return drawn
    template = palette[index % len(palette)]
    return dataclasses.replace(drawn, **{name: getattr(template, name) for name in fields})
