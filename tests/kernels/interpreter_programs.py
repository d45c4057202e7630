"""The kernels of test_interpreter.py, which runs this file in an interpreting process of its own.

    TRITON_INTERPRET=1 python interpreter_programs.py RESULTS

writes with `torch.save` what each program returned, or what it raised.
"""

import contextlib
import dataclasses
import io
import sys

import numpy as np
import torch
import triton
import triton.language as tl

from kernelfuzz.kernels.interpreter import OutOfBoundsError, install, reachable

install()
install()

PROGRAMS = {}
SENTINEL = -7.0


def program(function):
    PROGRAMS[function.__name__] = function
    return function


def attempt(function):
    """What `function` returns, or what it raises as a dictionary."""
    try:
        return function()
    except OutOfBoundsError as error:
        return {"raised": "OutOfBoundsError", "text": str(error), **dataclasses.asdict(error)}
    except Exception as error:
        return {"raised": type(error).__name__, "text": str(error)}


def bits16(count, seed):
    """Random bfloat16 bit patterns, and every special value beside every other one in the first 256."""
    special = [0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x0080, 0x3F80, 0xBF80]
    special += [0x3F81, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF]
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 1 << 16, (count,), generator=generator)
    pairs = torch.tensor(special).repeat(16) if seed % 2 else torch.tensor(special).repeat_interleave(16)
    bits[:256] = pairs
    return bits.to(torch.uint16).view(torch.bfloat16)


def bits32(count, seed):
    """Random float32 bit patterns, a quarter of them halfway between two bfloat16, a quarter next to that."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(1 << 31), 1 << 31, (count,), generator=generator)
    halfway = (bits & ~0xFFFF) | 0x8000
    bits[1::4] = halfway[1::4]
    bits[2::4] = (halfway + torch.randint(-1, 2, (count,), generator=generator))[2::4]
    bits[:4] = torch.tensor([0x7F800000, -0x800000, 0x7F800001, 0x7F7FFFFF])
    return bits.to(torch.int32).view(torch.float32)


@triton.jit
def _elementwise(x_ptr, y_ptr, z_ptr, out_ptr, flags_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    y = tl.load(y_ptr + i)
    z = tl.load(z_ptr + i)
    tl.store(out_ptr + 0 * N + i, x + y)
    tl.store(out_ptr + 1 * N + i, x - y)
    tl.store(out_ptr + 2 * N + i, x * y)
    tl.store(out_ptr + 3 * N + i, x / y)
    tl.store(out_ptr + 4 * N + i, x % y)
    tl.store(out_ptr + 5 * N + i, tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL))
    tl.store(out_ptr + 6 * N + i, tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL))
    tl.store(out_ptr + 7 * N + i, tl.fma(x, y, z))
    tl.store(out_ptr + 8 * N + i, tl.where(x < y, x, y))
    tl.store(out_ptr + 9 * N + i, tl.abs(x))
    tl.store(out_ptr + 10 * N + i, -x)
    tl.store(out_ptr + 11 * N + i, x * 0.1)
    tl.store(out_ptr + 12 * N + i, x + tl.full((N,), 1.7, tl.bfloat16))
    tl.store(out_ptr + 13 * N + i, tl.clamp(x, tl.full((N,), -2.0, tl.bfloat16), tl.full((N,), 3.0, tl.bfloat16)))
    tl.store(flags_ptr + 0 * N + i, x < y)
    tl.store(flags_ptr + 1 * N + i, x <= y)
    tl.store(flags_ptr + 2 * N + i, x > y)
    tl.store(flags_ptr + 3 * N + i, x >= y)
    tl.store(flags_ptr + 4 * N + i, x == y)
    tl.store(flags_ptr + 5 * N + i, x != y)
    tl.store(flags_ptr + 6 * N + i, (x < y).to(tl.bfloat16) == 1.0)


@program
def elementwise():
    count = 4096
    x, y, z = bits16(count, 0), bits16(count, 1), bits16(count, 2)
    out = torch.empty(14, count, dtype=torch.bfloat16)
    flags = torch.empty(7, count, dtype=torch.int8)
    _elementwise[(1,)](x, y, z, out, flags, count)
    return {"x": x, "y": y, "z": z, "out": out, "flags": flags}


@program
def functions():
    """Triton's language does not let bfloat16 into these yet: asked of the builder that its next release would ask."""
    from triton.runtime import interpreter

    x = bits16(4096, 3)
    handle = interpreter.TensorHandle(x.view(torch.uint16).numpy(), tl.bfloat16)
    names = ("exp", "exp2", "log", "log2", "sqrt", "precise_sqrt", "rsqrt", "sin", "cos", "erf", "floor", "ceil")
    out = {}
    for name in names:
        with np.errstate(all="ignore"):
            result = getattr(interpreter.interpreter_builder, f"create_{name}")(handle)
        out[name] = torch.from_numpy(result.data).view(torch.bfloat16)
    return {"x": x, "out": out}


