"""bfloat16 for Triton's interpreter, which keeps it as uint16 and computes with the bit patterns.

Every operation is done in float32 and rounded to nearest even, as a GPU does. What is not mended here raises
NotImplementedError instead of giving garbage.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    InterpreterBuilder,
    ReduceOps,
    ScanOps,
    TensorHandle,
    _get_np_dtype,
    _interpreter,
    _ir,
)

NAN = np.uint16(0x7FC0)

# Operations of the interpreter's builder that work on each element's value.
ELEMENTWISE = re.compile(
    r"""create_(
    f(add|sub|mul|div|rem|neg|ma) | (precise|approx)_divf | (min|max)(imum|num)f | clampf | fcmp\w+ |
    exp2? | log2? | (precise_)?sqrt | rsqrt | sin | cos | erf | floor | ceil
    )""",
    re.VERBOSE,
)
# Operations that are right on bit patterns, never meet a float, or end in another operation.
UNTOUCHED = re.compile(
    r"""create_(
    fabs | select | bitcast | int_to_ptr | ptr_to_int | reshape | trans | expand_dims | broadcast | (un)?splat |
    cat | join | split | gather | (masked_|tensor_pointer_|descriptor_|atomic_)?(load|store) | atomic_cas |
    descriptor_(gather|scatter) | make_(block_ptr|tensor_descriptor|range) | advance | addptr |
    get_(program_id|num_programs) | assert | assume | barrier | add | sub | mul | [isu]div | [su]rem | and | or | xor |
    shl | [al]shr | icmp\w+ | (min|max)[su]i | [su]i_to_fp | fp_to_[su]i | fp_(ext|trunc) | int_cast
    )""",
    re.VERBOSE,
)


def widen(bits: Any) -> Any:
    """The float32 values of an array of bfloat16 bit patterns (uint16); exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: Any, toward_zero: bool = False) -> Any:
    """The bfloat16 bit patterns (uint16) of an array of numbers, rounded once, to nearest even or toward zero.

    Every NaN becomes the same quiet one.
    """
    values = np.asarray(values)
    single = values.astype(np.float32) if np.can_cast(values.dtype, np.float32) else _round_to_odd(values)
    bits = single.view(np.uint32)
    if not toward_zero:
        bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(single), NAN, (bits >> np.uint32(16)).astype(np.uint16))


def _round_to_odd(values: Any) -> Any:
    """float32 of wider numbers such that rounding once more to bfloat16 gives what one rounding would have given.

    Cut toward zero, and set the last bit where something was cut off.
    Source: Boldo and Melquiond, "When double rounding is odd", 2005.
    """
    exact = values.astype(np.longdouble)
    single = exact.astype(np.float32)
    cut = np.where(np.abs(single) > np.abs(exact), np.nextafter(single, np.float32(0)), single)
    return (cut.view(np.uint32) | (cut != exact) & ~np.isnan(exact)).view(np.float32)


def _is_bfloat16(operand: Any) -> bool:
    return isinstance(operand, TensorHandle) and bool(operand.dtype.scalar == tl.bfloat16)


def _values(operand: Any) -> Any:
    return widen(operand.data) if _is_bfloat16(operand) else operand.data


def _widened(operand: Any) -> Any:
    return TensorHandle(widen(operand.data), tl.float32) if _is_bfloat16(operand) else operand


def _unsupported(operation: str) -> NotImplementedError:
    return NotImplementedError(f"kernelfuzz does not mend {operation} on bfloat16 in Triton's interpreter")


def _refuse_nan_padding(block: Any, padding: Any) -> None:
    # The interpreter converts NaN to uint16 and pads with 0.
    if padding == _ir.PADDING_OPTION.PAD_NAN and block.base.get_element_ty() == tl.bfloat16:
        raise _unsupported("NaN padding")


