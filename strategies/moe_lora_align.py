"""Cases for `moe_lora_align`: `moe_lora_align_block_size`, which sorts routed tokens by adapter and expert into padded
blocks."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from hypothesis import strategies as st

from kernelfuzz.strategies import contents
from kernelfuzz.strategies.adapters import disabled_adapters, enabled_mask, lora_ids
from kernelfuzz.strategies.alignment import padded_capacity
from kernelfuzz.strategies.batches import BATCH_REGIMES, SMALL_BATCHES, Batch, batch_regimes, batches
from kernelfuzz.strategies.case import Case as BaseCase
from kernelfuzz.strategies.devices import USUAL, Placement
from kernelfuzz.strategies.layouts import CONTIGUOUS, Allocate, Layout, plain_allocator
from kernelfuzz.strategies.routing import ExpertMapStyle, InvalidIds, Routing, expert_map, routings
from kernelfuzz.strategies.sizes import sizes

IdsDtype = Literal["int32", "int64"]

SMALL_BATCH_PAIRS = 1024
SMALL_BATCH_EXPERTS = 64
MAX_EXPERTS = 992
TOO_MANY_EXPERTS = 1025

STACKABLE = True
"""make_inputs takes several content seeds of one structure at once, and the oracle what it makes of them."""

STACK_GAP = 128
"""Elements between the items of a stack, at least. Items start at multiples of it, so that each is as well aligned as
an allocation of its own."""

SMALL: dict[str, Any] = {**SMALL_BATCHES}
"""Arguments with which `cases` draws small cases."""


@dataclass(frozen=True)
class Case(BaseCase):
    """One call of `moe_lora_align_block_size`."""

    target: ClassVar[str] = "moe_lora_align"

    batch: Batch
    num_adapters: int
    disabled: tuple[int, ...]
    descending_ids: bool
    num_experts: int
    top_k: int
    routing: Routing
    expert_map: ExpertMapStyle
    block_size: int
    rounded_capacity: bool
    ids_dtype: IdsDtype

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.batch.num_tokens

    @property
    def pairs(self) -> int:
        """Number of (token, choice) pairs."""
        return self.batch.num_tokens * self.top_k

    @property
    def capacity(self) -> int:
        """Entries of a row of sorted token ids."""
        return padded_capacity(self.pairs, self.num_experts, max(self.block_size, 1), rounded=self.rounded_capacity)

    @property
    def max_blocks(self) -> int:
        """Entries of a row of expert ids."""
        return -(-self.capacity // max(self.block_size, 1))


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    max_experts: int = 160,
    max_segments: int = 6,
    max_length: int = 200,
    max_adapters: int = 4,
    max_top_k: int = 8,
    block_size: tuple[int, ...] = (16, 1, 4, 32, 64, 7),
    invalid_ids: tuple[InvalidIds, ...] = ("none", "minus_one", "beyond", "both"),
    expert_maps: tuple[ExpertMapStyle, ...] = ("none", "identity", "holes", "reversed_holes"),
    ids_dtype: tuple[IdsDtype, ...] = ("int32", "int64"),
    refusals: bool = True,
    placement: st.SearchStrategy[Placement] = USUAL,
) -> Case:
    """Draw a case. The simplest has one token; arguments narrow dimensions, `refusals` allows calls that must be
    refused."""
    num_adapters = draw(st.integers(1, max_adapters))
    refused = draw(st.sampled_from((None,) * 20 + ("block_size", "num_experts"))) if refusals else None
    num_experts = draw(sizes(1, max_experts, around=(SMALL_BATCH_EXPERTS,)))
    legal_block_size = draw(st.sampled_from(block_size))
    return Case(
        seed=draw(contents.seeds()),
        batch=draw(batches(num_adapters, max_segments=max_segments, max_length=max_length, beyond=1)),
        num_adapters=num_adapters,
        disabled=draw(disabled_adapters(num_adapters)),
        descending_ids=draw(st.booleans()),
        num_experts=TOO_MANY_EXPERTS if refused == "num_experts" else num_experts,
        top_k=draw(st.integers(1, max_top_k)),
        routing=draw(routings(invalid=invalid_ids)),
        expert_map=draw(st.sampled_from(expert_maps)),
        block_size=draw(st.sampled_from((0, -1))) if refused == "block_size" else legal_block_size,
        rounded_capacity=draw(st.booleans()),
        ids_dtype=draw(st.sampled_from(ids_dtype)),
        placement=draw(placement),
    )


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case.

    - topk_ids: int32 or int64 [tokens, top_k]; token_adapters: int32 [tokens]
    - lora_ids: int32, at least num_adapters + 1; adapter_enabled: int32, likewise
    - expert_map: int32 [num_experts] or None
    """

    case: Case
    topk_ids: torch.Tensor
    token_adapters: torch.Tensor
    lora_ids: torch.Tensor
    adapter_enabled: torch.Tensor
    expert_map: torch.Tensor | None


