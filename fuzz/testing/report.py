"""What a person reads of a kernel test that failed."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

from kernelfuzz.fuzz.events import FailureFound
from kernelfuzz.fuzz.readable import case_lines, element_lines
from kernelfuzz.fuzz.testing.run import Assignment
from kernelfuzz.fuzz.verdict import printable
from kernelfuzz.strategies.case import to_json


def failure_text(found: FailureFound, folder: Path, name: str, assignment: Assignment, problem: str = "") -> str:
    """Return a failure in a few lines: what differs, the case, and the files, or the `problem` with them. `name` is the
    test's."""
    return "\n".join(_lines(found, folder, name, assignment, problem))


def _lines(found: FailureFound, folder: Path, name: str, assignment: Assignment, problem: str) -> Iterator[str]:
    failure, verbose = found.failure, assignment.options.verbose
    yield f"{failure.kind}  {found.fingerprint}"
    yield f"  {failure.message}"
    yield from (line.plain for line in element_lines(failure.elements))
    yield from (f"  also: {symptom.message}" for symptom in found.symptoms)
    if failure.output_tail.strip():
        said = failure.output_tail.strip().splitlines()
        yield "  the process said last:"
        yield from (f"    {printable(line)}" for line in (said if verbose else said[-3:]))
    if assignment.saved is not None:
        yield f"  the saved case on {found.job.device}:"
    elif found.failed_runs == found.runs:
        yield "  smallest case found:"
    else:
        yield f"  smallest case found (unreliable: failed in {found.failed_runs} of {found.runs} runs):"
    yield from (line.plain for line in case_lines(found.case))
    if found.arguments:
        yield "    " + " ".join(f"{argument}={value!r}" for argument, value in found.arguments.items())
    if verbose:
        yield f"  as JSON: {json.dumps(to_json(found.case))}"
    if problem:
        yield f"  error: {problem}"
        return
    saved = folder if assignment.saved is None else assignment.saved.path
    for what, file in (("reproducer", "repro.py"), ("writemap", "writemap.png"), ("for an issue", "README.md")):
        if (saved / file).exists():
            yield f"  {what + ':':<13} {saved / file}"
    yield f"  see it again: {shlex.join(['pytest', name.partition('[')[0], f'--fuzz-replay={saved}'])}"
