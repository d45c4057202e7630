"""What makes the smallest case of a failure simpler to read and Hypothesis, which only walks down a case's fields,
cannot try: simpler contents and round sizes."""

import typing
from collections.abc import Iterator
from dataclasses import replace

from kernelfuzz.strategies.case import Case
from kernelfuzz.strategies.reduction import Reduced, Reducible

LARGEST_ROUNDED = 1024
"""The largest size that another one is raised to: how much memory a huge case may take is worked out for its sizes."""


def simpler(case: Case, reducible: Reducible, roundable: tuple[str, ...]) -> Iterator[Case]:
    """Yield cases that are a step simpler: the seed 0, a simpler style, one more of the `reducible` tensors constant or
    one-hot; then one of the `roundable` sizes raised to the next power of two.

    No case takes back a step of another kind, so that steps come to an end.
    """
    if case.seed != 0:
        yield replace(case, seed=0)
    yield from _simpler_contents(case, reducible)
    for name in roundable:
        size = getattr(case, name)
        rounded = 1 << (size - 1).bit_length()
        if size < rounded <= LARGEST_ROUNDED:
            yield replace(case, **{name: rounded})


def _simpler_contents(case: Case, reducible: Reducible) -> Iterator[Case]:
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
