"""A campaign on a kernel that crashes in 5 % of its cases, beside the same campaign on the healthy kernel.

Both draw the same cases. Which of them must crash is counted in the healthy campaign, where nothing can get lost.
Exit status: 1 if a crash was lost or invented, or a campaign did not complete its examples.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from crashing import must_crash
from rich.console import Console
from rich.table import Table

from kernelfuzz.fuzz import events
from kernelfuzz.fuzz.campaign import Budget, run_campaign
from kernelfuzz.fuzz.job import named_jobs
from kernelfuzz.fuzz.summary import JobSummary, Summary
from kernelfuzz.kernels.registry import parse_device
from kernelfuzz.strategies.case import Case
from kernelfuzz.strategies.errors import KernelfuzzError

EXAMPLES = 2000
EXAMPLES_ON_CPU = 500

SEED = 0
FOLDER = str(Path(__file__).parent)


@dataclass
class Searched:
    """What was run to look for failures, not to shrink one. A consumer of events.

    - drawn, crashed: how often each drawn structure was run, and how often that ended in a crash
    - cases: launches; seconds: wall time, what is spent on shrinking left out
    """

    drawn: Counter[Case] = field(default_factory=Counter)
    crashed: Counter[Case] = field(default_factory=Counter)
    cases: int = 0
    seconds: float = 0.0
    _last: float = 0.0

    def __call__(self, event: events.Event) -> None:
        now = time.monotonic()
        if isinstance(event, events.CaseFinished) and not event.shrinking:
            self.drawn[event.case] += 1
            self.crashed[event.case] += any(failure.kind == "crash" for failure in event.verdict.failures)
            self.cases += event.verdict.cases
            self.seconds += now - self._last
        self._last = now


def run(kernel: str, examples: int, device: torch.device) -> tuple[JobSummary, Searched]:
    """Run a campaign on one of the kernels of `crashing`."""
    summary, searched = Summary(), Searched()
    (job,) = named_jobs(["moe_lora_align"], [f"crashing:{kernel}"], device)
    with tempfile.TemporaryDirectory() as out:
        run_campaign([job], [], Budget(examples=examples), SEED, Path(out), events.Bus([summary, searched]))
    if summary.interrupted:
        raise KeyboardInterrupt
    return summary.jobs[0], searched


def main() -> None:
    """Run both campaigns and print what was counted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--examples", type=int, help=f"default: {EXAMPLES}, on a CPU {EXAMPLES_ON_CPU}")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    try:
        device = parse_device(options.device)
    except KernelfuzzError as error:
        parser.error(str(error))
    # Where workers look for `crashing`.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [FOLDER, os.environ.get("PYTHONPATH")]))
    examples = options.examples or (EXAMPLES_ON_CPU if device.type == "cpu" else EXAMPLES)
    healthy, reference = run("healthy", examples, device)
    crashing, searched = run("one_in_twenty", examples, device)

    expected = Counter({case: count for case, count in reference.drawn.items() if must_crash(case)})
    crashes = [name for name, found in crashing.failures.items() if found.failure.kind == "crash"]
    rates = [each.cases / each.seconds if each.seconds else 0.0 for each in (reference, searched)]
    numbers = {
        "examples": crashing.examples,
        "crashes expected": expected.total(),
        "crashes counted": sum(crashing.hits[name] for name in crashes),
        "crashes lost": (expected - searched.crashed).total(),
        "crashes invented": (searched.crashed - expected).total(),
        "workers replaced": crashing.replacements.workers,
        "waits without a spare": crashing.replacements.waits,
        "cases/s of the healthy kernel": round(rates[0], 1),
        "cases/s of the crashing one": round(rates[1], 1),
        "ratio": round(rates[1] / rates[0], 3) if rates[0] else 0.0,
    }
    table = Table(title=f"5 % of cases crash, on {device}", box=None, pad_edge=False, show_header=False)
    for name, number in numbers.items():
        table.add_row(name, f"{number:,}")
    console = Console(highlight=False)
    console.print(table)
    for job in (healthy, crashing):
        if job.error or job.examples != examples:
            console.print(f"{job.job}: {job.examples:,} of {examples:,} examples; {job.error}", soft_wrap=True)
    if options.json is not None:
        options.json.write_text(json.dumps({"device": str(device), **numbers}, indent=2) + "\n")
    complete = all(not job.error and job.examples == examples for job in (healthy, crashing))
    sys.exit(0 if complete and numbers["crashes counted"] == expected.total() and expected == searched.crashed else 1)


if __name__ == "__main__":
    main()