@triton.jit
def _cast(x_ptr, out_ptr, N: tl.constexpr, ROUNDING: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, x.to(out_ptr.dtype.element_ty, fp_downcast_rounding=ROUNDING))


@program
def casts():
    count = 4096
    single = bits32(count, 4)
    generator = torch.Generator().manual_seed(5)
    # Next to halfway between two bfloat16, nearer than float32 can tell.
    near = single.double() * (1 + torch.randint(-2, 3, (count,), generator=generator) * 2.0**-40)
    wide = torch.randint(-(1 << 62), 1 << 62, (count,), generator=generator)
    wide >>= torch.randint(0, 62, (count,), generator=generator)
    halfway = (1 << 62) + (1 << 54)
    wide[:3] = torch.tensor([halfway, halfway + 1, halfway - 1])
    half = torch.randint(0, 1 << 16, (count,), generator=generator).to(torch.uint16).view(torch.float16)
    small = bits16(count, 6).float().nan_to_num(0).clamp(-1e9, 1e9).bfloat16()
    jobs = {
        "float32": (single, torch.bfloat16, None),
        "float32 rtz": (single, torch.bfloat16, "rtz"),
        "float64": (near, torch.bfloat16, None),
        "float64 rtz": (near, torch.bfloat16, "rtz"),
        "float16": (half, torch.bfloat16, None),
        "int64": (wide, torch.bfloat16, None),
        "int32": (wide.to(torch.int32), torch.bfloat16, None),
        "uint8": (wide.to(torch.uint8), torch.bfloat16, None),
        "to float32": (bits16(count, 6), torch.float32, None),
        "to float16": (bits16(count, 6), torch.float16, None),
        "to float64": (bits16(count, 6), torch.float64, None),
        "to int32": (small, torch.int32, None),
    }
    results = {}
    for name, (x, dtype, rounding) in jobs.items():
        out = torch.empty(count, dtype=dtype)
        _cast[(1,)](x, out, count, rounding)
        results[name] = (x, out)
    return results


@program
def cast_to_float8():
    x, out = torch.ones(16, dtype=torch.bfloat16), torch.zeros(16, dtype=torch.float8_e5m2)
    return attempt(lambda: _cast[(1,)](x, out, 16, None))


