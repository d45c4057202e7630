"""Small, portable Triton kernels of our own.

Each can be built right or with one named bug that a released kernel once had, so that detection can be shown on any
machine without a download.
"""

from kernelfuzz.strategies.errors import KernelfuzzError


def version(bug: str | None, bugs: tuple[str, ...]) -> str:
    """Return what an example built with `bug` calls its version: the bug's name, or "correct" where it is None.

    Raises KernelfuzzError for a bug that is not among `bugs`.
    """
    if bug is not None and bug not in bugs:
        raise KernelfuzzError(f"unknown bug {bug!r}: this example can be built with {', '.join(bugs)}")
    return bug or "correct"
