# mypy: disallow-untyped-decorators=False
"""Kernels of `moe_lora_align` for `crash_campaign.py`: the healthy example, and one that crashes in every twentieth
case. From this folder also `kernelfuzz run moe_lora_align --kernel crashing:one_in_twenty`."""

import dataclasses
import os
import zlib
from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from kernelfuzz.kernels.examples.moe_lora_align import moe_lora_align_block_size
from kernelfuzz.strategies.case import Case
from kernelfuzz.strategies.moe_lora_align import Inputs

ONE_IN = 20


def must_crash(case: Case) -> bool:
    """Whether `one_in_twenty` crashes: a hash of the structure says so, so that it does with every content seed."""
    structure = dataclasses.replace(case, seed=0)
    return zlib.crc32(repr(structure).encode()) % ONE_IN == 0


def healthy(inputs: Inputs, outputs: Mapping[str, torch.Tensor]) -> None:
    """Right."""
    moe_lora_align_block_size(inputs, outputs, None)


def one_in_twenty(inputs: Inputs, outputs: Mapping[str, torch.Tensor]) -> None:
    """Right where it does not crash: with an illegal access on CUDA, elsewhere by ending the process."""
    if not must_crash(inputs.case):
        healthy(inputs, outputs)
    elif inputs.topk_ids.device.type == "cuda":
        _store_far_outside[(1,)](outputs["num_tokens_post_pad"])
    else:
        os.abort()


@triton.jit
def _store_far_outside(tensor: tl.tensor) -> None:
    tl.store(tensor + (1 << 40), 1)
