"""What a person sees of a night while it goes on: a live table, and a line for whatever is worth one."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kernelfuzz.fuzz import events
from kernelfuzz.fuzz.job import Skipped
from kernelfuzz.fuzz.nightly.night import JobState, Night
from kernelfuzz.fuzz.readable import case_lines
from kernelfuzz.fuzz.store.store import Status
from kernelfuzz.fuzz.verdict import printable

STATUS_STYLES: dict[Status, str] = {
    "new": "bold red",
    "returned": "bold red",
    "known": "yellow",
    "listed": "yellow",
    "fixed": "bold green",
    "unseen": "dim",
}
_OUTCOME_STYLES = {"FIXED": "green", "FAILED": "yellow", "ERROR": "bold red", "PASS": "green", "FAIL": "bold red"}


class NightDisplay:
    """Shows a night on a console. An observer of it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._night: Night | None = None

    def watch(self, night: Night, seed: int) -> None:
        """Say what is to run, and show it from now on."""
        self._night = night
        self._say(f"run {night.ledger.run}: {len(night.jobs)} job(s) for {_duration(night.seconds)}, seed {seed}")

    def event(self, event: events.Event) -> None:
        """Say what was replayed, and without a terminal also which slice begins and ends."""
        match event:
            case events.FailureReplayed(job, name, _, version, outcome, reason):
                text = Text.assemble((f"{outcome:<7}", _OUTCOME_STYLES[outcome]), f" {name} on {job.kernel} {version}")
                self._print(text.append(f"  {printable(reason)}", "dim"))
            case events.RegressionFinished(number, title, outcome, problem):
                text = Text.assemble((f"{outcome:<7}", _OUTCOME_STYLES.get(outcome, "dim")), f" {number} {title}")
                self._print(text.append(f"  {printable(problem)}", "dim"))
            case events.JobStarted(job, version) if not self._console.is_terminal:
                self._say(f"{job}: version {version}, started")
            case events.KernelsCompiled(job, cases, seconds) if not self._console.is_terminal:
                self._say(f"{job}: compiled kernels for {cases} cases in {seconds:.0f} s")
            case events.JobFinished(job, examples, error) if not self._console.is_terminal or error:
                self._say(f"{job}: {examples:,} examples in this slice{', error: ' + error if error else ''}")

    def failure(self, found: events.FailureFound, status: Status) -> None:
        """Say what was found, once as found and once with its smallest case."""
        line = Text.assemble((status.upper(), STATUS_STYLES[status]), "  ", (found.fingerprint, "bold"))
        line.append(f"  {found.job.kernel} on {found.job.device}", "dim")
        if not found.shrunk:
            self._print(line.append("  shrinking" if found.examples else ""))
        elif found.examples:  # otherwise a stored one, which is said above
            self._print(Group(line, Text(f"  {found.failure.message}"), *case_lines(found.case)))

    def problem(self, text: str) -> None:
        """Say what went wrong."""
        self._print(Text.assemble(("problem", "bold red"), f" {text}"))

    def _say(self, text: str) -> None:
        self._print(Text(text))

    def _print(self, content: Text | Group) -> None:
        self._console.print(content, soft_wrap=True)

    @contextmanager
    def live(self) -> Iterator[None]:
        """Redraw the table twice a second; without a terminal the lines do."""
        if not self._console.is_terminal:
            yield
            return
        with Live(console=self._console, get_renderable=self._picture, refresh_per_second=2, transient=True):
            yield

    def _picture(self) -> Group:
        night = self._night
        if night is None:
            return Group(Text("starting", "dim"))
        left = f"{_duration(night.remaining)} left of {_duration(night.seconds)}" if night.remaining else "ending"
        return Group(self.table(), Text(left, "dim"))

    def table(self) -> Table:
        """Return the table of jobs."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("target and kernel", overflow="fold")
        for name in ("examples", "cases", "per s", "err/bound", "failures"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("state", no_wrap=True)
        assert self._night is not None
        for name, state in list(self._night.jobs.items()):
            counted = state.statistics
            failures = sum(str(found.job) == name for found in list(self._night.ledger.found.values()))
            target, _, where = name.partition(" on ")
            table.add_row(
                Text(target).append(f"\n  {where}", style="dim"),
                f"{counted.examples:,}",
                f"{counted.cases:,}",
                f"{counted.cases / counted.seconds:,.0f}" if counted.seconds else "",
                f"{counted.worst_ratio:.3f}" if counted.worst_ratio else "",
                Text(str(failures or ""), style="bold red"),
                self._state(state),
            )
        return table

    def _state(self, state: JobState) -> Text:
        if state.lanes:
            return Text("running" if state.lanes == 1 else f"{state.lanes} lanes", style="bold cyan")
        if state.statistics.error:
            return Text("error", style="bold red")
        assert self._night is not None
        if state.statistics.seconds and not self._night.remaining:
            return Text("done", style="green")
        return Text("paused" if state.statistics.seconds else "waiting", style="dim")

    def print_end(self, night: Night, skipped: Sequence[Skipped]) -> None:
        """Print the table, what could not run, and what became of failures, the new ones first."""
        self._console.print(self.table())
        for state in night.jobs.values():
            if state.statistics.error:
                self.problem(printable(state.statistics.error))
        for each in skipped:
            self._print(Text(f"skipped {each.target} on {each.kernel} ({each.device}): {each.reason}", "dim"))
        for status, style in STATUS_STYLES.items():
            for name in sorted(name for name, each in night.ledger.statuses.items() if each == status):
                self._print(Text.assemble((f"{status:<8}", style), f" {name}"))
        counts = Counter(night.ledger.statuses.values())
        said = ", ".join(f"{counts[status]} {status}" for status in STATUS_STYLES if counts[status]) or "no failure"
        cases = sum(state.statistics.cases for state in night.jobs.values())
        interrupted = "interrupted: " if night.interrupted else ""
        self._say(f"{interrupted}{said}; {cases:,} cases in {_duration(night.elapsed)}")


def _duration(seconds: float) -> str:
    """Return a duration for a person."""
    return time.strftime("%H:%M:%S" if seconds >= 3600 else "%M:%S", time.gmtime(seconds))
