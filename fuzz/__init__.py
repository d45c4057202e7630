"""The engine, the command line, and what a test of one's own kernel needs.

Names are imported when they are first used: the pytest plugin is loaded in sessions that have nothing to do with
kernels.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernelfuzz.fuzz.buffers import Buffers
    from kernelfuzz.fuzz.testing.checks import assert_no_stray_writes, assert_within_bound
    from kernelfuzz.fuzz.testing.decorator import kernel_test
    from kernelfuzz.kernels.vllm.platform import emulate_platform
    from kernelfuzz.oracles.expectation import OutputSpec
    from kernelfuzz.oracles.own import Expected
    from kernelfuzz.strategies.own import TensorSpec, tensors

__all__ = [
    "Buffers",
    "Expected",
    "OutputSpec",
    "TensorSpec",
    "assert_no_stray_writes",
    "assert_within_bound",
    "emulate_platform",
    "kernel_test",
    "tensors",
]

_PLACES = {
    "Buffers": "fuzz.buffers",
    "Expected": "oracles.own",
    "OutputSpec": "oracles.expectation",
    "TensorSpec": "strategies.own",
    "assert_no_stray_writes": "fuzz.testing.checks",
    "assert_within_bound": "fuzz.testing.checks",
    "emulate_platform": "kernels.vllm.platform",
    "kernel_test": "fuzz.testing.decorator",
    "tensors": "strategies.own",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"kernelfuzz.{_PLACES[name]}"), name)
