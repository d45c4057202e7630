"""`kernelfuzz repro`: a saved failure as a script that shows it without kernelfuzz."""

from pathlib import Path
from typing import Annotated

import typer

from kernelfuzz.fuzz import reproducer
from kernelfuzz.fuzz.failure_folder import read_failure
from kernelfuzz.fuzz.job import unchecked_job
from kernelfuzz.strategies.errors import KernelfuzzError


def repro(
    folder: Annotated[Path, typer.Argument(metavar="FAILURE", help="The folder of a failure.")],
    pytest: Annotated[bool, typer.Option("--pytest", help="Print a test for pytest instead.")] = False,
    kernel: Annotated[
        str | None,
        typer.Option(help="NAME, NAME@VERSION, NAME@PATH or MODULE:FUNCTION. Default: the one that failed."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, xpu. Default: where it failed.")] = None,
) -> None:
    """Print a script that shows a saved failure without kernelfuzz: it exits with 1 while the bug is there, with 0 when
    it is fixed. Neither the kernel nor the device need be here.

    Exit status: 0 printed, 2 usage or environment.
    """
    saved = read_failure(folder)
    if not saved.failures:
        raise KernelfuzzError(f"{folder} is a case alone, which says nothing of a failure: name the failure's folder")
    if saved.test and kernel is None:
        raise KernelfuzzError(f"{folder}: a kernel test's script is written when it fails: {folder / 'repro.py'}")
    job = unchecked_job(saved.case.target, kernel or saved.kernel, device or saved.device)
    version = saved.version if kernel is None else job.kernel.version or ""
    sanitizer = saved.sanitizer if job.device.type == "cuda" else None
    text = reproducer.script(job, saved.case, saved.failures[0], version=version, sanitizer=sanitizer, pytest=pytest)
    print(text, end="")
