"""`kernelfuzz run`: look for failures under a budget."""

import fcntl
import json
import os
import random
import signal
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape

from kernelfuzz.fuzz import events
from kernelfuzz.fuzz.budget import parse_seconds
from kernelfuzz.fuzz.campaign import Budget, run_campaign
from kernelfuzz.fuzz.cli.isolation import isolation_of, sanitizer_tool
from kernelfuzz.fuzz.console import Display
from kernelfuzz.fuzz.failure_files import FailureFiles
from kernelfuzz.fuzz.files import SummaryFile
from kernelfuzz.fuzz.job import Job, Skipped, default_jobs, named_jobs
from kernelfuzz.fuzz.known_failures import read_known_failures
from kernelfuzz.fuzz.regimes import in_regime, require_regime
from kernelfuzz.fuzz.summary import Summary
from kernelfuzz.fuzz.targets import get_target
from kernelfuzz.kernels.registry import parse_device
from kernelfuzz.strategies.errors import KernelfuzzError

DEFAULT_SECONDS = 60.0
KNOWN_FAILURES = "known_failures.toml"
INTERRUPTED = 130
"""What a shell reports of a command that Ctrl-C ended: 128 + SIGINT."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run(
    targets: Annotated[list[str] | None, typer.Argument(metavar="[TARGET]...", help="Default: every target.")] = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option(help="NAME, NAME@VERSION, NAME@PATH or MODULE:FUNCTION. Default: the newest releases."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, xpu. Default: the best there is.")] = None,
    examples: Annotated[int | None, typer.Option(help="Examples for each kernel.", show_default=False)] = None,
    time: Annotated[str | None, typer.Option(help="Time for all together, like 90s, 10m, 2h. Default: 60s.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same cases. Default: a new one.")] = None,
    isolate: Annotated[
        bool, typer.Option("--isolate/--no-isolate", help="Run cases in worker processes, or in this one (CPU only).")
    ] = True,
    workers: Annotated[
        int | None, typer.Option(help="Worker processes for each kernel. Default: as many as pay.", show_default=False)
    ] = None,
    sanitizer: Annotated[
        str | None, typer.Option(help="Run under compute-sanitizer: memcheck, racecheck or initcheck (CUDA only).")
    ] = None,
    regime: Annotated[
        str | None, typer.Option(help="Draw cases of robustness (GPU only) or huge instead of the usual ones.")
    ] = None,
    known_failures: Annotated[
        Path | None,
        typer.Option(help=f"Failures that do not fail the run. Default: {KNOWN_FAILURES}, if it is there."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the summary and the failures.")] = Path("kernelfuzz-out"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON, and nothing else.")] = False,
) -> None:
    """Fuzz kernels and report what fails.

    Exit status: 0 no failure that is not known, 1 failures, 2 usage or environment, 130 interrupted before one was
    found.
    """
    console = Console(stderr=as_json, highlight=False, emoji=False)
    where = None if device is None else parse_device(device)
    for name in targets or []:
        get_target(name)
    if known_failures is None and Path(KNOWN_FAILURES).exists():
        known_failures = Path(KNOWN_FAILURES)
    known = () if known_failures is None else read_known_failures(known_failures)
    budget = _budget(examples, time)
    tool = sanitizer_tool(sanitizer)
    jobs, skipped = _jobs(targets or [], kernel or [], where)
    isolation = isolation_of(jobs, isolate, workers, tool)
    chosen_regime = require_regime(regime, jobs)
    jobs, left_out = in_regime(chosen_regime, jobs)
    if chosen_regime == "huge":
        if workers is not None:
            raise KernelfuzzError(
                "--regime huge runs one worker, which may take all of the memory: leave out --workers"
            )
        isolation = replace(isolation, workers=1)
    lock = _take(out)
    seed = random.randrange(2**32) if seed is None else seed

    interruption = Interruption()
    summary = Summary(known)
    files = FailureFiles(out, seed, tool)
    display = Display(console, summary, files)
    summary_file = SummaryFile(out, summary)
    bus = events.Bus([summary, files, summary_file, display, interruption])
    try:
        with display.live():
            run_campaign(jobs, [*skipped, *left_out], budget, seed, out, bus, isolation, chosen_regime)
    finally:
        display.print_end(out)
        if summary_file.problem and not files.problem:
            console.print(f"[bold red]error:[/] {escape(summary_file.problem)}", soft_wrap=True)
    os.close(lock)
    if as_json:
        print(json.dumps(summary.to_json(), indent=2))
    if summary.failed:
        raise typer.Exit(1)
    if summary.interrupted:
        raise typer.Exit(INTERRUPTED)
    raise typer.Exit(2 if summary.broken or summary_file.problem else 0)


class Interruption:
    """Ends the command on the first signal, and lets nothing interrupt what it says at its end.

    SIGTERM does as Ctrl-C, which a shell has ignored for what it starts in the background. An exception that is raised
    in the midst of a garbage collection is lost, so that it is to be raised once more: by `check`, or by this as a
    consumer of events.
    """

    def __init__(self) -> None:
        self._is_requested = False
        for number in _SIGNALS:
            signal.signal(number, self.request)

    def request(self, number: int, frame: FrameType | None) -> None:
        """Take a signal."""
        del number, frame
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        self._is_requested = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal came."""
        if self._is_requested:
            raise KeyboardInterrupt

    def __call__(self, event: events.Event) -> None:
        """Raise KeyboardInterrupt if a signal came before this case was finished."""
        if isinstance(event, events.CaseFinished):
            self.check()


def _jobs(targets: list[str], kernels: list[str], device: torch.device | None) -> tuple[list[Job], list[Skipped]]:
    """Return what to run, and what cannot run here. Raises KernelfuzzError if nothing can."""
    if kernels:
        return named_jobs(targets, kernels, device), []
    jobs, skipped = default_jobs(targets, device)
    if not jobs:
        reasons = "; ".join(dict.fromkeys(item.reason for item in skipped))
        raise KernelfuzzError(
            f"nothing can run here: {reasons}; 'kernelfuzz releases fetch --pinned' fetches the newest"
        )
    return jobs, skipped


def _budget(examples: int | None, time: str | None) -> Budget:
    """Return the budget. Raises KernelfuzzError unless one positive amount, or nothing, was given."""
    if examples is not None and time is not None:
        raise KernelfuzzError("give --examples or --time, not both")
    if examples is not None:
        if examples <= 0:
            raise KernelfuzzError(f"--examples {examples}: expected at least 1")
        return Budget(examples=examples)
    if time is None:
        return Budget(seconds=DEFAULT_SECONDS)
    return Budget(seconds=parse_seconds("--time", time))


def _take(folder: Path) -> int:
    """Lock the folder for this campaign and return the lock, a file descriptor. Raises KernelfuzzError, before anything
    is run, for a folder that cannot be written or that another campaign writes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise KernelfuzzError(f"--out {folder}: another campaign writes there; name another folder") from None
    except OSError as error:
        raise KernelfuzzError(f"--out {folder}: {error.strerror}; name a folder that can be written") from error
    return lock
