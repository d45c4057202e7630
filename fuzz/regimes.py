"""Regimes that are off unless asked for."""

from collections.abc import Sequence
from typing import Literal, cast, get_args

from kernelfuzz.fuzz.job import Job
from kernelfuzz.strategies.errors import KernelfuzzError

Regime = Literal["robustness", "huge"]
"""robustness: calls on which the contracts are silent, where an error is right and a crash or nonsense is not; huge:
tensors whose flattened offsets do not fit 32 bits."""


def require_regime(name: str | None, jobs: Sequence[Job]) -> Regime | None:
    """Return the regime of that name, None for None. Raises KernelfuzzError if there is none, or a job cannot run it."""
    if name is None:
        return None
    if name not in get_args(Regime):
        raise KernelfuzzError(f"--regime {name!r}: expected one of {', '.join(get_args(Regime))}")
    regime = cast(Regime, name)
    for job in jobs:
        if regime == "robustness" and job.device.type == "cpu":
            raise KernelfuzzError(
                f"--regime robustness needs a GPU, where {job} has nothing to vary: add --device cuda"
            )
    return regime
