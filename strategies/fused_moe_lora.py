"""Cases for `fused_moe_lora`: the LoRA part of a mixture-of-experts layer, added to or written over its output.

output[t, j, slice s] (+)= w[t, j]? * B[s][l, e] (A[s][l, e] x[t]) for adapter l of token t and expert e of its choice
j.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from hypothesis import strategies as st

from kernelfuzz.strategies import contents
from kernelfuzz.strategies.adapters import disabled_adapters, enabled_mask, lora_ids, ranks
from kernelfuzz.strategies.alignment import align_row, padded_capacity
from kernelfuzz.strategies.batches import BATCH_REGIMES, Batch, batch_regimes, batches
from kernelfuzz.strategies.case import Case as BaseCase
from kernelfuzz.strategies.dtypes import DTYPES, Dtype
from kernelfuzz.strategies.layouts import CONTIGUOUS, Allocate, Layout, layouts, plain_allocator
from kernelfuzz.strategies.routing import InvalidIds, Routing, routings
from kernelfuzz.strategies.sizes import sizes

SMALL_BATCH_MAX_RANK = 64
SMALL_BATCH_MAX_WORK = 1024
ONE_SHOT_MAX_RANK = 128


@dataclass(frozen=True)
class Tiles:
    """Block sizes that the host code hands to the shrink or the expand kernel of the two-kernel path."""

    block_n: int
    block_k: int
    group_m: int
    split_k: int


@dataclass(frozen=True)
class Case(BaseCase):
    """One launch of `fused_moe_lora`."""

    target: ClassVar[str] = "fused_moe_lora"

    batch: Batch
    num_adapters: int
    disabled: tuple[int, ...]
    num_experts: int
    top_k: int
    routing: Routing
    hidden: int
    rank: int
    columns: int
    slices: int
    dtype: Dtype
    contents: contents.Style
    aligned: bool  # sorted_token_ids from the alignment kernel, or None and one block a pair
    block_size: int
    fully_sharded: bool
    mul_routed_weight: bool
    add_inputs: bool
    descending_ids: bool
    visit_all: bool  # num_active_loras counts every entry of lora_ids, or the active ones only
    column_offset: int  # fully sharded only: where this rank's columns start in the output
    compute_units: int
    shrink: Tiles
    expand: Tiles
    input_layout: Layout
    output_gap: int

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.batch.num_tokens

    @property
    def path(self) -> str:
        """The path that the newest release takes: small_batch, one_shot or two_kernel."""
        if self.fully_sharded or self.rank > ONE_SHOT_MAX_RANK:
            return "two_kernel"
        work = self.batch.num_tokens * self.top_k * self.rank
        if not self.aligned and self.rank <= SMALL_BATCH_MAX_RANK and work <= SMALL_BATCH_MAX_WORK:
            return "small_batch"
        return "one_shot"


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    dtype: tuple[Dtype, ...] = DTYPES,
    style: tuple[contents.Style, ...] = contents.STYLES,
    invalid_ids: tuple[InvalidIds, ...] = ("none", "minus_one"),
    aligned: tuple[bool, ...] = (False, True),
    block_size: tuple[int, ...] = (16, 32, 64),
    fully_sharded: tuple[bool, ...] = (False, False, True),
    mul_routed_weight: tuple[bool, ...] = (False, True),
    add_inputs: tuple[bool, ...] = (True, False),
    compute_units: tuple[int, ...] = (1, 8, 132),
    input_layout: st.SearchStrategy[Layout] | None = None,
    max_adapters: int = 4,
    max_experts: int = 6,
    max_top_k: int = 3,
    max_slices: int = 2,
    max_rank: int = 144,
    max_hidden: int = 288,
    max_columns: int = 272,
    max_segments: int = 4,
    max_length: int = 8,
) -> Case:
    """Draw a case. The simplest has one token.

    Every argument narrows a dimension: a tuple holds what may be drawn, the simplest first, and max_... is the largest.
    """
    num_adapters = draw(st.integers(1, max_adapters))
    rank = draw(ranks(maximum=max_rank))
    sharded = draw(st.sampled_from(fully_sharded))
    two_kernel = sharded or rank > ONE_SHOT_MAX_RANK
    return Case(
        seed=draw(contents.seeds()),
        batch=draw(batches(num_adapters, max_segments=max_segments, max_length=max_length, beyond=1)),
        num_adapters=num_adapters,
        disabled=draw(disabled_adapters(num_adapters)),
        num_experts=draw(st.integers(1, max_experts)),
        top_k=draw(st.integers(1, max_top_k)),
        routing=draw(routings(invalid=invalid_ids)),
        hidden=draw(sizes(1, max_hidden, around=(64, 128, 256))),
        rank=rank,
        columns=draw(sizes(1, max_columns, around=(64, 128, 256))),
        slices=draw(st.integers(1, max_slices)),
        dtype=draw(st.sampled_from(dtype)),
        contents=draw(contents.styles(*style)),
        aligned=draw(st.sampled_from(aligned)),
        block_size=draw(st.sampled_from(block_size)),
        fully_sharded=sharded,
        mul_routed_weight=draw(st.sampled_from(mul_routed_weight)),
        add_inputs=draw(st.sampled_from(add_inputs)),
        descending_ids=draw(st.booleans()),
        visit_all=draw(st.booleans()),
        column_offset=draw(st.integers(0, 9)) if sharded else 0,
        compute_units=draw(st.sampled_from(compute_units)),
        shrink=draw(_tiles((32, 64), split=two_kernel)),
        expand=draw(_tiles((64, 128), split=False)),
        input_layout=draw(layouts() if input_layout is None else input_layout),
        output_gap=draw(st.integers(0, 5)),
    )


@st.composite
def _tiles(draw: st.DrawFn, widths: tuple[int, ...], *, split: bool) -> Tiles:
    return Tiles(
        block_n=draw(st.sampled_from(widths)),
        block_k=draw(st.sampled_from((32, 64))),
        group_m=draw(st.sampled_from((1, 8))),
        split_k=draw(st.sampled_from((1, 2, 4))) if split else 1,
    )


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case. T tokens, k choices, K hidden, R rank, N columns, S slices, L adapters, E experts.

    - x: [T, K], or [T * k, K] with mul_routed_weight
    - lora_a: S tensors [L, E, R, K]; lora_b: S tensors [L, E, N, R]; NaN where no token needs them
    - topk_weights: float32 [T, k]; topk_ids: int64 [T, k]
    - token_adapters: int32 [T]; lora_ids: int32; adapter_enabled: int32; num_active_loras: int32 [1] on the CPU
    - sorted_token_ids: int32 [L, P] or None; expert_ids: int32 [L, blocks], or the flat [T * k]
    - num_tokens_post_padded: int32 [L] or None; rows of adapters that are not in use are poison
    """

    case: Case
    x: torch.Tensor
    lora_a: list[torch.Tensor]
    lora_b: list[torch.Tensor]
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    token_adapters: torch.Tensor
    lora_ids: torch.Tensor
    adapter_enabled: torch.Tensor
    num_active_loras: torch.Tensor
    sorted_token_ids: torch.Tensor | None
    expert_ids: torch.Tensor
    num_tokens_post_padded: torch.Tensor | None

    def served_pairs(self) -> torch.Tensor:
        """Return which (token, choice) pairs get a LoRA contribution, bool [T, k]."""
        return served_tokens(self.case, self.token_adapters)[:, None] & (self.topk_ids >= 0)


