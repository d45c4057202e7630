"""The loop that a person writes by hand, to compare kernelfuzz with: a program that `speed.py` runs.

One process, one case after the other: make the inputs, launch, wait, ask the oracle, compare. No guarded memory, no
other process, no shrinking. Cases come from the target's own strategy, but drawing them is not on the clock: such a
loop would take random numbers, which cost nothing.
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch

from kernelfuzz.fuzz.generation import draw
from kernelfuzz.fuzz.job import Job, named_jobs
from kernelfuzz.fuzz.launch import Stopwatch, synchronize
from kernelfuzz.kernels.base import Kernel, UnsupportedCaseError
from kernelfuzz.oracles.expectation import ExpectedOutput
from kernelfuzz.strategies.case import Case
from kernelfuzz.strategies.layouts import plain_allocator

CASES = 1000
"""Different cases; after them the loop begins anew."""

GROUP_STRIDE = 1 << 33
"""Sets groups apart: the elements of an output that has them are 32-bit integers."""


def run_case(job: Job, kernel: Kernel, case: Case, watch: Stopwatch) -> bool:
    """Run one case and return whether it passed. `watch` gets the phases that kernelfuzz's own verdicts have."""
    inputs = job.target.make_inputs(case, job.device)
    allocate = plain_allocator(job.device)
    outputs, initial = {}, {}
    for name, spec in job.target.outputs(inputs).items():
        outputs[name] = allocate(name, spec.shape, spec.dtype, spec.layout).zero_()
        if spec.initial is not None:
            outputs[name].copy_(spec.initial)
        initial[name] = outputs[name].clone(memory_format=torch.contiguous_format)
    watch.lap("inputs")
    refused = False
    try:
        kernel.launch(inputs, outputs)
    except UnsupportedCaseError:
        return True
    except Exception:
        refused = True
    watch.lap("kernel")
    expectation = job.target.expect(inputs, initial)
    watch.lap("oracle")
    passed = refused == (expectation.error is not None)
    if not refused:
        passed &= all(agrees(outputs[name], initial[name], each) for name, each in expectation.outputs.items())
    watch.lap("check")
    return passed


def agrees(actual: torch.Tensor, initial: torch.Tensor, expected: ExpectedOutput) -> bool:
    """Return whether an output holds what its expectation asks for; what `initial` held where it asks to keep that."""
    written = expected.mask("write")
    wrong = (expected.mask("keep") & (actual != initial)).any()
    actual, values = torch.where(written, actual, 0), torch.where(written, expected.values, 0)
    if expected.groups is not None:
        places = expected.groups * GROUP_STRIDE
        actual, values = ((places + tensor).flatten().sort().values for tensor in (actual, values))
    if expected.bound is None:
        wrong |= (actual != values).any()
    else:
        wrong |= ~((actual - values).abs() <= torch.where(written, expected.bound, 0)).all()
    return not bool(wrong)


def measure(job: Job, seed: int, seconds: float, limit: int | None, warm_up: int) -> dict[str, Any]:
    """Load the kernel and run `warm_up` cases; then cases for `seconds`, but at most `limit`, and return how many these
    were, how many of them failed, how long they took, and the seconds of that by phase."""
    kernel = job.implementation.load(job.kernel, job.device)
    dimensions = {name: tuple(value) if isinstance(value, list) else value for name, value in kernel.dimensions.items()}
    drawn = itertools.cycle(draw(job.target.cases(**dimensions), seed, CASES))
    torch.zeros(1, device=job.device)  # the device's context takes seconds too
    for case in itertools.islice(drawn, warm_up):
        run_case(job, kernel, case, Stopwatch(job.device))
    synchronize(job.device)
    ran = failing = 0
    taken, spent = 0.0, dict.fromkeys(("kernel", "oracle", "inputs", "check"), 0.0)
    while taken < seconds and ran != limit:
        case = next(drawn)
        started, watch = time.perf_counter(), Stopwatch(job.device)
        failing += not run_case(job, kernel, case, watch)
        taken += time.perf_counter() - started
        for phase, part in watch.seconds.items():
            spent[phase] += part
        ran += 1
    return {"cases": ran, "failing": failing, "seconds": taken, "spent": spent}


def main() -> None:
    """Measure one kernel and write the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("kernel")
    parser.add_argument("device", type=torch.device)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--limit", type=int, help="most cases")
    parser.add_argument("--warm-up", type=int, default=0, help="cases before the clock starts")
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are small: as many as there are cores make it slower, several times at worst
    (job,) = named_jobs([options.target], [options.kernel], options.device)
    result = measure(job, options.seed, options.seconds, options.limit, options.warm_up)
    options.json.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
