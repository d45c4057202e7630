"""The command line's commands, put together."""

import sys

import typer
from rich.console import Console
from rich.markup import escape

from kernelfuzz.fuzz.cli.bisect import bisect
from kernelfuzz.fuzz.cli.history import history
from kernelfuzz.fuzz.cli.list import list_kernels
from kernelfuzz.fuzz.cli.nightly import nightly
from kernelfuzz.fuzz.cli.regressions import regressions
from kernelfuzz.fuzz.cli.releases import app as releases_app
from kernelfuzz.fuzz.cli.replay import replay
from kernelfuzz.fuzz.cli.report import report
from kernelfuzz.fuzz.cli.repro import repro
from kernelfuzz.fuzz.cli.run import run
from kernelfuzz.strategies.errors import KernelfuzzError

app = typer.Typer(
    name="kernelfuzz",
    help="Fuzz released MoE and LoRA kernels against pure-torch oracles.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("run")(run)
app.command("nightly")(nightly)
app.command("history")(history)
app.command("report")(report)
app.command("list")(list_kernels)
app.command("replay")(replay)
app.command("repro")(repro)
app.command("regressions")(regressions)
app.command("bisect")(bisect)
app.add_typer(releases_app, name="releases")


def run_app() -> None:
    """Run the command line; a problem the user can mend is one line on stderr and exit status 2."""
    try:
        app()
    except KernelfuzzError as error:
        console = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)
        console.print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(2)
