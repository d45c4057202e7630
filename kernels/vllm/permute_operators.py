"""Stand-ins, on CPU tensors, for the compiled operators below vLLM's moe_permute and moe_unpermute.

They have the schemas that the wheels of 0.20 to 0.33 register, and let vLLM's Python half run where there is no NVIDIA
GPU: its scratch, its checks and its handling of devices.
"""

import functools

import torch

_SHARED = (
    "Tensor input, Tensor topk_ids, Tensor token_expert_indices, Tensor? expert_map, int n_expert, int n_local_expert,"
    " int topk, Tensor! permuted_input, Tensor! expert_first_token_offset, Tensor! inv_permuted_idx,"
    " Tensor! permuted_idx"
)
_SCRATCH = "Tensor! sort_workspace, Tensor! permuted_experts_id, Tensor! sorted_row_idx, Tensor! topk_ids_for_sort"


@functools.cache
def register() -> torch.library.Library:
    """Register the operators in `torch.ops._moe_C`, once a process; they last as long as what is returned."""
    library = torch.library.Library("_moe_C", "FRAGMENT")  # type: ignore[no-untyped-call]
    operators = {
        f"moe_permute({_SHARED}) -> ()": moe_permute,
        f"moe_permute_with_scratch({_SHARED}, {_SCRATCH}) -> ()": moe_permute_with_scratch,
        "moe_permute_sort_workspace_size(int num_expanded_rows, int n_expert) -> int": _workspace_size,
        "moe_unpermute(Tensor permuted_hidden_states, Tensor topk_weights, Tensor inv_permuted_idx,"
        " Tensor? expert_first_token_offset, int topk, Tensor! hidden_states) -> ()": moe_unpermute,
    }
    for schema, function in operators.items():
        name = schema.partition("(")[0]
        if not hasattr(torch.ops._moe_C, name):  # an installed vLLM may have defined it
            library.define(schema)  # type: ignore[no-untyped-call]
        # The size is asked for without a tensor that could say the device.
        key = "CompositeExplicitAutograd" if function is _workspace_size else "CPU"
        library.impl(name, function, key)  # type: ignore[no-untyped-call]
    return library


def _workspace_size(num_expanded_rows: int, n_expert: int) -> int:
    del n_expert
    return 16 * num_expanded_rows + 1


def moe_permute(
    input: torch.Tensor,
    topk_ids: torch.Tensor,
    token_expert_indices: torch.Tensor,
    expert_map: torch.Tensor | None,
    n_expert: int,
    n_local_expert: int,
    topk: int,
    permuted_input: torch.Tensor,
    expert_first_token_offset: torch.Tensor,
    inv_permuted_idx: torch.Tensor,
    permuted_idx: torch.Tensor,
) -> None:
    """Group the rows of `input` [tokens, hidden] by the local expert of each of their `topk` choices.

    Choices without an expert here go last; their rows are not written. Raises RuntimeError for dtypes and shapes that
    the compiled operator refuses.
    """
    for name, tensor, dtype in (
        ("expert_first_token_offset", expert_first_token_offset, torch.int64),
        ("topk_ids", topk_ids, torch.int32),
        ("token_expert_indices", token_expert_indices, torch.int32),
        ("inv_permuted_idx", inv_permuted_idx, torch.int32),
    ):
        if tensor.dtype != dtype:
            raise RuntimeError(f"{name} must be {dtype}")
    if expert_first_token_offset.shape[0] != n_local_expert + 1:
        raise RuntimeError("expert_first_token_offset shape != n_local_expert+1")
    if inv_permuted_idx.shape != token_expert_indices.shape:
        raise RuntimeError("token_expert_indices shape must be same as inv_permuted_idx")
    ids = topk_ids.flatten().long()
    known = (ids >= 0) & (ids < n_expert)
    local = ids if expert_map is None else expert_map.long()[ids.where(known, 0)]
    local = local.where(known & (local >= 0), n_local_expert)
    keys, order = local.sort(stable=True)
    expert_first_token_offset.copy_(torch.searchsorted(keys, torch.arange(n_local_expert + 1)))
    rows = token_expert_indices.flatten()[order].long()
    inv_permuted_idx.view(-1)[rows] = torch.arange(rows.numel(), dtype=torch.int32)
    valid = int(expert_first_token_offset[-1])
    permuted_idx[:valid] = rows[:valid].int()
    # Float8 cannot be indexed.
    permuted_input.view(torch.uint8)[:valid] = input.view(torch.uint8)[rows[:valid] // topk]


def moe_permute_with_scratch(
    input: torch.Tensor,
    topk_ids: torch.Tensor,
    token_expert_indices: torch.Tensor,
    expert_map: torch.Tensor | None,
    n_expert: int,
    n_local_expert: int,
    topk: int,
    permuted_input: torch.Tensor,
    expert_first_token_offset: torch.Tensor,
    inv_permuted_idx: torch.Tensor,
    permuted_idx: torch.Tensor,
    sort_workspace: torch.Tensor,
    permuted_experts_id: torch.Tensor,
    sorted_row_idx: torch.Tensor,
    topk_ids_for_sort: torch.Tensor,
) -> None:
    """`moe_permute` in the caller's buffers, which are used up. Raises RuntimeError for one that is too small."""
    needed = topk_ids.numel()
    if sort_workspace.numel() < _workspace_size(needed, n_expert):
        raise RuntimeError("sort_workspace is too small for the requested shape")
    for name, buffer in (
        ("permuted_experts_id", permuted_experts_id),
        ("sorted_row_idx", sorted_row_idx),
        ("topk_ids_for_sort", topk_ids_for_sort),
    ):
        if buffer.dtype != torch.int32:
            raise RuntimeError(f"{name} has incorrect dtype")
        if buffer.numel() < needed:
            raise RuntimeError(f"{name} is too small for the requested shape")
    moe_permute(
        input,
        topk_ids,
        token_expert_indices,
        expert_map,
        n_expert,
        n_local_expert,
        topk,
        permuted_input,
        expert_first_token_offset,
        inv_permuted_idx,
        permuted_idx,
    )
    for buffer in (sort_workspace, permuted_experts_id, sorted_row_idx, topk_ids_for_sort):
        buffer.fill_(-1)


def moe_unpermute(
    permuted_hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    inv_permuted_idx: torch.Tensor,
    expert_first_token_offset: torch.Tensor | None,
    topk: int,
    hidden_states: torch.Tensor,
) -> None:
    """hidden_states[t] = the sum over a token's choices of weight times row, in float32, without the rows that lie
    beyond the last offset. Raises RuntimeError where the two dtypes differ."""
    if permuted_hidden_states.dtype != hidden_states.dtype:
        raise RuntimeError("permuted_hidden_states dtype must be same as hidden_states")
    places = inv_permuted_idx.view(-1, topk).long()
    valid = places.numel() if expert_first_token_offset is None else int(expert_first_token_offset[-1])
    total = torch.zeros(hidden_states.shape, dtype=torch.float32)
    for choice in range(topk):
        here = (places[:, choice] < valid)[:, None]
        rows = permuted_hidden_states[places[:, choice]].float() * topk_weights[:, choice, None]
        total += torch.where(here, rows, 0.0)
    hidden_states.copy_(total)
