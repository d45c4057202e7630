"""The naive loop and kernelfuzz side by side: `make bench`, or `python benchmarks/speed.py`.

Each kernel is measured with `naive.py` and in a campaign, which the clock counts from the loaded kernel to the end,
shrinking included. Kernels that Triton compiles for a GPU are measured cold, with an empty cache, and warm: the same
cases once more in new processes. Of interpreted kernels a few slow cases decide the rate: give them more seconds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kernelfuzz.fuzz import events
from kernelfuzz.fuzz.campaign import Budget, Isolation, default_workers, run_campaign
from kernelfuzz.fuzz.executor import worker_environment
from kernelfuzz.fuzz.job import Job, Skipped, default_jobs, named_jobs
from kernelfuzz.fuzz.summary import Summary, environment
from kernelfuzz.kernels.registry import parse_device
from kernelfuzz.strategies.errors import KernelfuzzError

PHASES = ("kernel", "oracle", "inputs", "check")
WARM_UP = 30
"""Cases before the naive loop's clock starts, where nothing is measured cold: Intel's runtime builds modules too."""

SEED = 0
WIDTH = 100
LEGEND = """\
100 % is the wall time from the loaded kernel on: of the naive loop's process, or of kernelfuzz's
workers (×N: of all N together). compile: the palette is compiled ahead on all cores; the naive loop
compiles in the kernel's time. rest: drawing, transfer, waiting. A ratio is to the naive loop above."""


@dataclass
class Measurement:
    """What one loop did with one kernel.

    - cache: cold, warm, or empty where nothing is compiled
    - seconds: wall time from the loaded kernel on; spent: seconds by phase, of all `workers` together; compiling: the
      part of `seconds` in which all cores compile the palette
    - failing: cases that failed, in the naive loop; fingerprints, in kernelfuzz
    - problem: why there is no result, in one line
    """

    target: str
    kernel: str
    device: str
    loop: str
    cache: str
    cases: int = 0
    failing: int = 0
    seconds: float = 0.0
    spent: Mapping[str, float] = field(default_factory=dict)
    workers: int = 1
    compiling: float = 0.0
    problem: str = ""

    @property
    def rate(self) -> float:
        """Cases a second."""
        return self.cases / self.seconds if self.seconds else 0.0

    def shares(self) -> dict[str, float]:
        """Return the share of the wall time by phase; they add up to 1."""
        found = {"compile": self.compiling / self.seconds}
        found |= {phase: self.spent.get(phase, 0.0) / (self.workers * self.seconds) for phase in PHASES}
        return found | {"rest": 1.0 - sum(found.values())}


def measure_naive(job: Job, cache: str, seconds: float, limit: int | None) -> Measurement:
    """Run the naive loop in a process of its own: it may die, and a GPU's context stays out of this one."""
    done = Measurement(job.target.name, str(job.kernel), str(job.device), "naive", cache)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, str(Path(__file__).with_name("naive.py")), done.target, done.kernel, done.device]
        command += ["--seed", str(SEED), "--seconds", str(seconds), "--json", str(result)]
        command += ["--limit", str(limit)] if limit else []
        command += [] if job.compiles else ["--warm-up", str(WARM_UP)]
        process = subprocess.run(command, env=worker_environment(job), capture_output=True, text=True)
        if process.returncode:
            last = process.stderr.strip().splitlines()[-1:]
            done.problem = ": ".join([f"the naive loop ended with status {process.returncode}", *last])
        else:
            vars(done).update(json.loads(result.read_text()))
    return done


class Clock:
    """Notes when a job began and ended, and how long its palette took to compile. A consumer of events."""

    def __init__(self) -> None:
        self.started = self.ended = time.monotonic()
        self.compiling = 0.0

    def __call__(self, event: events.Event) -> None:
        match event:
            case events.JobStarted():
                self.started = time.monotonic()
            case events.KernelsCompiled(_, _, seconds):
                self.compiling = seconds
            case events.JobFinished():
                self.ended = time.monotonic()


def measure_kernelfuzz(job: Job, cache: str, seconds: float) -> Measurement:
    """Run a campaign without anything left of an earlier one but Triton's cache."""
    warm_up = Isolation().executor(job)  # starts the server that forks workers, which imports torch for seconds
    with suppress(KernelfuzzError):  # the campaign will say so
        warm_up.loaded()
    warm_up.close()
    summary, clock = Summary(), Clock()
    with tempfile.TemporaryDirectory() as folder:
        run_campaign([job], [], Budget(seconds=seconds), SEED, Path(folder), events.Bus([summary, clock]))
    if summary.interrupted:
        raise KeyboardInterrupt
    done = summary.jobs[0]
    return Measurement(
        job.target.name,
        str(job.kernel),
        str(job.device),
        "kernelfuzz",
        cache,
        cases=done.cases,
        failing=len(done.failures),
        seconds=clock.ended - clock.started,
        spent=dict(done.spent),
        workers=default_workers(job),
        compiling=clock.compiling,
        problem=done.error or next(iter(done.errors), ""),
    )


