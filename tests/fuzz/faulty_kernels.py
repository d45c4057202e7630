"""Kernels in plain torch: `bgmv` and `moe_lora_align` are right, the others commit one fault each."""

import torch

from kernelfuzz.kernels.base import UnsupportedCaseError, WrongResultError
from kernelfuzz.kernels.interpreter import OutOfBoundsError
from kernelfuzz.strategies.alignment import align_rows
from kernelfuzz.strategies.errors import KernelfuzzError


def bgmv(inputs, outputs):
    """Right for the operator and the wrapper, but it refuses nothing."""
    _bgmv(inputs, outputs, lambda x, weights, _: weights @ x)


def moe_lora_align(inputs, outputs):
    """Right without an expert map, but it refuses nothing."""
    case = inputs.case
    sorted_token_ids = outputs["sorted_token_ids"].view(case.num_adapters, case.capacity)
    expert_ids = outputs["expert_ids"].view(case.num_adapters, case.max_blocks)
    adapters = inputs.token_adapters.repeat_interleave(case.top_k)
    sizes = (case.num_adapters, case.num_experts, case.block_size, case.capacity)
    aligned = align_rows(inputs.topk_ids.long().flatten()[None], adapters, *sizes)
    for adapter in inputs.lora_ids[: case.num_adapters + 1].tolist():
        if 0 <= adapter < case.num_adapters and inputs.adapter_enabled[adapter]:
            sorted_token_ids[adapter] = aligned.tokens[0, adapter]
            expert_ids[adapter] = aligned.experts[0, adapter]
            outputs["num_tokens_post_pad"][adapter] = aligned.totals[0, adapter]


def _bgmv(inputs, outputs, product):
    """`product` takes x and the weights of a token's adapter, both float32, and the adapter."""
    case, output = inputs.case, outputs["output"]
    weights = inputs.weights.flatten(0, -3).float()[:, : case.written_size]
    columns = slice(case.slice_offset, case.slice_offset + case.written_size)
    for token, adapter in enumerate(inputs.indices.tolist()):
        if adapter >= 0:
            result = case.scale * product(inputs.x[token].float(), weights[adapter], adapter)
            if case.accumulate:
                result += output[token, columns]
            output[token, columns] = result


# Faults in the numbers.


def last_k_left_out(inputs, outputs):
    _bgmv(inputs, outputs, lambda x, weights, _: weights[:, :-1] @ x[:-1])


def bfloat16_accumulator(inputs, outputs):
    def product(x, weights, adapter):
        total = torch.zeros(weights.shape[0], dtype=torch.bfloat16)
        for k in range(x.numel()):
            total = (total.float() + weights[:, k] * x[k]).bfloat16()
        return total.float()

    _bgmv(inputs, outputs, product)


def sum_over_every_adapter(inputs, outputs):
    """What is not the token's own adapter is multiplied by zero: right unless it is read as NaN."""
    every = inputs.weights.float()

    def product(x, weights, adapter):
        chosen = torch.zeros(every.shape[0]).index_fill(0, torch.tensor(adapter), 1.0)
        return torch.einsum("l,lnk,k->n", chosen, every, x)

    _bgmv(inputs, outputs, product)


def nan(inputs, outputs):
    bgmv(inputs, outputs)
    outputs["output"][0, 0] = torch.nan


def one_element_off(inputs, outputs):
    bgmv(inputs, outputs)
    outputs["output"][0, 0] += 0.25


# Faults in where it writes.


def last_column_unwritten(inputs, outputs):
    before = outputs["output"][:, -1].clone()
    bgmv(inputs, outputs)
    outputs["output"][:, -1] = before


def base_row_zeroed(inputs, outputs):
    bgmv(inputs, outputs)
    outputs["output"][inputs.indices < 0] = 0


def base_row_filled_with_its_first_element(inputs, outputs):
    """The first element stays as it was, and so does every other one that held the same bits."""
    bgmv(inputs, outputs)
    row = outputs["output"][inputs.indices < 0][0]
    outputs["output"][inputs.indices < 0] = row[0].expand_as(row)


def element_after_the_output(inputs, outputs):
    bgmv(inputs, outputs)
    _outside(outputs["output"], outputs["output"].numel())


def element_before_the_output(inputs, outputs):
    bgmv(inputs, outputs)
    _outside(outputs["output"], -1)


def element_after_an_input(inputs, outputs):
    bgmv(inputs, outputs)
    _outside(inputs.x, inputs.x.numel())


def _outside(tensor, index):
    tensor.as_strided((1,), (1,), tensor.storage_offset() + index).zero_()


def input_scaled_in_place(inputs, outputs):
    bgmv(inputs, outputs)
    inputs.x.mul_(2)


def nan_of_an_input_replaced_by_another(inputs, outputs):
    """Only a comparison of bits sees it."""
    bgmv(inputs, outputs)
    inputs.x[inputs.indices < 0] = -inputs.x[inputs.indices < 0]


def interpreted_store_out_of_bounds(inputs, outputs):
    """What the mended interpreter raises in the place of such a store."""
    raise OutOfBoundsError(
        access="store",
        kernel="_expand",
        program=(0, 0, 0),
        bad_lanes=1,
        lanes=32,
        argument="output",
        shape=tuple(outputs["output"].shape),
        offset=64,
        extent=64,
    )


# Errors.


def nothing(inputs, outputs):
    """Refuses nothing and writes nothing."""


def failing_host_code(inputs, outputs):
    def allocate():
        raise ValueError("negative dimension\nin the second line")

    allocate()


def result_of_another_form(inputs, outputs):
    bgmv(inputs, outputs)
    outputs["output"][0, 0] += 1  # what was written before does not count
    raise WrongResultError("output", "form_of_result", "output is float32 [3] on cpu and must be float32 [4] on cpu")


def without_what_it_needs(inputs, outputs):
    raise KernelfuzzError("kernelfuzz does not load it")


def refusal_of_shapes(inputs, outputs):
    raise RuntimeError(f"Expected: {inputs.case.refusal} (operator of this test)")


def not_offered(inputs, outputs):
    raise UnsupportedCaseError("ranks above 8 are not offered")


# Faults in integers.


def total_one_short(inputs, outputs):
    moe_lora_align(inputs, outputs)
    outputs["num_tokens_post_pad"][0] -= 1


def groups_reversed(inputs, outputs):
    """Not a fault: inside an expert's group any order will do, of tokens and padding alike."""
    moe_lora_align(inputs, outputs)
    case = inputs.case
    for row, used in enumerate(outputs["num_tokens_post_pad"].tolist()):
        experts = outputs["expert_ids"].view(case.num_adapters, case.max_blocks)[row, : used // case.block_size]
        start = 0
        for expert in experts.unique_consecutive().tolist():
            length = int((experts == expert).sum()) * case.block_size
            group = outputs["sorted_token_ids"].view(case.num_adapters, case.capacity)[row, start : start + length]
            group.copy_(group.flip(0))
            start += length


def first_tokens_of_two_groups_swapped(inputs, outputs):
    moe_lora_align(inputs, outputs)
    experts = outputs["expert_ids"]
    second = int((experts != experts[0]).nonzero()[0]) * inputs.case.block_size
    outputs["sorted_token_ids"][[0, second]] = outputs["sorted_token_ids"][[second, 0]]
