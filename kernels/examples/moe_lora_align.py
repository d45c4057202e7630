# mypy: disallow-untyped-decorators=False
"""An example of `moe_lora_align`: two Triton kernels.

One program of the first handles one entry of `lora_ids`: it counts the adapter's pairs for each expert, decides where
each expert's group starts, and fills the adapter's rows with padding. The second puts the pairs into their groups.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from kernelfuzz.kernels import examples, interpreter
from kernelfuzz.kernels.base import Kernel
from kernelfuzz.strategies.moe_lora_align import Inputs

BUGS = ("last_adapter_unwritten", "disabled_adapter_touched", "adapter_out_of_range")
"""What vLLM 0.21.0 and older did wrong (pull request 40131), one by one:

- last_adapter_unwritten: the grid covers as many entries of `lora_ids` as there are adapters, although the base model
  may be one entry more
- disabled_adapter_touched: the second kernel does not ask whether the adapter is enabled
- adapter_out_of_range: no kernel asks whether there are rows for the adapter
"""

BLOCK = 2048
WARP = 32
# Not specialised: a kernel compiled for each class of sizes would be compiled for nearly every case.
SIZES = ("num_pairs", "num_experts", "num_adapters", "top_k", "block_size", "capacity", "max_blocks")


@triton.jit
def _has_rows(
    adapter: tl.tensor,
    num_adapters: tl.tensor,
    adapter_enabled: tl.tensor,
    CHECK_RANGE: tl.constexpr,
    CHECK_ENABLED: tl.constexpr,
) -> tl.tensor:
    """Whether the adapter's rows are to be written."""
    has_rows = adapter >= 0
    if CHECK_RANGE:
        has_rows = has_rows & (adapter < num_adapters)
    if CHECK_ENABLED:
        has_rows = has_rows & (tl.load(adapter_enabled + adapter, mask=has_rows, other=0) != 0)
    return has_rows


