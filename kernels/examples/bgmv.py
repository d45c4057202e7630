# mypy: disallow-untyped-decorators=False
"""An example of `bgmv`: one Triton kernel, the operators that check shapes before they launch it, and the wrapper above
them, which accepts any padding of the vocabulary."""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from kernelfuzz.kernels import examples, interpreter
from kernelfuzz.kernels.base import Kernel
from kernelfuzz.strategies.bgmv import Inputs

BUGS = ("padded_vocab",)
"""- padded_vocab: the wrapper hands weights of any height to the operator, which refuses those that are not as high as
  the output is wide (vLLM 0.19.1 and older, pull request 39989)
"""

BLOCK_T = 64
BLOCK_N = 128
BLOCK_K = 64


# A kernel compiled for each class of sizes would be compiled for nearly every case.
@triton.jit(do_not_specialize=("num_tokens", "num_rows", "width", "output_stride", "adapter_stride"))
def _bgmv(
    output: tl.tensor,
    x: tl.tensor,
    weights: tl.tensor,
    indices: tl.tensor,
    scale: tl.tensor,
    num_tokens: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    output_stride: tl.tensor,
    adapter_stride: tl.tensor,
    ADD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Grid (adapters, blocks of tokens, blocks of weight rows): output[t, n] (+)= scale * weights[a, n] . x[t] for the
    tokens t of adapter a. The other tokens' rows are neither read nor written."""
    adapter = tl.program_id(0)
    tokens = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    mine = tl.load(indices + tokens, mask=tokens < num_tokens, other=-1) == adapter
    if tl.max(mine.to(tl.int32), 0) == 0:
        return
    tokens, mine = tokens[:, None], mine[:, None]
    rows = (tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    ours = mine & (rows < num_rows)

    x_rows = x + tokens * width
    weight_rows = weights + adapter.to(tl.int64) * adapter_stride + rows * width
    product = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(x_rows + k[None, :], mask=mine & (k < width)[None, :], other=0.0)
        b = tl.load(weight_rows + k[:, None], mask=(rows < num_rows) & (k < width)[:, None], other=0.0)
        product = tl.dot(a.to(b.dtype), b, product)
    product *= scale

    places = output + tokens * output_stride + rows
    if ADD:
        product += tl.load(places, mask=ours, other=0.0).to(tl.float32)
    tl.store(places, product.to(output.dtype.element_ty), mask=ours)


def _launch(
    output: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, scale: float, add: bool
) -> None:
    """Write all of `output`, a view whose rows are contiguous. x and the weights of each adapter are contiguous."""
    num_tokens, num_rows = output.shape
    grid = (weights.shape[0], triton.cdiv(num_tokens, BLOCK_T), triton.cdiv(num_rows, BLOCK_N))
    _bgmv[grid](
        output,
        x,
        weights,
        indices,
        scale,
        num_tokens,
        num_rows,
        x.shape[1],
        output.stride(0),
        weights.stride(0),
        ADD=add,
        BLOCK_T=BLOCK_T,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
    )


def bgmv_shrink(
    output: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, scale: float
) -> None:
    """output[t] += scale * weights[indices[t]] x[t]. Raises RuntimeError for shapes that do not agree."""
    if output.shape[1] != weights.shape[-2]:
        raise RuntimeError("output_tensor.size(1) must match lora_a_weights.size(-2)")
    _launch(output, x, weights, indices, scale, True)


def bgmv_expand_slice(
    output: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    offset: int,
    size: int,
    add: bool,
) -> None:
    """output[t, offset : offset + size] (+)= weights[indices[t]] x[t]. Raises RuntimeError for shapes that do not
    agree."""
    if weights.shape[-2] != size:
        raise RuntimeError("lora_b_weights.size(-2) must match slice_size")
    if offset + size > output.shape[1]:
        raise RuntimeError(f"slice [{offset}:{offset + size}) is out of bounds for output dimension {output.shape[1]}")
    _launch(output[:, offset : offset + size], x, weights, indices, 1.0, add)


def bgmv_expand(output: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, add: bool) -> None:
    """`bgmv_expand_slice` over all columns of the output."""
    bgmv_expand_slice(output, x, weights, indices, 0, output.shape[1], add)


def bgmv_expand_any_padding(
    output: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, add: bool
) -> None:
    """`bgmv_expand` of as many columns as both the output and the weights have; the output's others are kept."""
    size = min(weights.shape[-2], output.shape[1])
    bgmv_expand_slice(output, x, weights[..., :size, :], indices, 0, size, add)


def load(bug: str | None, device: torch.device) -> Kernel:
    """Return the example, right where `bug` is None, else with that one of `BUGS`.

    On a CPU the process must have been started with TRITON_INTERPRET=1. Raises KernelfuzzError for an unknown bug.
    """
    version = examples.version(bug, BUGS)
    if device.type == "cpu":
        interpreter.install()
    wrapper_expand = bgmv_expand if bug == "padded_vocab" else bgmv_expand_any_padding

    def launch(inputs: Inputs, outputs: Mapping[str, torch.Tensor]) -> None:
        case = inputs.case
        operands = (outputs["output"], inputs.x, inputs.weights, inputs.indices)
        if case.op == "shrink":
            bgmv_shrink(*operands, case.scale)
        elif case.op == "expand_slice":
            bgmv_expand_slice(*operands, case.slice_offset, case.slice_size, case.accumulate)
        elif case.layer == "wrapper":
            wrapper_expand(*operands, case.accumulate)
        else:
            bgmv_expand(*operands, case.accumulate)

    return Kernel(launch, version)
