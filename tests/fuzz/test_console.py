"""What the console says at the end of a campaign, from events alone."""

import io

import pytest
from rich.console import Console

from kernelfuzz.fuzz import events
from kernelfuzz.fuzz.console import Display
from kernelfuzz.fuzz.failure_files import FailureFiles
from kernelfuzz.fuzz.summary import Summary


@pytest.fixture
def said(tmp_path, engine_job):
    """Returns the lines at the end of a campaign of two kernels, which say so of themselves."""

    def lines(first: tuple[str, ...], second: tuple[str, ...]) -> list[str]:
        summary, stream = Summary(), io.StringIO()
        display = Display(Console(file=stream, width=80), summary, FailureFiles(tmp_path, 3))
        bus = events.Bus([summary, display])
        jobs = engine_job("right"), engine_job("two_bugs")
        bus.emit(events.CampaignStarted(jobs, (), 3))
        for job, notes in zip(jobs, (first, second)):
            bus.emit(events.JobStarted(job, "user", notes=notes))
            bus.emit(events.JobFinished(job, 1))
        bus.emit(events.CampaignFinished())
        display.print_end(tmp_path)
        return stream.getvalue().splitlines()

    return lines


def test_what_a_kernel_says_of_itself_is_printed_a_line_each(said):
    long = "backend A is left out: it needs" + " much that is not here," * 5
    lines = said(("on stand-ins", long), ("without [/] markup [bold]",))
    assert [line for line in lines if line.startswith("note")] == [
        "note bgmv on engine_kernels:right (cpu): on stand-ins",
        f"note bgmv on engine_kernels:right (cpu): {long}",
        "note bgmv on engine_kernels:two_bugs (cpu): without [/] markup [bold]",
    ]


def test_kernels_that_say_nothing_leave_no_line(said):
    assert not [line for line in said((), ()) if "note" in line]