def served_tokens(case: Case, token_adapters: torch.Tensor) -> torch.Tensor:
    """Return which tokens have an adapter that is in range and enabled, bool [T]."""
    adapters = token_adapters.long()
    served = (adapters >= 0) & (adapters < case.num_adapters)
    for adapter in case.disabled:
        served &= adapters != adapter
    return served


def make_inputs(case: Case, device: torch.device | str, allocate: Allocate | None = None) -> Inputs:
    """Make the tensors of a case on `device`, with `allocate` or in plain memory."""
    allocate = allocate or plain_allocator(device)
    dtype = getattr(torch, case.dtype)
    tokens, top_k = case.batch.num_tokens, case.top_k

    def place(name: str, tensor: torch.Tensor, layout: Layout = CONTIGUOUS) -> torch.Tensor:
        return allocate(name, tuple(tensor.shape), tensor.dtype, layout).copy_(tensor)

    def values(name: str, *shape: int, style: contents.Style = case.contents, weights: bool = False) -> torch.Tensor:
        return contents.values(shape, dtype, style, case.seed, name, device, weights=weights)

    token_adapters = case.batch.token_adapters(device)
    topk_ids = case.routing.expert_ids(tokens, top_k, case.num_experts, case.seed, device)
    served = served_tokens(case, token_adapters)[:, None] & (topk_ids >= 0)

    rows_used = served.flatten() if case.mul_routed_weight else served.any(1)
    x = allocate("x", (rows_used.numel(), case.hidden), dtype, case.input_layout)
    x[rows_used] = values("x", rows_used.numel(), case.hidden)[rows_used]

    blocks = torch.unique((token_adapters[:, None] * case.num_experts + topk_ids)[served])
    # The intermediate does not cancel any more: large weights of one sign would take it beyond float16.
    b_style: contents.Style = "signed" if case.contents == "cancelling" else case.contents
    lora_a, lora_b = [], []
    for s in range(case.slices):
        a = allocate(f"lora_a[{s}]", (case.num_adapters, case.num_experts, case.rank, case.hidden), dtype)
        b = allocate(f"lora_b[{s}]", (case.num_adapters, case.num_experts, case.columns, case.rank), dtype)
        a.flatten(0, 1)[blocks] = values(f"a/{s}", blocks.numel(), case.rank, case.hidden, weights=True)
        b.flatten(0, 1)[blocks] = values(f"b/{s}", blocks.numel(), case.columns, case.rank, style=b_style)
        lora_a.append(a)
        lora_b.append(b)

    active = lora_ids(case.num_adapters, case.batch, case.descending_ids)
    visited = active.numel() if case.visit_all else len(case.batch.active())
    sorted_ids, expert_ids, padded_totals = _alignment(case, topk_ids, token_adapters, allocate)
    return Inputs(
        case=case,
        x=x,
        lora_a=lora_a,
        lora_b=lora_b,
        topk_weights=place(
            "topk_weights", contents.routing_weights((tokens, top_k), case.contents, case.seed, "weights", device)
        ),
        topk_ids=topk_ids,
        token_adapters=place("token_lora_mapping", token_adapters.int()),
        lora_ids=place("lora_ids", active),
        adapter_enabled=place("adapter_enabled", enabled_mask(case.num_adapters, case.batch, case.disabled)),
        num_active_loras=torch.tensor([visited], dtype=torch.int32),
        sorted_token_ids=sorted_ids,
        expert_ids=expert_ids,
        num_tokens_post_padded=padded_totals,
    )


