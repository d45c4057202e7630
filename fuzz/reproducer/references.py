"""What each target's outputs must hold, as plain torch for a script.

The code is run after the launch. It finds the input tensors by their names, each output and, as `<output>_before`, what
it held before. For each output it makes `<output>_expected`, float64, and where rounding is allowed `<output>_written`,
bool: the elements to which that applies, all others must be exact. Where a contract leaves the order of elements open
it sorts them in the output. Elements that may hold anything it takes over from the output.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from kernelfuzz.fuzz.reproducer import literals
from kernelfuzz.oracles.expectation import Expectation
from kernelfuzz.strategies import bgmv, fp8_layout, fused_moe_lora, lora_shrink_expand, moe_lora_align, moe_permute

SIZES = {
    "fused_moe_lora": ("num_adapters", "top_k", "slices", "columns", "column_offset"),
    "moe_lora_align": ("num_adapters", "num_experts", "top_k", "pairs", "block_size", "capacity", "max_blocks"),
    "moe_permute": ("num_experts", "top_k", "pairs"),
}
"""Numbers of a case that the code calls by their names, by target."""


def _start(*names: str) -> str:
    return "".join(f"{name}_expected = {name}_before.double()\n" for name in names)


def _start_rounded(name: str) -> str:
    """As `_start`, for an output that may differ by rounding where it is written."""
    return _start(name) + f"{name}_written = torch.zeros_like({name}, dtype=torch.bool)\n"


def literal_reference(expectation: Expectation, names: Mapping[str, str]) -> str:
    """Return code for outputs of which only the values are known, not how they come about; `names` are the variables of
    the outputs. Raises KernelfuzzError for values that are too many to be written down."""
    code = ""
    for output, expected in expectation.outputs.items():
        name, written, free = names[output], expected.mask("write"), expected.mask("free")
        values = expected.values.to(torch.float64)
        code += f"{name}_written = {literals.expression(written)}\n"
        code += f"{name}_expected = {literals.expression(torch.where(written, values, 0.0))}\n"
        if not bool(written.all()):
            code += f"{name}_expected = {name}_expected.where({name}_written, {name}_before.double())\n"
        if bool(free.any()):
            code += f"{name}_expected = {name}.double().where({literals.expression(free)}, {name}_expected)\n"
    return code


def _bgmv(inputs: bgmv.Inputs) -> str:
    case = inputs.case
    matrix = "weights[adapter, 0]" if case.weights_4d else "weights[adapter]"
    start, size = case.slice_offset, case.written_size
    scale = f"{case.scale!r} * " if case.op == "shrink" and case.scale != 1.0 else ""
    old = f"output_before[token, {start}:{start + size}].double() + " if case.accumulate else ""
    return (
        _start_rounded("output")
        + f"""\
for token, adapter in enumerate(indices.tolist()):
    if adapter >= 0:
        product = {scale}{matrix}[:{size}].double() @ x[token].double()
        output_expected[token, {start}:{start + size}] = {old}product
        output_written[token, {start}:{start + size}] = True
"""
    )


def _lora_shrink_expand(inputs: lora_shrink_expand.Inputs) -> str:
    case = inputs.case
    matrix = "weight[adapter, 0]" if case.weights_4d else "weight[adapter]"
    if case.op == "shrink":
        return (
            _start_rounded("output")
            + f"""\
for s, weight in enumerate(weights):
    for token, adapter in enumerate(token_adapters.tolist()):
        product = {matrix}.double() @ x[token].double() if adapter >= 0 else 0.0
        output_expected[s, token] = {case.scale!r} * product
        output_written[s, token] = adapter >= 0
"""
        )
    old = "output_before[token, start:stop].double() + " if case.add_inputs else ""
    return (
        _start_rounded("output")
        + f"""\
start = {case.column_offset}
for s, weight in enumerate(weights):
    stop = start + weight.shape[-2]
    for token, adapter in enumerate(token_adapters.tolist()):
        if adapter >= 0:
            output_expected[token, start:stop] = {old}{matrix}.double() @ x[s, token].double()
            output_written[token, start:stop] = True
    start = stop
"""
    )


def _fused_moe_lora(inputs: fused_moe_lora.Inputs) -> str:
    case = inputs.case
    row = "token * top_k + choice" if case.mul_routed_weight else "token"
    weight = "topk_weights[token, choice].double() * " if case.mul_routed_weight else ""
    old = "output_before[token, choice, start:stop].double() + " if case.add_inputs else ""
    return (
        _start_rounded("output")
        + f"""\
