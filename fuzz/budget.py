"""Amounts of time as a user writes them."""

import re

from kernelfuzz.strategies.errors import KernelfuzzError

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_seconds(option: str, text: str) -> float:
    """Return the seconds in a time like 90s, 10m or 2h. Raises KernelfuzzError, naming the option, for anything
    else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if seconds <= 0:
        raise KernelfuzzError(f"{option} {text!r}: expected a positive time like 90s, 10m or 2h")
    return seconds
