"""What the host code above Intel's kernels refuses, which kernel it picks and how it launches it; nothing runs here."""

import pytest
import torch

from kernelfuzz.kernels.xpu import align, lora
from kernelfuzz.kernels.xpu.opencl import LocalMemory

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


class Recorder:
    """Stands in for a library of kernels and notes the launches."""

    def __init__(self):
        self.launches = []

    def entry(self, kernel, *arguments):
        self._chosen = (kernel.rpartition("::")[2], *(str(a).rpartition("::")[2] for a in arguments))
        return self

    def launch(self, global_range, local_range, arguments):
        self.launches.append((self._chosen, global_range, local_range, arguments))

    @property
    def last(self):
        return self.launches[-1]


@pytest.fixture
def recorder():
    return Recorder()


def shrink_operands(batch=3, hidden=32, rank=8, adapters=2, out=F32, inputs=BF16, weights=BF16):
    return {
        "outputs": torch.zeros(batch, rank, dtype=out),
        "inputs": torch.zeros(batch, hidden, dtype=inputs),
        "weights": torch.zeros(adapters, rank, hidden, dtype=weights),
        "indices": torch.zeros(batch, dtype=torch.int64),
    }


def expand_operands(batch=3, rank=8, size=32, columns=None, adapters=2, out=BF16, inputs=F32, weights=BF16):
    return {
        "outputs": torch.zeros(batch, size if columns is None else columns, dtype=out),
        "inputs": torch.zeros(batch, rank, dtype=inputs),
        "weights": torch.zeros(adapters, size, rank, dtype=weights),
        "indices": torch.zeros(batch, dtype=torch.int64),
    }


def offset_by(elements, tensor):
    """The same tensor, this many elements behind a 64-byte boundary."""
    storage = torch.zeros(tensor.numel() + elements, dtype=tensor.dtype)
    return storage[elements:].view(tensor.shape)


COMMON = [
    ("inputs", lambda t: t.to("meta"), "inputs must be on CPU"),
    ("outputs", lambda t: t.t().contiguous().t(), "output_tensor must be contiguous"),
    ("indices", lambda t: t.repeat(2)[::2], "lora_indices_tensor must be contiguous"),
    ("inputs", lambda t: t.double(), "inputs must be float16, bfloat16, or float32"),
    ("outputs", lambda t: t.double(), "output_tensor must be float16, bfloat16, or float32"),
    ("indices", lambda t: t.int(), "lora_indices_tensor must be int64"),
    ("indices", lambda t: t[None], r"lora_indices_tensor must be 1D \[batch_size\]"),
    ("indices", lambda t: t[:-1], r"inputs.size\(0\) must match lora_indices_tensor.size\(0\)"),
    ("outputs", lambda t: t[:-1], r"inputs.size\(0\) must match output_tensor.size\(0\)"),
]


@pytest.mark.parametrize(
    ("operand", "change", "message"),
    [
        *COMMON,
        ("weights", lambda t: t.transpose(1, 2), "lora_a_weights must be contiguous"),
        ("weights", lambda t: t.float(), "lora_a_weights must be float16 or bfloat16"),
        ("inputs", lambda t: t.half(), "inputs dtype must match lora_a_weights dtype when inputs is not float32"),
        ("inputs", lambda t: t[0], r"inputs must be 2D \[batch_size, hidden_size\]"),
        ("outputs", lambda t: t[0], r"output_tensor must be 2D \[batch_size, rank\]"),
        ("weights", lambda t: t[0], r"lora_a_weights must be 3D \[lora_num, rank, hidden_size\]"),
        ("weights", lambda t: t.view(1, *t.shape), r"lora_a_weights.size\(1\) must be 1"),
        ("inputs", lambda t: t[:, :-1].contiguous(), r"inputs.size\(1\) must match lora_a_weights.size\(-1\)"),
        ("outputs", lambda t: t[:, :-1].contiguous(), r"output_tensor.size\(1\) must match lora_a_weights.size\(-2\)"),
    ],
)
def test_shrink_refuses(recorder, operand, change, message):
    operands = shrink_operands()
    operands[operand] = change(operands[operand])
    with pytest.raises(RuntimeError, match=message):
        lora.bgmv_shrink(recorder, **operands, scale=1.0)
    assert not recorder.launches


