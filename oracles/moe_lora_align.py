"""The oracle of `moe_lora_align`: exact integers; inside one expert's group of sorted token ids the order is free."""

import torch

from kernelfuzz.oracles.expectation import (
    Axes,
    Clause,
    Expectation,
    ExpectedError,
    ExpectedOutput,
    OutputSpec,
    OutputSpecs,
)
from kernelfuzz.strategies.alignment import align_rows
from kernelfuzz.strategies.moe_lora_align import MAX_EXPERTS, Case, Inputs, stack_layout

CLAUSES = (
    Clause("active_adapter_row", "write"),
    Clause("inactive_adapter_row", "keep"),
    Clause("disabled_adapter_row", "keep"),
)
_WRITTEN, _INACTIVE, _DISABLED = range(len(CLAUSES))


def outputs(inputs: Inputs) -> OutputSpecs:
    """Return sorted_token_ids [L * P], expert_ids [L * blocks] and num_tokens_post_pad [L], all int32; of a stack of S
    with a leading dimension of S."""
    case = inputs.case

    def spec(width: int, column: str, block: int | None = None) -> OutputSpec:
        length = case.num_adapters * width
        axes = Axes("adapter row", column, width, block)
        return OutputSpec((*_stacked(inputs), length), torch.int32, stack_layout(length), axes=axes)

    return {
        "sorted_token_ids": spec(case.capacity, "token slot, block by block", max(case.block_size, 1)),
        "expert_ids": spec(case.max_blocks, "block"),
        "num_tokens_post_pad": spec(1, "total"),
    }


def expect(inputs: Inputs, initial: dict[str, torch.Tensor]) -> Expectation:
    """Return what the outputs must hold, those of a stack at once. Nothing waits for the device."""
    del initial  # nothing is read before it is written
    case = inputs.case
    if case.block_size <= 0:
        return Expectation(error=ExpectedError("block_size_is_positive", "block_size should be greater than 0"))
    if case.num_experts > MAX_EXPERTS:
        return Expectation(error=ExpectedError("at_most_992_experts", "padded_num_experts must be less than 1024"))
    stacked = _stacked(inputs)
    pair_adapters = inputs.token_adapters[:, None].expand(-1, case.top_k).flatten()
    aligned = align_rows(
        _local_ids(inputs), pair_adapters, case.num_adapters, case.num_experts, case.block_size, case.capacity
    )
    clauses = torch.tensor([_clause(case, adapter) for adapter in range(case.num_adapters)], dtype=torch.uint8)
    clauses = clauses.to(aligned.tokens.device, non_blocking=True)[:, None]

    def expected(values: torch.Tensor, groups: torch.Tensor | None = None) -> ExpectedOutput:
        """From values [S, L, width]; those of rows that are kept mean nothing."""
        return ExpectedOutput(
            CLAUSES,
            clauses.expand(values.shape).reshape(*stacked, -1),
            values.reshape(*stacked, -1),
            groups=None if groups is None else groups.reshape(*stacked, -1),
        )

    return Expectation(
        {
            "sorted_token_ids": expected(aligned.tokens, aligned.groups),
            "expert_ids": expected(aligned.experts),
            "num_tokens_post_pad": expected(aligned.totals[:, :, None]),
        }
    )


def _stacked(inputs: Inputs) -> torch.Size:
    """Return the leading dimensions of what depends on the seed: [S] for a stack, none for one case."""
    return inputs.topk_ids.shape[:-2]


def _clause(case: Case, adapter: int) -> int:
    """Return the clause that an adapter's rows fall under."""
    if adapter not in case.batch.active():
        return _INACTIVE
    return _DISABLED if adapter in case.disabled else _WRITTEN


def _local_ids(inputs: Inputs) -> torch.Tensor:
    """Return the expert of each pair after the expert map, int64 [S, pairs]; out of range where it is invalid or lives
    elsewhere."""
    case = inputs.case
    ids = inputs.topk_ids.reshape(_stacked(inputs).numel(), case.pairs).long()
    if inputs.expert_map is None:
        return ids
    valid = (ids >= 0) & (ids < case.num_experts)
    mapping = inputs.expert_map.reshape(-1, case.num_experts).long()
    return torch.where(valid, mapping.gather(1, ids.clamp(0, case.num_experts - 1)), -1)
