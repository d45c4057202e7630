"""The oracle of `fused_moe_lora`.

Operands are used in their own dtype and products accumulate in float32; the rank-sized intermediate may be rounded to
the output's dtype once per split-K part, the result once, and its sum with the old output once.
"""

from dataclasses import dataclass

import torch

from kernelfuzz.oracles import rounding
from kernelfuzz.oracles.expectation import (
    Axes,
    Clause,
    Expectation,
    ExpectedError,
    ExpectedOutput,
    OutputSpec,
    OutputSpecs,
)
from kernelfuzz.strategies import contents
from kernelfuzz.strategies.fused_moe_lora import Case, Inputs
from kernelfuzz.strategies.layouts import Layout

CLAUSES = (
    Clause("lora_delta", "write"),
    Clause("base_model_row", "keep"),
    Clause("adapter_out_of_range_row", "keep"),
    Clause("disabled_adapter_row", "keep"),
    Clause("unrouted_choice", "keep"),
    Clause("columns_of_other_ranks", "keep"),
    Clause("overflow", "free"),
)
_DELTA, _BASE, _BEYOND, _DISABLED, _UNROUTED, _OTHER_COLUMNS, _OVERFLOW = range(len(CLAUSES))


def outputs(inputs: Inputs) -> OutputSpecs:
    """Return the one output, [tokens, top_k, columns]; with add_inputs it starts from seeded values."""
    case = inputs.case
    shape = (case.batch.num_tokens, case.top_k, case.output_columns)
    dtype = getattr(torch, case.dtype)
    initial = None
    if case.add_inputs:
        initial = contents.values(shape, dtype, "signed", case.seed, "output", inputs.x.device)
    axes = Axes(f"pair (token · {case.top_k} + choice)", "column, slice by slice", block=case.columns)
    return {"output": OutputSpec(shape, dtype, Layout(row_gap=case.output_gap), initial, axes)}


def expect(inputs: Inputs, initial: dict[str, torch.Tensor]) -> Expectation:
    """Return what the output must hold; `initial` is its content before the launch."""
    case = inputs.case
    if case.fully_sharded and not case.add_inputs:
        return Expectation(error=ExpectedError("fully_sharded_must_add_inputs", "add_inputs=False"))
    before = initial["output"]
    values = torch.zeros(before.shape, dtype=torch.float64, device=before.device)
    bound = torch.zeros_like(values)
    region = _regions(case, before)

    served = _served(inputs)
    pairs = served.pairs
    for s in range(case.slices):
        start = case.column_offset + s * case.columns
        columns = slice(start, start + case.columns)
        delta, overflow = _delta(inputs, s, served)
        if case.add_inputs:
            old = rounding.exact(before.flatten(0, 1)[pairs, columns])
            delta = rounding.cast(rounding.add(old, delta), before.dtype)
            overflow = overflow | delta.may_overflow(before.dtype)
        values.flatten(0, 1)[pairs, columns] = delta.value
        bound.flatten(0, 1)[pairs, columns] = delta.error
        region.flatten(0, 1)[pairs, columns] = torch.where(overflow, _OVERFLOW, _DELTA).to(torch.uint8)
    return Expectation({"output": ExpectedOutput(CLAUSES, region, values, bound)})


@dataclass(frozen=True)
class _Served:
    """The pairs that get a contribution, as indices, int64 [pairs] each, on the device."""

    pairs: torch.Tensor
    tokens: torch.Tensor
    adapters: torch.Tensor
    experts: torch.Tensor


def _served(inputs: Inputs) -> _Served:
    """Find the pairs on the CPU, where it takes no waiting for the device, and copy them in one go."""
    case = inputs.case
    pairs = inputs.served_pairs().flatten().nonzero().flatten()
    tokens = pairs // case.top_k
    columns = (pairs, tokens, case.batch.token_adapters()[tokens], inputs.topk_ids.flatten()[pairs])
    return _Served(*torch.stack(columns).to(inputs.x.device, non_blocking=True))


def _delta(inputs: Inputs, s: int, served: _Served) -> tuple[rounding.Approximation, torch.Tensor]:
    """Return the contribution of slice `s` to the served pairs, [pairs, columns], and where a step may overflow."""
    case = inputs.case
    dtype = inputs.x.dtype
    x = rounding.exact(inputs.x[served.pairs if case.mul_routed_weight else served.tokens])
    a = rounding.exact(inputs.lora_a[s][served.adapters, served.experts])
    b = rounding.exact(inputs.lora_b[s][served.adapters, served.experts])

    parts = case.shrink.split_k
    hidden = rounding.dot("pk,prk->pr", x, a, case.hidden)
    absolute = rounding.Approximation(torch.einsum("pk,prk->pr", x.value.abs(), a.value.abs()), hidden.error)
    hidden = rounding.cast(hidden, dtype, parts=absolute, count=parts)
    overflow = (absolute if parts > 1 else hidden).may_overflow(dtype).any(1, keepdim=True)

    delta = rounding.dot("pr,pnr->pn", hidden, b, case.rank)
    if case.mul_routed_weight:
        weights = rounding.exact(inputs.topk_weights.flatten()[served.pairs, None])
        delta = rounding.multiply(delta, weights)
    delta = rounding.cast(delta, dtype)
    return delta, overflow | delta.may_overflow(dtype)


def _regions(case: Case, output: torch.Tensor) -> torch.Tensor:
    """Return the clause of each element that no contribution is written to."""
    clauses = [_row_clause(case, segment.adapter) for segment in case.batch.segments for _ in range(segment.length)]
    rows = torch.tensor(clauses, dtype=torch.uint8).to(output.device, non_blocking=True)
    region = rows[:, None, None].expand(output.shape).clone()
    region[:, :, : case.column_offset] = _OTHER_COLUMNS
    return region


def _row_clause(case: Case, adapter: int) -> int:
    if adapter < 0:
        return _BASE
    if adapter >= case.num_adapters:
        return _BEYOND
    return _DISABLED if adapter in case.disabled else _UNROUTED
