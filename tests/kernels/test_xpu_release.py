"""Intel's own kernels, out of the pinned release, on this CPU."""

import pytest
import torch

from kernelfuzz.kernels import releases
from kernelfuzz.kernels.xpu import XpuLibrary, unavailable
from kernelfuzz.strategies.errors import KernelfuzzError

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
NAN = float("nan")
UNIT_ROUNDOFF = {F16: 2.0**-11, BF16: 2.0**-8, F32: 2.0**-24}
SUBNORMAL = {F16: 2.0**-25, BF16: 2.0**-134, F32: 2.0**-150}


@pytest.fixture(scope="module")
def xpu():
    if reason := unavailable():
        pytest.skip(reason)
    package = "vllm-xpu-kernels"
    try:
        return XpuLibrary(releases.locate(package, releases.PINNED[package]))
    except KernelfuzzError as error:
        pytest.skip(str(error))


def in_poison(tensor, offset=5):
    """A contiguous copy of a tensor, off every alignment, between NaNs (or -7 for integers); and all that memory."""
    poison = NAN if tensor.is_floating_point() else -7
    memory = torch.full((tensor.numel() + offset + 64,), poison, dtype=tensor.dtype)
    view = memory[offset : offset + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view, memory


def same_bits(left, right):
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def bound(product, magnitude, terms, old, dtype):
    """One sum of `terms` in fp32, rounded to the output's dtype, and its sum with the old output rounded again."""
    error = magnitude * (terms + 2) * 2.0**-24 + product.abs() * UNIT_ROUNDOFF[dtype]
    return (error + (old + product).abs() * UNIT_ROUNDOFF[dtype]) * 1.01 + SUBNORMAL[dtype]


DTYPES = [(o, i, w) for o in (F16, BF16, F32) for w in (F16, BF16) for i in (w, F32)]


@pytest.mark.parametrize(("out", "dtype", "weight_dtype"), DTYPES)
@pytest.mark.parametrize(("hidden", "rank", "offset"), [(32, 8, 8), (100, 3, 5), (257, 17, 1)])
def test_shrink(xpu, out, dtype, weight_dtype, hidden, rank, offset):
    generator = torch.Generator().manual_seed(hidden)
    indices = torch.tensor([2, -1, 0, 2])
    inputs, _ = in_poison(torch.randn(4, hidden, generator=generator).to(dtype), offset)
    weights, _ = in_poison(torch.randn(4, rank, hidden, generator=generator).to(weight_dtype), offset)
    inputs[1], weights[1], weights[3] = NAN, NAN, NAN
    outputs, memory = in_poison(torch.randn(4, rank, generator=generator).to(out))
    before, memory_before = outputs.clone(), memory.clone()

    xpu.bgmv_shrink(outputs, inputs, weights, indices, -0.75)

    assert same_bits(outputs[1], before[1])
    for row, adapter in ((0, 2), (2, 0), (3, 2)):
        a, x, old = weights[adapter].double(), inputs[row].double(), before[row].double()
        product, magnitude = -0.75 * (a @ x), 0.75 * (a.abs() @ x.abs())
        assert ((outputs[row].double() - old - product).abs() <= bound(product, magnitude, hidden, old, out)).all()
    outputs.copy_(before)
    assert same_bits(memory, memory_before)


@pytest.mark.parametrize(("out", "dtype", "weight_dtype"), DTYPES)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("rank", "size", "left", "right"), [(8, 32, 0, 0), (6, 33, 3, 0), (17, 5, 1, 4)])
def test_expand_slice(xpu, out, dtype, weight_dtype, add, rank, size, left, right):
    generator = torch.Generator().manual_seed(rank)
    indices = torch.tensor([2, -1, 0, 2])
    inputs, _ = in_poison(torch.randn(4, rank, generator=generator).to(dtype))
    weights, _ = in_poison(torch.randn(4, 1, size, rank, generator=generator).to(weight_dtype))
    inputs[1], weights[1], weights[3] = NAN, NAN, NAN
    outputs, memory = in_poison(torch.randn(4, left + size + right, generator=generator).to(out))
    before, memory_before = outputs.clone(), memory.clone()

    if left == right == 0:
        xpu.bgmv_expand(outputs, inputs, weights, indices, add)
    else:
        xpu.bgmv_expand_slice(outputs, inputs, weights, indices, left, size, add)

    for row, adapter in ((0, 2), (2, 0), (3, 2)):
        b, y = weights[adapter, 0].double(), inputs[row].double()
        old = before[row, left : left + size].double() * add
        product, magnitude = b @ y, b.abs() @ y.abs()
        got = outputs[row, left : left + size]
        assert ((got.double() - old - product).abs() <= bound(product, magnitude, rank, old, out)).all()
        got.copy_(before[row, left : left + size])
    assert same_bits(memory, memory_before)


