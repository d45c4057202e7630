"""`kernelfuzz replay`: saved failures, run again."""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from kernelfuzz.fuzz.cli.isolation import isolation_of, sanitizer_tool
from kernelfuzz.fuzz.cli.run import INTERRUPTED, Interruption
from kernelfuzz.fuzz.readable import case_lines, element_lines
from kernelfuzz.fuzz.replay import Result, Trial, plan, run_trials
from kernelfuzz.fuzz.verdict import printable
from kernelfuzz.kernels.registry import parse_device

_STYLES = {"FIXED": "bold green", "FAILED": "bold red", "ERROR": "bold yellow"}


def replay(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH", help="Failure folders, folders of such folders, or case files.")
    ],
    kernel: Annotated[
        list[str] | None,
        typer.Option(help="NAME, NAME@VERSION, NAME@PATH or MODULE:FUNCTION. Default: the one that failed."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, xpu. Default: where it failed.")] = None,
    isolate: Annotated[
        bool, typer.Option("--isolate/--no-isolate", help="Run cases in worker processes, or in this one (CPU only).")
    ] = True,
    workers: Annotated[
        int | None, typer.Option(help="Worker processes for each kernel. Default: as many as pay.", show_default=False)
    ] = None,
    sanitizer: Annotated[
        str | None,
        typer.Option(help="Run under compute-sanitizer: memcheck, racecheck or initcheck. Default: as it failed."),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print cases and failures in full, as it is done for one alone.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON, and nothing else.")] = False,
) -> None:
    """Run saved failures again and say of each whether it is FIXED, FAILED, or an ERROR, if that cannot be said.

    FAILED is a case that fails in any way, with the saved failure or with another one. A failure that was seen in some
    runs only is run ten times. A case file alone is run on the newest releases.

    Exit status: 0 all FIXED, 1 any FAILED, 2 otherwise any ERROR, 130 interrupted.
    """
    console = Console(stderr=as_json, highlight=False, emoji=False, soft_wrap=True)
    where = None if device is None else parse_device(device)
    tool = sanitizer_tool(sanitizer)
    planned = plan(paths, kernel or [], where, tool)
    jobs = {str(each.job): each.job for each in planned if isinstance(each, Trial)}
    isolation = isolation_of(list(jobs.values()), isolate, workers, tool)
    report = _Report(console, planned, verbose)
    interruption = Interruption()
    interrupted = False
    try:
        with closing(run_trials(planned, isolation)) as results, console.status("loading") as status:
            for index, result in results:
                report.take(index, result)
                status.update(f"{len(report.results)} of {len(planned)} replayed")
                interruption.check()
    except KeyboardInterrupt:
        interrupted = True
    known = report.finish()
    if as_json:
        print(json.dumps([result.to_json() for result in known], indent=2, allow_nan=False))
    outcomes = {result.outcome for result in known}
    if interrupted:
        console.print(f"interrupted: {len(known)} of {len(planned)} were replayed")
        raise typer.Exit(INTERRUPTED)
    raise typer.Exit(1 if "FAILED" in outcomes else 2 if "ERROR" in outcomes else 0)


class _Report:
    """Prints results in the order of what was planned, each as soon as it and those before it are known.

    - results: those that are known, by their indices
    """

    def __init__(self, console: Console, planned: Sequence[Trial | Result], verbose: bool) -> None:
        self.results: dict[int, Result] = {}
        self._console = console
        self._verbose = verbose or len({each.path for each in planned}) == 1
        trials = [each for each in planned if isinstance(each, Trial)]
        self._path_width = max(len(str(each.path)) for each in planned)
        self._job_width = max((len(str(each.job)) for each in trials), default=0)
        self._version_width = max((len(each.saved.version) + 2 for each in trials), default=0)
        self._printed = 0
        self._last: Path | None = None

    def take(self, index: int, result: Result) -> None:
        """Take a result."""
        self.results[index] = result
        while self._printed in self.results:
            self._print(self.results[self._printed])
            self._printed += 1

    def finish(self) -> list[Result]:
        """Print the results that waited for others, and how many there are; return them all."""
        known = [result for _, result in sorted(self.results.items())]
        for result in known[self._printed :]:
            self._print(result)
        if len(known) > 1:
            outcomes = [result.outcome for result in known]
            self._console.print(", ".join(f"{outcomes.count(each)} {each}" for each in _STYLES if each in outcomes))
        return known

    def _print(self, result: Result) -> None:
        row = Text.assemble((f"{result.outcome:<6}", _STYLES[result.outcome]))
        row.append(f"  {result.path!s:<{self._path_width}}")
        if result.case is not None and result.kernel:
            where = f" ({result.device})" if result.device else ""
            job = printable(f"{result.case.target} on {result.kernel}{where}").replace("\n", " ")
            version = f"[{result.version}]" if result.version else ""
            row.append(f"  {job:<{self._job_width}} {version:<{self._version_width}}", "dim")
        reason = result.reason
        if not self._verbose and result.failures:
            first = next(iter(result.failures.values()))
            reason = "; ".join(filter(None, (first.message, reason)))
        row.append(f"  {reason}")
        row.rstrip()
        self._console.print(row)
        if self._verbose:
            for line in self._details(result):
                self._console.print(line)
        self._last = result.path

    def _details(self, result: Result) -> Iterator[Text]:
        if result.case is not None and result.path != self._last:
            yield from case_lines(result.case)
        for name, failure in result.failures.items():
            yield Text(f"  {failure.kind}  {name}", style="bold red")
            yield Text(f"  {failure.message}")
            yield from element_lines(failure.elements)
