"""Intel's port of `moe_lora_align_block_size`."""

from collections.abc import Mapping
from pathlib import Path

import torch

from kernelfuzz.kernels import releases
from kernelfuzz.kernels.base import Kernel
from kernelfuzz.kernels.xpu.operators import load_operators
from kernelfuzz.strategies.moe_lora_align import Inputs


def load(root: Path, device: torch.device) -> Kernel:
    """Return the operator of the vllm-xpu-kernels under `root`."""
    load_operators(root, device)
    return Kernel(launch, releases.version_of(root, "vllm-xpu-kernels"))


def launch(inputs: Inputs, outputs: Mapping[str, torch.Tensor]) -> None:
    """Call `torch.ops._moe_C.moe_lora_align_block_size`: vLLM's CUDA library registers it with the same arguments."""
    case = inputs.case
    torch.ops._moe_C.moe_lora_align_block_size(
        inputs.topk_ids,
        inputs.token_adapters,
        case.num_experts,
        case.block_size,
        case.num_adapters,
        case.capacity,
        case.max_blocks,
        outputs["sorted_token_ids"],
        outputs["expert_ids"],
        outputs["num_tokens_post_pad"],
        inputs.adapter_enabled,
        inputs.lora_ids,
        inputs.expert_map,
    )
