"""Where a campaign's wall time goes: `make bench`, or `python benchmarks/harness_share.py [--seconds N]`.

One line a kernel: examples a second, and the share of wall time in the kernel, in the oracle, and in everything else,
which is the harness: drawing, the worker's connection, making inputs, comparing. Kernels are warmed up first, so that
building and caching them does not count.
"""

import argparse
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kernelfuzz.fuzz import events
from kernelfuzz.fuzz.campaign import Budget, run_campaign
from kernelfuzz.fuzz.job import Job, default_jobs
from kernelfuzz.fuzz.summary import JobSummary, Summary

WARM_UP_EXAMPLES = 300


def measure(job: Job, seconds: float) -> tuple[JobSummary, float]:
    """Run a job for about `seconds` after a warm-up; return what it did and the wall seconds of the measured part."""
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder)
        run_campaign([job], [], Budget(examples=WARM_UP_EXAMPLES), 0, database / "warm", events.Bus())
        summary = Summary()
        clock: list[float] = []

        def start(event: events.Event) -> None:
            if isinstance(event, events.JobStarted):
                clock.append(time.monotonic())

        run_campaign([job], [], Budget(seconds=seconds), 1, database / "timed", events.Bus([summary, start]))
        return summary.jobs[0], time.monotonic() - clock[0]


def main() -> None:
    """Measure every released kernel that can run here and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="per kernel, its loading included")
    arguments = parser.parse_args()
    table = Table(box=None, header_style="bold")
    for name in ("target", "kernel", "device", "examples/s", "kernel", "oracle", "harness"):
        table.add_column(name, justify="left" if name in ("target", "device") else "right")
    for job in default_jobs([], None)[0]:
        done, wall = measure(job, arguments.seconds)
        kernel, oracle = done.spent["kernel"] / wall, done.spent["oracle"] / wall
        table.add_row(
            job.target.name,
            str(job.kernel),
            str(job.device),
            f"{done.examples / wall:,.0f}",
            f"{kernel:.0%}",
            f"{oracle:.0%}",
            f"{1 - kernel - oracle:.0%}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
