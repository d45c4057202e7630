"""The block alignment of routed tokens per adapter, in pure torch.

It is what `moe_lora_align_block_size` must produce and what `fused_moe_lora` takes as input, so strategies and oracles
share it.
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AlignedRows:
    """Token indices grouped by expert and padded: L rows for each of S routings of the same tokens, all int64.

    - tokens: [S, L, capacity], flat indices (token * top_k + choice), ascending in a group; padding and what follows
      the last group hold the number of pairs
    - groups: [S, L, capacity], the group that an entry belongs to; what follows a row's last group is one too, and all
      rows' groups differ
    - experts: [S, L, ceil(capacity / block size)], the expert of each block, -1 after the last
    - totals: [S, L], number of entries in groups, a multiple of the block size
    """

    tokens: torch.Tensor
    groups: torch.Tensor
    experts: torch.Tensor
    totals: torch.Tensor


def align_rows(
    expert_ids: torch.Tensor, rows: torch.Tensor, num_rows: int, num_experts: int, block_size: int, capacity: int
) -> AlignedRows:
    """Group each row's pairs by expert, ascending, each group padded to a multiple of `block_size`.

    expert_ids: int64 [S, pairs], ids outside [0, num_experts) are dropped; rows: integers [pairs], the row that a pair
    belongs to, those outside [0, num_rows) to none. `capacity` must suffice for every row, as `padded_capacity` does.
    Nothing waits for the device, and the number of operations is the same for all sizes.
    """
    device = expert_ids.device
    seeds, pairs = expert_ids.shape
    count = seeds * num_rows
    width = num_experts + 1  # groups of a row: one for each expert and, for what follows them, one without pairs

    kept = (expert_ids >= 0) & (expert_ids < num_experts) & (rows >= 0) & (rows < num_rows)
    owners = (torch.arange(seeds, device=device)[:, None] * num_rows + rows) * width + expert_ids
    grouped, order = torch.where(kept, owners, count * width).flatten().sort(stable=True)
    first = torch.searchsorted(grouped, torch.arange(count * width + 1, device=device))
    blocks = (first.diff().view(count, width) + block_size - 1) // block_size
    ends = blocks.cumsum(1)

    numbers = torch.arange(-(-capacity // block_size), device=device).expand(count, -1).contiguous()
    experts = torch.searchsorted(ends, numbers, right=True).clamp_max_(num_experts)
    row_numbers = torch.arange(count, device=device)[:, None]
    groups = (experts + row_numbers * width)[:, :, None].expand(-1, -1, block_size).flatten(1)[:, :capacity]

    # Dropped pairs are sorted last and share one place, after all rows.
    starts = ((ends - blocks) * block_size + row_numbers * capacity).flatten()
    starts = torch.cat([starts, starts.new_full((1,), count * capacity)])
    places = (starts - first).take(grouped) + torch.arange(seeds * pairs, device=device)
    tokens = torch.full((count * capacity + 1,), pairs, dtype=torch.int64, device=device)
    tokens[places.clamp_max_(count * capacity)] = order % max(pairs, 1)
    return AlignedRows(
        tokens[:-1].view(seeds, num_rows, -1),
        groups.view(seeds, num_rows, -1),
        torch.where(experts < num_experts, experts, -1).view(seeds, num_rows, -1),
        (ends[:, -1] * block_size).view(seeds, num_rows),
    )


def padded_capacity(pairs: int, num_experts: int, block_size: int, *, rounded: bool) -> int:
    """Return the length of a row of sorted token ids that vLLM allocates for `pairs` routed pairs.

    pairs + num_experts * (block_size - 1), rounded up to whole blocks or not; a block for each pair where pairs are
    fewer than experts.
    """
    if pairs < num_experts:
        return pairs * block_size
    capacity = pairs + num_experts * (block_size - 1)
    return math.ceil(capacity / block_size) * block_size if rounded else capacity
