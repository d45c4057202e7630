"""The mended interpreter against torch's own bfloat16, bit for bit, and against accesses out of bounds.

A process interprets Triton's kernels or compiles them, so the kernels run in one of their own: interpreter_programs.py.
"""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

PROGRAMS = Path(__file__).with_name("interpreter_programs.py")
SENTINEL = -7.0

pytest.importorskip("triton", reason="Triton exists for Linux only")


def run_python(*arguments, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("interpreter") / "results.pt"
    done = run_python(PROGRAMS, path, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert "RuntimeWarning" not in done.stderr, done.stderr
    return torch.load(path, weights_only=True)


def assert_same_bits(actual, expected):
    """Equal bit patterns, any NaN being as good as another."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    same = (actual.view(integers) == expected.view(integers)) | (actual.isnan() & expected.isnan())
    assert same.all(), (
        f"{int((~same).sum())} of {same.numel()} differ, first {actual[~same][0]} for {expected[~same][0]}"
    )


def remainder(x, y):
    """The C library's: torch.fmod gives NaN where the quotient is huge."""
    pairs = zip(x.float().numpy(), y.float().numpy(), strict=True)
    with np.errstate(invalid="ignore"):
        return torch.tensor([np.fmod(*pair) for pair in pairs]).bfloat16()


ELEMENTWISE = {
    "add": lambda x, y, z: x + y,
    "sub": lambda x, y, z: x - y,
    "mul": lambda x, y, z: x * y,
    "div": lambda x, y, z: x / y,
    "mod": lambda x, y, z: remainder(x, y),
    "maximum": lambda x, y, z: torch.maximum(x, y),
    "minimum": lambda x, y, z: torch.minimum(x, y),
    "fma": lambda x, y, z: (x.float() * y.float() + z.float()).bfloat16(),
    "where": lambda x, y, z: torch.where(x < y, x, y),
    "abs": lambda x, y, z: x.abs(),
    "neg": lambda x, y, z: -x,
    "scale": lambda x, y, z: x * torch.tensor(0.1).bfloat16(),
    "constant": lambda x, y, z: x + torch.tensor(1.7).bfloat16(),
    "clamp": lambda x, y, z: x.clamp(-2.0, 3.0),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_arithmetic_equals_torch(results, name):
    x, y, z, out = (results["elementwise"][key] for key in ("x", "y", "z", "out"))
    expected = ELEMENTWISE[name](x, y, z)
    actual = out[list(ELEMENTWISE).index(name)]
    if name in ("maximum", "minimum", "neg"):
        # Which of +0 and -0 is larger is not defined; and Triton before 3.8 negates as 0 - x.
        actual, expected = actual + 0.0, expected + 0.0
    if name == "clamp":
        # What becomes of NaN is not defined.
        actual, expected = actual[~x.isnan()], expected[~x.isnan()]
    assert_same_bits(actual, expected)


def test_comparisons_equal_torch(results):
    x, y, flags = (results["elementwise"][key] for key in ("x", "y", "flags"))
    expected = torch.stack([x < y, x <= y, x > y, x >= y, x == y, x != y, x < y])
    assert torch.equal(flags.bool(), expected)


def test_functions_are_rounded_from_float32(results):
    x = results["functions"]["x"]
    for name, out in results["functions"]["out"].items():
        expected = getattr(torch, name.removeprefix("precise_"))(x.float())
        # The float32 functions of numpy and torch differ in their last bits: at most one neighbouring bfloat16.
        near = torch.isclose(out.float(), expected, rtol=2**-8, atol=2**-130, equal_nan=True)
        exact = out == expected.bfloat16()
        assert (near | exact).all(), name
        assert (exact | expected.isnan())[x.isfinite()].float().mean() > 0.99, name


@pytest.mark.parametrize("name", ["float32", "float16", "uint8", "to float32", "to float16", "to float64", "to int32"])
def test_casts_equal_torch(results, name):
    x, out = results["casts"][name]
    assert_same_bits(out, x.float().to(out.dtype))


def nearest_bfloat16(value):
    """Exact, from a Python number: the nearest of the three candidates, the even one on a tie."""
    middle = torch.tensor(float(value)).bfloat16()
    if not middle.isfinite():
        return middle
    bits = int(middle.view(torch.int16))
    candidates = torch.tensor([bits - 1, bits, bits + 1]).to(torch.int16)
    finite = [c for c in candidates if c.view(torch.bfloat16).isfinite()]
    best = min(finite, key=lambda c: (abs(distance(c, value)), int(c) & 1))
    return best.view(torch.bfloat16)


def distance(bits, value):
    return Fraction(float(bits.view(torch.bfloat16))) - Fraction(value)


@pytest.mark.parametrize("name", ["int32", "int64", "float64"])
def test_casts_from_wider_types_round_once(results, name):
    x, out = results["casts"][name]
    x, out = x[:512], out[:512]
    expected = torch.stack([nearest_bfloat16(value) for value in x.tolist()])
    assert_same_bits(out, expected)


@pytest.mark.parametrize("name", ["float32 rtz", "float64 rtz"])
def test_casts_toward_zero(results, name):
    x, out = results["casts"][name]
    x = x.double()
    finite = x.isfinite()
    assert_same_bits(out[~finite], x[~finite].bfloat16())
    x, out = x[finite], out[finite]
    away = (out.view(torch.int16) + 1).view(torch.bfloat16)  # one more in magnitude; infinity after the largest
    assert (out.double().abs() <= x.abs()).all()
    assert (away.double().abs() > x.abs()).all()
    assert (out.signbit() == x.signbit()).all()


def test_what_is_not_mended_refuses_and_names_itself(results):
    error = results["cast_to_float8"]
    assert error["raised"] == "NotImplementedError"
    assert "bf16 to fp8e5" in error["text"]


def test_nan_padding_is_not_zero(results):
    single, narrow = results["nan_padding"]["torch.float32"], results["nan_padding"]["torch.bfloat16"]
    assert single["error"] is None
    assert single["y"][3].isnan().all()
    assert narrow["error"]["raised"] == "NotImplementedError"
    assert "NaN padding" in narrow["error"]["text"]


@pytest.mark.parametrize("dtype", ["torch.bfloat16", "torch.float16"])
def test_dot_accumulates_in_float32(results, dtype):
    a, b, c, out = results["dots"][dtype]
    assert torch.equal(out, (a.double() @ b.double() + c.double()).float())


def tree_sum(x):
    """Sums along the last dimension whose partial sums are rounded to x's type."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


@pytest.mark.parametrize("dtype", ["torch.bfloat16", "torch.float16"])
def test_reductions_round_every_step(results, dtype):
    result = results["reductions"][dtype]
    x = result["x"]
    assert_same_bits(result["sums"], tree_sum(x).expand(2, -1).contiguous())
    assert_same_bits(result["whole"], tree_sum(x.flatten())[None])
    assert_same_bits(result["extrema"], torch.stack([x.amax(1), x.amin(1), x.amax(1)]))
    assert torch.equal(result["indices"].long(), torch.stack([x.argmax(1), x.argmin(1)]))
    total, product = x[:, 0], x[:, 0]
    for column in x[:, 1:].unbind(1):
        total, product = total + column, product * column
    assert_same_bits(result["generic"], torch.stack([x.amax(1), total, product]))


def test_scans_round_every_step(results):
    x, integers, out = (results["scans"][key] for key in ("x", "integers", "out"))
    sums = [x[0]]
    for value in x[1:]:
        sums.append(sums[-1] + value)
    assert_same_bits(out[0], torch.stack(sums))
    assert_same_bits(out[1], x.cummax(0).values)
    assert_same_bits(out[2], integers.cumsum(0))
    assert_same_bits(out[3], integers.cumprod(0))


def test_atomic_add_sees_every_lane_before_it(results):
    result = results["atomics"]
    expected, old = result["x"].clone(), torch.zeros(32, dtype=torch.bfloat16)
    for lane, (index, value) in enumerate(zip(result["index"].tolist(), result["value"], strict=True)):
        if index >= 0:
            old[lane] = expected[index]
            expected[index] += value
    assert_same_bits(result["result"], expected)
    assert_same_bits(result["old"], old)


def test_integers_wrap_around(results):
    assert results["integer_overflow"].tolist() == [-(2**31)] * 4


def test_values_are_printed(results):
    assert "1.5" in results["prints"]


def test_range_over_a_loaded_number(results):
    assert results["range_over_a_tensor"] == 0 + 1 + 2 + 3 + 4


def test_kernels_work_on_the_callers_memory(results):
    assert results["address"]["kernel"] == results["address"]["tensor"]


def test_accesses_inside_are_let_through(results):
    for name in ("inside", "masked lanes outside", "no lane active"):
        assert results["bounds"][name]["error"] is None, name
    assert results["bounds"]["inside"]["buffer"][24:40].tolist() == list(range(16))
    assert results["bounds"]["masked lanes outside"]["buffer"][28:40].tolist() == list(range(4, 16))


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "load past the end": {"access": "load", "argument": "x_ptr", "bad_lanes": 1, "offset": 64},
        "load before the start": {"access": "load", "argument": "x_ptr", "bad_lanes": 2, "offset": -8},
        "store past the end": {"access": "store", "argument": "y_ptr", "bad_lanes": 1, "offset": 64},
        "store before the start": {"access": "store", "argument": "y_ptr", "bad_lanes": 3, "offset": -12},
        "store far away": {"access": "store", "bad_lanes": 16},
        "store past the end, bfloat16": {"argument": "y_ptr", "bad_lanes": 1, "offset": 32, "extent": 32},
        "one lane too many": {"access": "load", "argument": "x_ptr", "bad_lanes": 1, "lanes": 13, "offset": 64},
    }.items(),
)
def test_accesses_outside_raise_before_they_happen(results, name, expected):
    error, buffer = (results["bounds"][name][key] for key in ("error", "buffer"))
    usual = {"raised": "OutOfBoundsError", "kernel": "_copy", "program": (0, 0, 0), "lanes": 16, "shape": (16,)}
    wanted = {**usual, **expected}
    assert {key: error[key] for key in wanted} == wanted
    assert (buffer == SENTINEL).all()


def test_error_names_the_program_and_reads_well(results):
    error, buffer = (results["bounds_scalar_in_a_grid"][key] for key in ("error", "buffer"))
    assert error["program"] == (0, 16, 0)
    assert error["text"] == (
        "_store_program, program (0, 16, 0): 1 of 1 lanes of a store are out of bounds; "
        "nearest is y_ptr of shape (16,): offset 64 of 64 bytes"
    )
    assert (buffer == SENTINEL).sum() == 48


def test_memory_behind_a_table_is_legal_while_it_is_reachable(results):
    result = results["bounds_through_table"]
    assert result["registered"]["error"] is None
    assert result["registered"]["y"].tolist() == list(range(100, 116))
    past = result["past the end"]["error"]
    assert (past["access"], past["program"], past["offset"], past["extent"]) == ("load", (0, 0, 0), 64, 64)
    assert past["argument"] is None
    programs = {name: result[name]["error"]["program"][0] for name in result if name not in ("registered",)}
    assert programs == {
        "unregistered": 0,
        "half registered": 1,
        "past the end": 0,
        "half registered again": 1,
        "no longer registered": 0,
    }


@pytest.mark.parametrize("name", ["float32", "bfloat16", "cas"])
def test_atomics_outside_raise_before_they_happen(results, name):
    error, buffer = (results["bounds_of_atomics"][name][key] for key in ("error", "buffer"))
    assert (error["access"], error["bad_lanes"], error["argument"]) == ("atomic", 1, "x_ptr")
    assert (buffer == SENTINEL).all()


def test_tuples_and_strided_views(results):
    result = results["bounds_of_tuples_and_views"]
    assert result["gap"] is None
    assert result["overlapping"] is None
    assert result["view"] is None
    assert (result["after"]["argument"], result["after"]["offset"], result["after"]["extent"]) == ("pair[0]", 48, 48)
    assert (result["empty"]["argument"], result["empty"]["extent"]) == ("pair[0]", 0)


def test_tensor_descriptors_are_checked(results):
    honest, lying = (results["bounds_of_descriptors"][rows] for rows in (3, 4))
    assert honest["error"] is None
    assert honest["buffer"][:3].flatten().tolist() == list(range(24))
    assert (lying["error"]["access"], lying["error"]["bad_lanes"], lying["error"]["offset"]) == ("load", 8, 96)
    assert (lying["buffer"] == SENTINEL).all()


def test_block_pointers_are_checked(results):
    result = results["bounds_of_block_pointers"]
    if result[12] is not None and result[12]["raised"] == "NotImplementedError":
        pytest.skip(f"this Triton has no block pointers: {result[12]['text']}")
    assert result[12] is None
    assert (result[13]["access"], result[13]["argument"], result[13]["offset"]) == ("load", "x_ptr", 48)


def test_error_comes_through_device_functions(results):
    error = results["bounds_in_a_device_function"]
    assert (error["raised"], error["kernel"], error["offset"]) == ("OutOfBoundsError", "_outer", 64)


def test_no_memory_is_legal_without_tensors(results):
    error = results["bounds_without_a_tensor"]
    assert (error["raised"], error["access"], error["extent"]) == ("OutOfBoundsError", "load", 0)


INSTALL = "from kernelfuzz.kernels.interpreter import install; install()"


def test_compiled_mode_is_refused():
    done = run_python("-c", INSTALL)
    assert "KernelfuzzError: Triton compiles its kernels in this process: set TRITON_INTERPRET=1" in done.stderr


def test_interpreter_that_moved_is_refused():
    code = "import triton.runtime.interpreter as i; del i.InterpreterBuilder.create_masked_load; " + INSTALL
    done = run_python("-c", code, TRITON_INTERPRET="1")
    assert "KernelfuzzError: Triton 3." in done.stderr
    assert "create_masked_load" in done.stderr.splitlines()[-1]
