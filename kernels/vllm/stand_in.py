"""Stand-ins for objects of vLLM's: they have what is needed, and say what they lack."""

import types
from typing import Any

from kernelfuzz.strategies.errors import KernelfuzzError


class StandInLacksError(KernelfuzzError, AttributeError):
    """Code under test came to a part of vLLM that kernelfuzz has no stand-in for. It says nothing of that code.

    An AttributeError too, so that code may ask with hasattr.
    """

    def __init__(self, what: str) -> None:
        super().__init__(f"kernelfuzz has no stand-in for {what}, which the code under test came to")


class StandIn(types.SimpleNamespace):
    """An object of vLLM's with as much of it as is needed; `what` it is is said where it lacks something."""

    def __init__(self, what: str, **attributes: Any) -> None:
        super().__init__(**attributes)
        self._what = what

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise StandInLacksError(f"{name} of {self._what}")
