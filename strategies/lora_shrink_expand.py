"""Cases for `lora_shrink` and `lora_expand`: a mixed batch through the two halves of a LoRA layer ("punica").

shrink: y[s, m] = scale * A[s][l] x[m];  expand: out[m, slice s] (+)= B[s][l] y[s, m], for adapter l of token m.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from hypothesis import strategies as st

from kernelfuzz.strategies import contents, huge
from kernelfuzz.strategies.adapters import ranks
from kernelfuzz.strategies.batches import BASE, BATCH_REGIMES, SMALL_BATCHES, Batch, batch_regimes, batches
from kernelfuzz.strategies.case import Case as BaseCase
from kernelfuzz.strategies.devices import USUAL, Placement
from kernelfuzz.strategies.dtypes import DTYPES, Dtype
from kernelfuzz.strategies.layouts import CONTIGUOUS, Allocate, Layout, layouts, plain_allocator
from kernelfuzz.strategies.palette import share, templates
from kernelfuzz.strategies.reduction import PATTERNS, Reducible
from kernelfuzz.strategies.sizes import sizes

Op = Literal["shrink", "expand"]

SMALL: dict[str, Any] = {**SMALL_BATCHES}
"""Arguments with which `cases` draws small cases."""

REDUCIBLE: Reducible = {"x": PATTERNS, "weights": PATTERNS}
"""What a shrunk case's tensors may hold instead of their contents."""

ROUNDABLE = ("hidden", "rank")
"""Sizes of a shrunk case that may be raised one by one. The hidden size of an expand is 1 already."""


@dataclass(frozen=True)
class Case(BaseCase):
    """One launch of `lora_shrink` or `lora_expand`."""

    target: ClassVar[str] = "lora_shrink_expand"

    op: Op
    batch: Batch
    num_adapters: int
    hidden: int  # shrink only: columns of x
    rank: int
    widths: tuple[int, ...]  # a slice each; expand only: its columns
    dtype: Dtype
    float32_input: bool  # expand only: y in float32, as shrink writes it, or in the weights' dtype
    contents: contents.Style
    scale: float  # shrink only
    add_inputs: bool  # expand only
    column_offset: int  # expand only: columns before the first slice
    column_tail: int  # expand only: columns after the last
    weights_4d: bool  # [L, 1, ...] as layers store them, or [L, ...]
    visit_all: bool  # the grid covers every adapter slot, or the active ones only
    block_n: int
    block_k: int
    split_k: int
    input_layout: Layout

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.batch.num_tokens

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of x: [tokens, hidden] for shrink, [slices, tokens, rank] for expand."""
        tokens = self.batch.num_tokens
        return (tokens, self.hidden) if self.op == "shrink" else (len(self.widths), tokens, self.rank)

    @property
    def no_lora(self) -> bool:
        """Whether no token has an adapter, so that the call returns at once."""
        return set(self.batch.active()) <= {BASE}


SPECIALISED = (
    "op",
    "hidden",
    "rank",
    "widths",
    "dtype",
    "float32_input",
    "scale",  # which goes with op
    "add_inputs",
    "column_offset",
    "column_tail",
    "weights_4d",
    "block_n",
    "block_k",
    "split_k",
    "input_layout",
)
"""Fields that the kernels are compiled for: constants, and integers by whether they are 1 or multiples of 16.

