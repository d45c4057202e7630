"""`kernelfuzz regressions`: historical bugs must be found where they are, and only there."""

import json
import signal
import statistics
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from kernelfuzz.fuzz.cli.run import INTERRUPTED
from kernelfuzz.fuzz.readable import case_lines
from kernelfuzz.fuzz.regressions import RegressionResult, SideResult, missing_releases, run_regression
from kernelfuzz.kernels.registry import parse_device
from kernelfuzz.kernels.regressions import REGRESSIONS, find
from kernelfuzz.strategies.errors import KernelfuzzError

SCHEMA = 1
_STYLES = {"PASS": "bold green", "FAIL": "bold red", "NOT RUN": "bold yellow"}


def regressions(
    pull_requests: Annotated[
        list[str] | None, typer.Argument(metavar="[PR]...", help="Pull requests that mended them. Default: all.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, xpu. Default: for each the best there is.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the campaigns.")] = 0,
    seeds: Annotated[int, typer.Option(help="How many seeds the bug must be found with, from --seed on.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON, and nothing else.")] = False,
) -> None:
    """Run the five bugs of vLLM's that kernelfuzz was made for, each where it is and where it is not.

    A bug passes if a normal campaign finds it within 2,000 cases and the mended code does not show it while ten times
    as many cases as that took pass, and 1,000 at least.

    Exit status: 0 everything that can run here passed, 1 something did not, 2 usage or environment, 130 interrupted.
    """
    console = Console(stderr=as_json, highlight=False, emoji=False)
    if seeds < 1:
        raise KernelfuzzError(f"--seeds {seeds}: expected at least 1")
    where = None if device is None else parse_device(device)
    chosen = [find(number) for number in dict.fromkeys(pull_requests)] if pull_requests else list(REGRESSIONS)
    if missing := missing_releases(chosen, where):
        raise KernelfuzzError(f"releases are missing: run 'kernelfuzz releases fetch {' '.join(missing)}'")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C: temporary trees are taken away
    results: list[RegressionResult] = []
    for regression in chosen:
        if results and results[-1].interrupted:
            results.append(RegressionResult(regression, interrupted=True))
            continue
        with console.status("") as status:
            results.append(run_regression(regression, where, range(seed, seed + seeds), status.update))
        for line in _lines(results[-1]):
            console.print(line, soft_wrap=True)
    interrupted = any(result.interrupted for result in results)
    outcomes = [result.outcome for result in results]
    console.print(", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in _STYLES if outcome in outcomes))
    if as_json:
        print(json.dumps({"schema": SCHEMA, "results": [result.to_json() for result in results]}, indent=2))
    if "FAIL" in outcomes:
        raise typer.Exit(1)
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    if "PASS" not in outcomes:
        raise KernelfuzzError("none of these can run here")


def _lines(result: RegressionResult) -> Iterator[Text]:
    """Return what a person reads of a regression."""
    regression = result.regression
    yield Text.assemble(
        (f"{result.outcome:<8}", _STYLES[result.outcome]),
        (f"{regression.package} {regression.pull_request}  {regression.title}", "bold"),
        f"  ({regression.target})",
    )
    if result.problem:
        yield Text(f"        {result.problem}")
    for number, side in enumerate(result.bad):
        yield from _side_lines(side, "bad", brief=number > 0)
    if len(result.bad) > 1 and (cases := result.cases_until_found):
        middle = statistics.median(cases)
        yield Text(
            f"        found with {len(cases)} seeds after {middle:,g} cases in the median, {max(cases):,} at most"
        )
    if result.good is not None:
        yield from _side_lines(result.good, "good")


def _side_lines(side: SideResult, name: str, *, brief: bool = False) -> Iterator[Text]:
    """Return what was found on a side; where `brief`, one line of it."""
    text = f"        {name:<5} {side.side} on {side.device}, seed {side.seed}: "
    found = side.found
    if found is None:
        yield Text(f"{text}without the bug in {side.cases:,} cases, of which {side.passed:,} passed")
    else:
        size = "shrunk to" if found.shrunk else "not shrunk:"
        yield Text(f"{text}{found.failure.kind} after {found.cases:,} cases, {size} size {found.case.size}")
    if side.error:
        yield Text(f"              error: {side.error}", style="bold red")
    if brief:
        return
    if found is not None:
        yield Text(f"              {found.failure.message}", style="dim")
        for line in case_lines(found.case):
            yield Text("          ", style="dim").append(line)
    for note in side.notes if name == "bad" else ():
        yield Text(f"              note: {note}", style="dim")
    for other, message in side.others.items():
        yield Text(f"              other failure: {other}: {message}", style="dim")
