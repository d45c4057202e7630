"""`kernelfuzz list`: which kernels run on which devices here."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kernelfuzz.fuzz.job import Job, all_kernels


def list_kernels(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
) -> None:
    """List targets × kernels × devices, and why what cannot run here cannot."""
    rows = [
        {
            "target": entry.target.name if isinstance(entry, Job) else entry.target,
            "kernel": str(entry.kernel),
            "device": str(entry.device),
            "runs": isinstance(entry, Job),
            "reason": "" if isinstance(entry, Job) else entry.reason,
        }
        for entry in all_kernels()
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("target", "kernel", "device"):
        table.add_column(name, no_wrap=True)
    table.add_column("here", overflow="fold")
    for row in rows:
        here = Text("runs", "green") if row["runs"] else Text(str(row["reason"]), "dim")
        table.add_row(str(row["target"]), str(row["kernel"]), str(row["device"]), here)
    Console().print(table)