def _elementwise(original: Callable[..., Any]) -> Callable[..., Any]:
    def operation(self: Any, *operands: Any) -> Any:
        if not any(map(_is_bfloat16, operands)):
            return original(self, *operands)
        result = original(self, *map(_widened, operands)).data
        if result.dtype == np.bool_:
            return TensorHandle(result, tl.int1)
        return TensorHandle(narrow(result), tl.bfloat16)

    return operation


def _refusing(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    def operation(self: Any, *operands: Any, **named: Any) -> Any:
        if any(map(_is_bfloat16, (*operands, *named.values()))):
            raise _unsupported(name.removeprefix("create_"))
        return original(self, *operands, **named)

    return operation


class Builder(InterpreterBuilder):  # type: ignore[misc]
    """The interpreter's builder with right bfloat16."""

    def get_bf16(self, value: float) -> Any:
        """A constant; Triton has it from 3.9 on."""
        return TensorHandle(narrow(np.array([value], np.float64)), tl.bfloat16)

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        """Conversion between number types, to nearest."""
        cast = self._cast(src, dst_type)
        return super().cast_impl(src, dst_type) if cast is None else cast

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        """Conversion between float types with a rounding mode."""
        cast = self._cast(src, dst_type, toward_zero=rounding_mode == _ir.ROUNDING_MODE.RTZ)
        return super().create_fp_to_fp(src, dst_type, rounding_mode) if cast is None else cast

    def _cast(self, src: Any, dst_type: Any, toward_zero: bool = False) -> Any:
        """None if neither type is bfloat16."""
        target = dst_type.scalar
        if tl.bfloat16 not in (src.dtype.scalar, target):
            return None
        if src.dtype.scalar.is_fp8() or target.is_fp8():
            raise _unsupported(f"the conversion {src.dtype.scalar} to {target}")
        values = _values(src)
        data = narrow(values, toward_zero) if target == tl.bfloat16 else values.astype(_get_np_dtype(target))
        return TensorHandle(data, target)

    def create_dot(self, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        """``a @ b + d``, accumulated in d's type, which Triton does not allow to be bfloat16."""
        if _is_bfloat16(d):
            raise _unsupported("dot with an accumulator")
        return super().create_dot(_widened(a), _widened(b), d, *precision)

    def create_print(self, prefix: Any, hexadecimal: Any, values: Any, is_signed: Any) -> None:
        """Print values instead of bit patterns."""
        super().create_print(prefix, hexadecimal, [_widened(value) for value in values], is_signed)

    def create_descriptor_load(self, desc: Any, *rest: Any) -> Any:
        """A load through a tensor descriptor."""
        _refuse_nan_padding(desc, desc.padding)
        return super().create_descriptor_load(desc, *rest)

    def create_tensor_pointer_load(self, ptr: Any, boundary_check: Any, padding: Any, *rest: Any) -> Any:
        """A load through a block pointer; the builder knows them up to Triton 3.7."""
        _refuse_nan_padding(ptr, padding)
        return super().create_tensor_pointer_load(ptr, boundary_check, padding, *rest)

    def create_atomic_rmw(self, op: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any) -> Any:
        """Triton defines no other atomic than addition on bfloat16."""
        if not _is_bfloat16(val):
            return super().create_atomic_rmw(op, ptr, val, mask, sem, scope)
        if op != _ir.ATOMIC_OP.FADD:
            raise _unsupported(f"atomic {op}")
        addresses, added, active = np.broadcast_arrays(ptr.data, val.data, mask.data)
        shape = addresses.shape
        addresses, added, waiting = addresses.ravel(), added.ravel(), np.flatnonzero(active)
        old = np.zeros(addresses.shape, np.uint16)
        while waiting.size:
            # The first of all lanes that share an address; the others wait for the next round.
            _, first = np.unique(addresses[waiting], return_index=True)
            lanes, waiting = waiting[first], np.delete(waiting, first)
            everywhere = np.ones(lanes.shape, np.bool_)
            old[lanes] = _interpreter.load(addresses[lanes], everywhere, old[lanes], old.dtype)
            _interpreter.store(addresses[lanes], narrow(widen(old[lanes]) + widen(added[lanes])), everywhere)
        return TensorHandle(old.reshape(shape), tl.bfloat16)


def _mend_remaining() -> None:
    """Give `Builder` the elementwise operations, and have it refuse those that nobody here has thought of."""
    for name in dir(InterpreterBuilder):
        if not name.startswith("create_") or name in vars(Builder) or UNTOUCHED.fullmatch(name):
            continue
        original = getattr(InterpreterBuilder, name)
        setattr(Builder, name, _elementwise(original) if ELEMENTWISE.fullmatch(name) else _refusing(original, name))


_mend_remaining()


def _keeping_types(combine: Any, inputs: Any) -> Any:
    """``combine`` with its results in the types of ``inputs``: before 3.9 maximum and minimum return float32."""

    def fn(*operands: Any) -> tuple[Any, ...]:
        results = combine.fn(*operands)
        results = results if isinstance(results, tuple) else (results,)
        semantic = interpreter.interpreter_semantic
        return tuple(semantic.cast(semantic.to_tensor(r), i.dtype) for r, i in zip(results, inputs, strict=True))

    return SimpleNamespace(fn=fn)


class Reduce(ReduceOps):  # type: ignore[misc]
    """The interpreter's reductions with right bfloat16."""

    combine_fn: Any

    def generic_reduce(self, inputs: Any) -> Any:
        """A reduction with the kernel's own function."""
        if any(value.dtype == tl.bfloat16 for value in inputs):
            self.combine_fn = _keeping_types(self.combine_fn, inputs)
        return super().generic_reduce(inputs)

    def min_max(self, value: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
        """Maximum or minimum, with or without its index."""
        if value.dtype != tl.bfloat16:
            return super().min_max(value, val_reduce_op, idx_reduce_op)
        result = super().min_max(self.to_tensor(widen(value.handle.data), tl.float32), val_reduce_op, idx_reduce_op)
        extremum, *index = result if isinstance(result, tuple) else (result,)
        extremum = self.to_tensor(narrow(extremum.handle.data), tl.bfloat16)
        return (extremum, *index) if index else extremum

    def sum(self, value: Any) -> Any:
        """A sum whose partial sums are rounded too, for float16 as well as bfloat16.

        Compiled Triton adds in the operand's type; the order is the backend's own, here that of a balanced tree.
        """
        if value.dtype not in (tl.bfloat16, tl.float16):
            return super().sum(value)
        data = value.handle.data
        terms = data.ravel() if self.axis is None else np.moveaxis(data, self.axis, 0)
        while len(terms) > 1:
            half = len(terms) // 2
            halves = (TensorHandle(part, value.dtype) for part in (terms[:half], terms[half:]))
            terms = interpreter.interpreter_builder.create_fadd(*halves).data
        total = terms[0]
        if self.keep_dims:
            total = np.reshape(total, [1] * data.ndim) if self.axis is None else np.expand_dims(total, self.axis)
        return self.to_tensor(total, value.dtype)


class Scan(ScanOps):  # type: ignore[misc]
    """The interpreter's scans with right bfloat16, each step rounded."""

    combine_fn: Any

    def cumsum(self, value: Any) -> Any:
        """Running sums."""
        return self.generic_scan((value,)) if value.dtype == tl.bfloat16 else super().cumsum(value)

    def cumprod(self, value: Any) -> Any:
        """Running products."""
        return self.generic_scan((value,)) if value.dtype == tl.bfloat16 else super().cumprod(value)

    def generic_scan(self, inputs: Any) -> Any:
        """A scan with the kernel's own function."""
        if any(value.dtype == tl.bfloat16 for value in inputs):
            self.combine_fn = _keeping_types(self.combine_fn, inputs)
        return super().generic_scan(inputs)
