"""Kernels of `bgmv` in plain torch for the tests of the engine, run in workers as `engine_kernels:<function>`."""

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import torch

from kernelfuzz.kernels import releases
from kernelfuzz.kernels.base import WrongResultError
from kernelfuzz.kernels.xpu import XpuLibrary
from kernelfuzz.strategies.errors import KernelfuzzError


def right(inputs, outputs):
    """Right, refusals included."""
    case, output = inputs.case, outputs["output"]
    if case.refusal is not None:
        raise RuntimeError(case.refusal)
    tokens = (inputs.indices >= 0).nonzero().flatten()
    weights = inputs.weights.flatten(0, -3)[inputs.indices[tokens], : case.written_size].float()
    product = case.scale * torch.einsum("tnk,tk->tn", weights, inputs.x[tokens].float())
    columns = slice(case.slice_offset, case.slice_offset + case.written_size)
    if case.accumulate:
        product += output[tokens, columns]
    output[tokens, columns] = product.to(output.dtype)


def rank(case):
    return case.rows if case.op == "shrink" else case.width


def wrong_above_rank_8(inputs, outputs):
    """The first element of every row is 1000 too large above rank 8."""
    right(inputs, outputs)
    if rank(inputs.case) > 8:
        outputs["output"][inputs.indices >= 0, inputs.case.slice_offset] += 1000


def two_bugs(inputs, outputs):
    """Wrong above rank 8, and refuses four tokens and more."""
    if inputs.case.refusal is None and inputs.case.batch.num_tokens >= 4:
        raise ValueError("too many tokens\nfor this kernel")
    wrong_above_rank_8(inputs, outputs)


_launches = 0


def wrong_in_three_of_ten(inputs, outputs):
    """Wrong in 30 % of its launches, whatever the case."""
    global _launches
    right(inputs, outputs)
    _launches += 1
    if _launches % 10 in (3, 6, 9):
        outputs["output"][inputs.indices >= 0, inputs.case.slice_offset] += 1000


def chatty(inputs, outputs):
    """Right, and writes on every channel that it has."""
    print("{}" * 10_000)
    sys.stderr.write("noise\n")
    os.write(1, b"\x00\x00\x00\x04null")
    os.write(2, b"\xff\xfe")
    right(inputs, outputs)


def mortal(inputs, outputs):
    """Right but at ranks 2, 3 and 4, which end the process or never end."""
    match rank(inputs.case):
        case 2:
            print("the last words", flush=True)
            os._exit(3)
        case 3:
            ctypes.string_at(0)
        case 4:
            _never_end()
    right(inputs, outputs)


def _never_end():
    """Write the process's id into the file $ENGINE_KERNELS_MARK and wait."""
    mark = Path(os.environ["ENGINE_KERNELS_MARK"])
    mark.with_suffix(".new").write_text(str(os.getpid()))
    mark.with_suffix(".new").replace(mark)
    while True:
        time.sleep(3600)


def _is_first_time():
    """Whether the file $ENGINE_KERNELS_MARK was not there yet; it is now, with the process's id."""
    mark = Path(os.environ["ENGINE_KERNELS_MARK"])
    if mark.exists():
        return False
    mark.with_suffix(".new").write_text(str(os.getpid()))
    mark.with_suffix(".new").replace(mark)
    return True


def waits_once(inputs, outputs):
    """Right, but the first time it waits for whoever kills it."""
    if _is_first_time():
        time.sleep(3600)
    right(inputs, outputs)


def stops_once(inputs, outputs):
    """Right, but the first time its process stops, as a machine's that is suspended."""
    if _is_first_time():
        os.kill(os.getpid(), signal.SIGSTOP)
    right(inputs, outputs)


def slow(inputs, outputs):
    """Right, in a fifth of a second."""
    time.sleep(0.2)
    right(inputs, outputs)


def dies_and_leaves_a_child(inputs, outputs):
    """Right; at rank 3 it starts a process that keeps everything open, writes down its id, and dies."""
    right(inputs, outputs)
    if rank(inputs.case) == 3:
        child = os.fork()
        if child == 0:
            os.setsid()
            time.sleep(3600)
        mark = Path(os.environ["ENGINE_KERNELS_MARK"])
        mark.with_suffix(".new").write_text(str(child))
        mark.with_suffix(".new").replace(mark)
        ctypes.string_at(0)


