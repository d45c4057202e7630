"""The block alignment of routed tokens per adapter, in pure torch.

It is what `moe_lora_align_block_size` must produce and what `fused_moe_lora` takes as input, so strategies and oracles
share it.
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AlignedRow:
    """One adapter's row: token indices grouped by expert and padded, the expert of each block, and the padded total.

    - tokens: int64 [padded total], flat indices (token * top_k + choice); padding holds the number of pairs
    - experts: int64 [padded total / block size]
    """

    tokens: torch.Tensor
    experts: torch.Tensor

    @property
    def padded_total(self) -> int:
        """Number of entries in use, a multiple of the block size."""
        return self.tokens.numel()


def align_row(expert_ids: torch.Tensor, chosen: torch.Tensor, num_experts: int, block_size: int) -> AlignedRow:
    """Group the chosen pairs by expert, ascending, each group padded to a multiple of `block_size`.

    expert_ids: int64 [pairs], ids outside [0, num_experts) are dropped; chosen: bool [pairs].
    """
    pairs = expert_ids.numel()
    kept = chosen & (expert_ids >= 0) & (expert_ids < num_experts)
    indices = kept.nonzero().flatten()
    experts = expert_ids[indices]
    order = torch.argsort(experts, stable=True)
    indices, experts = indices[order], experts[order]
    counts = torch.bincount(experts, minlength=num_experts)
    blocks = (counts + block_size - 1) // block_size
    starts = (blocks.cumsum(0) - blocks) * block_size
    within = torch.arange(indices.numel(), device=indices.device) - (counts.cumsum(0) - counts)[experts]
    tokens = torch.full((int(blocks.sum()) * block_size,), pairs, dtype=torch.int64, device=indices.device)
    tokens[starts[experts] + within] = indices
    return AlignedRow(tokens, torch.repeat_interleave(torch.arange(num_experts, device=indices.device), blocks))


def padded_capacity(pairs: int, num_experts: int, block_size: int, *, rounded: bool) -> int:
    """Return the length of a row of sorted token ids that vLLM allocates for `pairs` routed pairs.

    pairs + num_experts * (block_size - 1), rounded up to whole blocks or not; a block for each pair where pairs are
    fewer than experts.
    """
    if pairs < num_experts:
        return pairs * block_size
    capacity = pairs + num_experts * (block_size - 1)
    return math.ceil(capacity / block_size) * block_size if rounded else capacity
