"""The oracle of `bgmv`.

Products accumulate in float32. A float32 input may be rounded to the narrower dtype of weights or output first; the
product may be rounded to the output's dtype, and its sum with the old output once more.
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
from kernelfuzz.strategies import contents
from kernelfuzz.strategies.batches import BASE
from kernelfuzz.strategies.bgmv import Inputs

CLAUSES = (
    Clause("product", "write"),
    Clause("row_without_adapter", "keep"),
    Clause("columns_outside_weights", "keep"),
    Clause("overflow", "free"),
    Clause("row_without_adapter_is_zero", "write"),
)
_PRODUCT, _NO_ADAPTER, _OUTSIDE, _OVERFLOW, _ZERO = range(len(CLAUSES))


def outputs(inputs: Inputs) -> OutputSpecs:
    """Return the one output, [tokens, columns]; it starts from values where the call adds to it, shrink else from
    zeros."""
    case = inputs.case
    dtype = torch.float32 if case.float32_output else getattr(torch, case.dtype)
    shape = (case.batch.num_tokens, case.columns)
    initial = None
    if case.accumulate:
        initial = contents.values(shape, dtype, "signed", case.seed, "output", inputs.x.device)
    elif case.op == "shrink":
        initial = torch.zeros(shape, dtype=dtype, device=inputs.x.device)
    return {"output": OutputSpec(shape, dtype, initial=initial, axes=Axes("token", "column"))}


def expect(inputs: Inputs, initial: dict[str, torch.Tensor]) -> Expectation:
    """Return what the output must hold; `initial` is its content before the launch."""
    case = inputs.case
    if case.refusal is not None:
        return Expectation(error=ExpectedError("shapes_are_checked", case.refusal))
    before = initial["output"]
    values = torch.zeros(before.shape, dtype=torch.float64, device=before.device)
    bound = torch.zeros_like(values)
    region = torch.full(before.shape, _OUTSIDE, dtype=torch.uint8, device=before.device)
    # A shrink that starts from zeros may write zeros, of either sign.
    starts_from_zeros = case.op == "shrink" and not case.accumulate
    region[inputs.indices < 0] = _ZERO if starts_from_zeros else _NO_ADAPTER
    columns = slice(case.slice_offset, case.slice_offset + case.written_size)
    for adapter in set(case.batch.active()) - {BASE}:
        tokens = (inputs.indices == adapter).nonzero().flatten()
        product, overflow = _product(inputs, adapter, tokens, before[tokens, columns])
        values[tokens, columns] = product.value
        bound[tokens, columns] = product.error
        region[tokens, columns] = torch.where(overflow, _OVERFLOW, _PRODUCT).to(torch.uint8)
    return Expectation({"output": ExpectedOutput(CLAUSES, region, values, bound)})


def _product(
    inputs: Inputs, adapter: int, tokens: torch.Tensor, before: torch.Tensor
) -> tuple[rounding.Approximation, torch.Tensor]:
    """Return what the rows of one adapter must hold, [tokens, columns], and where a step may overflow."""
    case = inputs.case
    x = rounding.exact(inputs.x[tokens])
    if case.float32_input:
        x = rounding.cast(x, inputs.weights.dtype)
    overflow = x.may_overflow(inputs.weights.dtype).any(1, keepdim=True)
    weights = inputs.weights[adapter].view(case.rows, case.width)[: case.written_size]
    product = rounding.dot("bk,nk->bn", x, rounding.exact(weights), case.width)
    if case.op == "shrink":
        scale = torch.tensor(case.scale, dtype=torch.float32, device=before.device)
        product = rounding.multiply(product, rounding.exact(scale))
    product = rounding.cast(product, before.dtype)
    overflow = overflow | product.may_overflow(before.dtype)
    if case.accumulate:
        product = rounding.cast(rounding.add(rounding.exact(before), product), before.dtype)
        overflow = overflow | product.may_overflow(before.dtype)
    return product, overflow
