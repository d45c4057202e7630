"""The bgmv kernels of vllm-xpu-kernels, launched as the host code of ``torch.ops._xpu_C.bgmv_*`` launches them.

The checks, their order and their words, the choice of the instantiation and the launch ranges are those of release
0.1.16.2 (``csrc/xpu/lora`` of the repository vllm-project/vllm-xpu-kernels, and the host code in the wheel's binary).
``bgmv_expand`` has no kernel of its own: it is ``bgmv_expand_slice`` over the whole width of the output.
"""

from dataclasses import dataclass

import numpy as np
import torch

from kernelfuzz.kernels.xpu.opencl import Library

SHRINK = "vllm::lora::bgmv_shrink_kernel"
EXPAND_SLICE = "vllm::lora::bgmv_expand_slice_kernel"

_TYPES = {
    torch.float16: "sycl::_V1::detail::half_impl::half",
    torch.bfloat16: "sycl::_V1::ext::oneapi::bfloat16",
    torch.float32: "float",
}
_VECTOR_BYTES = 16
_MAX_GLOBAL_RANGE = 2**31 - 1


@dataclass(frozen=True)
class _Words:
    """What the messages of one direction's checks call the weights and the columns of each operand."""

    weights: str
    input_columns: str
    output_columns: str
    weight_dimensions: str


_SHRINK_WORDS = _Words("lora_a_weights", "hidden_size", "rank", "rank, hidden_size")
_EXPAND_WORDS = _Words("lora_b_weights", "rank", "hidden_size", "slice_size, rank")


