"""Cases for `bgmv`: batched gather matrix-vector products, one adapter index a row ("bgmv_shrink", "_expand",
"_expand_slice").

shrink: out[b] += scale * A[idx[b]] x[b];  expand: out[b, offset : offset + size] (+)= B[idx[b]] x[b].
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from hypothesis import strategies as st

from kernelfuzz.strategies import contents
from kernelfuzz.strategies.adapters import ranks
from kernelfuzz.strategies.batches import BASE, BATCH_REGIMES, SMALL_BATCHES, Batch, batch_regimes, batches
from kernelfuzz.strategies.case import Case as BaseCase
from kernelfuzz.strategies.devices import USUAL, Placement
from kernelfuzz.strategies.dtypes import DTYPES, Dtype
from kernelfuzz.strategies.layouts import Allocate, plain_allocator
from kernelfuzz.strategies.reduction import PATTERNS, Reducible
from kernelfuzz.strategies.sizes import padded_widths, sizes

Op = Literal["shrink", "expand", "expand_slice"]
Layer = Literal["wrapper", "operator"]
"""vLLM's wrapper, which must accept any padding of the vocabulary, or the operator below it, which checks shapes."""

OPS: tuple[Op, ...] = get_args(Op)
LAYERS: tuple[Layer, ...] = get_args(Layer)

SMALL: dict[str, Any] = {**SMALL_BATCHES}
"""Arguments with which `cases` draws small cases."""

REDUCIBLE: Reducible = {"x": PATTERNS, "weights": PATTERNS}
"""What a shrunk case's tensors may hold instead of their contents."""


