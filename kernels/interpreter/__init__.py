"""Triton's interpreter, mended: real Triton kernels run right and safely on CPU tensors.

The only code that touches Triton's internals. It works with Triton 3.6 to 3.9.
"""

from __future__ import annotations

import dataclasses
import importlib.util

from kernelfuzz.kernels.interpreter.bounds import OutOfBoundsError, reachable
from kernelfuzz.strategies.errors import KernelfuzzError

__all__ = ["OutOfBoundsError", "install", "reachable"]

# Overriding what a release no longer has would mend nothing.
_OVERRIDDEN = {
    "InterpreterBuilder": (
        "cast_impl",
        "create_fp_to_fp",
        "create_fadd",
        "create_dot",
        "create_print",
        "create_masked_load",
        "create_masked_store",
        "create_atomic_rmw",
        "create_atomic_cas",
    ),
    "ReduceOps": ("sum", "min_max", "generic_reduce"),
    "ScanOps": ("cumsum", "cumprod", "generic_scan"),
    "GridExecutor": ("_init_args_hst",),
}


def install() -> None:
    """Mend Triton's interpreter in this process; calling it again does nothing.

    - bfloat16 is computed in float32 and rounded to nearest even, as a GPU does; Triton's interpreter computes with the
      bit patterns. A bfloat16 operation that is not mended raises NotImplementedError. Sums of bfloat16 and float16
      round each partial sum, as compiled Triton's do.
    - Every load, store and atomic is checked against the extents of the launch's tensors and of those that are
      ``reachable``, before it happens, and raises OutOfBoundsError. An access inside the extent of a strided view but
      in a gap between its rows is let through.
    - Integer arithmetic is not checked for overflow, which halves the time. numpy does not warn during a launch.

    CPU tensors are not copied: kernels work on the caller's memory.

    Raises:
        KernelfuzzError: Triton is missing, was imported without ``TRITON_INTERPRET=1`` in the environment, or is a
            release whose interpreter lacks what is mended.
    """
    if importlib.util.find_spec("triton") is None:
        raise KernelfuzzError("Triton is not installed: its kernels cannot be interpreted; pip install 'triton>=3.6'")
    import triton

    if not triton.knobs.runtime.interpret or isinstance(triton.language.cdiv, triton.JITFunction):
        raise KernelfuzzError("Triton compiles its kernels in this process: set TRITON_INTERPRET=1 before it starts")
    try:
        from triton.runtime import interpreter

        for name, methods in _OVERRIDDEN.items():
            for method in methods:
                getattr(getattr(interpreter, name), method)
        from kernelfuzz.kernels.interpreter import bfloat16, launch
    except (ImportError, AttributeError) as error:
        raise KernelfuzzError(
            f"Triton {triton.__version__}'s interpreter cannot be mended ({error}): use Triton 3.6 to 3.9"
        ) from error
    if isinstance(interpreter.interpreter_builder, launch.Builder):
        return
    builder = launch.Builder()
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter.interpreter_builder = builder
    interpreter.interpreter_semantic.builder = builder
    interpreter.ReduceOps = bfloat16.Reduce
    interpreter.ScanOps = bfloat16.Scan
    interpreter.GridExecutor = launch.Executor
    interpreter._patch_lang = launch.patch_language_once
