"""`kernelfuzz history`: the nights of a store."""

import dataclasses
import json
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kernelfuzz.fuzz.nightly.display import STATUS_STYLES
from kernelfuzz.fuzz.report.charts import clock
from kernelfuzz.fuzz.store import queries


def history(
    store: Annotated[Path, typer.Option(metavar="DIR", help="The folder of the store.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
) -> None:
    """List the nights of a store, the newest first.

    Exit status: 0 listed, 2 usage or environment.
    """
    connection = queries.connect(store)
    nights = queries.history(connection)
    connection.close()
    if as_json:
        print(json.dumps([dataclasses.asdict(night) for night in nights], indent=2))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "started (UTC)", "took", "state", "cases", "err/bound", "exit", "failures"):
        is_number = name in ("run", "cases", "err/bound", "exit")
        table.add_column(name, justify="right" if is_number else "left", no_wrap=name != "failures")
    for night in nights:
        run = night.run
        failures = Text()
        for status, style in STATUS_STYLES.items():
            if count := night.statuses.get(status):
                failures.append(f"{count} {status} ", style)
        table.add_row(
            str(run.id),
            run.started[:16].replace("T", " "),
            _took(run),
            run.state,
            f"{night.cases:,}",
            f"{night.worst_ratio:.3f}" if night.worst_ratio else "",
            "" if run.exit_status is None else str(run.exit_status),
            failures,
        )
    Console().print(table)


def _took(run: queries.Run) -> str:
    if not run.finished:
        return ""
    return clock((datetime.fromisoformat(run.finished) - datetime.fromisoformat(run.started)).total_seconds())
