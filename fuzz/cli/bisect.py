"""`kernelfuzz bisect`: the release or the commit with which a failure came in or went away."""

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.text import Text

from kernelfuzz.fuzz.bisect import (
    Boundary,
    Outcome,
    Trials,
    bisect_releases,
    device_of,
    implementation_of,
    releases_between,
)
from kernelfuzz.fuzz.bisect_commits import Change, bisect_commits, worktree
from kernelfuzz.fuzz.cli.releases import fetch_with_progress
from kernelfuzz.fuzz.cli.run import INTERRUPTED
from kernelfuzz.fuzz.failure_folder import SavedFailure, read_failure
from kernelfuzz.kernels.registry import Implementation
from kernelfuzz.strategies.errors import KernelfuzzError

_STYLES = {"good": "bold green", "bad": "bold red", "cannot run": "bold yellow"}
_FIRST = {"bad": "first bad", "good": "first fixed"}
_SHORT = 12
"""How much of a commit's hash a table shows."""


def bisect(
    failure: Annotated[Path, typer.Argument(metavar="FAILURE", help="The folder of a failure, or a case file.")],
    first: Annotated[str | None, typer.Option("--from", metavar="VERSION", help="The oldest release.")] = None,
    last: Annotated[str | None, typer.Option("--to", metavar="VERSION", help="The newest release.")] = None,
    package: Annotated[
        str | None, typer.Option(metavar="NAME", help="The kernel's name before the @. Default: the one that failed.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, xpu. Default: where it failed.")] = None,
    clone: Annotated[
        Path | None, typer.Option("--git", metavar="PATH", help="Search the commits of this clone instead.")
    ] = None,
    good: Annotated[str | None, typer.Option(metavar="REV", help="With --git: a commit without the failure.")] = None,
    bad: Annotated[str | None, typer.Option(metavar="REV", help="With --git: one with it, older or newer.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Run what an earlier call has run once more.")] = False,
) -> None:
    """Find the release, or with --git the commit, with which a failure came in or went away.

    A version is bad if the saved case shows the saved failure there; for a case file alone, any failure counts.
    Outcomes are kept beside the case, in bisect.json, and the next call goes on from there.

    Exit status: 0 found, even if between versions that cannot run here, 2 usage or environment, 130 interrupted.
    """
    console = Console(highlight=False, emoji=False, soft_wrap=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        saved = read_failure(failure)
        implementation = implementation_of(saved, package)
        search = _Search(saved, implementation, device_of(saved, implementation, device), console, again)
        if first and last and not (clone or good or bad):
            _search_releases(search, first, last)
        elif clone and good and bad and not (first or last):
            _search_commits(search, clone, good, bad)
        else:
            raise KernelfuzzError("give --from and --to, two releases; or --git, --good and --bad, a clone's commits")
    except KeyboardInterrupt:
        console.print("interrupted: the same command goes on from here")
        raise typer.Exit(INTERRUPTED) from None


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End the search on the first signal, and let nothing interrupt what then takes away the worktree."""
    del number, frame
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


@dataclass(frozen=True)
class _Search:
    """What both kinds of search need."""

    saved: SavedFailure
    implementation: Implementation
    device: torch.device
    console: Console
    again: bool

    def __str__(self) -> str:
        failure = self.saved.fingerprint or f"any failure of {self.saved.path}"
        return f"searching for {failure} in {self.implementation.package} on {self.device}"

    def trials(self, get: Callable[[str], str]) -> Trials:
        package = self.implementation.package
        return Trials(
            self.saved,
            package,
            self.device,
            get,
            lambda version: self.console.status(f"{package} {version}: running the case"),
            again=self.again,
        )

    def print_outcomes(self, outcomes: Mapping[str, Outcome], title: Callable[[str], str] = str) -> None:
        """Print a table of versions, each with its title, in the order of the mapping."""
        titles = {version: title(version) for version in outcomes}
        width = max(map(len, titles.values()), default=0)
        for version, outcome in outcomes.items():
            runs = f"run {outcome.runs} times" if outcome.runs > 1 else ""
            earlier = "from an earlier call" if outcome.earlier else ""
            remarks = "; ".join(filter(None, (outcome.note, runs, earlier)))
            row = Text.assemble(f"{titles[version]:<{width}}  ", (f"{outcome.state:<10}", _STYLES[outcome.state]))
            row.append(f"  {remarks}", "dim")  # not a rich table: that folds what does not fit
            row.rstrip()
            self.console.print(row)


def _search_releases(search: _Search, first: str, last: str) -> None:
    package = search.implementation.releases[0]
    console = search.console
    found = releases_between(package, first, last)
    versions = found.versions

    def get(version: str) -> str:
        return fetch_with_progress(package, version, console)[0].version

    trials = search.trials(get)
    if found.problem:
        console.print(Text(f"{found.problem}; searching the releases in the cache"))
    most = 2 + max(0, len(versions) - 2).bit_length()
    console.print(Text(f"{search}: {len(versions)} releases, {', '.join(versions)}"))
    console.print(f"at most {most} are run, unless some cannot run here, and fetched when it is their turn")
    for version in found.unlisted:
        get(version)
    try:
        boundary = bisect_releases(versions, trials)
    finally:
        search.print_outcomes({each: trials.outcomes[each] for each in versions if each in trials.outcomes})
    console.print(_boundary_text(package, boundary, trials.outcomes))
    console.print(_count(trials.outcomes, "release"))


def _boundary_text(package: str, boundary: Boundary, outcomes: Mapping[str, Outcome]) -> Text:
    before, after = outcomes[boundary.before].state, outcomes[boundary.after].state
    text = f"last {before} {package} {boundary.before}, {_FIRST[after]} {package} {boundary.after}"
    if boundary.skipped:
        reasons = "; ".join(f"{each} cannot run here: {outcomes[each].note}" for each in boundary.skipped)
        text = f"{_FIRST[after]} between {package} {boundary.before} and {boundary.after}, which is {after} ({reasons})"
    return Text(text, "bold")


def _search_commits(search: _Search, clone: Path, good: str, bad: str) -> None:
    console = search.console
    with worktree(clone) as tree:
        trials = search.trials(tree.check_out)
        ends = tree.resolve(good), tree.resolve(bad)
        console.print(Text(f"{search}: the commits of {clone} between {good} (good) and {bad} (bad)"))
        try:
            change = bisect_commits(tree, *ends, trials)
        finally:
            search.print_outcomes(trials.outcomes, lambda commit: f"{commit[:_SHORT]} {tree.subject(commit)}")
        for line in _change_lines(change, tree.subject):
            console.print(Text(line, "bold"))
    console.print(_count(trials.outcomes, "commit"))


def _change_lines(change: Change, subject: Callable[[str], str]) -> list[str]:
    commits = [f"{commit} {subject(commit)}" for commit in change.commits]
    if len(commits) == 1:
        return [f"{_FIRST[change.into]} commit: {commits[0]}"]
    return [f"{_FIRST[change.into]} commit: one of these, of which only the first can run here", *commits]


def _count(outcomes: Mapping[str, Outcome], what: str) -> str:
    """Return how many versions were run, and which were not."""
    ran = [each for each in outcomes.values() if each.state != "cannot run"]
    earlier = sum(each.earlier for each in ran)
    counts = [f"{len(ran) - earlier} {what}(s) run"]
    counts += [f"{earlier} taken from an earlier call"] * bool(earlier)
    counts += [f"{len(outcomes) - len(ran)} cannot run here"] * (len(ran) < len(outcomes))
    return ", ".join(counts)
