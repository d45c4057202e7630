"""The engine's checks for tests that call a kernel themselves."""

from collections.abc import Mapping

import torch

from kernelfuzz.fuzz.buffers import Buffers
from kernelfuzz.fuzz.readable import element_lines
from kernelfuzz.fuzz.verdict import judge_output, judge_stray_write
from kernelfuzz.oracles import own
from kernelfuzz.oracles.expectation import OutputSpec
from kernelfuzz.oracles.own import Expected
from kernelfuzz.oracles.rounding import Approximation


def assert_within_bound(
    actual: torch.Tensor | Mapping[str, torch.Tensor],
    expected: Expected | Approximation | torch.Tensor | Mapping[str, Expected | Approximation | torch.Tensor],
    initial: Mapping[str, torch.Tensor] | None = None,
) -> float:
    """Check one output, or several by name, element by element, and return the worst |actual - value| / bound.

    `expected` is what an oracle of `kernel_test` returns. With the `initial` contents, which `Buffers.freeze` returns,
    an element that still holds its sentinel counts as unwritten, and what `Expected.written` excludes must be as it
    was.

    Raises AssertionError that names the elements; KernelfuzzError for an expectation that does not fit the output.
    """
    __tracebackhide__ = True
    outputs = dict(actual) if isinstance(actual, Mapping) else {own.ONLY_OUTPUT: actual}
    returned = own.by_output(expected)
    specs = {name: OutputSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in outputs.items()}
    worst, problems = 0.0, list[str]()
    for name, each in own.expectation(returned, specs).outputs.items():
        before = outputs[name] if initial is None else initial[name]
        failures, ratio = judge_output(name, outputs[name], before, each, from_sentinel=initial is not None)
        worst = max(worst, ratio)
        for failure in failures:
            problems += [failure.message, *(line.plain for line in element_lines(failure.elements))]
    assert not problems, "\n".join(problems)
    return worst


def assert_no_stray_writes(buffers: Buffers) -> None:
    """Check that since `buffers.freeze()` nothing was written to an input, around a tensor, or between its rows.

    Raises AssertionError that names the tensors.
    """
    __tracebackhide__ = True
    problems = [judge_stray_write(write).message for write in buffers.stray_writes()]
    assert not problems, "\n".join(problems)