def _alignment(
    case: Case, topk_ids: torch.Tensor, token_adapters: torch.Tensor, allocate: Allocate
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """Return sorted_token_ids, expert_ids and num_tokens_post_padded; rows of adapters not in use stay poison."""
    flat = topk_ids.flatten()
    if not case.aligned:
        return None, allocate("expert_ids", (flat.numel(),), torch.int32).copy_(flat), None
    capacity = padded_capacity(flat.numel(), case.num_experts, case.block_size, rounded=True)
    rows = case.num_adapters
    sorted_ids = allocate("sorted_token_ids", (rows, capacity), torch.int32)
    expert_ids = allocate("expert_ids", (rows, capacity // case.block_size), torch.int32)
    totals = allocate("num_tokens_post_padded", (rows,), torch.int32)
    pair_adapters = token_adapters.repeat_interleave(case.top_k)
    for adapter in set(case.batch.active()) & set(range(rows)) - set(case.disabled):
        row = align_row(flat, pair_adapters == adapter, case.num_experts, case.block_size)
        sorted_ids[adapter] = flat.numel()
        sorted_ids[adapter, : row.padded_total] = row.tokens.int()
        expert_ids[adapter] = -1
        expert_ids[adapter, : row.experts.numel()] = row.experts.int()
        totals[adapter] = row.padded_total
    return sorted_ids, expert_ids, totals


REGIMES = (
    *BATCH_REGIMES,
    "small_batch",
    "one_shot",
    "two_kernel",
    "split_k",
    "aligned",
    "disabled_adapter_in_batch",
    "adapter_out_of_range",
    "unrouted_choice",
    "hidden_tail",
    "columns_tail",
    "rank_not_power_of_two",
    "strided_input",
    "refused_overwrite",
)
"""Every regime that `regimes` names."""


def regimes(case: Case) -> set[str]:
    """Return the names of the regimes that a case is in."""
    active = set(case.batch.active())
    found = {
        case.path: True,
        "split_k": case.path == "two_kernel" and case.shrink.split_k > 1,
        "aligned": case.aligned,
        "disabled_adapter_in_batch": bool(active & set(case.disabled)),
        "adapter_out_of_range": any(adapter >= case.num_adapters for adapter in active),
        "unrouted_choice": case.routing.invalid != "none",
        "hidden_tail": case.hidden % 128 != 0,
        "columns_tail": case.columns % 128 != 0,
        "rank_not_power_of_two": case.rank & (case.rank - 1) != 0,
        "strided_input": case.input_layout != CONTIGUOUS,
        "refused_overwrite": case.fully_sharded and not case.add_inputs,
    }
    return batch_regimes(case.batch, case.num_adapters) | {name for name, holds in found.items() if holds}