@pytest.mark.parametrize(
    ("operand", "change", "message"),
    [
        *COMMON,
        ("weights", lambda t: t.float(), "lora_b_weights must be float16 or bfloat16"),
        ("inputs", lambda t: t.half(), "inputs dtype must match lora_b_weights dtype when inputs is not float32"),
        ("inputs", lambda t: t[0], r"inputs must be 2D \[batch_size, rank\]"),
        ("outputs", lambda t: t[0], r"output_tensor must be 2D \[batch_size, hidden_size\]"),
        ("weights", lambda t: t[0], r"lora_b_weights must be 3D \[lora_num, slice_size, rank\]"),
        ("inputs", lambda t: t[:, :-1].contiguous(), r"inputs.size\(1\) must match lora_b_weights.size\(-1\)"),
        ("weights", lambda t: t[:, :-1].contiguous(), r"lora_b_weights.size\(-2\) must match slice_size"),
        ("outputs", lambda t: t[:, :-1].contiguous(), r"slice \[0:32\) is out of bounds for output dimension 31"),
    ],
)
def test_expand_slice_refuses(recorder, operand, change, message):
    operands = expand_operands()
    operands[operand] = change(operands[operand])
    with pytest.raises(RuntimeError, match=message):
        lora.bgmv_expand_slice(recorder, **operands, slice_offset=0, slice_size=32, add_to_output=True)
    assert not recorder.launches


@pytest.mark.parametrize("columns", [31, 33])
def test_expand_wants_a_weight_row_for_every_column(recorder, columns):
    with pytest.raises(RuntimeError, match=r"lora_b_weights.size\(-2\) must match slice_size"):
        lora.bgmv_expand(recorder, **expand_operands(size=32, columns=columns), add_to_output=True)


@pytest.mark.parametrize("weights", [F16, BF16])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("out", [F16, BF16, F32])
def test_the_kernel_is_the_one_for_the_dtypes(recorder, out, wide, weights):
    inputs = F32 if wide else weights
    names = {F16: "half", BF16: "bfloat16", F32: "float"}
    dtypes = {"out": out, "inputs": inputs, "weights": weights}
    width = str(4 if wide else 8)
    lora.bgmv_shrink(recorder, **shrink_operands(**dtypes), scale=1.0)
    assert recorder.last[0] == ("bgmv_shrink_kernel", names[out], names[inputs], names[weights], width)
    lora.bgmv_expand(recorder, **expand_operands(**dtypes), add_to_output=True)
    assert recorder.last[0] == ("bgmv_expand_slice_kernel", names[out], names[inputs], names[weights], width)


@pytest.mark.parametrize(
    ("hidden", "input_offset", "weight_offset", "width"),
    [
        (32, 0, 0, 8),
        (32, 8, 16, 8),
        (32, 4, 0, 4),
        (32, 0, 2, 2),
        (32, 1, 0, 1),
        (12, 0, 0, 4),
        (6, 0, 4, 2),
        (7, 0, 0, 1),
    ],
)
def test_vectors_are_as_wide_as_rows_and_addresses_allow(recorder, hidden, input_offset, weight_offset, width):
    operands = shrink_operands(hidden=hidden)
    operands["inputs"] = offset_by(input_offset, operands["inputs"])
    operands["weights"] = offset_by(weight_offset, operands["weights"])
    lora.bgmv_shrink(recorder, **operands, scale=1.0)
    assert recorder.last[0][-1] == str(width)


@pytest.mark.parametrize(("hidden", "group"), [(7, 64), (56, 64), (57, 256), (64, 256), (4096, 256)])
def test_shrink_has_one_work_group_for_each_output(recorder, hidden, group):
    operands = shrink_operands(batch=3, rank=5, hidden=hidden)
    lora.bgmv_shrink(recorder, **operands, scale=0.5)
    _, global_range, local_range, arguments = recorder.last
    assert (global_range, local_range) == ((15 * group,), (group,))
    assert [argument.item() for argument in arguments[4:]] == [hidden, 5, 0.5, 2]


@pytest.mark.parametrize(
    ("batch", "size", "groups", "group"),
    [
        (1, 1, 1, 1),
        (1, 63, 1, 63),
        (1, 64, 1, 64),
        (3, 32, 2, 64),
        (2, 4096, 128, 64),
        (2, 4097, 65, 128),
        (64, 1025, 257, 256),
    ],
)
def test_expand_has_one_work_item_for_each_output(recorder, batch, size, groups, group):
    lora.bgmv_expand(recorder, **expand_operands(batch=batch, size=size), add_to_output=False)
    assert recorder.last[1:3] == ((groups * group,), (group,))


def test_expand_shares_out_many_outputs(recorder):
    operands = expand_operands(batch=1024, rank=1, size=1025, adapters=1)
    lora.bgmv_expand(recorder, **operands, add_to_output=False)
    assert recorder.last[1:3] == ((8192 * 256,), (256,))


def test_expand_slice_passes_the_slice(recorder):
    lora.bgmv_expand_slice(
        recorder, **expand_operands(size=4, columns=10), slice_offset=5, slice_size=4, add_to_output=True
    )
    columns, rank, offset, size, add, batch = (argument.item() for argument in recorder.last[3][4:])
    assert (columns, rank, offset, size, add, batch) == (10, 8, 5, 4, 1, 3)


