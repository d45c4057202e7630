"""`kernelfuzz nightly`: every kernel under one budget, remembered from night to night."""

import contextlib
import json
import os
import random
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console

from kernelfuzz.fuzz.budget import parse_seconds
from kernelfuzz.fuzz.cli.report import write_night_reports
from kernelfuzz.fuzz.nightly.config import Config, cluster_jobs, local_jobs, read_config
from kernelfuzz.fuzz.nightly.display import NightDisplay
from kernelfuzz.fuzz.nightly.lanes import Lanes, LocalLanes
from kernelfuzz.fuzz.nightly.night import Night
from kernelfuzz.fuzz.nightly.redis_examples import require_redis
from kernelfuzz.fuzz.store import queries
from kernelfuzz.fuzz.store.store import Store
from kernelfuzz.strategies.errors import KernelfuzzError

CONFIG = "kernelfuzz.toml"


def nightly(
    store: Annotated[Path, typer.Option(metavar="DIR", help="Folder that remembers earlier nights.")],
    time: Annotated[str, typer.Option(help="Time for all together, like 10m or 2h.")],
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help=f"What is to run. Default: {CONFIG}, if it is there.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the night. Default: a new one.")] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run on a Ray cluster: its address, or auto.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON, and nothing else.")] = False,
) -> None:
    """Run stored failures and the historical bugs again, then fuzz every kernel until the time is over.

    Time goes to what still finds new regimes or raises err/bound, half of it to all alike. The store remembers
    failures from night to night; DIR/report.html tells what is new.

    Exit status: 0 nothing new, 1 failures that are new or have come back, 2 usage or environment, 130 interrupted
    before one was found.
    """
    console = _SteadyConsole(stderr=as_json, highlight=False, emoji=False)
    seconds = parse_seconds("--time", time)
    if config is None and Path(CONFIG).exists():
        config = Path(CONFIG)
    settings = Config() if config is None else read_config(config)
    if settings.examples:
        require_redis(settings.examples)
    signals = _Signals()
    jobs, skipped = local_jobs(settings) if ray is None else ([], [])
    kept = Store(store)
    lanes: Lanes = LocalLanes(store, settings.workers)
    if ray is not None:
        from kernelfuzz.fuzz.nightly.cluster import RayLanes

        lanes = RayLanes(ray, queries.identity(kept.connection), settings)
        jobs = cluster_jobs(settings, lanes.kinds())
    display = NightDisplay(console)
    for problem in kept.problems:
        display.problem(problem)
    seed = random.randrange(2**32) if seed is None else seed
    # Ray prints there when a node dies.
    quiet = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    with display.live(), quiet:
        night = Night(settings, kept, jobs, skipped, lanes, seconds, seed, display, signals.is_requested)
        display.watch(night, seed)
        status = night.run()
    kept.close()
    display.print_end(night, skipped)
    try:
        write_night_reports(store, night.ledger.run, console)
    except KernelfuzzError as error:
        display.problem(str(error))
        status = status or 2
    if as_json:
        print(json.dumps(_summary(night, seed, status), indent=2))
    raise typer.Exit(status)


def _summary(night: Night, seed: int, status: int) -> dict[str, Any]:
    return {
        "run": night.ledger.run,
        "seed": seed,
        "exit_status": status,
        "interrupted": night.interrupted,
        "failures": night.ledger.statuses,
        "regressions": {name: each.outcome for name, each in night.ledger.regressions.items()},
        "cases": {name: state.statistics.cases for name, state in night.jobs.items()},
        "problems": night.ledger.problems,
    }


class _SteadyConsole(Console):
    """A console whose reader may go away: the night goes on and says nothing any more."""

    def on_broken_pipe(self) -> None:
        """Say nothing from now on."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, (sys.__stderr__ if self.stderr else sys.__stdout__).fileno())  # type: ignore[union-attr]


class _Signals:
    """Notes that Ctrl-C, SIGTERM or SIGHUP came; what is being written is finished."""

    def __init__(self) -> None:
        self._came = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._came = True

    def is_requested(self) -> bool:
        """Whether a signal came."""
        return self._came
