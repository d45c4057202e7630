"""The oracle of `moe_permute`.

permute: rows and indices are exact; where pairs without an expert go, behind all others, is free. unpermute: products
with the float32 weights accumulate in float32 and are rounded to the rows' dtype once.
"""

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
from kernelfuzz.strategies.moe_permute import PermuteInputs, UnpermuteInputs, sorted_pairs

ROW_CLAUSES = (Clause("valid_row", "write"), Clause("row_without_expert", "free"))
SOURCE_CLAUSES = (Clause("source_pair", "write"), Clause("row_without_expert", "free"))
POSITION_CLAUSES = (Clause("position", "write"), Clause("position_without_expert", "write"))
OFFSET_CLAUSES = (Clause("offset", "write"),)
SUM_CLAUSES = (Clause("weighted_sum", "write"), Clause("token_without_expert", "write"))
"""The clauses of each output: first what holds where there is an expert, then what holds where there is none."""


def outputs(inputs: PermuteInputs | UnpermuteInputs) -> OutputSpecs:
    """Return the outputs; T tokens, k choices, H hidden, G scale groups.

    permute: permuted [T * k, H] in x's dtype, offsets int64 [local experts + 1], inverse and permuted_idx int32
    [T * k], with a scale permuted_scale float32 [T * k, G]. unpermute: output [T, H] in the rows' dtype.
    """
    case = inputs.case
    if isinstance(inputs, UnpermuteInputs):
        axes = Axes("token", "hidden")
        return {"output": OutputSpec((case.tokens, case.hidden), inputs.rows.dtype, axes=axes)}
    specs = {
        "permuted": OutputSpec((case.pairs, case.hidden), inputs.x.dtype, axes=Axes("permuted row", "hidden")),
        "offsets": OutputSpec((inputs.num_local_experts + 1,), torch.int64, axes=Axes("", "local expert")),
        "inverse": OutputSpec((case.pairs,), torch.int32, axes=Axes("token", "choice", case.top_k)),
        "permuted_idx": OutputSpec((case.pairs,), torch.int32, axes=Axes("", "permuted row")),
    }
    if inputs.scale is not None:
        axes = Axes("permuted row", "scale group")
        specs["permuted_scale"] = OutputSpec((case.pairs, case.scale_groups), torch.float32, axes=axes)
    return specs


def expect(inputs: PermuteInputs | UnpermuteInputs, initial: dict[str, torch.Tensor]) -> Expectation:
    """Return what the outputs must hold. Nothing waits for the device."""
    del initial  # nothing is read before it is written
    if inputs.case.refused:
        return Expectation(error=ExpectedError("rows_are_whole_vectors", "align to 16B"))
    if isinstance(inputs, UnpermuteInputs):
        return Expectation({"output": _sums(inputs)})
    return Expectation(_permutation(inputs))


def _permutation(inputs: PermuteInputs) -> dict[str, ExpectedOutput]:
    case = inputs.case
    pairs = sorted_pairs(inputs.topk_ids, inputs.expert_map, case.num_experts, inputs.num_local_experts)
    flat = torch.arange(case.pairs, device=pairs.source.device)
    behind = (flat >= pairs.offsets[-1]).to(torch.uint8)

    def rows(of: torch.Tensor, wide: torch.dtype) -> ExpectedOutput:
        values = of[pairs.source // case.top_k].to(wide)
        return ExpectedOutput(ROW_CLAUSES, behind[:, None].expand(values.shape), values)

    expected = {
        "permuted": rows(inputs.x, torch.float64 if inputs.x.is_floating_point() else torch.int64),
        "offsets": ExpectedOutput(OFFSET_CLAUSES, torch.zeros_like(pairs.offsets, dtype=torch.uint8), pairs.offsets),
        "inverse": ExpectedOutput(
            POSITION_CLAUSES,
            (~pairs.valid).to(torch.uint8),
            pairs.inverse,
            # Pairs without an expert share the positions behind all others, in any order.
            groups=torch.where(pairs.valid, flat, case.pairs),
        ),
        "permuted_idx": ExpectedOutput(SOURCE_CLAUSES, behind, pairs.source),
    }
    if inputs.scale is not None:
        expected["permuted_scale"] = rows(inputs.scale, torch.float64)
    return expected


def _sums(inputs: UnpermuteInputs) -> ExpectedOutput:
    """Return what every token's experts make together, [tokens, hidden]; exactly 0 where it has none."""
    case = inputs.case
    positions = inputs.inverse.long().view(case.tokens, case.top_k)
    count = case.pairs if inputs.offsets is None else inputs.offsets[-1]
    valid = positions < count
    rows = torch.where(valid[:, :, None], inputs.rows[positions], 0)
    total = rounding.dot("tk,tkh->th", rounding.exact(inputs.topk_weights), rounding.exact(rows), case.top_k)
    if inputs.rows.dtype != torch.float32:
        total = rounding.cast(total, inputs.rows.dtype)
    without = ~valid.any(1, keepdim=True)
    region = without.to(torch.uint8).expand(total.value.shape)
    return ExpectedOutput(SUM_CLAUSES, region, total.value, torch.where(without, 0.0, total.error))