@triton.jit
def _dot(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m = tl.arange(0, M)[:, None]
    n = tl.arange(0, N)[None, :]
    a = tl.load(a_ptr + m * K + tl.arange(0, K)[None, :])
    b = tl.load(b_ptr + tl.arange(0, K)[:, None] * N + n)
    c = tl.load(c_ptr + m * N + n)
    tl.store(c_ptr + m * N + n, tl.dot(a, b, acc=c))


@program
def dots():
    """Integers: exact in float32 in any order, far from exact with a 16-bit accumulator."""
    results = {}
    for dtype, largest in ((torch.bfloat16, 256), (torch.float16, 128)):
        generator = torch.Generator().manual_seed(7)
        a = torch.randint(-largest, largest, (16, 64), generator=generator).to(dtype)
        b = torch.randint(-largest, largest, (64, 32), generator=generator).to(dtype)
        c = torch.randint(-largest, largest, (16, 32), generator=generator).float()
        out = c.clone()
        _dot[(1,)](a, b, out, 16, 32, 64)
        results[str(dtype)] = (a, b, c, out)
    return results


@triton.jit
def _largest(a, b):
    return tl.maximum(a, b)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b * d


@triton.jit
def _reduce(x_ptr, sums_ptr, whole_ptr, extrema_ptr, indices_ptr, generic_ptr, M: tl.constexpr, N: tl.constexpr):
    m = tl.arange(0, M)
    x = tl.load(x_ptr + m[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(sums_ptr + m, tl.sum(x, axis=1))
    tl.store(sums_ptr + M + m[:, None], tl.sum(x, axis=1, keep_dims=True))
    tl.store(whole_ptr, tl.sum(x))
    tl.store(extrema_ptr + m, tl.max(x, axis=1))
    tl.store(extrema_ptr + M + m, tl.min(x, axis=1))
    largest, where = tl.max(x, axis=1, return_indices=True)
    tl.store(extrema_ptr + 2 * M + m, largest)
    tl.store(indices_ptr + m, where)
    tl.store(indices_ptr + M + m, tl.argmin(x, axis=1))
    tl.store(generic_ptr + m, tl.reduce(x, 1, _largest))
    total, product = tl.reduce((x, x), 1, _add_pairs)
    tl.store(generic_ptr + M + m, total)
    tl.store(generic_ptr + 2 * M + m, product)


@program
def reductions():
    rows, columns = 8, 32
    generator = torch.Generator().manual_seed(8)
    results = {}
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(rows, columns, generator=generator).to(dtype)
        out = {
            "sums": torch.empty(2, rows, dtype=dtype),
            "whole": torch.empty(1, dtype=dtype),
            "extrema": torch.empty(3, rows, dtype=dtype),
            "indices": torch.empty(2, rows, dtype=torch.int32),
            "generic": torch.empty(3, rows, dtype=dtype),
        }
        _reduce[(1,)](x, *out.values(), rows, columns)
        results[str(dtype)] = {"x": x, **out}
    return results


@triton.jit
def _plus(a, b):
    return a + b


@triton.jit
def _scan(x_ptr, integers_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    integers = tl.load(integers_ptr + i)
    tl.store(out_ptr + i, tl.associative_scan(x, 0, _plus))
    tl.store(out_ptr + N + i, tl.associative_scan(x, 0, _largest))
    tl.store(out_ptr + 2 * N + i, tl.cumsum(integers))
    tl.store(out_ptr + 3 * N + i, tl.cumprod(integers))


@program
def scans():
    x = torch.randn(16, generator=torch.Generator().manual_seed(9)).bfloat16()
    integers = torch.tensor([1, 2, -1, 3] * 4).bfloat16()
    out = torch.empty(4, 16, dtype=torch.bfloat16)
    _scan[(1,)](x, integers, out, 16)
    return {"x": x, "integers": integers, "out": out}


@triton.jit
def _atomic(x_ptr, index_ptr, value_ptr, old_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    index = tl.load(index_ptr + i)
    old = tl.atomic_add(x_ptr + index, tl.load(value_ptr + i), mask=index >= 0)
    tl.store(old_ptr + i, old)


@program
def atomics():
    generator = torch.Generator().manual_seed(10)
    x = torch.randn(8, generator=generator).bfloat16()
    index = torch.randint(-1, 8, (32,), generator=generator)
    value = torch.randn(32, generator=generator).bfloat16()
    result, old = x.clone(), torch.full((32,), SENTINEL, dtype=torch.bfloat16)
    _atomic[(1,)](result, index, value, old, 32)
    return {"x": x, "index": index, "value": value, "result": result, "old": old}


@triton.jit
def _add_integers(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i) + 1)


@program
def integer_overflow():
    out = torch.zeros(4, dtype=torch.int32)
    _add_integers[(1,)](torch.full((4,), 2**31 - 1, dtype=torch.int32), out, 4)
    return out


@triton.jit
def _print(x_ptr):
    tl.device_print("x", tl.load(x_ptr))


@program
def prints():
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        _print[(1,)](torch.tensor([1.5], dtype=torch.bfloat16))
    return printed.getvalue()


@triton.jit
def _count_up(limit_ptr, out_ptr):
    total = 0
    for i in range(tl.load(limit_ptr)):
        total += i
    tl.store(out_ptr, total)


@program
def range_over_a_tensor():
    out = torch.zeros(1, dtype=torch.int32)
    _count_up[(1,)](torch.tensor([5], dtype=torch.int32), out)
    return int(out)


@triton.jit
def _own_address(x_ptr, out_ptr):
    tl.store(out_ptr, x_ptr.to(tl.int64))


@program
def address():
    x, out = torch.arange(16.0)[4:8], torch.zeros(1, dtype=torch.int64)
    _own_address[(1,)](x, out)
    return {"tensor": x.data_ptr(), "kernel": int(out)}


# Bounds. Tensors are views into a larger buffer, so that an access outside them would not crash.


@triton.jit
def _copy(x_ptr, y_ptr, load_at, store_at, limit, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x_ptr + load_at + i, mask=i < limit, other=0.0)
    tl.store(y_ptr + store_at + i, value, mask=i < limit)


def guarded(dtype=torch.float32):
    buffer = torch.full((64,), SENTINEL, dtype=dtype)
    return buffer, buffer[24:40]


def copy(load_at=0, store_at=0, limit=16, grid=1, dtype=torch.float32):
    _, x = guarded(dtype)
    x.copy_(torch.arange(16))
    buffer, y = guarded(dtype)
    return {"error": attempt(lambda: _copy[(grid,)](x, y, load_at, store_at, limit, 16)), "buffer": buffer}


@program
def bounds():
    return {
        "inside": copy(),
        "load past the end": copy(load_at=1),
        "load before the start": copy(load_at=-2),
        "store past the end": copy(store_at=1),
        "store before the start": copy(store_at=-3),
        "store far away": copy(store_at=1 << 40),
        "store past the end, bfloat16": copy(store_at=1, dtype=torch.bfloat16),
        "masked lanes outside": copy(load_at=4, store_at=4, limit=12),
        "no lane active": copy(load_at=100, store_at=100, limit=0),
        "one lane too many": copy(load_at=4, store_at=4, limit=13),
    }


@triton.jit
def _store_program(y_ptr):
    tl.store(y_ptr + tl.program_id(1), 1.0)


@program
def bounds_scalar_in_a_grid():
    buffer, y = guarded()
    return {"error": attempt(lambda: _store_program[(2, 20)](y)), "buffer": buffer}


@triton.jit
def _through_table(table_ptr, y_ptr, offset, N: tl.constexpr):
    x_ptr = tl.load(table_ptr + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + offset + i))


@program
def bounds_through_table():
    weights = [torch.arange(16.0), torch.arange(16.0) + 100]
    table = torch.tensor([w.data_ptr() for w in weights], dtype=torch.uint64)
    y = torch.zeros(16)

    def launch(offset=0):
        return {"error": attempt(lambda: _through_table[(2,)](table, y, offset, 16)), "y": y.clone()}

    results = {"unregistered": launch()}
    with reachable(weights[0]):
        results["half registered"] = launch()
        with reachable():
            pass
        with reachable(weights[1]):
            results["registered"] = launch()
            results["past the end"] = launch(offset=1)
        results["half registered again"] = launch()
    results["no longer registered"] = launch()
    return results


@triton.jit
def _bump(x_ptr, offset, N: tl.constexpr, SWAP: tl.constexpr):
    i = tl.arange(0, N)
    if SWAP:
        tl.atomic_cas(x_ptr + offset + i, i, i + 1)
    else:
        tl.atomic_add(x_ptr + offset + i, i.to(x_ptr.dtype.element_ty))


@program
def bounds_of_atomics():
    results = {}
    for name, dtype, swap in (
        ("float32", torch.float32, False),
        ("bfloat16", torch.bfloat16, False),
        ("cas", torch.int32, True),
    ):
        buffer, x = guarded(dtype)
        error = attempt(lambda x=x, swap=swap: _bump[(1,)](x, 1, 16, swap))
        results[name] = {"error": error, "buffer": buffer.float()}
    return results


@triton.jit
def _nothing_but_memory(pair, M: tl.constexpr, N: tl.constexpr):
    x_ptr, y_ptr = pair
    i = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(y_ptr + i, tl.load(x_ptr + i))


@program
def bounds_of_tuples_and_views():
    """Two rows of four in a buffer of rows of eight: the gap between the rows is let through, what follows is not."""
    whole = torch.arange(32.0).reshape(4, 8)
    y = torch.zeros(16)
    results = {"gap": attempt(lambda: _nothing_but_memory[(1,)]((whole[:2], y), 2, 8))}
    results["view"] = attempt(lambda: _nothing_but_memory[(1,)]((whole[:2, :4], y), 1, 8))
    results["after"] = attempt(lambda: _nothing_but_memory[(1,)]((whole[:2, :4], y), 2, 8))
    results["empty"] = attempt(lambda: _nothing_but_memory[(1,)]((whole[:0], y), 1, 1))
    results["overlapping"] = attempt(lambda: _nothing_but_memory[(1,)]((whole, whole[:, 2:5]), 2, 8))
    return results


@triton.jit
def _pad(x_ptr, y_ptr, N: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, shape=[3, N], strides=[N, 1], block_shape=[4, N], padding_option="nan")
    i = tl.arange(0, 4)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(y_ptr + i, x.load([0, 0]))


@program
def nan_padding():
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, y = torch.ones(3, 8, dtype=dtype), torch.zeros(4, 8, dtype=dtype)
        results[str(dtype)] = {"error": attempt(lambda x=x, y=y: _pad[(1,)](x, y, 8)), "y": y}
    return results


@triton.jit
def _descriptor(x_ptr, y_ptr, rows, N: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, shape=[rows, N], strides=[N, 1], block_shape=[4, N])
    y = tl.make_tensor_descriptor(y_ptr, shape=[rows, N], strides=[N, 1], block_shape=[4, N])
    y.store([0, 0], x.load([0, 0]))


@program
def bounds_of_descriptors():
    """Three rows in blocks of four; a descriptor that claims a row too many is caught."""
    results = {}
    for rows in (3, 4):
        x, buffer = torch.arange(24.0).reshape(3, 8), torch.full((4, 8), SENTINEL)
        results[rows] = {"error": attempt(lambda rows=rows, x=x, y=buffer: _descriptor[(1,)](x, y[:3], rows, 8))}
        results[rows]["buffer"] = buffer
    return results


@triton.jit
def _block_pointer(x_ptr, y_ptr, size, N: tl.constexpr):
    x = tl.make_block_ptr(x_ptr, shape=(size,), strides=(1,), offsets=(0,), block_shape=(N,), order=(0,))
    tl.store(y_ptr + tl.arange(0, N), tl.load(x, boundary_check=(0,), padding_option="zero"))


@program
def bounds_of_block_pointers():
    x = torch.arange(12.0)
    return {size: attempt(lambda size=size: _block_pointer[(1,)](x, torch.zeros(16), size, 16)) for size in (12, 13)}


@triton.jit
def _inner(x_ptr):
    return tl.load(x_ptr + 16)


@triton.jit
def _outer(x_ptr):
    tl.store(x_ptr, _inner(x_ptr))


@program
def bounds_in_a_device_function():
    return attempt(lambda: _outer[(1,)](guarded()[1]))


@triton.jit
def _from_nowhere(y_ptr, address):
    tl.store(y_ptr, tl.load(address.to(tl.pointer_type(tl.float32))))


@program
def bounds_without_a_tensor():
    return attempt(lambda: _from_nowhere[(1,)](torch.zeros(0), 1 << 40))


if __name__ == "__main__":
    torch.save({name: attempt(function) for name, function in PROGRAMS.items()}, sys.argv[1])
