"""Intel's released kernels on a CPU, through the SPIR-V in their wheel and Intel's OpenCL runtime.

`spirv` finds the kernels in a shared library, `opencl` builds and launches them on torch's memory, `lora` and `align`
are the host code above them, rewritten. In which order work-groups run and a work-group's sums are added is the
runtime's choice, and not a GPU's.
"""

from functools import cached_property
from pathlib import Path

import torch

from kernelfuzz.kernels.xpu import align, lora
from kernelfuzz.kernels.xpu.opencl import Library, unavailable

__all__ = ["XpuLibrary", "unavailable"]


class XpuLibrary:
    """The operators of one vllm-xpu-kernels release on CPU tensors, with the schemas of ``torch.ops``.

    `root` is the folder that holds ``vllm_xpu_kernels/``. A module of kernels is built when one of it is first launched
    (seconds, or hundredths from the cache below `kernelfuzz.kernels.releases.home`): keep one `XpuLibrary` per process.
    Launches block. Every operator raises KernelfuzzError where `unavailable()` gives a reason, or if the release lacks
    the kernels.
    """

    def __init__(self, root: Path) -> None:
        self._folder = Path(root) / "vllm_xpu_kernels"

    @cached_property
    def _lora(self) -> Library:
        return Library(self._folder / "_xpu_C.abi3.so", (lora.SHRINK, lora.EXPAND_SLICE))

    @cached_property
    def _moe(self) -> Library:
        return Library(self._folder / "_moe_C.abi3.so", (align.SMALL_BATCH, align.ALIGN, align.COUNT_AND_SORT))

    def bgmv_shrink(
        self,
        outputs: torch.Tensor,
        inputs: torch.Tensor,
        weights: torch.Tensor,
        indices: torch.Tensor,
        scale: float,
    ) -> None:
        """``torch.ops._xpu_C.bgmv_shrink``; see `lora.bgmv_shrink`."""
        lora.bgmv_shrink(self._lora, outputs, inputs, weights, indices, scale)

    def bgmv_expand(
        self,
        outputs: torch.Tensor,
        inputs: torch.Tensor,
        weights: torch.Tensor,
        indices: torch.Tensor,
        add_to_output: bool,
    ) -> None:
        """``torch.ops._xpu_C.bgmv_expand``; see `lora.bgmv_expand`."""
        lora.bgmv_expand(self._lora, outputs, inputs, weights, indices, add_to_output)

    def bgmv_expand_slice(
        self,
        outputs: torch.Tensor,
        inputs: torch.Tensor,
        weights: torch.Tensor,
        indices: torch.Tensor,
        slice_offset: int,
        slice_size: int,
        add_to_output: bool,
    ) -> None:
        """``torch.ops._xpu_C.bgmv_expand_slice``; see `lora.bgmv_expand_slice`."""
        lora.bgmv_expand_slice(self._lora, outputs, inputs, weights, indices, slice_offset, slice_size, add_to_output)

    def moe_lora_align_block_size(
        self,
        topk_ids: torch.Tensor,
        token_lora_mapping: torch.Tensor,
        num_experts: int,
        block_size: int,
        max_loras: int,
        max_num_tokens_padded: int,
        max_num_m_blocks: int,
        sorted_token_ids: torch.Tensor,
        expert_ids: torch.Tensor,
        num_tokens_post_pad: torch.Tensor,
        adapter_enabled: torch.Tensor,
        lora_ids: torch.Tensor,
        expert_map: torch.Tensor | None = None,
    ) -> None:
        """``torch.ops._moe_C.moe_lora_align_block_size``; see `align.moe_lora_align_block_size`."""
        align.moe_lora_align_block_size(
            self._moe,
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
        )
