"""The oracle of `moe_lora_align`: exact integers; inside one expert's group of sorted token ids the order is free."""

import torch

from kernelfuzz.oracles.expectation import (
    Clause,
    Expectation,
    ExpectedError,
    ExpectedOutput,
    OutputSpec,
    OutputSpecs,
)
from kernelfuzz.strategies.alignment import align_row
from kernelfuzz.strategies.moe_lora_align import MAX_EXPERTS, Inputs

CLAUSES = (
    Clause("active_adapter_row", "write"),
    Clause("inactive_adapter_row", "keep"),
    Clause("disabled_adapter_row", "keep"),
)
_WRITTEN, _INACTIVE, _DISABLED = range(len(CLAUSES))


def outputs(inputs: Inputs) -> OutputSpecs:
    """Return sorted_token_ids [L * P], expert_ids [L * blocks] and num_tokens_post_pad [L], all int32."""
    case = inputs.case
    return {
        "sorted_token_ids": OutputSpec((case.num_adapters * case.capacity,), torch.int32),
        "expert_ids": OutputSpec((case.num_adapters * case.max_blocks,), torch.int32),
        "num_tokens_post_pad": OutputSpec((case.num_adapters,), torch.int32),
    }


def expect(inputs: Inputs, initial: dict[str, torch.Tensor]) -> Expectation:
    """Return what the outputs must hold."""
    del initial  # nothing is read before it is written
    case = inputs.case
    if case.block_size <= 0:
        return Expectation(error=ExpectedError("block_size_is_positive", "block_size should be greater than 0"))
    if case.num_experts > MAX_EXPERTS:
        return Expectation(error=ExpectedError("at_most_992_experts", "padded_num_experts must be less than 1024"))
    device = inputs.topk_ids.device
    shape = (case.num_adapters, case.capacity)
    rows = torch.full((case.num_adapters, 1), _INACTIVE, dtype=torch.uint8, device=device)
    tokens = torch.full(shape, case.pairs, dtype=torch.int64, device=device)
    # One group for each expert of each row, and one for the row's unused tail.
    groups = torch.full(shape, case.num_experts, dtype=torch.int64, device=device)
    experts = torch.full((case.num_adapters, case.max_blocks), -1, dtype=torch.int64, device=device)
    totals = torch.zeros(case.num_adapters, dtype=torch.int64, device=device)

    pair_adapters = inputs.token_adapters.long().repeat_interleave(case.top_k)
    expert_ids = _local_ids(inputs)
    for adapter in set(inputs.lora_ids[: case.num_adapters + 1].tolist()) & set(range(case.num_adapters)):
        if adapter in case.disabled:
            rows[adapter] = _DISABLED
            continue
        row = align_row(expert_ids, pair_adapters == adapter, case.num_experts, case.block_size)
        rows[adapter] = _WRITTEN
        tokens[adapter, : row.padded_total] = row.tokens
        groups[adapter, : row.padded_total] = row.experts.repeat_interleave(case.block_size)
        experts[adapter, : row.experts.numel()] = row.experts
        totals[adapter] = row.padded_total
    groups += torch.arange(case.num_adapters, device=device)[:, None] * (case.num_experts + 1)

    def region(width: int) -> torch.Tensor:
        return rows.expand(-1, width).flatten()

    return Expectation(
        {
            "sorted_token_ids": ExpectedOutput(
                CLAUSES, region(case.capacity), tokens.flatten(), groups=groups.flatten()
            ),
            "expert_ids": ExpectedOutput(CLAUSES, region(case.max_blocks), experts.flatten()),
            "num_tokens_post_pad": ExpectedOutput(CLAUSES, region(1), totals),
        }
    )


def _local_ids(inputs: Inputs) -> torch.Tensor:
    """Return the expert of each pair after the expert map, int64; -1 where it is invalid or lives elsewhere."""
    ids = inputs.topk_ids.long().flatten()
    valid = (ids >= 0) & (ids < inputs.case.num_experts)
    if inputs.expert_map is None:
        return torch.where(valid, ids, -1)
    return torch.where(valid, inputs.expert_map.long()[ids.clamp(0, inputs.case.num_experts - 1)], -1)