@triton.jit
def _load_pairs(
    start: tl.tensor,
    adapter: tl.tensor,
    topk_ids: tl.tensor,
    token_adapters: tl.tensor,
    expert_map: tl.tensor,
    num_pairs: tl.tensor,
    num_experts: tl.tensor,
    top_k: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """A block of pairs from `start` on: their indices, their local experts, and which of them the adapter has here."""
    pairs = start + tl.arange(0, BLOCK)
    valid = pairs < num_pairs
    valid = valid & (tl.load(token_adapters + pairs // top_k, mask=valid, other=-1) == adapter)
    experts = tl.load(topk_ids + pairs, mask=valid, other=-1)
    valid = valid & (experts >= 0) & (experts < num_experts)
    if expert_map is not None:
        experts = tl.load(expert_map + experts, mask=valid, other=-1)
        valid = valid & (experts >= 0)
    return pairs, experts.to(tl.int32), valid


@triton.jit
def _fill(row: tl.tensor, length: tl.tensor, value: tl.tensor, BLOCK: tl.constexpr) -> None:
    for start in range(0, length, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        tl.store(row + columns, tl.full((BLOCK,), value, tl.int32), mask=columns < length)


@triton.jit(do_not_specialize=SIZES)
def _lay_out(
    topk_ids: tl.tensor,
    token_adapters: tl.tensor,
    lora_ids: tl.tensor,
    adapter_enabled: tl.tensor,
    expert_map: tl.tensor,
    sorted_token_ids: tl.tensor,
    expert_ids: tl.tensor,
    num_tokens_post_pad: tl.tensor,
    group_starts: tl.tensor,
    num_pairs: tl.tensor,
    num_experts: tl.tensor,
    num_adapters: tl.tensor,
    top_k: tl.tensor,
    block_size: tl.tensor,
    capacity: tl.tensor,
    max_blocks: tl.tensor,
    CHECK_RANGE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Grid (entries of lora_ids). Write num_tokens_post_pad and group_starts, and pad the adapter's other rows."""
    adapter = tl.load(lora_ids + tl.program_id(0))
    if not _has_rows(adapter, num_adapters, adapter_enabled, CHECK_RANGE, True):
        return
    counts = tl.zeros((BLOCK_E,), tl.int32)
    for start in range(0, num_pairs, BLOCK):
        _, experts, valid = _load_pairs(
            start, adapter, topk_ids, token_adapters, expert_map, num_pairs, num_experts, top_k, BLOCK
        )
        counts += tl.histogram(experts, BLOCK_E, mask=valid)
    padded = (counts + block_size - 1) // block_size * block_size
    ends = tl.cumsum(padded, 0)
    all_experts = tl.arange(0, BLOCK_E)

    tl.store(num_tokens_post_pad + adapter, tl.sum(padded, 0))
    _fill(sorted_token_ids + adapter * capacity, capacity, num_pairs, BLOCK)
    _fill(expert_ids + adapter * max_blocks, max_blocks, -1, BLOCK)
    tl.store(group_starts + adapter * num_experts + all_experts, ends - padded, mask=all_experts < num_experts)


@triton.jit(do_not_specialize=SIZES)
def _sort(
    topk_ids: tl.tensor,
    token_adapters: tl.tensor,
    lora_ids: tl.tensor,
    adapter_enabled: tl.tensor,
    expert_map: tl.tensor,
    sorted_token_ids: tl.tensor,
    expert_ids: tl.tensor,
    group_starts: tl.tensor,
    num_pairs: tl.tensor,
    num_experts: tl.tensor,
    num_adapters: tl.tensor,
    top_k: tl.tensor,
    block_size: tl.tensor,
    capacity: tl.tensor,
    max_blocks: tl.tensor,
    CHECK_RANGE: tl.constexpr,
    CHECK_ENABLED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Grid (entries of lora_ids, blocks of pairs). Put each pair into the next free place of its expert's group."""
    adapter = tl.load(lora_ids + tl.program_id(0))
    if not _has_rows(adapter, num_adapters, adapter_enabled, CHECK_RANGE, CHECK_ENABLED):
        return
    pairs, experts, valid = _load_pairs(
        tl.program_id(1) * BLOCK,
        adapter,
        topk_ids,
        token_adapters,
        expert_map,
        num_pairs,
        num_experts,
        top_k,
        BLOCK,
    )
    places = tl.atomic_add(group_starts + adapter * num_experts + experts, 1, mask=valid)
    tl.store(sorted_token_ids + adapter * capacity + places, pairs, mask=valid)
    # Every block that is in use holds a pair, and all pairs in a block agree on its expert.
    tl.store(expert_ids + adapter * max_blocks + places // block_size, experts, mask=valid)


def load(bug: str | None, device: torch.device) -> Kernel:
    """Return the example, right where `bug` is None, else with that one of `BUGS`.

    On a CPU the process must have been started with TRITON_INTERPRET=1. Raises KernelfuzzError for an unknown bug.
    """
    version = examples.version(bug, BUGS)
    if device.type == "cpu":
        interpreter.install()

    def launch(inputs: Inputs, outputs: Mapping[str, torch.Tensor]) -> None:
        moe_lora_align_block_size(inputs, outputs, bug)

    return Kernel(launch, version)


def moe_lora_align_block_size(inputs: Inputs, outputs: Mapping[str, torch.Tensor], bug: str | None) -> None:
    """Write the three outputs. Raises RuntimeError for what the contract refuses."""
    case = inputs.case
    if case.block_size <= 0:
        raise RuntimeError("block_size should be greater than 0.")
    if triton.cdiv(case.num_experts, WARP) * WARP >= 1024:
        raise RuntimeError("padded_num_experts must be less than 1024")
    tensors = (inputs.topk_ids, inputs.token_adapters, inputs.lora_ids, inputs.adapter_enabled, inputs.expert_map)
    sizes = (
        case.pairs,
        case.num_experts,
        case.num_adapters,
        case.top_k,
        case.block_size,
        case.capacity,
        case.max_blocks,
    )
    entries = case.num_adapters + (bug != "last_adapter_unwritten")
    check_range = bug != "adapter_out_of_range"
    group_starts = inputs.topk_ids.new_zeros((case.num_adapters, case.num_experts), dtype=torch.int32)
    _lay_out[(entries,)](
        *tensors,
        outputs["sorted_token_ids"],
        outputs["expert_ids"],
        outputs["num_tokens_post_pad"],
        group_starts,
        *sizes,
        CHECK_RANGE=check_range,
        BLOCK_E=max(triton.next_power_of_2(case.num_experts), WARP),
        BLOCK=BLOCK,
    )
    _sort[(entries, triton.cdiv(case.pairs, BLOCK))](
        *tensors,
        outputs["sorted_token_ids"],
        outputs["expert_ids"],
        group_starts,
        *sizes,
        CHECK_RANGE=check_range,
        CHECK_ENABLED=bug != "disabled_adapter_touched",
        BLOCK=BLOCK,
    )