@contextmanager
def empty_triton_cache() -> Iterator[None]:
    """Let what is started meanwhile compile into a new folder."""
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="kernelfuzz-triton-") as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["TRITON_CACHE_DIR"]
            if before is not None:
                os.environ["TRITON_CACHE_DIR"] = before


def measure(job: Job, seconds: float, naive_seconds: float, *, warm: bool) -> list[Measurement]:
    """Measure a job with both loops, and where it compiles, each of them cold and, if so wanted, `warm`."""
    if not job.compiles:
        return [measure_naive(job, "", naive_seconds, None), measure_kernelfuzz(job, "", seconds)]
    with empty_triton_cache():
        naive = [measure_naive(job, "cold", naive_seconds, None)]
        if warm:
            naive.append(measure_naive(job, "warm", naive_seconds, naive[0].cases))
    with empty_triton_cache():
        return naive + [measure_kernelfuzz(job, cache, seconds) for cache in ("cold", "warm")[: 1 + warm]]


def table(jobs: list[list[Measurement]]) -> Table:
    """Return the table that a person reads: a few rows for each job, naive and kernelfuzz."""
    result = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for name in ("target, kernel", "loop"):
        result.add_column(name, no_wrap=True)
    for name in ("cases/s", "ratio", "compile", *PHASES, "rest"):
        result.add_column(name, justify="right", no_wrap=True)
    for job in jobs:
        naive = {done.cache: done.rate for done in job if done.loop == "naive"}
        names = [f"{job[0].target} ({job[0].device})", job[0].kernel]
        for number, done in enumerate(job):
            loop = f"{done.loop}×{done.workers}" if done.workers > 1 else done.loop
            ratio = f"{done.rate / naive[done.cache]:.2f}" if naive[done.cache] and done.loop != "naive" else ""
            shares = [f"{share:.0%}" for share in done.shares().values()] if done.cases else []
            rate = f"{done.rate:,.0f}" if done.rate >= 100 else f"{done.rate:.3g}"
            result.add_row(*names[number : number + 1] or [""], f"{loop} {done.cache}".strip(), rate, ratio, *shares)
    return result


def main() -> None:
    """Measure, then print one table. Exit status: 2 if there is nothing to measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", default=[], help="default: all")
    parser.add_argument("--kernel", action="append", default=[], help="default: the newest releases")
    parser.add_argument("--device", help="default: the best there is for each kernel")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each measurement (20)")
    parser.add_argument("--naive-seconds", type=float, help="for the naive loop, if not as long")
    parser.add_argument("--cold-only", action="store_true", help="measure nothing warm")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    try:
        device = None if options.device is None else parse_device(options.device)
        jobs, skipped = default_jobs(options.target, device)
        if options.kernel:
            jobs, skipped = named_jobs(options.target, options.kernel, device), []
    except KernelfuzzError as error:
        parser.error(str(error))
    results = []
    naive_seconds = options.naive_seconds or options.seconds
    try:
        for number, job in enumerate(jobs, start=1):
            print(f"measuring {number} of {len(jobs)}: {job}", file=sys.stderr, flush=True)
            results.append(measure(job, options.seconds, naive_seconds, warm=not options.cold_only))
    except KeyboardInterrupt:
        print("interrupted: this is what was measured until then", file=sys.stderr)
    report(results, skipped)
    if options.json is not None:
        document = {
            "environment": environment(),
            "measurements": [asdict(done) | {"rate": done.rate} for job in results for done in job],
        }
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    if not jobs:
        sys.exit(2)


def report(jobs: list[list[Measurement]], skipped: list[Skipped]) -> None:
    """Print the table, what it means, and what is missing in it."""
    console = Console(width=WIDTH, highlight=False, emoji=False, markup=False)
    console.print(table(jobs))
    console.print(LEGEND)
    for done in (done for job in jobs for done in job):
        where = f"{done.target} on {done.kernel} ({done.device}), {done.loop} {done.cache}".rstrip()
        if done.problem:
            console.print(f"{where}: {done.problem}", soft_wrap=True)
        if done.failing:
            what = "failure(s) found and shrunk" if done.loop == "kernelfuzz" else "case(s) failed"
            console.print(f"{where}: {done.failing:,} {what}", soft_wrap=True)
    for each in skipped:
        console.print(f"skipped {each.target} on {each.kernel} ({each.device}): {each.reason}", soft_wrap=True)


if __name__ == "__main__":
    main()
