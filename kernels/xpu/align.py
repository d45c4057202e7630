"""moe_lora_align of vllm-xpu-kernels, launched as the host code of ``torch.ops._moe_C`` launches it.

The checks, the thresholds and the launch ranges are those of release 0.1.16.2: ``csrc/moe/moe_align_sum_kernels.cpp``
of the repository vllm-project/vllm-xpu-kernels, and the host code in the wheel's binary.

The two-kernel path of that release has a race: for each adapter two work-groups start by setting its entry of
``num_tokens_post_pad`` to 0, and only the first of them writes the total later. Nothing orders work-groups, and a CPU,
which mostly runs them one after the other, often ends with the 0.
"""

import numpy as np
import torch

from kernelfuzz.kernels.xpu.opencl import Library, LocalMemory

SMALL_BATCH = "vllm::moe::moe_lora_align_block_size_small_batch_expert_kernel"
ALIGN = "vllm::moe::moe_lora_align_block_size_kernel"
COUNT_AND_SORT = "vllm::moe::lora_count_and_sort_expert_tokens_kernel"

_TYPES = {
    torch.int64: "long",
    torch.int32: "int",
    torch.int16: "short",
    torch.int8: "signed char",
    torch.uint8: "unsigned char",
}
_FILL_ITEMS = 256
_WARP = 32
_ALIGN_ITEMS = 1024
_SORT_ITEMS = 256
_MAX_SORT_GROUPS = 65535
_INT32_BYTES = 4
# What scratch memory starts with where the host code leaves it as it is: reading it unwritten must not look right.
_SCRATCH = -0x5A5A5A5B
# A SYCL local accessor reaches a kernel as its memory and the id where it begins.
_ACCESSOR_OFFSET = np.uint64(0)


def moe_lora_align_block_size(
    library: Library,
    topk_ids: torch.Tensor,
    token_lora_mapping: torch.Tensor,
    num_experts: int,
    block_size: int,
    max_loras: int,
    max_num_tokens_padded: int,
    max_num_m_blocks: int,
    sorted_token_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
    adapter_enabled: torch.Tensor,
    lora_ids: torch.Tensor,
    expert_map: torch.Tensor | None = None,
) -> None:
    """Group each active adapter's tokens by expert, every group padded to whole blocks; writes the three outputs.

    `topk_ids` [T, k] of any integer dtype up to int64; all other tensors int32: `token_lora_mapping` [T],
    `sorted_token_ids` [L * P], `expert_ids` [L * Mb], `num_tokens_post_pad` [L], `adapter_enabled` and `lora_ids`
    [L + 1 or more], `expert_map` [E], where L, P, Mb, E are `max_loras`, `max_num_tokens_padded`, `max_num_m_blocks`
    and `num_experts`. One kernel runs for fewer than 1024 ids and at most 64 experts, else two. Neither shapes nor
    contiguity nor indices are checked, as the host code does not. Raises RuntimeError (NotImplementedError for the
    dtype of `topk_ids`) for what the host code refuses, and NotImplementedError for ``k == 0``, where the kernels
    divide by zero.
    """
    top_k = topk_ids.size(1)
    if block_size <= 0:
        raise RuntimeError("block_size should be greater than 0. ")
    if _round_up(num_experts, _WARP) >= 1024:
        raise RuntimeError("padded_num_experts must be less than 1024")
    if topk_ids.dtype not in _TYPES:
        raise NotImplementedError(f'"moe_lora_align_sum_kernel" not implemented for {str(topk_ids.dtype)!r}')
    for tensor in (token_lora_mapping, sorted_token_ids, expert_ids, num_tokens_post_pad, adapter_enabled, lora_ids):
        _check_int32(tensor)
    if expert_map is not None:
        _check_int32(expert_map)
    if top_k == 0:
        raise NotImplementedError("moe_lora_align with top_k == 0 divides by zero, which ends the process on a CPU")

    token_mask = torch.full((max_loras * topk_ids.size(0),), _SCRATCH, dtype=torch.int32)
    problem = (
        topk_ids,
        token_lora_mapping,
        np.int64(block_size),
        expert_map,
        _int32(num_experts),
        _int32(max_loras),
        np.uint64(topk_ids.numel()),
        _int32(max_num_tokens_padded),
        _int32(max_num_m_blocks),
        sorted_token_ids,
        expert_ids,
        np.int32(top_k),
        num_tokens_post_pad,
        adapter_enabled,
    )
    has_map = np.uint8(expert_map is not None)
    scalar = _TYPES[topk_ids.dtype]

    if topk_ids.numel() < 1024 and num_experts <= 64:
        counters = max(num_experts, 128)
        shared = ((counters + 1) * num_experts + num_experts + 1) * _INT32_BYTES
        items = counters + _FILL_ITEMS
        library.entry(SMALL_BATCH, scalar, _FILL_ITEMS).launch(
            ((max_loras + 1) * items,),
            (items,),
            (*problem, lora_ids, token_mask, has_map, LocalMemory(shared), _ACCESSOR_OFFSET),
        )
        return

    padded_experts = _round_up(num_experts, _WARP)
    cumsum = torch.zeros(max_loras * (num_experts + 1), dtype=torch.int32)
    shared = (_ALIGN_ITEMS + padded_experts) * _INT32_BYTES
    library.entry(ALIGN, scalar).launch(
        ((max_loras + 1) * 2 * _ALIGN_ITEMS,),
        (_ALIGN_ITEMS,),
        (
            *problem,
            cumsum,
            np.int32(_WARP),
            np.int32(padded_experts),
            lora_ids,
            token_mask,
            has_map,
            LocalMemory(shared),
            _ACCESSOR_OFFSET,
        ),
    )
    groups = min(-(-topk_ids.numel() // _SORT_ITEMS), _MAX_SORT_GROUPS)
    if groups:
        library.entry(COUNT_AND_SORT, scalar).launch(
            ((max_loras + 1) * _SORT_ITEMS, groups),
            (_SORT_ITEMS, 1),
            (
                topk_ids,
                sorted_token_ids,
                cumsum,
                expert_map,
                np.uint64(topk_ids.numel()),
                _int32(num_experts),
                _int32(max_num_tokens_padded),
                np.int32(top_k),
                token_mask,
                _int32(max_loras),
                adapter_enabled,
                lora_ids,
                has_map,
            ),
        )


def _check_int32(tensor: torch.Tensor) -> None:
    if tensor.dtype != torch.int32:
        raise RuntimeError(f"expected scalar type Int but found {str(tensor.dtype).removeprefix('torch.')}")


def _int32(value: int) -> np.int32:
    """The low 32 bits, as the conversion of a C++ int64 keeps them."""
    wrapped: np.int32 = np.int32((value + 2**31) % 2**32 - 2**31)
    return wrapped


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
