"""vLLM's Triton `fused_moe_lora`, compiled on a GPU or run by Triton's interpreter on a CPU."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kernelfuzz.kernels.base import Kernel, UnsupportedCaseError
from kernelfuzz.kernels.interpreter import reachable
from kernelfuzz.kernels.vllm.triton_release import TritonRelease
from kernelfuzz.strategies.fused_moe_lora import Inputs


def load(root: Path | None, device: torch.device) -> Kernel:
    """Return the kernel of the release under `root`, or of the installed vLLM where it is None."""
    release = TritonRelease(root, device)
    module = release.import_module("lora.ops.triton_ops.fused_moe_lora_op")
    takes_add_inputs = "add_inputs" in inspect.signature(module._fused_moe_lora).parameters

    def launch(inputs: Inputs, outputs: Mapping[str, torch.Tensor]) -> None:
        case = inputs.case
        if not (takes_add_inputs or case.add_inputs):
            raise UnsupportedCaseError("this release cannot overwrite its output: it has no add_inputs")
        # Keyed by address, which the allocator gives to other weights from case to case.
        module._LORA_PTR_DICT.clear()
        options = {"add_inputs": case.add_inputs} if takes_add_inputs else {}
        with release.on_platform(case.compute_units), reachable(*inputs.lora_a, *inputs.lora_b):
            module.fused_moe_lora(**_arguments(inputs, outputs["output"]), **options)

    return Kernel(launch, release.version, {} if takes_add_inputs else {"add_inputs": [True]})


def _arguments(inputs: Inputs, output: torch.Tensor) -> dict[str, Any]:
    case = inputs.case
    arguments: dict[str, Any] = {
        "output": output,
        "qcurr_hidden_states": inputs.x,
        "lora_a_stacked": inputs.lora_a,
        "lora_b_stacked": inputs.lora_b,
        "topk_weights": inputs.topk_weights,
        "sorted_token_ids": inputs.sorted_token_ids,
        "expert_ids": inputs.expert_ids,
        "num_tokens_post_padded": inputs.num_tokens_post_padded,
        "token_lora_mapping": inputs.token_adapters,
        "max_lora_rank": case.rank,
        "top_k_num": case.top_k,
        "lora_ids": inputs.lora_ids,
        "num_active_loras": inputs.num_active_loras,
        "adapter_enabled": inputs.adapter_enabled,
        "mul_routed_weight": case.mul_routed_weight,
        "fully_sharded": case.fully_sharded,
        "offset": case.column_offset,
    }
    for step, tiles in (("shrink", case.shrink), ("expand", case.expand)):
        arguments |= {
            f"{step}_block_size_m": case.block_size,
            f"{step}_block_size_n": tiles.block_n,
            f"{step}_block_size_k": tiles.block_k,
            f"{step}_group_size_m": tiles.group_m,
            f"{step}_num_warps": 4,
            f"{step}_num_stages": 2,
            f"{step}_split_k": tiles.split_k,
        }
    return arguments
