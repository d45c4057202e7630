"""The oracle of `lora_shrink` and `lora_expand`.

shrink accumulates in float32, scales and stores float32, in any split of K. expand may round its input to the weights'
dtype, accumulates in float32, rounds the result once to the output's dtype and its sum with the old output once.
"""

import torch

from kernelfuzz.oracles import rounding
from kernelfuzz.oracles.expectation import Axes, Clause, Expectation, ExpectedOutput, OutputSpec, OutputSpecs
from kernelfuzz.strategies import contents
from kernelfuzz.strategies.batches import BASE
from kernelfuzz.strategies.lora_shrink_expand import Inputs

SHRINK_CLAUSES = (
    Clause("product", "write"),
    Clause("base_model_row_is_zero", "write"),
    Clause("no_lora_in_batch", "free"),
)
_PRODUCT, _ZERO, _NO_LORA = range(len(SHRINK_CLAUSES))
EXPAND_CLAUSES = (
    Clause("product", "write"),
    Clause("base_model_row", "keep"),
    Clause("columns_outside_slices", "keep"),
    Clause("overflow", "free"),
)
_EXPANDED, _BASE_ROW, _OUTSIDE, _OVERFLOW = range(len(EXPAND_CLAUSES))


def outputs(inputs: Inputs) -> OutputSpecs:
    """Return shrink's float32 [slices, tokens, rank], or expand's [tokens, columns] in the weights' dtype."""
    case = inputs.case
    tokens = case.batch.num_tokens
    if case.op == "shrink":
        axes = Axes(f"slice · {tokens} + token", "rank")
        return {"output": OutputSpec((len(case.widths), tokens, case.rank), torch.float32, axes=axes)}
    shape = (tokens, case.column_offset + sum(case.widths) + case.column_tail)
    dtype = getattr(torch, case.dtype)
    initial = None
    if case.add_inputs:
        initial = contents.values(shape, dtype, "signed", case.seed, "output", inputs.x.device)
    return {"output": OutputSpec(shape, dtype, initial=initial, axes=Axes("token", "column"))}


def expect(inputs: Inputs, initial: dict[str, torch.Tensor]) -> Expectation:
    """Return what the output must hold; `initial` is its content before the launch."""
    before = initial["output"]
    expected = _shrink(inputs, before) if inputs.case.op == "shrink" else _expand(inputs, before)
    return Expectation({"output": expected})


def _served(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens that have an adapter, as indices, and their adapters, int64 on the device.

    They are found on the CPU, where it takes no waiting for the device, and copied in one go.
    """
    adapters = inputs.case.batch.token_adapters()
    tokens = (adapters != BASE).nonzero().flatten()
    tokens, adapters = torch.stack([tokens, adapters[tokens]]).to(inputs.x.device, non_blocking=True)
    return tokens, adapters


def _weight(inputs: Inputs, s: int, adapters: torch.Tensor) -> rounding.Approximation:
    """Return the weights of slice `s` for each token, [tokens, rows, columns]."""
    weight = inputs.weights[s]
    return rounding.exact((weight.squeeze(1) if weight.ndim == 4 else weight)[adapters])


def _shrink(inputs: Inputs, output: torch.Tensor) -> ExpectedOutput:
    case = inputs.case
    tokens, adapters = _served(inputs)
    values = torch.zeros(output.shape, dtype=torch.float64, device=output.device)
    bound = torch.zeros_like(values)
    region = torch.full(output.shape, _NO_LORA if case.no_lora else _ZERO, dtype=torch.uint8, device=output.device)
    scale = rounding.exact(torch.full((), case.scale, dtype=torch.float32, device=output.device))
    x = rounding.exact(inputs.x[tokens])
    for s in range(len(case.widths)):
        a = _weight(inputs, s, adapters)
        product = rounding.dot("mk,mrk->mr", x, a, case.hidden, extra=case.split_k)
        product = rounding.multiply(product, scale)
        values[s, tokens] = product.value
        bound[s, tokens] = product.error
        region[s, tokens] = _PRODUCT
    return ExpectedOutput(SHRINK_CLAUSES, region, values, bound)


def _expand(inputs: Inputs, output: torch.Tensor) -> ExpectedOutput:
    case = inputs.case
    tokens, adapters = _served(inputs)
    values = torch.zeros(output.shape, dtype=torch.float64, device=output.device)
    bound = torch.zeros_like(values)
    rows = torch.where(inputs.token_adapters[:, None] == BASE, _BASE_ROW, _OUTSIDE).to(torch.uint8)
    region = rows.expand(output.shape).clone()
    start = case.column_offset
    for s, width in enumerate(case.widths):
        columns = slice(start, start + width)
        start += width
        y = rounding.exact(inputs.x[s, tokens])
        if case.float32_input:
            y = rounding.cast(y, output.dtype)
        overflow = y.may_overflow(output.dtype).any(1, keepdim=True)
        b = _weight(inputs, s, adapters)
        product = rounding.cast(rounding.dot("mr,mnr->mn", y, b, case.rank), output.dtype)
        if case.add_inputs:
            overflow = overflow | product.may_overflow(output.dtype)
            product = rounding.cast(rounding.add(rounding.exact(output[tokens, columns]), product), output.dtype)
        values[tokens, columns] = product.value
        bound[tokens, columns] = product.error
        region[tokens, columns] = torch.where(overflow | product.may_overflow(output.dtype), _OVERFLOW, _EXPANDED).to(
            torch.uint8
        )
    return ExpectedOutput(EXPAND_CLAUSES, region, values, bound)
