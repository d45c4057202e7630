"""``kernelfuzz releases``: fetch, list and remove the released kernels that campaigns run."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from kernelfuzz.kernels import releases
from kernelfuzz.strategies.errors import KernelfuzzError

app = typer.Typer(help="Fetch, list and remove released kernels.", no_args_is_help=True)

_METAVAR = "NAME==VERSION"


@app.command()
def fetch(
    requirements: Annotated[
        list[str] | None, typer.Argument(metavar=_METAVAR, help="What to fetch, such as vllm==0.33.0.")
    ] = None,
    pinned: Annotated[
        bool, typer.Option("--pinned", help="Fetch the newest releases, which a campaign runs unless told otherwise.")
    ] = False,
) -> None:
    """Get releases with pip and keep the files that targets need."""
    wanted = [*(requirements or []), *(f"{name}=={version}" for name, version in releases.PINNED.items() if pinned)]
    if not wanted:
        raise KernelfuzzError("no release named: give NAME==VERSION, or --pinned for the newest")
    console = Console(stderr=True, soft_wrap=True)
    failures = []
    for text in dict.fromkeys(wanted):
        try:
            _fetch_one(text, console)
        except KernelfuzzError as error:
            failures.append(error)
    for failure in failures[:-1]:
        console.print(f"[bold red]error:[/] {escape(str(failure))}", highlight=False)
    if failures:
        raise failures[-1]


def _fetch_one(text: str, console: Console) -> None:
    release, is_new = fetch_with_progress(*releases.parse_requirement(text), console)
    how = "fetched" if is_new else "already fetched"
    typer.echo(f"{release.package} {release.version}: {how}, {decimal(release.size)} in {release.path}")


def fetch_with_progress(package: str, version: str, console: Console) -> tuple[releases.Release, bool]:
    """Fetch a release while a bar shows how far that is; return it, and whether it was not there before.

    Raises KernelfuzzError as `releases.fetch` does.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"{package} {version}", total=None)
        shown = ""

        def progress(stage: str, done: int, total: int | None) -> None:
            nonlocal shown
            if stage != shown:
                shown = stage
                bar.reset(task, description=f"{package} {version}: {stage}")
            bar.update(task, completed=done, total=total)

        release = releases.fetch(package, version, progress)
    return release, bool(shown)


@app.command(name="list")
def list_(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array; sizes are in bytes.")] = False,
) -> None:
    """Show the fetched releases and where they are."""
    found = releases.installed_releases()
    if as_json:
        rows = [{"package": r.package, "version": r.version, "path": str(r.path), "size": r.size} for r in found]
        typer.echo(json.dumps(rows, indent=2))
        return
    if not found:
        typer.echo("no releases fetched yet: run 'kernelfuzz releases fetch --pinned'")
        return
    table = [("package", "version", "size", "path")]
    table += [(r.package, r.version, decimal(r.size), str(r.path)) for r in found]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:  # not a rich table: that folds paths to the terminal's width, which breaks copying and grep
        typer.echo("  ".join(map(str.ljust, row, widths)).rstrip())


@app.command()
def remove(
    requirements: Annotated[list[str], typer.Argument(metavar=_METAVAR, help="What to remove, such as vllm==0.19.1.")],
) -> None:
    """Delete fetched releases."""
    for text in dict.fromkeys(requirements):
        package, version = releases.parse_requirement(text)
        releases.remove(package, version)
        typer.echo(f"{package} {version}: removed")