@dataclass(frozen=True)
class Case(BaseCase):
    """One call of a bgmv operator or of vLLM's wrapper above it."""

    target: ClassVar[str] = "bgmv"

    layer: Layer
    op: Op
    batch: Batch
    num_adapters: int
    width: int  # columns of x and of the weights: the hidden size for shrink, the rank for expand
    rows: int  # rows of the weights: the rank for shrink, the vocabulary or slice for expand
    columns: int  # columns of the output
    slice_offset: int  # expand_slice only
    slice_size: int  # expand_slice only
    dtype: Dtype
    float32_input: bool
    float32_output: bool
    contents: contents.Style
    scale: float  # shrink only
    accumulate: bool  # shrink: the output starts from values, not zeros; expand: adds to the output
    weights_4d: bool

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.batch.num_tokens

    @property
    def refusal(self) -> str | None:
        """What the operator's shape checks say of this call, or None if the call is legal."""
        if self.layer == "wrapper":
            return None
        if self.op == "shrink" and self.rows != self.columns:
            return "output_tensor.size(1) must match lora_a_weights.size(-2)"
        if self.op != "shrink" and self.rows != self.written_size:
            return "lora_b_weights.size(-2) must match slice_size"
        if self.op == "expand_slice" and self.slice_offset + self.slice_size > self.columns:
            return "out of bounds for output dimension"
        return None

    @property
    def written_size(self) -> int:
        """How many output columns a legal call writes, starting at `slice_offset`."""
        if self.op == "expand_slice":
            return self.slice_size
        return min(self.rows, self.columns) if self.layer == "wrapper" else self.columns


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    layer: tuple[Layer, ...] = LAYERS,
    op: tuple[Op, ...] = OPS,
    dtype: tuple[Dtype, ...] = DTYPES,
    style: tuple[contents.Style, ...] = contents.STYLES,
    float32_input: tuple[bool, ...] = (False, True),
    float32_output: tuple[bool, ...] = (False, True),
    max_adapters: int = 4,
    accumulating_shrink: tuple[bool, ...] = (False, True),
    max_rank: int = 144,
    max_hidden: int = 300,
    max_columns: int = 150,
    max_segments: int = 4,
    max_length: int = 8,
    placement: st.SearchStrategy[Placement] = USUAL,
) -> Case:
    """Draw a case. The simplest has one token; every argument narrows a dimension.

    `max_columns` bounds the weights' rows; the output may be wider by its padding and the slice's offset. The
    operator is given shapes it must refuse now and then, the wrapper is given padded and truncated vocabularies.
    """
    chosen_layer = draw(st.sampled_from(layer))
    chosen = draw(st.sampled_from(op))
    num_adapters = draw(st.integers(1, max_adapters))
    shrink = chosen == "shrink"
    matching = shrink or chosen_layer == "operator"
    if matching and not (chosen_layer == "operator" and draw(st.integers(0, 9)) == 9):
        rows = columns = draw(ranks(maximum=max_rank) if shrink else sizes(1, max_columns, around=(64, 128)))
    else:
        rows, columns = draw(padded_widths(1, max_rank if shrink else max_columns))
    offset = slice_size = 0
    if chosen == "expand_slice":
        slice_size = columns if chosen_layer == "operator" else rows
        offset = draw(st.integers(0, 9))
        columns = offset + slice_size + draw(st.integers(-1 if chosen_layer == "operator" else 0, 9))
    return Case(
        seed=draw(contents.seeds()),
        layer=chosen_layer,
        op=chosen,
        batch=draw(batches(num_adapters, max_segments=max_segments, max_length=max_length)),
        num_adapters=num_adapters,
        width=draw(sizes(1, max_hidden, around=(64, 128, 256)) if shrink else ranks(maximum=max_rank)),
        rows=rows,
        columns=columns,
        slice_offset=offset,
        slice_size=slice_size,
        dtype=draw(st.sampled_from(dtype)),
        float32_input=draw(st.sampled_from(float32_input)),
        float32_output=(shrink and chosen_layer == "wrapper") or draw(st.sampled_from(float32_output)),
        contents=draw(contents.styles(*style)),
        scale=draw(st.sampled_from((1.0, 0.5, -1.75, 0.0, 0.7))) if shrink else 1.0,
        accumulate=draw(st.sampled_from(accumulating_shrink)) if shrink else draw(st.booleans()),
        weights_4d=draw(st.booleans()),
        placement=draw(placement),
    )


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case. B tokens, L adapters.

    - x: [B, width], the weights' dtype or float32; NaN in rows without adapter
    - weights: [L, (1,) rows, width]; NaN for adapters that are not in the batch, and in
      rows beyond the output's columns
    - indices: int64 [B], the adapter of each row or -1
    """

    case: Case
    x: torch.Tensor
    weights: torch.Tensor
    indices: torch.Tensor


def make_inputs(case: Case, device: torch.device | str, allocate: Allocate | None = None) -> Inputs:
    """Make the tensors of a case on `device`, with `allocate` or in plain memory."""
    allocate = allocate or plain_allocator(device)
    dtype = getattr(torch, case.dtype)
    adapters = case.batch.token_adapters(device)
    shape = (case.batch.num_tokens, case.width)
    x = allocate("inputs", shape, torch.float32 if case.float32_input else dtype)
    x[adapters >= 0] = contents.values(shape, x.dtype, case.contents, case.seed, "x", device)[adapters >= 0]
    one = (1,) if case.weights_4d else ()
    weights = allocate("weights", (case.num_adapters, *one, case.rows, case.width), dtype)
    active = [adapter for adapter in case.batch.active() if adapter != BASE]
    # Rows beyond the output's columns are cut off by the wrapper.
    read = min(case.rows, case.columns)
    used = (len(active), *one, read, case.width)
    weights[active, ..., :read, :] = contents.values(used, dtype, case.contents, case.seed, "w", device, weights=True)
    return Inputs(case, x, weights, allocate("indices", adapters.shape, torch.int64).copy_(adapters))


REGIMES = (
    *BATCH_REGIMES,
    "shrink",
    "expand",
    "expand_slice",
    "padded_columns",
    "truncated_weights",
    "float32_input",
    "float32_output",
    "accumulate",
    "rank_not_power_of_two",
    "refused",
)
"""Every regime that `regimes` names."""


def regimes(case: Case) -> set[str]:
    """Return the names of the regimes that a case is in."""
    rank = case.rows if case.op == "shrink" else case.width
    found = {
        case.op: True,
        "padded_columns": case.op == "expand" and case.rows < case.columns,
        "truncated_weights": case.op == "expand" and case.rows > case.columns,
        "float32_input": case.float32_input,
        "float32_output": case.float32_output,
        "accumulate": case.accumulate,
        "rank_not_power_of_two": rank & (rank - 1) != 0,
        "refused": case.refusal is not None,
    }
    return batch_regimes(case.batch, case.num_adapters) | {name for name, holds in found.items() if holds}