def changes_its_process(inputs, outputs):
    """Right; at rank 3 it leaves torch in a state that nothing else expects."""
    right(inputs, outputs)
    if rank(inputs.case) == 3:
        torch.set_default_device("meta")
        torch.full = None


def breaks_the_comparison(inputs, outputs):
    """Right; at rank 3 it takes away what its output is compared with."""
    right(inputs, outputs)
    if rank(inputs.case) == 3:
        torch.stack = None


def writes_over_the_connection(inputs, outputs):
    """Right; at rank 3 it writes into every file that it has open."""
    right(inputs, outputs)
    if rank(inputs.case) == 3:
        for descriptor in range(3, 40):
            with contextlib.suppress(OSError):
                os.write(descriptor, b"\x00\x00\x00\x04oops")


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def raises_without_a_text(inputs, outputs):
    raise Unspeakable


def of_another_form(inputs, outputs):
    """Right; at rank 3 its result is no tensor."""
    if rank(inputs.case) == 3:
        raise WrongResultError("output", "form_of_result", "output is NoneType and must be a tensor")
    right(inputs, outputs)


def needs_what_is_not_loaded(inputs, outputs):
    """Right; at rank 3 it comes to something that kernelfuzz does not offer it."""
    if rank(inputs.case) == 3:
        raise KernelfuzzError("kernelfuzz does not load the configuration\nof anything")
    right(inputs, outputs)


def kills_itself(inputs, outputs):
    os.kill(os.getpid(), signal.SIGKILL)


def mortal_seed(inputs, outputs):
    """Right but with seed 2, which ends the process."""
    if inputs.case.seed == 2:
        os._exit(3)
    right(inputs, outputs)


def dies_of_every_third(inputs, outputs):
    """Right but with seeds that 3 divides, which end the process."""
    if inputs.case.seed % 3 == 0:
        os._exit(5)
    right(inputs, outputs)


def reads_too_far(inputs, outputs):
    """Right; above rank 8 it reads the byte behind its weights."""
    right(inputs, outputs)
    if rank(inputs.case) > 8:
        weights = inputs.weights
        ctypes.string_at(weights.data_ptr() + weights.numel() * weights.element_size(), 1)


_xpu = None


def one_adapter_too_far(inputs, outputs):
    """Intel's shipped kernel with every adapter's index one too large, which the host code does not check."""
    global _xpu
    case = inputs.case
    if case.op == "shrink" or case.refusal is not None or case.rows != case.written_size:
        return right(inputs, outputs)
    if _xpu is None:
        _xpu = XpuLibrary(releases.locate("vllm-xpu-kernels", releases.PINNED["vllm-xpu-kernels"]))
    indices = torch.where(inputs.indices >= 0, inputs.indices + 1, -1)
    operands = (outputs["output"], inputs.x, inputs.weights, indices)
    return _xpu.bgmv_expand_slice(*operands, case.slice_offset, case.written_size, case.accumulate)


def reported(inputs, outputs):
    """Right; above rank 8 the sanitizer has something to say of it, and above rank 16 the process ends too."""
    right(inputs, outputs)
    if rank(inputs.case) > 8:
        with Path(os.environ["FAKE_SANITIZER_LOG"]).open("a") as log:
            log.write(
                "========= Invalid __global__ write of size 2 bytes\n"
                "=========     at _expand_rows+0x10 in expand.py:3\n"
                "=========     by thread (1,0,0) in block (0,0,0)\n"
                "=========     Access at 0x1000 is out of bounds\n"
                "=========\n"
            )
    if rank(inputs.case) > 16:
        os._exit(3)


def keeps_its_scratch(inputs, outputs):
    """Right if the memory that it allocates is left as it is, zeros here."""
    right(inputs, outputs)
    fresh = torch.empty(1 << 22)
    if fresh.isnan().any():
        outputs["output"].zero_().sub_(1)


def right_and_then_never_ends(inputs, outputs):
    """Right 20 times."""
    global _launches
    _launches += 1
    if _launches > 20:
        _never_end()
    right(inputs, outputs)


def wrong_and_then_never_ends(inputs, outputs):
    """Wrong above rank 8, 80 times."""
    global _launches
    _launches += 1
    if _launches > 80:
        _never_end()
    wrong_above_rank_8(inputs, outputs)