Not all of them: some arguments also depend on the batch and on num_adapters, which have to differ from case to case."""


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    op: tuple[Op, ...] = ("shrink", "expand"),
    dtype: tuple[Dtype, ...] = DTYPES,
    style: tuple[contents.Style, ...] = contents.STYLES,
    add_inputs: tuple[bool, ...] = (False, True),
    float32_input: tuple[bool, ...] = (False, True),
    split_k: tuple[int, ...] = (1, 2, 4),
    max_adapters: int = 4,
    max_slices: int = 3,
    max_rank: int = 144,
    max_hidden: int = 600,
    max_columns: int = 272,
    max_segments: int = 6,
    max_length: int = 12,
    placement: st.SearchStrategy[Placement] = USUAL,
    palette: tuple[Case, ...] = (),
) -> Case:
    """Draw a case. The simplest has one token; every argument narrows a dimension. `palette`: see `templates`."""
    template: Case | None = draw(templates(palette))
    num_adapters = draw(st.integers(1, max_adapters))
    chosen = draw(st.sampled_from(op))
    expand = chosen == "expand"
    width = sizes(1, max_columns, around=(64, 128, 256))
    equal_widths = draw(st.booleans())
    slices = draw(st.integers(1, max_slices))
    first = draw(width) if expand else 1
    widths = tuple(first if equal_widths or not expand else draw(width) for _ in range(slices))
    case = Case(
        seed=draw(contents.seeds()),
        op=chosen,
        batch=draw(batches(num_adapters, max_segments=max_segments, max_length=max_length)),
        num_adapters=num_adapters,
        hidden=1 if expand else draw(sizes(1, max_hidden, around=(64, 128, 256, 512))),
        rank=draw(ranks(maximum=max_rank)),
        widths=widths,
        dtype=draw(st.sampled_from(dtype)),
        float32_input=expand and draw(st.sampled_from(float32_input)),
        contents=draw(contents.styles(*style)),
        scale=1.0 if expand else draw(st.sampled_from((1.0, 0.5, -1.75, 0.0, 0.7))),
        add_inputs=expand and draw(st.sampled_from(add_inputs)),
        column_offset=draw(st.integers(0, 9)) if expand else 0,
        column_tail=draw(st.integers(0, 9)) if expand else 0,
        weights_4d=draw(st.booleans()),
        visit_all=draw(st.booleans()),
        block_n=draw(st.sampled_from((64, 32))),
        block_k=draw(st.sampled_from((64, 32, 256))),
        split_k=1 if expand else draw(st.sampled_from(split_k)),
        input_layout=draw(layouts()),
        placement=draw(placement),
    )
    return share(case, template, SPECIALISED)


@st.composite
def huge_cases(draw: st.DrawFn, /, *, beyond: int = huge.BEYOND, **dimensions: Any) -> Case:
    """Draw a case in which offsets into one weight or the input cross `beyond` elements.

    `dimensions` are arguments of `cases`. The batch is of the last adapters; a weight is as wide as a vocabulary.
    """
    few = {"max_segments": 2, "max_length": 1}
    case = draw(cases(**{**few, **dimensions}))
    adapters, rank, hidden, widths = case.num_adapters, case.rank, case.hidden, case.widths
    weights = draw(st.sampled_from((True, False)))
    if weights:
        rank = draw(st.sampled_from((64, 128)))
        width = draw(huge.widths(huge.side(beyond), 3 * huge.side(beyond)))
        hidden, widths = (width, (1,)) if case.op == "shrink" else (hidden, (width,))
        adapters = max(adapters, beyond // (rank * width) + draw(st.sampled_from((1, 2, 0))))
    case = dataclasses.replace(
        case,
        batch=huge.last_adapters(case.batch, case.num_adapters, adapters),
        num_adapters=adapters,
        rank=rank,
        hidden=hidden,
        widths=widths,
    )
    if weights:
        return case
    *rows, columns = case.input_shape
    gap = draw(huge.row_gaps(math.prod(rows), columns * case.input_layout.step, beyond))
    return dataclasses.replace(case, input_layout=dataclasses.replace(case.input_layout, row_gap=gap))


def huge_bytes(case: Case) -> int:
    """Return the device memory that a case takes, in bytes, rounded up."""
    matrices = case.rank * (len(case.widths) * case.hidden if case.op == "shrink" else sum(case.widths))
    x = case.input_layout.extent(case.input_shape) * (4 if case.float32_input else 2)
    return huge.device_bytes(2 * case.num_adapters * matrices + x, case.batch.num_tokens * matrices)


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case. M tokens, K hidden, R rank, N_s columns, L adapters.

    - x: shrink [M, K] in the weights' dtype; expand [S, M, R], float32 or the weights' dtype; NaN in rows without
      adapter
    - weights: shrink S tensors [L, (1,) R, K], expand S tensors [L, (1,) N_s, R]; NaN for adapters not in the batch
    - token_adapters: int64 [M]
    """

    case: Case
    x: torch.Tensor
    weights: list[torch.Tensor]
    token_adapters: torch.Tensor


def make_inputs(case: Case, device: torch.device | str, allocate: Allocate | None = None) -> Inputs:
    """Make the tensors of a case on `device`, with `allocate` or in plain memory.

    What is filled is found on the CPU, so that nothing waits for the device.
    """
    allocate = allocate or plain_allocator(device)
    dtype = getattr(torch, case.dtype)
    adapters = case.batch.token_adapters()
    served = (adapters != BASE).nonzero().flatten().to(device, non_blocking=True)
    active = torch.tensor([adapter for adapter in case.batch.active() if adapter != BASE], dtype=torch.int64)
    active = active.to(device, non_blocking=True)

    x = allocate("inputs", case.input_shape, torch.float32 if case.float32_input else dtype, case.input_layout)
    x[..., served, :] = contents.values(x.shape, x.dtype, case.contents, case.seed, "x", device)[..., served, :]

    weights = []
    for s, width in enumerate(case.widths):
        rows, columns = (case.rank, case.hidden) if case.op == "shrink" else (width, case.rank)
        stacked = (case.num_adapters, 1) if case.weights_4d else (case.num_adapters,)
        shape = (*stacked, rows, columns)
        weight = allocate(f"weights[{s}]", shape, dtype)
        used = (active.numel(), *shape[1:])
        weight[active] = contents.values(used, dtype, case.contents, case.seed, f"w/{s}", device, weights=True)
        weights.append(weight)
    token_adapters = allocate("token_lora_mapping", (case.size,), torch.int64).copy_(adapters, non_blocking=True)
    return Inputs(case, x, weights, token_adapters)


REGIMES = (
    *BATCH_REGIMES,
    "shrink",
    "expand",
    "split_k",
    "unequal_slices",
    "several_slices",
    "hidden_tail",
    "columns_tail",
    "rank_not_power_of_two",
    "strided_input",
)
"""Every regime that `regimes` names."""


def regimes(case: Case) -> set[str]:
    """Return the names of the regimes that a case is in."""
    expand = case.op == "expand"
    found = {
        case.op: True,
        "split_k": case.split_k > 1,
        "unequal_slices": len(set(case.widths)) > 1,
        "several_slices": len(case.widths) > 1,
        "hidden_tail": not expand and case.hidden % case.block_k != 0,
        "columns_tail": expand and any(width % 64 for width in case.widths),
        "rank_not_power_of_two": case.rank & (case.rank - 1) != 0,
        "strided_input": case.input_layout != CONTIGUOUS,
    }
    return batch_regimes(case.batch, case.num_adapters) | {name for name, holds in found.items() if holds}
