"""A Triton kernel, without kernelfuzz, that reads one element too far where $PLANTED_BUG is set."""

import os

import triton
import triton.language as tl

TOO_FAR = bool(os.environ.get("PLANTED_BUG"))


@triton.jit
def _expand(output, x, weights, indices, rows, width, BLOCK: tl.constexpr):
    token, row = tl.program_id(0), tl.program_id(1)
    adapter = tl.load(indices + token)
    if adapter >= 0:
        k = tl.arange(0, BLOCK)
        a = tl.load(x + token * width + k, mask=k < width, other=0.0)
        b = tl.load(weights + (adapter * rows + row) * width + k, mask=k < width, other=0.0)
        tl.store(output + token * rows + row, tl.sum(a.to(tl.float32) * b.to(tl.float32), 0))


def expand(inputs, outputs):
    case = inputs.case
    sizes = (case.rows, case.width + TOO_FAR)
    _expand[(case.size, case.rows)](outputs["output"], inputs.x, inputs.weights, inputs.indices, *sizes, BLOCK=4)
