"""File names made of names that people chose."""

import re


def file_name(*parts: str) -> str:
    """Return a legal file name that shows the parts, empty ones left out."""
    return ".".join(re.sub(r"[^A-Za-z0-9_.-]+", "-", part).strip("-.") for part in parts if part)
