"""What a user's own oracle says, as an expectation.

An oracle is a pure-torch function of a case's inputs. For each output it returns

- an `Approximation`: it was computed step by step with `kernelfuzz.oracles.rounding`, which derives the bound from the
  formula, and ends with a cast into the output's dtype;
- a tensor of integers: the output must equal it;
- an `Expected`: values with a bound of the user's, or with masks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kernelfuzz.oracles.expectation import Clause, Expectation, ExpectedOutput, OutputSpec, OutputSpecs
from kernelfuzz.oracles.rounding import Approximation
from kernelfuzz.strategies.errors import KernelfuzzError

ONLY_OUTPUT = "output"
"""The name of the output of an oracle that returns one only."""

CLAUSES = (Clause("value", "write"), Clause("not_written", "keep"), Clause("anything", "free"))
_WRITE, _KEEP, _FREE = range(len(CLAUSES))


@dataclass(frozen=True)
class Expected:
    """What one output must hold. All tensors have its shape.

    - values: an `Approximation`, or a tensor. Where one is not finite, or may be beyond the range of the dtype of the
      output, that may hold anything
    - bound: the largest allowed |actual - value|: a number or a tensor; for an `Approximation` it comes with it, for
      integers it may be left out and means equality
    - dtype: of the output; None: that of the values
    - written: bool, where the kernel must write; what is False must stay as it was. None: everywhere
    - free: bool, where it may do as it likes. None: nowhere
    """

    values: Approximation | torch.Tensor
    bound: torch.Tensor | float | None = None
    dtype: torch.dtype | None = None
    written: torch.Tensor | None = None
    free: torch.Tensor | None = None


def by_output(returned: Any) -> dict[str, Expected]:
    """Return what an oracle returned, by output. Raises KernelfuzzError, in one line, for what it cannot have meant."""
    outputs = returned if isinstance(returned, Mapping) else {ONLY_OUTPUT: returned}
    if not outputs:
        raise KernelfuzzError("the oracle returned no output")
    return {str(name): _checked(str(name), value) for name, value in outputs.items()}


def _checked(name: str, value: Any) -> Expected:
    expected = value if isinstance(value, Expected) else Expected(value)
    values = expected.values
    if isinstance(values, Approximation):
        if expected.bound is not None:
            raise KernelfuzzError(f"the oracle gives {name} two bounds: an Approximation has its own")
        if (expected.dtype or values.dtype) is None:
            raise KernelfuzzError(f"the oracle's {name} has no dtype: end with cast(…, dtype), as the kernel does")
        if not (expected.dtype or torch.float32).is_floating_point:
            raise KernelfuzzError(f"the oracle's {name} is an Approximation, which no {expected.dtype} can hold")
    elif not isinstance(values, torch.Tensor):
        raise KernelfuzzError(
            f"the oracle's {name} is a {type(values).__name__}: expected a tensor or an Approximation"
        )
    elif values.is_floating_point() and expected.bound is None:
        raise KernelfuzzError(
            f"the oracle's {name} has no bound: compute it with kernelfuzz.oracles.rounding, "
            "return Expected(values, bound=…), or exact(values) if not a bit may differ"
        )
    if isinstance(values, torch.Tensor) and values.is_complex():
        raise KernelfuzzError(f"the oracle's {name} is complex: return torch.view_as_real of it")
    if (expected.dtype or _tensor(values).dtype) == torch.bool:
        # No sentinel is a legal bool, and torch takes every byte but 0 for True.
        raise KernelfuzzError(
            f"the oracle's {name} is of bools: return it as torch.uint8, and have the kernel write "
            f"outputs.{name}.view(torch.bool)"
        )
    if expected.bound is not None and not bool((torch.as_tensor(expected.bound) >= 0).all()):
        raise KernelfuzzError(f"the oracle's bound of {name} is negative or NaN somewhere")
    shape = shape_of(expected)
    for what in ("bound", "written", "free"):
        tensor = getattr(expected, what)
        if what != "bound" and tensor is not None and getattr(tensor, "dtype", None) != torch.bool:
            raise KernelfuzzError(f"the oracle's {what} of {name} is no tensor of bools")
        if isinstance(tensor, torch.Tensor) and tensor.shape != shape and not (what == "bound" and tensor.ndim == 0):
            raise KernelfuzzError(f"the oracle's {what} of {name} has shape {list(tensor.shape)}, not {list(shape)}")
    return expected


def shape_of(expected: Expected) -> tuple[int, ...]:
    """Return the output's shape."""
    values = expected.values
    return tuple(values.value.shape if isinstance(values, Approximation) else values.shape)


def output_specs(returned: Mapping[str, Expected]) -> OutputSpecs:
    """Return what the outputs of those shapes and dtypes are; they start as sentinels."""
    specs = {}
    for name, expected in returned.items():
        dtype = expected.dtype or expected.values.dtype
        assert dtype is not None
        specs[name] = OutputSpec(shape_of(expected), dtype)
    return specs


def expectation(returned: Mapping[str, Expected], specs: OutputSpecs) -> Expectation:
    """Return the expectation that an oracle's values stand for. Raises KernelfuzzError where it does not fit the
    outputs."""
    if wrong := returned.keys() ^ specs.keys():
        raise KernelfuzzError(f"oracle and outputs name different outputs: {', '.join(sorted(wrong))}")
    return Expectation({name: _expected_output(name, each, specs[name]) for name, each in returned.items()})


def _expected_output(name: str, expected: Expected, spec: OutputSpec) -> ExpectedOutput:
    if shape_of(expected) != spec.shape:
        raise KernelfuzzError(f"the oracle's {name} has shape {list(shape_of(expected))}, not {list(spec.shape)}")
    values, bound = expected.values, expected.bound
    region = torch.full(spec.shape, _WRITE, dtype=torch.uint8, device=_tensor(values).device)
    if expected.written is not None:
        region.masked_fill_(~expected.written, _KEEP)
    if expected.free is not None:
        region.masked_fill_(expected.free, _FREE)
    if not spec.dtype.is_floating_point:
        return ExpectedOutput(CLAUSES, region, _tensor(values).to(torch.int64), _bound(bound, region))
    if isinstance(values, Approximation):
        # What may exceed the dtype's range may be infinite or not, as the kernel's steps come.
        largest, reference, bound = values.magnitude(), values.value, values.error
    else:
        largest = reference = values.to(torch.float64)
    region.masked_fill_((region == _WRITE) & ~(largest.abs() <= torch.finfo(spec.dtype).max), _FREE)
    return ExpectedOutput(CLAUSES, region, reference, _bound(bound, region))


def _tensor(values: Approximation | torch.Tensor) -> torch.Tensor:
    return values.value if isinstance(values, Approximation) else values


def _bound(bound: torch.Tensor | float | None, region: torch.Tensor) -> torch.Tensor | None:
    if bound is None:
        return None
    return torch.as_tensor(bound, dtype=torch.float64, device=region.device).expand(region.shape)