def test_weights_with_a_dimension_of_one(recorder):
    operands = expand_operands()
    operands["weights"] = operands["weights"][:, None]
    lora.bgmv_expand(recorder, **operands, add_to_output=True)
    assert recorder.last[0][0] == "bgmv_expand_slice_kernel"


def test_shrink_of_no_tokens_launches_nothing(recorder):
    lora.bgmv_shrink(recorder, **shrink_operands(batch=0), scale=1.0)
    assert recorder.launches == []


def test_a_range_beyond_an_int_is_refused(recorder):
    operands = shrink_operands(batch=2**16, rank=2**7, hidden=64, adapters=1)
    with pytest.raises(RuntimeError, match="does not fit in int"):
        lora.bgmv_shrink(recorder, **operands, scale=1.0)


def align_arguments(tokens=4, top_k=2, experts=6, block_size=4, adapters=3, dtype=torch.int32):
    padded = tokens * top_k + experts * (block_size - 1)
    blocks = -(-padded // block_size)

    def int32(size):
        return torch.zeros(size, dtype=torch.int32)

    return {
        "topk_ids": torch.zeros(tokens, top_k, dtype=dtype),
        "token_lora_mapping": int32(tokens),
        "num_experts": experts,
        "block_size": block_size,
        "max_loras": adapters,
        "max_num_tokens_padded": padded,
        "max_num_m_blocks": blocks,
        "sorted_token_ids": int32(adapters * padded),
        "expert_ids": int32(adapters * blocks),
        "num_tokens_post_pad": int32(adapters),
        "adapter_enabled": int32(adapters + 1),
        "lora_ids": int32(adapters + 1),
    }


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"block_size": 0}, RuntimeError, "block_size should be greater than 0."),
        ({"num_experts": 993}, RuntimeError, "padded_num_experts must be less than 1024"),
        ({"topk_ids": torch.zeros(4, 2)}, NotImplementedError, "not implemented for 'torch.float32'"),
        ({"token_lora_mapping": torch.zeros(4, dtype=torch.int64)}, RuntimeError, "expected scalar type Int but found"),
        ({"expert_map": torch.zeros(6, dtype=torch.int64)}, RuntimeError, "expected scalar type Int but found"),
        ({"topk_ids": torch.zeros(4, 0, dtype=torch.int32)}, NotImplementedError, "top_k == 0 divides by zero"),
    ],
)
def test_align_refuses(recorder, changes, error, message):
    with pytest.raises(error, match=message):
        align.moe_lora_align_block_size(recorder, **{**align_arguments(), **changes})
    assert not recorder.launches


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "experts", "kernels"), [(511, 64, 1), (512, 64, 2), (511, 65, 2), (4, 992, 2), (0, 64, 1)]
)
def test_align_runs_one_kernel_for_a_small_batch_and_two_else(recorder, dtype, tokens, experts, kernels):
    align.moe_lora_align_block_size(recorder, **align_arguments(tokens=tokens, experts=experts, dtype=dtype))
    scalar = "int" if dtype == torch.int32 else "long"
    small = [("moe_lora_align_block_size_small_batch_expert_kernel", scalar, "256")]
    large = [("moe_lora_align_block_size_kernel", scalar), ("lora_count_and_sort_expert_tokens_kernel", scalar)]
    assert [launch[0] for launch in recorder.launches] == (small if kernels == 1 else large)


def test_align_ranges_of_a_small_batch(recorder):
    align.moe_lora_align_block_size(recorder, **align_arguments(experts=6, adapters=3))
    _, global_range, local_range, arguments = recorder.last
    assert (global_range, local_range) == ((4 * 384,), (384,))
    assert LocalMemory((129 * 6 + 7) * 4) in [argument for argument in arguments if isinstance(argument, LocalMemory)]


def test_align_ranges_of_a_large_batch(recorder):
    align.moe_lora_align_block_size(recorder, **align_arguments(tokens=700, experts=100, adapters=3))
    first, second = recorder.launches
    assert first[1:3] == ((4 * 2 * 1024,), (1024,))
    assert LocalMemory((1024 + 128) * 4) in [argument for argument in first[3] if isinstance(argument, LocalMemory)]
    assert second[1:3] == ((4 * 256, 6), (256, 1))


def test_align_of_no_tokens_sorts_nothing(recorder):
    align.moe_lora_align_block_size(recorder, **align_arguments(tokens=0, experts=65))
    assert [launch[0][0] for launch in recorder.launches] == ["moe_lora_align_block_size_kernel"]
