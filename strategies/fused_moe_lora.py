"""Cases for `fused_moe_lora`: the LoRA part of a mixture-of-experts layer, added to or written over its output.

output[t, j, slice s] (+)= w[t, j]? * B[s][l, e] (A[s][l, e] x[t]) for adapter l of token t and expert e of its choice
j.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st

from kernelfuzz.strategies import contents, huge
from kernelfuzz.strategies.adapters import disabled_adapters, enabled_mask, lora_ids, ranks
from kernelfuzz.strategies.alignment import align_rows, padded_capacity
from kernelfuzz.strategies.batches import BATCH_REGIMES, SMALL_BATCHES, Batch, batch_regimes, batches
from kernelfuzz.strategies.case import Case as BaseCase
from kernelfuzz.strategies.devices import USUAL, Placement
from kernelfuzz.strategies.dtypes import DTYPES, Dtype
from kernelfuzz.strategies.layouts import CONTIGUOUS, POISON_INTEGER, Allocate, Layout, layouts, plain_allocator
from kernelfuzz.strategies.palette import share, templates
from kernelfuzz.strategies.reduction import PATTERNS, Reducible
from kernelfuzz.strategies.routing import InvalidIds, Routing, routings
from kernelfuzz.strategies.sizes import sizes

SMALL_BATCH_MAX_RANK = 64
SMALL_BATCH_MAX_WORK = 1024
ONE_SHOT_MAX_RANK = 128

SMALL: dict[str, Any] = {**SMALL_BATCHES}
"""Arguments with which `cases` draws small cases."""

REDUCIBLE: Reducible = {"x": PATTERNS, "lora_a": PATTERNS, "lora_b": PATTERNS, "topk_weights": ("ones",)}
"""What a shrunk case's tensors may hold instead of their contents. No routing weight is 0."""

ROUNDABLE = ("hidden", "rank")
"""Sizes of a shrunk case that may be raised one by one. A power of two, ONE_SHOT_MAX_RANK is not crossed by one that is
raised to the next, and so a case that has a split-K still takes the path that has one."""


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
    def pairs(self) -> int:
        """Number of (token, choice) pairs."""
        return self.batch.num_tokens * self.top_k

    @property
    def input_rows(self) -> int:
        """Rows of x: one for each pair where routed weights are multiplied, else one for each token."""
        return self.pairs if self.mul_routed_weight else self.batch.num_tokens

    @property
    def output_columns(self) -> int:
        """Columns of the output."""
        return self.column_offset + self.slices * self.columns

    @property
    def path(self) -> str:
        """The path that the newest release takes: small_batch, one_shot or two_kernel."""
        if self.fully_sharded or self.rank > ONE_SHOT_MAX_RANK:
            return "two_kernel"
        work = self.pairs * self.rank
        if not self.aligned and self.rank <= SMALL_BATCH_MAX_RANK and work <= SMALL_BATCH_MAX_WORK:
            return "small_batch"
        return "one_shot"


SPECIALISED = (
    "num_experts",
    "top_k",
    "hidden",
    "rank",
    "columns",
    "slices",
    "dtype",
    "aligned",
    "block_size",
    "fully_sharded",
    "mul_routed_weight",
    "add_inputs",
    "column_offset",
    "compute_units",
    "shrink",
    "expand",
    "input_layout",
    "output_gap",
)
"""Fields that the kernels are compiled for: constants, and integers by whether they are 1 or multiples of 16.

Not all of them: some arguments also depend on the batch and on num_adapters, which have to differ from case to case."""


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
    placement: st.SearchStrategy[Placement] = USUAL,
    palette: tuple[Case, ...] = (),
) -> Case:
    """Draw a case. The simplest has one token.

    Every argument narrows a dimension: a tuple holds what may be drawn, the simplest first, and max_... is the largest.
    `palette`: see `templates`.
    """
    template: Case | None = draw(templates(palette))
    num_adapters = draw(st.integers(1, max_adapters))
    rank = draw(ranks(maximum=max_rank))
    sharded = draw(st.sampled_from(fully_sharded))
    two_kernel = sharded or rank > ONE_SHOT_MAX_RANK
    case = Case(
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
        placement=draw(placement),
    )
    return share(case, template, SPECIALISED)


@st.composite
def _tiles(draw: st.DrawFn, widths: tuple[int, ...], *, split: bool) -> Tiles:
    return Tiles(
        block_n=draw(st.sampled_from(widths)),
        block_k=draw(st.sampled_from((32, 64))),
        group_m=draw(st.sampled_from((1, 8))),
        split_k=draw(st.sampled_from((1, 2, 4))) if split else 1,
    )


