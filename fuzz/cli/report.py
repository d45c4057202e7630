"""`kernelfuzz report`: a night as a page, and for CI services."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from kernelfuzz.fuzz.files import write_file
from kernelfuzz.fuzz.report.github import annotations
from kernelfuzz.fuzz.report.junit import junit as junit_xml
from kernelfuzz.fuzz.report.markdown import summary
from kernelfuzz.fuzz.report.page import page
from kernelfuzz.fuzz.report.view import read_view
from kernelfuzz.strategies.errors import KernelfuzzError


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of the store.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="The page. Default: DIR/report.html.")
    ] = None,
    run: Annotated[int | None, typer.Option(metavar="N", help="Which run. Default: the last.")] = None,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write JUnit XML.")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a summary in Markdown.")] = None,
) -> None:
    """Write the report of a night: one HTML file that needs no network.

    Exit status: 0 written, 2 usage or environment.
    """
    view = read_view(folder, run)
    files = {out or folder / "report.html": page(view)}
    if junit is not None:
        files[junit] = junit_xml(view)
    if markdown is not None:
        files[markdown] = summary(view)
    console = Console(highlight=False, emoji=False)
    for path, content in files.items():
        write_file(path, content)
        console.print(Text(f"{path}: run {view.run.id}, {len(content.encode()) / 1e3:,.0f} kB"), soft_wrap=True)


def write_night_reports(folder: Path, run: int, console: Console) -> None:
    """Write all reports of a run into the store's folder, print annotations where a GitHub workflow runs this, and add
    the summary to the job's page. Raises KernelfuzzError for what cannot be written."""
    view = read_view(folder, run)
    text = summary(view)
    for name, content in (("junit.xml", junit_xml(view)), ("summary.md", text), ("report.html", page(view))):
        write_file(folder / name, content)
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in annotations(view):
            console.print(Text(line), soft_wrap=True)
    if job_page := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            with Path(job_page).open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise KernelfuzzError(f"cannot write {job_page}: {error.strerror}") from error
    console.print(Text(str(folder / "report.html")), soft_wrap=True)
