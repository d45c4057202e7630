"""Cases for `moe_permute`: vLLM's moe_permute, which groups rows by the expert that they are routed to, and
moe_unpermute, which sums what the experts made of them.

permute: permuted[p] = x[source[p] // k], (token, choice) pairs in the order of their experts;
unpermute: out[t] = sum over j of w[t, j] * rows[inverse[t, j]].
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from hypothesis import strategies as st

from kernelfuzz.strategies import contents
from kernelfuzz.strategies.case import Case as BaseCase
from kernelfuzz.strategies.case import derive_seed
from kernelfuzz.strategies.devices import USUAL, Placement
from kernelfuzz.strategies.layouts import Allocate, plain_allocator
from kernelfuzz.strategies.routing import ExpertMapStyle, InvalidIds, Routing, expert_map, routings
from kernelfuzz.strategies.sizes import sizes

Op = Literal["permute", "unpermute"]
RowDtype = Literal["float16", "bfloat16", "float32", "float8_e4m3fn"]
Scratch = Literal["none", "metadata", "rows"]
"""Buffers that the caller keeps from call to call: none; those for indices; those and one for the permuted rows."""

IdsDtype = Literal["int32", "int64"]

ROW_DTYPES: tuple[RowDtype, ...] = get_args(RowDtype)
VECTOR_BYTES = 16
"""Rows must be whole vectors of this size."""

BLOCK_VECTORS = 256
"""How many vectors the threads of a block take at a time."""

MAX_EARLIER_CALLS = 3
SMALL: dict[str, Any] = {"max_tokens": 2, "max_experts": 3, "max_hidden_vectors": 2}
"""Arguments with which `cases` draws small cases."""


@dataclass(frozen=True)
class Case(BaseCase):
    """One call of moe_permute or moe_unpermute, and for a scratch the calls that used it before."""

    target: ClassVar[str] = "moe_permute"

    op: Op
    tokens: int
    top_k: int
    num_experts: int
    routing: Routing
    expert_map: ExpertMapStyle
    hidden: int
    dtype: RowDtype
    scale_groups: int  # permute only: columns of the quantisation scale, 0 for none
    ids_dtype: IdsDtype  # permute only
    scratch: Scratch  # permute only
    earlier: tuple[int, ...]  # token counts of the calls made before with the same scratch
    spare_tokens: int  # by how much the scratch is larger than the largest call
    given_output: bool  # permute only: the caller passes the tensor for the permuted rows
    pass_offsets: bool  # unpermute only
    contents: contents.Style

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.tokens

    @property
    def pairs(self) -> int:
        """Number of (token, choice) pairs, which is the number of permuted rows."""
        return self.tokens * self.top_k

    @property
    def scratch_tokens(self) -> int:
        """For how many tokens the scratch is made."""
        return max((self.tokens, *self.earlier)) + self.spare_tokens

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        itemsize: int = getattr(torch, self.dtype).itemsize
        return self.hidden * itemsize

    @property
    def refused(self) -> bool:
        """Whether rows are not whole vectors, so that the call must be refused."""
        return self.row_bytes % VECTOR_BYTES != 0


@functools.cache
def _earlier_calls(max_tokens: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, max_tokens), max_size=MAX_EARLIER_CALLS)


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    op: tuple[Op, ...] = ("permute", "permute", "unpermute"),
    dtype: tuple[RowDtype, ...] = ROW_DTYPES,
    style: tuple[contents.Style, ...] = contents.STYLES,
    scratch: tuple[Scratch, ...] = ("none", "metadata", "rows"),
    expert_maps: tuple[ExpertMapStyle, ...] = ("none", "none", "none", "identity", "holes", "reversed_holes"),
    invalid_ids: tuple[InvalidIds, ...] = ("none", "none", "none", "minus_one", "beyond", "both"),
    refusals: bool = True,
    max_tokens: int = 80,
    max_top_k: int = 8,
    max_experts: int = 160,
    max_hidden_vectors: int = 260,
    placement: st.SearchStrategy[Placement] = USUAL,
) -> Case:
    """Draw a case. The simplest is to permute one token of one vector.

    Every argument narrows a dimension; `refusals` allows calls that must be refused. Float8 rows are permuted only.
    """
    # What is drawn late is made simple now and then, so what is rare anyway comes first.
    chosen = draw(st.sampled_from(op))
    permute = chosen == "permute"
    refused = refusals and draw(st.sampled_from((False,) * 19 + (True,)))
    wide = max_hidden_vectors > BLOCK_VECTORS and draw(st.sampled_from((False,) * 11 + (True,)))
    row_dtype = draw(st.sampled_from([each for each in dtype if permute or each != "float8_e4m3fn"]))
    # What one operation has no use for is drawn for it too: with fewer draws it would be the simpler one.
    buffers = draw(st.sampled_from(scratch))
    buffers = buffers if permute else "none"
    scale_groups, ids_dtype = draw(st.sampled_from((0, 0, 0, 1, 2, 5))), draw(st.sampled_from(get_args(IdsDtype)))
    given_output, pass_offsets = draw(st.booleans()), draw(st.booleans())
    routing = draw(routings(invalid=invalid_ids))
    mapping = draw(st.sampled_from(expert_maps))
    fewest, most = (BLOCK_VECTORS - 3, max_hidden_vectors) if wide else (1, min(40, max_hidden_vectors))
    vectors = draw(st.integers(fewest, most))
    per_vector: int = VECTOR_BYTES // getattr(torch, row_dtype).itemsize
    return Case(
        seed=draw(contents.seeds()),
        op=chosen,
        tokens=draw(sizes(1, max_tokens)),
        top_k=draw(st.integers(1, max_top_k)),
        num_experts=draw(sizes(1, max_experts, around=(16, 64, 128))),
        routing=routing,
        expert_map=mapping,
        hidden=(vectors - 1) * per_vector + (draw(st.integers(1, per_vector - 1)) if refused else per_vector),
        dtype=row_dtype,
        scale_groups=scale_groups if permute else 0,
        ids_dtype=ids_dtype if permute else "int32",
        scratch=buffers,
        earlier=tuple(draw(_earlier_calls(max_tokens))) if buffers != "none" else (),
        spare_tokens=draw(st.sampled_from((0, 1, 9))) if buffers != "none" else 0,
        given_output=permute and given_output and buffers != "rows",
        pass_offsets=not permute and (pass_offsets or _may_drop(routing, mapping)),
        contents=draw(contents.styles(*style)),
        placement=draw(placement),
    )


def _may_drop(routing: Routing, mapping: ExpertMapStyle) -> bool:
    """Return whether pairs may have no expert here, so that moe_unpermute must be told how many have one."""
    return routing.invalid != "none" or mapping != "none"


@dataclass(frozen=True)
class SortedPairs:
    """The order of T * k (token, choice) pairs by local expert; a flat pair is token * k + choice.

    - valid: bool [T * k], which flat pairs have an expert that lives here; V of them
    - source: int64 [T * k], the flat pair at each position; those without expert stand last
    - inverse: int64 [T * k], the position of each flat pair
    - offsets: int64 [local experts + 1], how many valid pairs have a smaller local expert; the last is V
    """

    valid: torch.Tensor
    source: torch.Tensor
    inverse: torch.Tensor
    offsets: torch.Tensor


def sorted_pairs(
    topk_ids: torch.Tensor, mapping: torch.Tensor | None, num_experts: int, num_local_experts: int
) -> SortedPairs:
    """Sort the pairs of `topk_ids`, integers [T, k], stably by the local experts that `mapping` [num_experts] gives.

    Without a map every expert lives here under its own number. Nothing waits for the device.
    """
    ids = topk_ids.flatten().long()
    valid = (ids >= 0) & (ids < num_experts)
    local = ids
    if mapping is not None:
        local = mapping.long()[ids.clamp(0, num_experts - 1)]
        valid = valid & (local >= 0)
    ordered, source = torch.where(valid, local, num_local_experts).sort(stable=True)
    inverse = torch.empty_like(source)
    inverse[source] = torch.arange(source.numel(), device=source.device)
    offsets = torch.searchsorted(ordered, torch.arange(num_local_experts + 1, device=ordered.device))
    return SortedPairs(valid, source, inverse, offsets)


@dataclass(frozen=True)
class Inputs:
    """What both operations have: the case, and how many experts live here, at least 1."""

    case: Case
    num_local_experts: int


@dataclass(frozen=True)
class PermuteInputs(Inputs):
    """The tensors of a call of moe_permute. T tokens, k choices, H hidden, E experts, G scale groups.

    - x: [T, H] in the case's dtype; float8 rows as their bytes, uint8. NaN in rows whose pairs all lack an expert
    - scale: float32 [T, G] or None, with NaN likewise
    - topk_ids: int32 or int64 [T, k]
    - expert_map: int32 [E] or None
    - earlier_x, earlier_topk_ids: the same for each call made before with the same scratch
    """

    x: torch.Tensor
    scale: torch.Tensor | None
    topk_ids: torch.Tensor
    expert_map: torch.Tensor | None
    earlier_x: list[torch.Tensor]
    earlier_topk_ids: list[torch.Tensor]


@dataclass(frozen=True)
class UnpermuteInputs(Inputs):
    """The tensors of a call of moe_unpermute. T tokens, k choices, H hidden; V pairs have an expert that lives here.

    - rows: [T * k, H] in the case's dtype, results of the experts; NaN from row V on
    - topk_weights: float32 [T, k]
    - inverse: int32 [T * k], the row of each pair
    - offsets: int64 [num_local_experts + 1], the last is V; None only where V is T * k
    """

    rows: torch.Tensor
    topk_weights: torch.Tensor
    inverse: torch.Tensor
    offsets: torch.Tensor | None


def make_inputs(
    case: Case, device: torch.device | str, allocate: Allocate | None = None
) -> PermuteInputs | UnpermuteInputs:
    """Make the tensors of a case on `device`, with `allocate` or in plain memory.

    Everything that depends on the routing is computed on the CPU and copied, so that nothing waits for the device.
    """
    allocate = allocate or plain_allocator(device)

    def place(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return allocate(name, tuple(tensor.shape), dtype).copy_(tensor, non_blocking=True)

    def values(name: str, used: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        """Allocate a row for each of `used`, bool on the CPU, and fill those that are; float8 is seen as bytes."""
        shape = (used.numel(), width)
        tensor = allocate(name, shape, dtype)
        seeded = contents.values(shape, dtype, case.contents, case.seed, name, device)
        if dtype.itemsize == 1:
            tensor, seeded = tensor.view(torch.uint8), seeded.view(torch.uint8)
        rows = used.nonzero().flatten().to(device, non_blocking=True)
        tensor[rows] = seeded[rows]
        return tensor

    mapping = expert_map(case.expert_map, case.num_experts, case.seed, "cpu")
    num_local = case.num_experts if mapping is None else max(1, int((mapping >= 0).sum()))
    topk_ids = case.routing.expert_ids(case.tokens, case.top_k, case.num_experts, case.seed, "cpu")
    pairs = sorted_pairs(topk_ids, mapping, case.num_experts, num_local)
    if case.op == "unpermute":
        weights = contents.routing_weights(tuple(topk_ids.shape), case.contents, case.seed, "weights", device)
        return UnpermuteInputs(
            case=case,
            num_local_experts=num_local,
            rows=values("rows", pairs.valid[pairs.source], case.hidden, getattr(torch, case.dtype)),
            topk_weights=place("topk_weights", weights, torch.float32),
            inverse=place("inverse", pairs.inverse, torch.int32),
            offsets=place("offsets", pairs.offsets, torch.int64) if case.pass_offsets else None,
        )
    ids_dtype = getattr(torch, case.ids_dtype)
    routed = pairs.valid.view(topk_ids.shape).any(1)
    earlier_x, earlier_topk_ids = _earlier_inputs(case, values, place)
    return PermuteInputs(
        case=case,
        num_local_experts=num_local,
        x=values("x", routed, case.hidden, getattr(torch, case.dtype)),
        scale=values("scale", routed, case.scale_groups, torch.float32) if case.scale_groups else None,
        topk_ids=place("topk_ids", topk_ids, ids_dtype),
        expert_map=None if mapping is None else place("expert_map", mapping, torch.int32),
        earlier_x=earlier_x,
        earlier_topk_ids=earlier_topk_ids,
    )


def _earlier_inputs(
    case: Case,
    values: Callable[[str, torch.Tensor, int, torch.dtype], torch.Tensor],
    place: Callable[[str, torch.Tensor, torch.dtype], torch.Tensor],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return x and topk_ids of each call made before with the same scratch."""
    every_x, every_ids = [], []
    for i, tokens in enumerate(case.earlier):
        every_row = torch.ones(tokens, dtype=torch.bool)
        every_x.append(values(f"earlier_x[{i}]", every_row, case.hidden, getattr(torch, case.dtype)))
        ids = case.routing.expert_ids(tokens, case.top_k, case.num_experts, derive_seed(case.seed, i + 1), "cpu")
        every_ids.append(place(f"earlier_topk_ids[{i}]", ids, getattr(torch, case.ids_dtype)))
    return every_x, every_ids


