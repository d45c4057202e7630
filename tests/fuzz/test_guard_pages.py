"""Guard pages: one element too far is a SIGSEGV, and everything else is as it is elsewhere."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kernelfuzz.fuzz.buffers import REDZONE, Buffers, StrayWrite
from kernelfuzz.fuzz.buffers.guard_pages import PAGE, guarded_memory
from kernelfuzz.oracles.expectation import OutputSpec
from kernelfuzz.strategies.layouts import Layout

# What is tried: an input or an output, its layout, dtype and shape.
TENSORS = [
    ("input", Layout(), torch.float16, (3, 5)),
    ("input", Layout(1, 3, 2), torch.int64, (3, 5)),
    ("input", Layout(), torch.float32, (0, 5)),
    ("output", Layout(), torch.uint8, (2 * PAGE,)),
    ("output", Layout(3, 1, 2), torch.bfloat16, (7,)),
    ("output", Layout(), torch.float32, ()),
]

# For each tensor a process reads or writes, as native code does behind torch's back, its last element or the one that
# would follow. The signals that ended these processes are printed.
ACCESSES = """
import ctypes, os, sys
import torch
from kernelfuzz.fuzz.buffers import Buffers
from kernelfuzz.oracles.expectation import OutputSpec
from kernelfuzz.strategies.layouts import Layout

def access(group, layout, dtype, shape, beyond):
    launch = Buffers("cpu", 1, memory="guarded")
    if group == "input":
        tensor = launch.allocate("t", shape, dtype, layout)
    else:
        tensor = launch.output("t", OutputSpec(shape, dtype, layout))
    width = tensor.element_size()
    first = tensor.untyped_storage().data_ptr() + tensor.storage_offset() * width
    element = (ctypes.c_uint8 * width).from_address(first + (layout.extent(shape) - 1 + beyond) * width)
    bytes(element) if sys.argv[1] == "read" else element.__setitem__(0, 1)

torch.set_num_threads(1)
for tensor in eval(sys.argv[2]):
    for beyond in (0, 1):
        child = os.fork()
        if child == 0:
            access(*tensor, beyond)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("access", ["read", "write"])
def test_the_last_element_of_a_tensor_can_be_touched_and_one_behind_it_cannot(access):
    command = [sys.executable, "-c", ACCESSES, access, repr(TENSORS)]
    statuses = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert statuses == ["0", str(-signal.SIGSEGV)] * len(TENSORS)


def test_a_write_before_a_tensor_is_a_stray_write():
    launch = Buffers("cpu", 1, memory="guarded")
    tensor = launch.allocate("x", (4,), torch.int32).fill_(1)
    output = launch.output("y", OutputSpec((4,), torch.int32))
    launch.freeze()
    assert min(tensor.storage_offset(), output.storage_offset()) >= REDZONE
    for each in (tensor, output):
        each.as_strided((1,), (1,), each.storage_offset() - REDZONE).zero_()
    assert launch.stray_writes() == [
        StrayWrite("y", False, False, 1, (-REDZONE,)),
        StrayWrite("x", True, False, 1, (-REDZONE,)),
    ]


def test_a_kernel_finds_its_inputs_and_writes_its_outputs():
    launch = Buffers("cpu", 1, memory="guarded")
    a = launch.allocate("a", (30, 70), torch.float32, Layout(1, 2, 2)).copy_(torch.arange(2100).view(30, 70) % 11)
    b = launch.allocate("b", (70, 20), torch.float32).copy_(torch.arange(1400).view(70, 20) % 7)
    product = launch.output("product", OutputSpec((30, 20), torch.float32, Layout(row_gap=3)))
    launch.freeze()
    np.matmul(a.numpy(), b.numpy(), out=product.numpy())
    assert torch.equal(product, a.contiguous() @ b)
    assert launch.stray_writes() == []


def test_memory_lives_as_long_as_a_tensor_in_it_and_no_longer():
    def mappings():
        return len(Path("/proc/self/maps").read_text().splitlines())

    tensor = Buffers("cpu", 1, memory="guarded").allocate("x", (5,), torch.float32).fill_(2)
    before = mappings()
    for _ in range(10_000):
        Buffers("cpu", 1, memory="guarded").allocate("x", (5,), torch.float32)
    assert mappings() < before + 100
    assert tensor.tolist() == [2] * 5


@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, PAGE + 1])
def test_guarded_memory_is_whole_pages(size):
    memory = guarded_memory(size)
    assert memory.numel() % PAGE == memory.data_ptr() % PAGE == 0
    assert size <= memory.numel() < size + PAGE


def test_guard_pages_are_refused_for_a_device():
    with pytest.raises(ValueError, match="cuda"):
        Buffers("cuda", 1, memory="guarded")