@dataclass(frozen=True)
class Stack(Inputs):
    """The tensors of one structure with S content seeds.

    `topk_ids` and `expert_map` have a leading dimension of S; the rest does not depend on the seed. `case` is the
    structure, whatever its seed.
    """

    seeds: tuple[int, ...]

    def item(self, index: int) -> Inputs:
        """Return the inputs of one seed, views of the stack's: bit for bit those that its case has alone."""
        return Inputs(
            case=dataclasses.replace(self.case, seed=self.seeds[index]),
            topk_ids=self.topk_ids[index],
            token_adapters=self.token_adapters,
            lora_ids=self.lora_ids,
            adapter_enabled=self.adapter_enabled,
            expert_map=None if self.expert_map is None else self.expert_map[index],
        )


def stack_layout(length: int) -> Layout:
    """Return the layout of [S, length], an item each row: no stray access of a few elements meets the next item."""
    return Layout(row_gap=STACK_GAP + -length % STACK_GAP)


def make_inputs(
    case: Case, device: torch.device | str, allocate: Allocate | None = None, seeds: Sequence[int] | None = None
) -> Inputs:
    """Make the tensors of a case on `device`, with `allocate` or in plain memory; with `seeds`, those of a `Stack`.

    Nothing waits for the device, and the number of operations does not depend on the number of seeds.
    """
    allocate = allocate or plain_allocator(device)
    if seeds is None:
        return _make_stack(case, (case.seed,), device, allocate).item(0)
    return _make_stack(case, tuple(seeds), device, allocate)


def _make_stack(case: Case, seeds: tuple[int, ...], device: torch.device | str, allocate: Allocate) -> Stack:
    def place(name: str, tensor: torch.Tensor, dtype: torch.dtype, layout: Layout = CONTIGUOUS) -> torch.Tensor:
        return allocate(name, tuple(tensor.shape), dtype, layout).copy_(tensor, non_blocking=True)

    shape = (len(seeds), case.batch.num_tokens, case.top_k)
    ids = case.routing.expert_ids(*shape[1:], case.num_experts, seeds, device).flatten(1)
    mapping = expert_map(case.expert_map, case.num_experts, seeds, device)
    if mapping is not None:
        mapping = place("expert_map", mapping, torch.int32, stack_layout(case.num_experts))
    enabled = enabled_mask(case.num_adapters, case.batch, case.disabled)
    return Stack(
        case=case,
        topk_ids=place("topk_ids", ids, getattr(torch, case.ids_dtype), stack_layout(case.pairs)).view(shape),
        token_adapters=place("token_lora_mapping", case.batch.token_adapters(), torch.int32),
        lora_ids=place("lora_ids", lora_ids(case.num_adapters, case.batch, case.descending_ids), torch.int32),
        adapter_enabled=place("adapter_enabled", enabled, torch.int32),
        expert_map=mapping,
        seeds=seeds,
    )


REGIMES = (
    *BATCH_REGIMES,
    "few_pairs_few_experts",
    "few_pairs_many_experts",
    "many_pairs_few_experts",
    "many_pairs_many_experts",
    "disabled_adapter_in_batch",
    "adapter_out_of_range",
    "invalid_expert_id",
    "expert_map",
    "int64_ids",
    "fewer_pairs_than_experts",
    "unrounded_capacity",
    "refused",
)
"""Every regime that `regimes` names."""


def regimes(case: Case) -> set[str]:
    """Return the names of the regimes that a case is in."""
    active = set(case.batch.active())
    pairs = "few_pairs" if case.pairs < SMALL_BATCH_PAIRS else "many_pairs"
    experts = "few_experts" if case.num_experts <= SMALL_BATCH_EXPERTS else "many_experts"
    found = {
        f"{pairs}_{experts}": True,
        "disabled_adapter_in_batch": bool(active & set(case.disabled)),
        "adapter_out_of_range": any(adapter >= case.num_adapters for adapter in active),
        "invalid_expert_id": case.routing.invalid != "none",
        "expert_map": case.expert_map != "none",
        "int64_ids": case.ids_dtype == "int64",
        "fewer_pairs_than_experts": case.pairs < case.num_experts,
        "unrounded_capacity": not case.rounded_capacity,
        "refused": case.block_size <= 0 or case.num_experts > MAX_EXPERTS,
    }
    return batch_regimes(case.batch, case.num_adapters) | {name for name, holds in found.items() if holds}
