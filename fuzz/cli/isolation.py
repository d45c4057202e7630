"""Where the commands that run kernels run them: what their options ask for."""

from typing import cast, get_args

from kernelfuzz.fuzz import sanitizer
from kernelfuzz.fuzz.campaign import Isolation
from kernelfuzz.fuzz.job import Job
from kernelfuzz.fuzz.sanitizer import Tool
from kernelfuzz.strategies.errors import KernelfuzzError


def sanitizer_tool(name: str | None) -> Tool | None:
    """Return the sanitizer's tool of that name. Raises KernelfuzzError if there is none, or it is not installed."""
    if name is None:
        return None
    for tool in get_args(Tool):
        if tool == name:
            sanitizer.find()
            return cast(Tool, tool)
    raise KernelfuzzError(f"--sanitizer {name!r}: expected one of {', '.join(get_args(Tool))}")


def isolation_of(jobs: list[Job], isolate: bool, workers: int | None, tool: Tool | None) -> Isolation:
    """Return where the jobs run. Raises KernelfuzzError for what they cannot be run in."""
    if workers is not None and workers < 1:
        raise KernelfuzzError(f"--workers {workers}: expected at least 1")
    for job in jobs:
        if tool is not None and job.device.type != "cuda":
            raise KernelfuzzError(f"--sanitizer watches CUDA kernels only: {job} is none, add --device cuda")
        if not isolate and job.device.type != "cpu":
            raise KernelfuzzError(f"--no-isolate: {job} could leave the device unusable for all that follows")
    if not isolate and (len(jobs) > 1 or workers is not None or tool is not None):
        raise KernelfuzzError("--no-isolate runs one target and one kernel in this process: name them, and no workers")
    return Isolation(isolate, workers, tool)
