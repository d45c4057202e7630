"""Kernels of `bgmv` in plain torch for the tests of the engine, run in workers as `engine_kernels:<function>`."""

import ctypes
import os
import sys
import time
from pathlib import Path

import torch


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