def test_expand_rounds_the_product_before_it_is_added(xpu):
    outputs, inputs = torch.ones(1, 1, dtype=F16), torch.tensor([[2.0**-11 * (1 + 2.0**-12)]])
    xpu.bgmv_expand(outputs, inputs, torch.ones(1, 1, 1, dtype=F16), torch.tensor([0]), True)
    assert outputs.item() == 1.0, "one rounding would give 1 + 2**-10"


def test_no_tokens(xpu):
    outputs, indices = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    xpu.bgmv_shrink(outputs, torch.zeros(0, 8, dtype=F16), torch.zeros(1, 4, 8, dtype=F16), indices, 1.0)
    xpu.bgmv_expand(outputs, torch.zeros(0, 8, dtype=F16), torch.zeros(1, 4, 8, dtype=F16), indices, False)
    assert outputs.shape == (0, 4)


def groups(topk_ids, mapping, adapter, experts, expert_map):
    """The flat ids of an adapter's tokens by local expert, in the experts' order."""
    found = {}
    for index, expert in enumerate(topk_ids.flatten().tolist()):
        if mapping[index // topk_ids.shape[1]] == adapter and 0 <= expert < experts:
            local = expert if expert_map is None else int(expert_map[expert])
            if local >= 0:
                found.setdefault(local, []).append(index)
    return sorted(found.items())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("with_map", [False, True])
@pytest.mark.parametrize(("tokens", "experts"), [(9, 6), (500, 64), (0, 6), (600, 6), (9, 100)])
def test_align(xpu, tokens, experts, dtype, with_map):
    generator, top_k, adapters, block, kept = torch.Generator().manual_seed(tokens), 2, 3, 4, -7
    topk_ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=generator).to(dtype)
    mapping = torch.randint(-1, adapters, (tokens,), generator=generator).int()
    capacity = -(-(tokens * top_k + experts * (block - 1)) // block) * block
    expert_map = None
    if with_map:
        expert_map = torch.full((experts,), -1, dtype=torch.int32)
        expert_map[::2] = torch.arange(len(expert_map[::2])).int()
    enabled = torch.tensor([1, 0, 1, 1], dtype=torch.int32)
    lora_ids = torch.tensor([2, 1, -1, 0], dtype=torch.int32)
    ids, id_memory = in_poison(torch.full((adapters, capacity), kept, dtype=torch.int32))
    blocks, block_memory = in_poison(torch.full((adapters, capacity // block), kept, dtype=torch.int32))
    totals, _ = in_poison(torch.full((adapters,), kept, dtype=torch.int32))

    xpu.moe_lora_align_block_size(
        topk_ids, mapping, experts, block, adapters, capacity, capacity // block,
        ids, blocks, totals, enabled, lora_ids, expert_map,
    )  # fmt: skip

    for adapter in (0, 2):
        position, owners = 0, []
        for expert, members in groups(topk_ids, mapping, adapter, experts, expert_map):
            width = -(-len(members) // block) * block
            segment = ids[adapter, position : position + width].tolist()
            assert sorted(segment) == members + [topk_ids.numel()] * (width - len(members))
            owners += [expert] * (width // block)
            position += width
        assert (ids[adapter, position:] == topk_ids.numel()).all()
        assert blocks[adapter].tolist() == owners + [-1] * (capacity // block - len(owners))
        one_kernel = topk_ids.numel() < 1024 and experts <= 64
        # The second work-group of the two-kernel path may clear the total after the first has written it.
        assert totals[adapter] in ([position] if one_kernel else [position, 0])
        ids[adapter], blocks[adapter] = kept, kept
    assert totals[1] == kept
    assert (id_memory == kept).all()
    assert (block_memory == kept).all()


def test_a_folder_without_the_release(tmp_path):
    with pytest.raises(KernelfuzzError, match=r"cannot read .*_xpu_C.abi3.so"):
        XpuLibrary(tmp_path).bgmv_shrink(
            torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1, 1), torch.zeros(1, dtype=torch.int64), 1.0
        )
