"""One saved case, run again."""

import json
import math
from collections.abc import Callable

import torch
from rich.console import Console
from rich.text import Text

from kernelfuzz.fuzz.campaign import Isolation
from kernelfuzz.fuzz.console import case_lines, element_lines
from kernelfuzz.fuzz.executor import Request, WorkerLostError
from kernelfuzz.fuzz.failures import fingerprint
from kernelfuzz.fuzz.job import Job, default_jobs, named_jobs
from kernelfuzz.strategies.case import Case
from kernelfuzz.strategies.errors import KernelfuzzError


def replay_case(
    case: Case,
    targets: list[str],
    kernels: list[str],
    device: torch.device | None,
    isolation: Callable[[list[Job]], Isolation],
    console: Console,
    as_json: bool,
) -> int:
    """Run `case` on each of `kernels` (by default the newest releases), print the verdicts, return the exit status.

    `isolation` says where jobs run. Raises KernelfuzzError if `targets` names another target than the case's, or a
    kernel cannot run it.
    """
    if set(targets) - {case.target}:
        raise KernelfuzzError(f"the case is for target {case.target}, not {', '.join(targets)}")
    jobs = named_jobs([case.target], kernels, device) if kernels else default_jobs([case.target], device)[0]
    if not jobs:
        raise KernelfuzzError(f"no kernel for {case.target} can run here: see kernelfuzz list")
    where = isolation(jobs)
    for line in case_lines(case):
        console.print(line)
    results = []
    for job in jobs:
        executor = where.executor(job)
        try:
            kernel = executor.loaded()
            verdict = executor.run(Request.alone(case))
        except WorkerLostError as lost:  # the verdict is what was asked for
            verdict = lost.verdict
        finally:
            executor.close()
        if verdict.error:
            raise KernelfuzzError(f"{job}: the case cannot be judged: {verdict.error}")
        outcome = "rejected" if verdict.rejected else "FAILED" if verdict.failures else "passed"
        console.print(Text(f"{job} [{kernel.version}]: {outcome} {verdict.rejected}".rstrip()))
        for failure in verdict.failures:
            console.print(Text(f"  {failure.kind}  {fingerprint(job, failure)}", style="bold red"))
            console.print(Text(f"  {failure.message}"))
            for line in element_lines(failure.elements):
                console.print(line)
        document = verdict.to_json()
        if not math.isfinite(verdict.ratio):
            document["ratio"] = str(verdict.ratio)  # JSON has no infinity
        results.append({"kernel": str(job.kernel), "device": str(job.device), **document})
    if as_json:
        print(json.dumps(results, indent=2, allow_nan=False))
    return 1 if any(result["failures"] for result in results) else 0
