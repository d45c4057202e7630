"""Kernels in whose process the CPU behaves as a GPU does after a mistake: the launch returns, what comes later fails.

Only what the engine asks of the device is simulated: to wait for it, and a small operation.
"""

import os

from engine_kernels import rank, right
from faulty_kernels import moe_lora_align

from kernelfuzz.fuzz import launch

ILLEGAL = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported"
INVALID = "CUDA error: invalid configuration argument\nCompile with `TORCH_USE_CUDA_DSA`"

_pending: list[str] = []
_broken: list[str] = []


def _probe(device):
    if _broken:
        raise RuntimeError(_broken[0])
    if _pending:
        raise RuntimeError(_pending.pop())


launch._probe = launch.synchronize = _probe


def illegal_access(inputs, outputs):
    """Right; above rank 8 the context is lost, and only later is that seen."""
    right(inputs, outputs)
    if rank(inputs.case) > 8:
        _broken.append(ILLEGAL)


def illegal_access_that_raises(inputs, outputs):
    """The same, but the host code waits for its kernel."""
    illegal_access(inputs, outputs)
    _probe(None)


def pending_error(inputs, outputs):
    """Right, but without tokens it leaves an error of a launch that never happened."""
    right(inputs, outputs)
    if inputs.case.size == 0:
        _pending.append(INVALID)


def align(inputs, outputs):
    """A right moe_lora_align, but for seeds that 5 divides: those lose the context."""
    moe_lora_align(inputs, outputs)
    if inputs.case.seed % 5 == 0:
        _broken.append(ILLEGAL)


def align_wrong(inputs, outputs):
    """A moe_lora_align that is wrong with seeds that 5 divides."""
    moe_lora_align(inputs, outputs)
    if inputs.case.seed % 5 == 0:
        outputs["num_tokens_post_pad"][inputs.token_adapters[0]] += 1


_launches = 0


def align_wrong_after_another(inputs, outputs):
    """A moe_lora_align that is wrong only if its process has run one with the same structure just before."""
    global _launches
    moe_lora_align(inputs, outputs)
    _launches += 1
    if _launches == 3 and os.environ.get("SIMULATED_STATE"):
        outputs["num_tokens_post_pad"][inputs.token_adapters[0]] += 1
