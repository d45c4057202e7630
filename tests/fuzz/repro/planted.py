"""Kernels in plain torch, without kernelfuzz: right, or with the bug that $PLANTED_BUG names."""

import ctypes
import os
import time
from pathlib import Path

import torch

BUG = os.environ.get("PLANTED_BUG", "")


def bgmv(inputs, outputs):
    case, output = inputs.case, outputs["output"]
    if case.refusal is not None and BUG != "accepts":
        raise RuntimeError("something else" if BUG == "other_words" else case.refusal)
    columns = slice(case.slice_offset, case.slice_offset + case.written_size)
    if BUG == "stray_output":
        output.as_strided((1,), (1,), output.storage_offset() + output.numel()).fill_(7)
    if BUG == "stray_input":
        inputs.x.as_strided((1,), (1,), inputs.x.storage_offset() - 1).fill_(7)
    if BUG == "mutates":
        inputs.x[inputs.indices < 0] = -inputs.x[inputs.indices < 0]
    if BUG == "raises":
        raise ValueError("no such tile")
    if BUG == "exits":
        os._exit(3)
    if BUG == "hangs":
        time.sleep(3600)
    if BUG == "reads_too_far":
        ctypes.string_at(inputs.weights.data_ptr() + inputs.weights.numel() * inputs.weights.element_size(), 1)
    if BUG == "races":
        with Path(os.environ["FAKE_SANITIZER_LOG"]).open("a") as log:
            log.write("========= Error: Race reported between Write access at k::bgmv_kernel(int *)+0x90\n=========\n")
    scratch = torch.empty(output.shape[1])
    for token, adapter in enumerate(inputs.indices.tolist()):
        if adapter < 0:
            if BUG == "base_row":
                output[token] = 0
            continue
        weights = inputs.weights[adapter].view(case.rows, case.width)[: case.written_size]
        result = case.scale * (weights.float() @ inputs.x[token].float())
        if BUG == "wrong":
            result[0] += 1
        if BUG == "scratch":
            result += scratch[0]
        if BUG == "poison":
            result += 0 * inputs.weights[-1].float().sum()
        if case.accumulate:
            result += output[token, columns]
        if BUG == "last_column":
            result[-1] = output[token, columns][-1]
        output[token, columns] = result


def align(inputs, outputs):
    case = inputs.case
    if case.block_size <= 0 and BUG != "accepts":
        raise RuntimeError("block_size should be greater than 0.")
    if case.num_experts > 992 and BUG != "accepts":
        raise RuntimeError("padded_num_experts must be less than 1024")
    if BUG == "accepts":
        return
    tokens = outputs["sorted_token_ids"].view(case.num_adapters, case.capacity)
    blocks = outputs["expert_ids"].view(case.num_adapters, case.max_blocks)
    flat = inputs.topk_ids.flatten().tolist()
    if inputs.expert_map is not None:
        flat = [int(inputs.expert_map[e]) if 0 <= e < case.num_experts else -1 for e in flat]
    adapters = inputs.token_adapters.repeat_interleave(case.top_k).tolist()
    if BUG == "mutates":
        inputs.topk_ids[0, 0] += 1
    if BUG == "stray_output":
        outputs["expert_ids"].as_strided((1,), (1,), blocks.storage_offset() + blocks.numel() + 2).fill_(7)
    if BUG == "raises":
        raise ValueError("no such tile")
    entries = inputs.lora_ids[: -1 if BUG == "last_entry" else None].tolist()
    for row in entries:
        if not 0 <= row < case.num_adapters or (not inputs.adapter_enabled[row] and BUG != "disabled"):
            continue
        pairs, experts = [], []
        for expert in range(case.num_experts):
            group = [i for i, e in enumerate(flat) if e == expert and adapters[i] == row]
            group = group[::-1] + [case.pairs] * (-len(group) % case.block_size)  # any order will do
            pairs += group
            experts += [expert] * (len(group) // case.block_size)
        total = len(pairs)
        pairs += [case.pairs] * (case.capacity - total)
        experts += [-1] * (case.max_blocks - len(experts))
        if BUG == "swapped":
            pairs[0], pairs[case.block_size] = pairs[case.block_size], pairs[0]
        tokens[row] = torch.tensor(pairs)
        blocks[row] = torch.tensor(experts)
        outputs["num_tokens_post_pad"][row] = total - (BUG == "short")
