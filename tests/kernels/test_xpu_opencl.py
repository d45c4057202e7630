"""Building and launching SPIR-V through Intel's OpenCL runtime, on a module that is assembled here."""

import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch

from kernelfuzz.kernels.xpu import opencl
from kernelfuzz.strategies.errors import KernelfuzzError


def instruction(opcode, *operands):
    body = b"".join(
        operand.encode() + b"\0" * (4 - len(operand) % 4) if isinstance(operand, str) else struct.pack("<I", operand)
        for operand in operands
    )
    return struct.pack("<I", (1 + len(body) // 4) << 16 | opcode) + body


def store_module(symbol):
    """A kernel ``(uint *where, uint what)`` that stores one number."""
    function, where, what, void, uint, pointer, signature, label = range(1, 9)
    return b"".join(
        [
            struct.pack("<5I", 0x07230203, 0x10000, 0, 9, 0),
            instruction(17, 4),  # capability Addresses
            instruction(17, 6),  # capability Kernel
            instruction(14, 2, 2),  # memory model: Physical64, OpenCL
            instruction(15, 6, function, symbol),
            instruction(71, where, 38, 5),  # not captured
            instruction(19, void),
            instruction(21, uint, 32, 0),
            instruction(32, pointer, 5, uint),  # in global memory
            instruction(33, signature, void, pointer, uint),
            instruction(54, void, function, 0, signature),
            instruction(55, pointer, where),
            instruction(55, uint, what),
            instruction(248, label),
            instruction(62, where, what, 2, 4),  # store, aligned to 4 bytes
            instruction(253),
            instruction(56),
        ]
    )


@pytest.fixture
def runtime():
    if reason := opencl.unavailable():
        pytest.skip(reason)
    return opencl.runtime()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELFUZZ_HOME", str(tmp_path))
    return tmp_path / "opencl"


@pytest.fixture
def library(tmp_path, runtime, cache):
    path = tmp_path / "lib.so"
    path.write_bytes(b"data" + store_module("_ZTSN3fuz5storeIiEE"))
    return opencl.Library(path, ["fuz::store"])


def test_a_kernel_writes_to_torch_memory_in_place(library):
    memory = torch.zeros(9, dtype=torch.int32)
    for offset in range(9):
        library.entry("fuz::store", "int").launch((1,), (1,), (memory[offset:], np.uint32(offset + 1)))
    assert memory.tolist() == list(range(1, 10))


def test_a_view_without_alignment_is_passed_as_it_is(library):
    memory = torch.zeros(12, dtype=torch.uint8)
    library.entry("fuz::store", "int").launch((1,), (1,), (memory[3:], np.uint32(0x04030201)))
    assert memory.tolist() == [0, 0, 0, 1, 2, 3, 4, 0, 0, 0, 0, 0]


def test_another_number_of_arguments_is_refused(library):
    entry = library.entry("fuz::store", "int")
    with pytest.raises(KernelfuzzError, match="takes 2 arguments where kernelfuzz knows 1"):
        entry.launch((1,), (1,), (torch.zeros(1),))


def test_an_instantiation_that_the_library_lacks(library):
    with pytest.raises(KernelfuzzError, match="has no instantiation fuz::store<long>: use a release"):
        library.entry("fuz::store", "long")


def test_a_library_without_the_kernel(tmp_path):
    path = tmp_path / "lib.so"
    path.write_bytes(store_module("_ZTSN3fuz5storeIiEE"))
    with pytest.raises(KernelfuzzError, match="has no SPIR-V of fuz::load: use a release"):
        opencl.Library(path, ["fuz::store", "fuz::load"])


def test_a_library_that_is_not_there(tmp_path):
    with pytest.raises(KernelfuzzError, match=r"cannot read .*absent\.so: No such file"):
        opencl.Library(tmp_path / "absent.so", ["fuz::store"])


def store_with_a_new_runtime(module, symbol):
    """What the kernel stored, where nothing is remembered but the files in the cache."""
    memory = torch.zeros(1, dtype=torch.int32)
    fresh = opencl.runtime.__wrapped__()
    fresh.entry(module, symbol).launch((1,), (1,), (memory, np.uint32(7)))
    return memory.item()


def test_a_built_binary_is_kept_whole_and_used_again(runtime, cache):
    symbol = "_ZTSN3fuz5storeIiEE"
    assert store_with_a_new_runtime(store_module(symbol), symbol) == 7
    (binary,) = cache.iterdir()
    written = binary.stat().st_mtime_ns
    assert store_with_a_new_runtime(store_module(symbol), symbol) == 7
    assert [path.name for path in cache.iterdir()] == [binary.name]
    assert binary.stat().st_mtime_ns == written


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b[:-9] + b"\x55" + b[-8:]])
def test_a_damaged_binary_is_built_again(runtime, cache, damage):
    symbol = "_ZTSN3fuz5storeIiEE"
    store_with_a_new_runtime(store_module(symbol), symbol)
    (binary,) = cache.iterdir()
    whole = binary.read_bytes()
    binary.write_bytes(damage(whole))
    assert store_with_a_new_runtime(store_module(symbol), symbol) == 7
    assert len(binary.read_bytes()) == len(whole)


def test_another_module_gets_another_binary(runtime, cache):
    for symbol in ("_ZTSN3fuz5storeIiEE", "_ZTSN3fuz5storeIlEE"):
        store_with_a_new_runtime(store_module(symbol), symbol)
    assert len(list(cache.iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_done_without(runtime, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("KERNELFUZZ_HOME", str(tmp_path / "file"))
    symbol = "_ZTSN3fuz5storeIiEE"
    assert store_with_a_new_runtime(store_module(symbol), symbol) == 7


def test_another_machine_is_named(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert opencl.unavailable.__wrapped__() == (
        "Intel's OpenCL runtime for CPUs needs x86-64 Linux, this is arm64 Darwin"
    )


def in_a_new_process(code, **environment):
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="the reason is another one here")
def test_without_pyopencl_the_remedy_is_named():
    code = """
import sys
sys.modules["pyopencl"] = None
from kernelfuzz.kernels.xpu import unavailable
print(unavailable())
"""
    assert in_a_new_process(code) == "pyopencl is not installed: pip install 'kernelfuzz[xpu-cpu]'"


def test_vendors_that_lead_elsewhere_are_overruled_and_stand_afterwards(runtime, tmp_path):
    (tmp_path / "other.icd").write_text("libsomethingelse.so\n")
    code = """
import os, sys
from kernelfuzz.kernels.xpu import unavailable
assert "pyopencl" not in sys.modules, "importing kernelfuzz.kernels.xpu loads pyopencl"
print(unavailable(), os.environ["OCL_ICD_VENDORS"])
"""
    assert in_a_new_process(code, OCL_ICD_VENDORS=str(tmp_path)) == f"None {tmp_path}"
