"""What a person sees of a campaign: a live table, then the failures and a summary. A consumer of events."""

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kernelfuzz.fuzz.events import Event, FailureFound, JobFinished, JobStarted, KernelsCompiled
from kernelfuzz.fuzz.failure_files import FailureFiles
from kernelfuzz.fuzz.readable import case_lines, element_lines
from kernelfuzz.fuzz.summary import JobSummary, Summary
from kernelfuzz.strategies.case import to_json

SHOWN_ERRORS = 3
_STATE_STYLES = {"running": "bold cyan", "shrinking": "bold yellow", "done": "green", "error": "bold red"}


class Display:
    """Shows a campaign on a console while `live` is active."""

    def __init__(self, console: Console, summary: Summary, files: FailureFiles) -> None:
        self._console = console
        self._summary = summary
        self._files = files

    def __call__(self, event: Event) -> None:
        """Say at once what was found, and without a terminal also which job begins and ends."""
        match event:
            case FailureFound(job, name, failure) if not event.shrunk:
                self._say(f"{failure.kind} in {job} at example {event.examples:,}: {name}; shrinking", "bold red")
            case JobStarted(job, version, retried):
                if retried:
                    what = f"{retried} case(s) that were running when an earlier campaign was cut off"
                    self._say(f"{job}: starts with {what}", "bold yellow")
                if not self._console.is_terminal:
                    self._say(f"{job}: version {version}, started")
            case KernelsCompiled(job, cases, seconds) if not self._console.is_terminal:
                self._say(f"{job}: compiled kernels for {cases} cases in {seconds:.0f} s")
            case JobFinished(job, examples, error) if not self._console.is_terminal:
                self._say(f"{job}: {examples:,} examples, {'error' if error else 'done'}")

    def _say(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style), soft_wrap=True)

    @contextmanager
    def live(self) -> Iterator[None]:
        """Redraw the table twice a second; without a terminal the lines of `__call__` do."""
        if not self._console.is_terminal:
            yield
            return
        with Live(console=self._console, get_renderable=self._table, refresh_per_second=2, transient=True):
            yield

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("target and kernel", overflow="fold")
        for name in ("examples", "cases", "per s", "err/bound", "failures"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("state", no_wrap=True)
        for entry in self._summary.jobs:
            what = Text(entry.job.target.name)
            what.append(f"\n  {entry.job.kernel} on {entry.job.device}", style="dim")
            table.add_row(
                what,
                f"{entry.examples:,}",
                f"{entry.cases:,}",
                f"{entry.cases / entry.seconds:,.0f}" if entry.seconds else "",
                f"{entry.worst_ratio:.3f}" if entry.worst_ratio else "",
                Text(str(len(entry.failures)), style="bold red" if entry.failures else ""),
                Text(entry.state, style=_STATE_STYLES.get(entry.state, "dim")),
            )
        return table

    def print_end(self, folder: Path) -> None:
        """Print the final table, what could not run, each failure, and where the files are."""
        summary, console = self._summary, self._console
        console.print(self._table())
        for entry in summary.jobs:
            if entry.error:
                console.print(f"[bold red]error:[/] {escape(entry.error)}", soft_wrap=True)
            for error, count in entry.errors.most_common(SHOWN_ERRORS):
                what = f"{entry.job}: kernelfuzz could not judge {count} case(s), see {folder / 'errors'}: {error}"
                console.print(f"[bold red]error:[/] {escape(what)}", soft_wrap=True)
            if entry.replacements.workers:
                self._say(f"{entry.job}: {_replacements(entry)}", "dim")
        for entry in summary.jobs:
            for note in entry.notes:
                console.print(f"[dim]note[/] {escape(f'{entry.job}: {note}')}", soft_wrap=True)
        for skipped in summary.skipped:
            what = escape(f"{skipped.target} on {skipped.kernel} ({skipped.device}): {skipped.reason}")
            console.print(f"[dim]skipped[/] {what}", soft_wrap=True)
        for entry in summary.jobs:
            for failure in entry.failures.values():
                console.print(self._failure(entry, failure), soft_wrap=True)
        for gone, examples in summary.fixed().items():
            what = escape(f"{gone.fingerprint}: not seen in {examples:,} examples ({gone})")
            console.print(f"[bold green]fixed[/] {what}", soft_wrap=True)
        if summary.interrupted:
            console.print("[bold yellow]interrupted[/]: this is what was done until then")
        unknown = len(summary.unknown())
        known = sum(len(entry.failures) for entry in summary.jobs) - unknown
        examples = sum(entry.examples for entry in summary.jobs)
        verdict = "[bold red]not everything could be run[/]" if summary.broken else "[bold green]no failure[/]"
        if unknown:
            verdict = f"[bold red]{unknown} failure(s)[/]"
        if known:
            verdict += f" and [yellow]{known} known[/]"
        console.print(
            f"{verdict} in {examples:,} examples; seed {summary.seed}; {escape(str(folder / 'summary.json'))}",
            soft_wrap=True,
        )
        if self._files.problem:
            console.print(f"[bold red]error:[/] {escape(self._files.problem)}", soft_wrap=True)

    def _failure(self, entry: JobSummary, found: FailureFound) -> Group:
        failure = found.failure
        size = "smallest case found" if found.shrunk else "case as found, not shrunk"
        command = shlex.join(["kernelfuzz", "replay", str(self._files.folder(found))])
        again = Text.assemble("  see it again: ", (command, "cyan"))
        if not self._files.is_saved(found):
            again = Text(f"  its case, which could not be saved: {json.dumps(to_json(found.case))}")
        seen = f"first seen at example {found.examples:,} of {entry.examples:,}"
        if hits := entry.hits_of(found):
            seen += f", in {hits:,} of them"
        if found.failed_runs < found.runs:
            seen += f"; unreliable: failed in {found.failed_runs} of {found.runs} runs"
        known = self._summary.known(entry, found)
        style = "bold red" if known is None else "yellow"
        lines = [
            Text(),
            Text.assemble((f"{failure.kind}", style), "  ", (found.fingerprint, "bold")),
            Text(f"  {failure.message}"),
            *element_lines(failure.elements),
            *(Text(f"  also: {symptom.message}", style="dim") for symptom in found.symptoms),
            *([] if known is None else [Text(f"  known: {known}", style="yellow")]),
            Text(f"  {size} ({seen}):"),
            *case_lines(found.case),
            again,
        ]
        return Group(*lines)


def _replacements(entry: JobSummary) -> str:
    """Return what a reader should know of workers that died or hung."""
    done = entry.replacements
    text = f"{done.workers:,} worker(s) died or hung and were replaced"
    return text + (f", {done.waits:,} time(s) with no spare ready" if done.waits else "")
