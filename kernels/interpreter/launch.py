"""Triton's interpreter with every access checked before it happens."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterError, _patch_lang

from kernelfuzz.kernels.interpreter import bfloat16
from kernelfuzz.kernels.interpreter.bounds import Memory


class Builder(bfloat16.Builder):
    """The interpreter's builder with right bfloat16 and checked accesses.

    All accesses come through these four: those without a mask, through a block pointer or through a tensor descriptor
    end in the masked ones.
    """

    memory: Memory

    def create_masked_load(self, ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        """Every load."""
        self._check("load", ptrs, mask, max(1, ptrs.get_element_ty().primitive_bitwidth // 8))
        return super().create_masked_load(ptrs, mask, *rest, **named)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        """Every store."""
        self._check("store", ptrs, mask, value.data.itemsize)
        return super().create_masked_store(ptrs, value, mask, *rest, **named)

    def create_atomic_rmw(self, op: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any) -> Any:
        """Every atomic that reads, modifies and writes."""
        self._check("atomic", ptr, mask, val.data.itemsize)
        return super().create_atomic_rmw(op, ptr, val, mask, sem, scope)

    def create_atomic_cas(self, ptr: Any, cmp: Any, val: Any, sem: Any, scope: Any) -> Any:
        """Every compare and swap."""
        self._check("atomic", ptr, None, val.data.itemsize)
        return super().create_atomic_cas(ptr, cmp, val, sem, scope)

    def _check(self, access: str, ptrs: Any, mask: Any, itemsize: int) -> None:
        # Triton 3.6 passes a bare array as the mask of a descriptor: its `data` is a buffer, a handle's is an array.
        active = None if mask is None else np.asarray(mask.data)
        self.memory.check(access, ptrs.data, active, itemsize, self.grid_idx)


_patched: set[Any] = set()


def patch_language_once(fn: Any) -> Any:
    """Triton's patch of its own language for the function ``fn``, once a launch.

    Triton repeats it, and undoes none of it, at every call of a device function: a third of a launch's time.
    """
    if fn in _patched:
        return None
    _patched.add(fn)
    scope = _patch_lang(fn)
    # For `range` over a tensor: what Triton 3.6 puts here fails with numpy 2.4.
    scope.set_attr(tl.tensor, "__index__", lambda tensor: int(tensor.handle.data.item()))
    return scope


class Executor(GridExecutor):  # type: ignore[misc]
    """A launch that knows its memory and lets its own errors through."""

    def _init_args_hst(self, args_dev: Any, kwargs: Any) -> Any:
        # What it returns is the memory that the kernel sees: the caller's own for CPU tensors, else a copy.
        args, named = super()._init_args_hst(args_dev, kwargs)
        arguments = {**dict(zip(self.arg_names, args, strict=False)), **named}
        interpreter.interpreter_builder.memory = Memory(self.fn.__name__, arguments)
        return args, named

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        _patched.clear()
        # Kernels meet infinities and NaN on purpose; numpy would warn of each.
        with np.errstate(all="ignore"):
            try:
                super().__call__(*args, **kwargs)
            except InterpreterError as error:
                # Triton wraps what is raised in a kernel once for every device function on the way.
                cause: BaseException | None = error
                while isinstance(cause, InterpreterError):
                    cause = cause.__cause__
                raise (cause or error) from None