@st.composite
def huge_cases(draw: st.DrawFn, /, *, beyond: int = huge.BEYOND, **dimensions: Any) -> Case:
    """Draw a case in which offsets into one weight, the input or the output cross `beyond` elements.

    `dimensions` are arguments of `cases`. The batch is of the last adapters, the very last enabled, and often of the
    last expert.
    """
    few = {"max_top_k": 2, "max_rank": SMALL_BATCH_MAX_RANK, "max_segments": 2, "max_length": 1}
    case = draw(cases(**{**few, **dimensions}))
    tensor = draw(st.sampled_from(("lora_a", "lora_b", "input", "output")))
    rank, hidden, columns = case.rank, case.hidden, case.columns
    adapters, experts, last = case.num_adapters, case.num_experts, case.num_adapters - 1
    if tensor in ("lora_a", "lora_b"):
        rank = draw(st.sampled_from((16, 32, 64)))
        width = draw(huge.widths(huge.side(beyond) // 8, huge.side(beyond)))
        hidden, columns = (width, columns) if tensor == "lora_a" else (hidden, width)
        adapters, experts = draw(huge.stacks(rank * width, beyond, case.num_adapters))
    case = dataclasses.replace(
        case,
        batch=huge.last_adapters(case.batch, case.num_adapters, adapters),
        num_adapters=adapters,
        disabled=tuple(huge.renumber(each, case.num_adapters, adapters) for each in case.disabled if each != last),
        num_experts=experts,
        routing=dataclasses.replace(case.routing, style=draw(st.sampled_from(("last_expert", case.routing.style)))),
        hidden=hidden,
        rank=rank,
        columns=columns,
        slices=case.slices if tensor in ("input", "output") else 1,
        add_inputs=case.add_inputs or case.fully_sharded,
    )
    if tensor == "input":
        gap = draw(huge.row_gaps(case.input_rows, case.hidden * case.input_layout.step, beyond))
        case = dataclasses.replace(case, input_layout=dataclasses.replace(case.input_layout, row_gap=gap))
    elif tensor == "output":
        case = dataclasses.replace(case, output_gap=draw(huge.row_gaps(case.pairs, case.output_columns, beyond)))
    return case


def huge_bytes(case: Case) -> int:
    """Return the device memory that a case takes, in bytes, rounded up."""
    matrices = case.rank * (case.hidden + case.columns)
    weights = case.slices * case.num_adapters * case.num_experts * matrices
    x = case.input_layout.extent((case.input_rows, case.hidden))
    output = Layout(row_gap=case.output_gap).extent((case.pairs, case.output_columns))
    itemsize = getattr(torch, case.dtype).itemsize
    return huge.device_bytes(itemsize * (weights + x + output), case.pairs * matrices)


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case. T tokens, k choices, K hidden, R rank, N columns, S slices, L adapters, E experts.

    - x: [T, K], or [T * k, K] with mul_routed_weight
    - lora_a: S tensors [L, E, R, K]; lora_b: S tensors [L, E, N, R]; NaN where no token needs them
    - topk_weights: float32 [T, k]; topk_ids: int64 [T, k] on the CPU, for the oracle
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
        """Return which (token, choice) pairs get a LoRA contribution, bool [T, k] on the CPU."""
        return served_tokens(self.case)[:, None] & (self.topk_ids >= 0)


def served_tokens(case: Case) -> torch.Tensor:
    """Return which tokens have an adapter that is in range and enabled, bool [T] on the CPU."""
    adapters = case.batch.token_adapters()
    served = (adapters >= 0) & (adapters < case.num_adapters)
    for adapter in case.disabled:
        served &= adapters != adapter
    return served


def make_inputs(case: Case, device: torch.device | str, allocate: Allocate | None = None) -> Inputs:
    """Make the tensors of a case on `device`, with `allocate` or in plain memory.

    Everything that depends on the routing is computed on the CPU and copied, so that nothing waits for the device.
    """
    allocate = allocate or plain_allocator(device)
    dtype = getattr(torch, case.dtype)
    tokens, top_k = case.batch.num_tokens, case.top_k

    def place(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return allocate(name, tuple(tensor.shape), tensor.dtype).copy_(tensor, non_blocking=True)

    def values(name: str, *shape: int, style: contents.Style = case.contents, weights: bool = False) -> torch.Tensor:
        return contents.values(shape, dtype, style, case.seed, name, device, weights=weights)

    token_adapters = case.batch.token_adapters()
    topk_ids = case.routing.expert_ids(tokens, top_k, case.num_experts, case.seed, "cpu")
    served = served_tokens(case)[:, None] & (topk_ids >= 0)

    rows_used = served.flatten() if case.mul_routed_weight else served.any(1)
    rows = rows_used.nonzero().flatten().to(device, non_blocking=True)
    x = allocate("x", (rows_used.numel(), case.hidden), dtype, case.input_layout)
    x[rows] = values("x", rows_used.numel(), case.hidden)[rows]

    blocks = torch.unique((token_adapters[:, None] * case.num_experts + topk_ids)[served])
    blocks = blocks.to(device, non_blocking=True)
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
    sorted_ids, expert_ids, padded_totals = _alignment(case, topk_ids, place)
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
    case: Case, topk_ids: torch.Tensor, place: Callable[[str, torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """Return sorted_token_ids, expert_ids and num_tokens_post_padded; rows of adapters not in use are poison."""
    flat = topk_ids.flatten()
    if not case.aligned:
        return None, place("expert_ids", flat.int()), None
    rows = case.num_adapters
    capacity = padded_capacity(flat.numel(), case.num_experts, case.block_size, rounded=True)
    pair_adapters = case.batch.token_adapters().repeat_interleave(case.top_k)
    aligned = align_rows(flat[None], pair_adapters, rows, case.num_experts, case.block_size, capacity)
    in_use = set(case.batch.active()) - set(case.disabled)
    unused = torch.tensor([adapter not in in_use for adapter in range(rows)])
    return (
        place("sorted_token_ids", aligned.tokens[0].int().masked_fill_(unused[:, None], POISON_INTEGER)),
        place("expert_ids", aligned.experts[0].int().masked_fill_(unused[:, None], POISON_INTEGER)),
        place("num_tokens_post_padded", aligned.totals[0].int().masked_fill_(unused, POISON_INTEGER)),
    )


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
