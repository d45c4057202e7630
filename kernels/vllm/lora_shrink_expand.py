"""vLLM's Triton `lora_shrink` and `lora_expand`, with the metadata that its own `LoRAKernelMeta` prepares."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kernelfuzz.kernels.base import Kernel
from kernelfuzz.kernels.interpreter import reachable
from kernelfuzz.kernels.vllm.triton_release import TritonRelease
from kernelfuzz.strategies.lora_shrink_expand import Inputs


def load(root: Path | None, device: torch.device) -> Kernel:
    """Return the kernels of the release under `root`, or of the installed vLLM where it is None."""
    release = TritonRelease(root, device)
    ops = "lora.ops.triton_ops"
    metadata = release.import_module(f"{ops}.lora_kernel_metadata")
    shrink, expand = release.import_module(f"{ops}.lora_shrink_op"), release.import_module(f"{ops}.lora_expand_op")
    utils = release.import_module(f"{ops}.utils")
    tiles: dict[str, int] = {}

    def configured(*arguments: Any, **options: Any) -> dict[str, int | None]:
        return {**utils.get_lora_op_configs(*arguments, **options), **tiles}

    # The default split of 64 would launch 64 programs where K is exhausted after two.
    shrink.get_lora_op_configs = expand.get_lora_op_configs = configured

    def launch(inputs: Inputs, outputs: Mapping[str, torch.Tensor]) -> None:
        case = inputs.case
        tiles.update(block_n=case.block_n, block_k=case.block_k)
        # Keyed by address, which the allocator gives to other weights from case to case.
        utils._LORA_A_PTR_DICT.clear()
        utils._LORA_B_PTR_DICT.clear()
        where = case.placement.spelled(inputs.x.device)
        with release.on_platform(), reachable(*inputs.weights):
            meta = metadata.LoRAKernelMeta.make(case.num_adapters, case.batch.num_tokens, device=where)
            meta.prepare_tensors(inputs.token_adapters)
            arguments = meta.meta_args(case.batch.num_tokens, specialize_active_lora=not case.visit_all)
            if case.op == "shrink":
                tiles.update(split_k=case.split_k)
                shrink.lora_shrink(inputs.x, inputs.weights, outputs["output"], *arguments, case.scale)
            else:
                expand.lora_expand(
                    inputs.x,
                    inputs.weights,
                    outputs["output"],
                    *arguments,
                    offset_start=case.column_offset,
                    add_inputs=case.add_inputs,
                )

    return Kernel(launch, release.version)
