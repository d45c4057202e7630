"""Regimes that are off unless asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from kernelfuzz.fuzz.job import Job, Skipped
from kernelfuzz.fuzz.targets import TARGETS
from kernelfuzz.strategies.errors import KernelfuzzError
from kernelfuzz.strategies.huge import MOST_BYTES

Regime = Literal["robustness", "huge"]
"""robustness: calls on which the contracts are silent, where an error is right and a crash or nonsense is not; huge:
tensors whose flattened offsets do not fit 32 bits."""


def require_regime(name: str | None, jobs: Sequence[Job]) -> Regime | None:
    """Return the regime of that name, None for None.

    Raises KernelfuzzError if there is none, a job's device cannot run it, or no job's target has it.
    """
    if name is None:
        return None
    if name not in get_args(Regime):
        raise KernelfuzzError(f"--regime {name!r}: expected one of {', '.join(get_args(Regime))}")
    regime = cast(Regime, name)
    for job in jobs:
        if regime == "robustness" and job.device.type == "cpu":
            remedy = "add --device cuda" if "cuda" in job.implementation.devices else f"leave out {job.target.name}"
            raise KernelfuzzError(f"--regime robustness needs a GPU, {job} has nothing to vary: {remedy}")
    if regime == "huge":
        _require_huge(in_regime(regime, jobs)[0])
    return regime


def in_regime(regime: Regime | None, jobs: Sequence[Job]) -> tuple[list[Job], list[Skipped]]:
    """Return the jobs whose targets have cases of the regime, and the rest, with the reason."""
    left_out = [job for job in jobs if regime == "huge" and job.target.huge_cases is None]
    skipped = [
        Skipped(job.target.name, job.kernel, str(job.device), "the target has no huge cases") for job in left_out
    ]
    return [job for job in jobs if job not in left_out], skipped


def _require_huge(jobs: Sequence[Job]) -> None:
    if not jobs:
        having = [name for name, target in TARGETS.items() if target.huge_cases is not None]
        raise KernelfuzzError(f"--regime huge is for {' and '.join(having)}: name one of them")
    for job in jobs:
        free = free_memory(job.device)
        if free < MOST_BYTES:
            raise KernelfuzzError(
                f"--regime huge: {job.target.name} needs {MOST_BYTES / 1e9:.0f} GB free on {job.device}, "
                f"which has {free / 1e9:.1f} GB: free some there or name another --device"
            )


def free_memory(device: torch.device) -> int:
    """Return how many bytes can still be allocated on `device`, by all processes together."""
    if device.type == "cpu":
        lines = Path("/proc/meminfo").read_text().splitlines()
        (available,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return 1024 * int(available)
    backend: Any = getattr(torch, device.type)
    free: int = backend.mem_get_info(device)[0]
    return free
