"""Tensors with simpler values than their case's style and seed give, so that a person sees at once what went wrong."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

Pattern = Literal["ones", "first", "last"]
"""What the elements of a reduced tensor are:

- ones: all 1
- first, last: each row of the last dimension is one-hot, with its 1 in the first or the last column
"""

PATTERNS: tuple[Pattern, ...] = get_args(Pattern)

Reducible = Mapping[str, tuple[Pattern, ...]]
"""The tensors of a target's inputs that may be reduced, and to what."""


@dataclass(frozen=True)
class Reduced:
    """One tensor of a case, or each of a list of tensors, that holds a pattern instead of what was drawn."""

    tensor: str
    pattern: Pattern


def reduce_inputs(inputs: Any, reduced: tuple[Reduced, ...]) -> None:
    """Overwrite the finite elements of the named tensors of `inputs`, in place. Poison stays where it is."""
    for each in reduced:
        value = getattr(inputs, each.tensor)
        for tensor in value if isinstance(value, list) else [value]:
            tensor.copy_(torch.where(tensor.isfinite(), _pattern(tensor, each.pattern), tensor))


def _pattern(tensor: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    if pattern == "ones":
        return torch.ones_like(tensor)
    result = torch.zeros_like(tensor)
    result[..., 0 if pattern == "first" else -1] = 1
    return result