def bgmv_shrink(
    library: Library,
    outputs: torch.Tensor,
    inputs: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    scale: float,
) -> None:
    """``outputs[b] += scale * inputs[b] @ weights[indices[b]].T``; a row keeps its bits if its index is not in [0, L).

    `outputs` [B, R] fp16, bf16 or fp32; `inputs` [B, H] of the weights' dtype or fp32; `weights` [L, R, H] or
    [L, 1, R, H], fp16 or bf16; `indices` [B] int64. Raises RuntimeError for what the host code refuses.
    """
    _check_operands(outputs, inputs, weights, indices, _SHRINK_WORDS)
    _check(outputs.shape[1] == weights.shape[-2], "output_tensor.size(1) must match lora_a_weights.size(-2)")
    _check_batch(outputs, inputs, indices)

    (batch, hidden), rank = inputs.shape, outputs.shape[1]
    width = _vector_width(inputs, weights, hidden)
    group = 256 if -(-hidden // width) >= 8 else 64
    _launch(
        library,
        SHRINK,
        (outputs, inputs, weights),
        width,
        (_uint32(batch * rank * group), group),
        (indices, np.uint32(hidden), np.uint32(rank), np.float32(scale), np.uint32(weights.shape[0])),
    )


def bgmv_expand(
    library: Library,
    outputs: torch.Tensor,
    inputs: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    add_to_output: bool,
) -> None:
    """`bgmv_expand_slice` over all columns of `outputs`, so that ``weights.size(-2)`` must be their number."""
    bgmv_expand_slice(library, outputs, inputs, weights, indices, 0, outputs.shape[1], add_to_output)


def bgmv_expand_slice(
    library: Library,
    outputs: torch.Tensor,
    inputs: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    slice_offset: int,
    slice_size: int,
    add_to_output: bool,
) -> None:
    """``outputs[b, o : o + s]`` becomes, or grows by, ``inputs[b] @ weights[indices[b]].T``; an index < 0 keeps a row.

    `outputs` [B, N] fp16, bf16 or fp32; `inputs` [B, R] of the weights' dtype or fp32; `weights` [L, s, R] or
    [L, 1, s, R], fp16 or bf16; `indices` [B] int64, which the kernel does not compare with L. Raises RuntimeError for
    what the host code refuses. It takes the slice as 32-bit unsigned numbers, so that some negative offsets pass.
    """
    offset, size = _uint32(slice_offset), _uint32(slice_size)
    _check_operands(outputs, inputs, weights, indices, _EXPAND_WORDS)
    _check(weights.shape[-2] == size, "lora_b_weights.size(-2) must match slice_size")
    _check_batch(outputs, inputs, indices)
    (batch, rank), hidden = inputs.shape, outputs.shape[1]
    end = _uint32(offset + size)
    _check(end <= hidden, f"slice [{offset}:{end}) is out of bounds for output dimension {hidden}")

    groups, group = _elementwise_range(_uint32(batch * size))
    _launch(
        library,
        EXPAND_SLICE,
        (outputs, inputs, weights),
        _vector_width(inputs, weights, rank),
        (_uint32(groups * group), group),
        (
            indices,
            np.uint32(hidden),
            np.uint32(rank),
            np.uint32(offset),
            np.uint32(size),
            np.uint8(add_to_output),
            np.uint32(batch),
        ),
    )


def _launch(
    library: Library,
    kernel: str,
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    width: int,
    ranges: tuple[int, int],
    rest: tuple[torch.Tensor | np.generic, ...],
) -> None:
    """Launch the instantiation for the operands' dtypes; an empty range does nothing, one beyond an int is refused."""
    global_range, local_range = ranges
    _check(global_range <= _MAX_GLOBAL_RANGE, "Provided range and/or offset does not fit in int.")
    if global_range:
        entry = library.entry(kernel, *(_TYPES[operand.dtype] for operand in operands), width)
        entry.launch((global_range,), (local_range,), (*operands, *rest))


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def _check_operands(
    outputs: torch.Tensor, inputs: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, words: _Words
) -> None:
    """The checks of device, contiguity, dtype and number of dimensions, and that the inner dimensions agree."""
    named = {"inputs": inputs, words.weights: weights, "output_tensor": outputs, "lora_indices_tensor": indices}
    for name, tensor in named.items():
        _check(tensor.device.type == "cpu", f"{name} must be on CPU")
    for name, tensor in named.items():
        _check(tensor.is_contiguous(), f"{name} must be contiguous")
    _check(inputs.dtype in _TYPES, "inputs must be float16, bfloat16, or float32")
    _check(weights.dtype in (torch.float16, torch.bfloat16), f"{words.weights} must be float16 or bfloat16")
    _check(
        inputs.dtype in (torch.float32, weights.dtype),
        f"inputs dtype must match {words.weights} dtype when inputs is not float32",
    )
    _check(outputs.dtype in _TYPES, "output_tensor must be float16, bfloat16, or float32")
    _check(indices.dtype == torch.int64, "lora_indices_tensor must be int64")
    _check(inputs.dim() == 2, f"inputs must be 2D [batch_size, {words.input_columns}]")
    _check(outputs.dim() == 2, f"output_tensor must be 2D [batch_size, {words.output_columns}]")
    _check(indices.dim() == 1, "lora_indices_tensor must be 1D [batch_size]")
    if weights.dim() == 4:
        _check(weights.shape[1] == 1, f"{words.weights}.size(1) must be 1")
    else:
        _check(weights.dim() == 3, f"{words.weights} must be 3D [lora_num, {words.weight_dimensions}]")
    _check(inputs.shape[1] == weights.shape[-1], f"inputs.size(1) must match {words.weights}.size(-1)")


def _check_batch(outputs: torch.Tensor, inputs: torch.Tensor, indices: torch.Tensor) -> None:
    _check(inputs.shape[0] == outputs.shape[0], "inputs.size(0) must match output_tensor.size(0)")
    _check(inputs.shape[0] == indices.shape[0], "inputs.size(0) must match lora_indices_tensor.size(0)")


def _vector_width(inputs: torch.Tensor, weights: torch.Tensor, columns: int) -> int:
    """How many elements the kernel loads at a time: what the address and the row length of both tensors allow."""
    return min(_aligned_width(inputs, columns), _aligned_width(weights, columns))


def _aligned_width(tensor: torch.Tensor, columns: int) -> int:
    width, address = _VECTOR_BYTES // tensor.element_size(), tensor.data_ptr()
    while columns % width or address % (width * tensor.element_size()):
        width //= 2
    return width


def _elementwise_range(elements: int) -> tuple[int, int]:
    """Number and size of the work-groups that share out this many elements."""
    size = 64 if elements <= 8192 else 128 if elements <= 65536 else 256
    if elements > 2**20:
        return min(-(-elements // 16), 8192), size
    return (1, max(elements, 1)) if elements < size else (-(-elements // size), size)


def _uint32(value: int) -> int:
    return value % 2**32