REGIMES = (
    "permute",
    "unpermute",
    "one_token",
    "scratch_none",
    "scratch_metadata",
    "scratch_rows",
    "scratch_reused",
    "expert_map",
    "invalid_expert_id",
    "more_experts_than_pairs",
    "fp8_rows",
    "wide_rows",
    "quantised_scale",
    "int64_ids",
    "given_output",
    "offsets_left_out",
    "device_string",
    "device_object",
    "device_indexed",
    "refused",
)
"""Every regime that `regimes` names."""


def regimes(case: Case) -> set[str]:
    """Return the names of the regimes that a case is in. Only a scratch is told its device."""
    permute, spelling = case.op == "permute", case.placement.spelling
    told_device = case.scratch != "none"
    found = {
        case.op: True,
        "one_token": case.tokens == 1,
        f"scratch_{case.scratch}": permute,
        "scratch_reused": bool(case.earlier),
        "expert_map": case.expert_map != "none",
        "invalid_expert_id": case.routing.invalid != "none",
        "more_experts_than_pairs": case.pairs < case.num_experts,
        "fp8_rows": case.dtype == "float8_e4m3fn",
        "wide_rows": case.row_bytes > BLOCK_VECTORS * VECTOR_BYTES,
        "quantised_scale": case.scale_groups > 0,
        "int64_ids": case.ids_dtype == "int64",
        "given_output": case.given_output,
        "offsets_left_out": not permute and not case.pass_offsets,
        "device_string": told_device and not spelling.endswith("object"),
        "device_object": told_device and spelling.endswith("object"),
        "device_indexed": told_device and spelling.startswith("indexed"),
        "refused": case.refused,
    }
    return {name for name, holds in found.items() if holds}
