"""Makes Intel's operators callable as `torch.ops._xpu_C` and `torch.ops._moe_C`, on an Intel GPU or on a CPU."""

from pathlib import Path

import torch

from kernelfuzz.kernels.xpu import XpuLibrary

# The schemas that vllm-xpu-kernels registers; on a CPU they are implemented by its kernels run through OpenCL.
_SCHEMAS = {
    "_xpu_C": (
        "bgmv_shrink(Tensor! outputs, Tensor inputs, Tensor weights, Tensor indices, float scale) -> ()",
        "bgmv_expand(Tensor! outputs, Tensor inputs, Tensor weights, Tensor indices, bool add_to_output) -> ()",
        "bgmv_expand_slice(Tensor! outputs, Tensor inputs, Tensor weights, Tensor indices, int slice_offset,"
        " int slice_size, bool add_to_output) -> ()",
    ),
    "_moe_C": (
        "moe_lora_align_block_size(Tensor topk_ids, Tensor token_lora_mapping, int num_experts, int block_size,"
        " int max_loras, int max_num_tokens_padded, int max_num_m_blocks, Tensor! sorted_token_ids,"
        " Tensor! expert_ids, Tensor! num_tokens_post_pad, Tensor adapter_enabled, Tensor lora_ids,"
        " Tensor? maybe_expert_map) -> ()",
    ),
}
_registered: list[torch.library.Library] = []


def load_operators(root: Path, device: torch.device) -> None:
    """Register the operators of the vllm-xpu-kernels under `root` with torch, once in a process.

    On an XPU the release's own libraries are loaded. On a CPU the operators run its SPIR-V kernels through OpenCL.
    """
    if device.type == "xpu":
        for name in _SCHEMAS:
            binary = root / "vllm_xpu_kernels" / f"{name}.abi3.so"
            torch.ops.load_library(str(binary))  # type: ignore[no-untyped-call]
        return
    library = XpuLibrary(root)
    for namespace, schemas in _SCHEMAS.items():
        fragment = torch.library.Library(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
        for schema in schemas:
            fragment.define(schema)  # type: ignore[no-untyped-call]
            name = schema.partition("(")[0]
            fragment.impl(name, getattr(library, name), "CPU")  # type: ignore[no-untyped-call]
        _registered.append(fragment)
