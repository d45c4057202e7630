"""The runs of test_vllm_binary.py, which starts this file in a process of its own: what is registered with torch stays.

    python vllm_stand_in.py TREE RESULTS

loads vLLM's `moe_lora_align` of TREE, or of the installed vLLM where that is empty, with a library that registers the
operator in plain Python for the CPU, and writes as JSON what was loaded and how the adapter did on drawn cases.
"""

import json
import sys
from pathlib import Path

import torch
from hypothesis import Phase, given, settings

from kernelfuzz.fuzz.launch import Conditions, judge_alone
from kernelfuzz.fuzz.targets import get_target
from kernelfuzz.kernels.vllm.moe_lora_align import load
from kernelfuzz.strategies.moe_lora_align import regimes

CPU = torch.device("cpu")
CASES = 120
# As the libraries of 0.19.1 to 0.33.0 spell it, but for the white space.
SCHEMA = (
    "moe_lora_align_block_size(Tensor topk_ids, Tensor token_lora_mapping, int num_experts, int block_size,"
    " int max_loras, int max_num_tokens_padded, int max_num_m_blocks, Tensor !sorted_token_ids, Tensor !experts_ids,"
    " Tensor !num_tokens_post_pad, Tensor !adapter_enabled, Tensor !lora_ids, Tensor? maybe_expert_map) -> ()"
)

libraries: list[torch.library.Library] = []
loaded: list[str] = []
seen: set[tuple[str, bool]] = set()


def load_library(path):
    loaded.append(path)
    fragment = torch.library.Library("_moe_C", "FRAGMENT")
    fragment.define(SCHEMA)
    fragment.impl("moe_lora_align_block_size", align, "CPU")
    libraries.append(fragment)


def align(
    topk_ids,
    token_lora_mapping,
    num_experts,
    block_size,
    max_loras,
    max_num_tokens_padded,
    max_num_m_blocks,
    sorted_token_ids,
    expert_ids,
    num_tokens_post_pad,
    adapter_enabled,
    lora_ids,
    expert_map,
):
    seen.add((str(topk_ids.dtype), expert_map is not None))
    if block_size <= 0:
        raise RuntimeError("block_size should be greater than 0. ")
    if num_experts > 992:
        raise RuntimeError("padded_num_experts must be less than 1024")
    experts = topk_ids.flatten().tolist()
    adapters = token_lora_mapping.repeat_interleave(topk_ids.shape[1]).tolist()
    for row in lora_ids[: max_loras + 1].tolist():
        if not 0 <= row < max_loras or not adapter_enabled[row]:
            continue
        groups = [[] for _ in range(num_experts)]
        for pair, (adapter, expert) in enumerate(zip(adapters, experts)):
            local = expert if expert_map is None or not 0 <= expert < num_experts else int(expert_map[expert])
            if adapter == row and 0 <= local < num_experts:
                groups[local].append(pair)
        tokens, blocks = [], []
        for expert, group in enumerate(groups):
            padded = group + [len(experts)] * (-len(group) % block_size)
            tokens += padded
            blocks += [expert] * (len(padded) // block_size)
        fill(sorted_token_ids, row, max_num_tokens_padded, tokens, len(experts))
        fill(expert_ids, row, max_num_m_blocks, blocks, -1)
        num_tokens_post_pad[row] = len(tokens)


def fill(output, row, width, values, rest):
    output[row * width : (row + 1) * width] = torch.tensor(values + [rest] * (width - len(values)), dtype=torch.int32)


def draw(target, count):
    cases = []

    @settings(max_examples=count, phases=[Phase.generate], derandomize=True, database=None, deadline=None)
    @given(target.cases())
    def collect(case):
        cases.append(case)

    collect()
    return cases


def main(tree, results):
    torch.ops.load_library = load_library
    kernel = load(Path(tree) if tree else None, CPU)
    probed = len(seen)
    target = get_target("moe_lora_align")
    cases = draw(target, CASES)
    verdicts = [judge_alone(target, kernel, case, Conditions(CPU)) for case in cases]
    outcome = {
        "loaded": loaded,
        "version": kernel.version,
        "imported": "vllm" in sys.modules,
        "probed": probed,
        "cases": len(cases),
        "regimes": sorted(set().union(*map(regimes, cases))),
        "seen": sorted(seen),
        "failures": [f"{case}: {failure}" for case, verdict in zip(cases, verdicts) for failure in verdict.failures],
        "rejected": [verdict.rejected for verdict in verdicts if verdict.rejected],
    }
    Path(results).write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(*sys.argv[1:])