for token, adapter in enumerate(token_adapters.tolist()):
    if not 0 <= adapter < num_adapters or not adapter_enabled[adapter]:
        continue
    for choice, expert in enumerate(topk_ids[token].tolist()):
        if expert < 0:
            continue
        for s in range(slices):
            start = column_offset + s * columns
            stop = start + columns
            hidden = lora_a[s][adapter, expert].double() @ x[{row}].double()
            delta = {weight}(lora_b[s][adapter, expert].double() @ hidden)
            output_expected[token, choice, start:stop] = {old}delta
            output_written[token, choice, start:stop] = True
"""
    )


def _moe_lora_align(inputs: moe_lora_align.Inputs) -> str:
    expert_of = "expert = int(topk_ids.flatten()[pair])\n"
    if inputs.expert_map is not None:
        expert_of += "        expert = int(expert_map[expert]) if 0 <= expert < num_experts else -1\n"
    return (
        _start("sorted_token_ids", "expert_ids", "num_tokens_post_pad")
        + f"""\
for adapter in range(num_adapters):
    if adapter not in token_adapters.tolist() or not adapter_enabled[adapter]:
        continue  # nothing of this adapter's rows is written
    groups = [[] for expert in range(num_experts)]
    for pair in range(pairs):
        {expert_of}\
        if token_adapters[pair // top_k] == adapter and 0 <= expert < num_experts:
            groups[expert].append(pair)
    tokens, experts = adapter * capacity, adapter * max_blocks  # where the adapter's rows begin
    sorted_token_ids_expected[tokens : tokens + capacity] = pairs  # padding
    expert_ids_expected[experts : experts + max_blocks] = -1
    end = 0
    for expert, group in enumerate(groups):
        begin, end = end, end + -(-len(group) // block_size) * block_size
        sorted_token_ids_expected[tokens + begin : tokens + begin + len(group)] = torch.tensor(group).double()
        expert_ids_expected[experts + begin // block_size : experts + end // block_size] = expert
        # The tokens of a group may stand in any order.
        row = slice(tokens + begin, tokens + end)
        sorted_token_ids[row] = sorted_token_ids[row].sort().values
    num_tokens_post_pad_expected[adapter] = end
"""
    )


def _moe_permute(inputs: moe_permute.PermuteInputs | moe_permute.UnpermuteInputs) -> str:
    if isinstance(inputs, moe_permute.UnpermuteInputs):
        valid = "pairs" if inputs.offsets is None else "int(offsets[-1])"
        return (
            _start_rounded("output")
            + f"""\
output_expected.zero_()
for pair, row in enumerate(inverse.tolist()):
    token, choice = divmod(pair, top_k)
    if row < {valid}:
        output_expected[token] += topk_weights[token, choice].double() * rows[row].double()
        output_written[token] = True
"""
        )
    local = "expert"
    if inputs.expert_map is not None:
        local = "int(expert_map[expert])"
    scale = ""
    if inputs.scale is not None:
        scale = """\
permuted_scale_expected = permuted_scale.double()
for row, pair in enumerate(order):
    permuted_scale_expected[row] = scale[pair // top_k].double()
"""
    names = ("permuted", "offsets", "inverse", "permuted_idx", *(["permuted_scale"] if scale else []))
    return (
        _start(*names)
        + f"""\
experts = [{local} if 0 <= expert < num_experts else -1 for expert in topk_ids.flatten().tolist()]
order = sorted((pair for pair in range(pairs) if experts[pair] >= 0), key=lambda pair: experts[pair])
permuted_expected, permuted_idx_expected = permuted.double(), permuted_idx.double()  # behind these rows: anything
for row, pair in enumerate(order):
    permuted_expected[row] = x[pair // top_k].double()
    permuted_idx_expected[row] = pair
    inverse_expected[pair] = row
for expert in range({inputs.num_local_experts} + 1):
    offsets_expected[expert] = sum(0 <= other < expert for other in experts)
# Pairs without an expert share the positions behind all others, in any order.
without = [pair for pair in range(pairs) if experts[pair] < 0]
inverse[without] = inverse[without].sort().values
inverse_expected[without] = torch.arange(len(order), pairs, device=inverse.device).double()
{scale}"""
    )


_FP8_ONLINE = '''\
def quantised(weights):
    """Quantise each expert's weights so that the largest becomes 448."""
    scale = weights.float().abs().amax((1, 2)) / 448
    return (weights.float() / scale[:, None, None]).to(torch.float8_e4m3fn).view(torch.uint8), scale

'''
_FP8_ONLINE_BLOCKS = f'''\
def quantised(weights):
    """Quantise each block of {fp8_layout.BLOCK} x {fp8_layout.BLOCK} weights so that the largest becomes 448."""
    experts, rows, columns = weights.shape
    scale = torch.empty(experts, -(-rows // {fp8_layout.BLOCK}), -(-columns // {fp8_layout.BLOCK}))
    result = torch.empty(weights.shape)
    for i in range(scale.shape[1]):
        for j in range(scale.shape[2]):
            block = (
                slice(None),
                slice({fp8_layout.BLOCK} * i, {fp8_layout.BLOCK} * (i + 1)),
                slice({fp8_layout.BLOCK} * j, {fp8_layout.BLOCK} * (j + 1)),
            )
            scale[:, i, j] = weights[block].float().abs().amax((1, 2)) / 448
            result[block] = weights[block].float() / scale[:, i, j, None, None]
    return result.to(torch.float8_e4m3fn).view(torch.uint8), scale

'''
_FP8_ONE_SCALE = """\
# w13 comes with a scale for each half and gets one for both, the larger.
larger = w13_scale.amax(1)
ratios = (w13_scale / larger[:, None]).repeat_interleave({half}, 1)[:, :, None]
w13_new = (w13.view(torch.float8_e4m3fn).float() * ratios).to(torch.float8_e4m3fn).view(torch.uint8)
w13_scale_new = larger
"""


def _fp8_layout(inputs: fp8_layout.Inputs) -> str:
    case = inputs.case
    code = "w13_new, w2_new, w13_scale_new, w2_scale_new = w13, w2, w13_scale, w2_scale\n"
    if inputs.w13_scale is None:
        code = _FP8_ONLINE_BLOCKS if case.scales == "block" else _FP8_ONLINE
        code += "w13_new, w13_scale_new = quantised(w13)\nw2_new, w2_scale_new = quantised(w2)\n"
    elif case.entry == "checkpoint" and inputs.w13_scale.shape[1:] == (2,):
        code += _FP8_ONE_SCALE.format(half=case.intermediate)
    if case.layout == "transposed":
        code += "w13_new, w2_new = w13_new.transpose(1, 2), w2_new.transpose(1, 2)\n"
        if case.scales != "per_tensor":
            code += (
                "w13_scale_new, w2_scale_new = "
                "(s.transpose(1, 2) if s.ndim == 3 else s for s in (w13_scale_new, w2_scale_new))\n"
            )
    if case.layout == "gate_up_swapped":
        code += _gate_up_swapped(case)
    names = ("w13", "w2", "w13_scale", "w2_scale")
    results = "".join(f"{name}_result_expected = {name}_new.double()\n" for name in names)
    return code + results


def _gate_up_swapped(case: fp8_layout.Case) -> str:
    """Return code that exchanges the halves of w13 and pads the intermediate size."""
    missing = case.padded_intermediate - case.intermediate
    code = "gate, up = w13_new.chunk(2, dim=1)\n"
    if missing:
        code += f"gate, up = (torch.nn.functional.pad(half, (0, 0, 0, {missing})) for half in (gate, up))\n"
        code += f"w2_new = torch.nn.functional.pad(w2_new, (0, {missing}))\n"
    code += "w13_new = torch.cat([up, gate], 1)\n"
    if case.scales == "block":
        least = repr(fp8_layout.MINIMUM_SCALE)
        code += f"w13_scale_new = torch.cat(w13_scale_new.chunk(2, dim=1)[::-1], 1).clamp_min({least})\n"
        code += f"w2_scale_new = w2_scale_new.clamp_min({least})\n"
    return code


REFERENCES: dict[str, Callable[[Any], str]] = {
    "bgmv": _bgmv,
    "fp8_layout": _fp8_layout,
    "fused_moe_lora": _fused_moe_lora,
    "lora_shrink_expand": _lora_shrink_expand,
    "moe_lora_align": _moe_lora_align,
    "moe_permute": _moe_permute,
}
"""By target: from the inputs of a case to the code."""
