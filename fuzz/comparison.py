"""The comparison of an output with its expectation, element by element."""

from dataclasses import dataclass

import torch

from kernelfuzz.fuzz.buffers import bits
from kernelfuzz.oracles.expectation import ExpectedOutput


@dataclass(frozen=True)
class Comparison:
    """An output beside its expectation; all tensors have the output's shape.

    - canonical, values: what it holds and what it must hold, each with the elements of a group sorted
    - must_write, must_keep: bool, what the clauses ask for
    - wrong, untouched, overwritten: bool, where it is not so. `wrong` elements are out of their bound, among them those
      that are `untouched`: they hold a sentinel still
    - ratios: float64, err/bound; meaningful where the output must be written
    """

    expected: ExpectedOutput
    canonical: torch.Tensor
    values: torch.Tensor
    must_write: torch.Tensor
    must_keep: torch.Tensor
    wrong: torch.Tensor
    untouched: torch.Tensor
    overwritten: torch.Tensor
    ratios: torch.Tensor

    @property
    def has_bound(self) -> bool:
        """Whether elements may differ by a bound; else the ratios are 0 or 1."""
        return self.expected.bound is not None

    def incorrect(self, clause: int) -> torch.Tensor:
        """Return where a clause's elements were written, but wrong. Once one of a group is unwritten, sorting puts the
        others in each other's places, and none counts."""
        here = self.expected.region == clause
        if self.expected.groups is not None and bool((self.untouched & here).any()):
            return torch.zeros_like(here)
        return self.wrong & ~self.untouched & here


def compare(
    actual: torch.Tensor, initial: torch.Tensor, expected: ExpectedOutput, *, from_sentinel: bool
) -> Comparison:
    """Compare an output with its expectation.

    An element that still holds its initial bits is unwritten if they were a sentinel. Where they were values to add to,
    a contribution too small to change them looks the same, so it is a wrong value.
    """
    must_write, must_keep = expected.mask("write"), expected.mask("keep")
    same_bits = bits(actual) == bits(initial)
    canonical = actual if expected.groups is None else _in_group_order(actual, expected.groups)
    values = expected.values if expected.groups is None else _in_group_order(expected.values, expected.groups)

    wrong, ratios = _deviation(canonical, values, expected.bound)
    wrong &= must_write
    # Inside a group an untouched element would be sorted to another's place, so it is looked for where it stands.
    untouched = (wrong if expected.groups is None else must_write) & same_bits & from_sentinel
    overwritten = must_keep & ~same_bits
    return Comparison(expected, canonical, values, must_write, must_keep, wrong, untouched, overwritten, ratios)


def _deviation(
    actual: torch.Tensor, values: torch.Tensor, bound: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which elements are out of their bound, and err/bound (NaN and infinity count as infinitely far)."""
    if bound is None:
        wrong = actual.to(values.dtype) != values
        return wrong, wrong.to(torch.float64)
    error = (actual.to(torch.float64) - values).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
    ratios = torch.where(error == 0, 0.0, error / bound)
    return ~(ratios <= 1.0), ratios  # a NaN is wrong too


def _in_group_order(tensor: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Sort the elements that share a group, leaving each group where it stands."""
    flat, labels = tensor.flatten(), groups.flatten()
    by_value = torch.argsort(flat, stable=True)
    order = by_value[torch.argsort(labels[by_value], stable=True)]
    places = torch.argsort(labels, stable=True)
    result = torch.empty_like(flat)
    result[places] = flat[order]
    return result.view(tensor.shape)
