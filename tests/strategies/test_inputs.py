"""The tensors of a case: values where the contract reads, poison where it does not."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelfuzz.strategies import bgmv, fused_moe_lora, lora_shrink_expand, moe_lora_align
from kernelfuzz.strategies.batches import Batch, Segment
from kernelfuzz.strategies.contents import seeds
from kernelfuzz.strategies.layouts import CONTIGUOUS, POISON_INTEGER, Layout, plain_allocator
from kernelfuzz.strategies.routing import Routing

TARGETS = (fused_moe_lora, lora_shrink_expand, bgmv, moe_lora_align)
SMALL = {
    fused_moe_lora: {"max_rank": 5, "max_hidden": 9, "max_columns": 7},
    lora_shrink_expand: {"max_rank": 5, "max_hidden": 9, "max_columns": 7},
    bgmv: {"max_rank": 5, "max_hidden": 9, "max_columns": 7},
    moe_lora_align: {"max_length": 20, "max_experts": 30},
}
small_cases = {target: target.cases(**arguments) for target, arguments in SMALL.items()}


def tensors_of(inputs):
    """Return every tensor of a target's inputs, by name."""
    found = {}
    for field in dataclasses.fields(inputs):
        value = getattr(inputs, field.name)
        if isinstance(value, torch.Tensor):
            found[field.name] = value
        elif isinstance(value, list):
            found |= {f"{field.name}[{i}]": tensor for i, tensor in enumerate(value)}
    return found


def bits_of(tensor):
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(integer).flatten().tolist()


def all_nan(tensor):
    return bool(tensor.isnan().all())


def all_finite(tensor):
    return bool(tensor.isfinite().all())


def token_adapters(case):
    return [segment.adapter for segment in case.batch.segments for _ in range(segment.length)]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.Case.target)
@settings(max_examples=60)
@given(data=st.data())
def test_the_same_case_gives_the_same_bits(target, data):
    case = data.draw(small_cases[target])
    first, second = (tensors_of(target.make_inputs(case, "cpu")) for _ in range(2))
    assert {name: bits_of(tensor) for name, tensor in first.items()} == {
        name: bits_of(tensor) for name, tensor in second.items()
    }
    assert {name: tensor.stride() for name, tensor in first.items()} == {
        name: tensor.stride() for name, tensor in second.items()
    }


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.Case.target)
@settings(max_examples=60)
@given(data=st.data())
def test_memory_comes_from_the_allocator_under_distinct_names(target, data):
    case = data.draw(small_cases[target])
    asked = []

    def allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout = CONTIGUOUS) -> torch.Tensor:
        asked.append(name)
        return plain_allocator("cpu")(name, shape, dtype, layout)

    own = tensors_of(target.make_inputs(case, "cpu", allocate))
    # The oracle's own copy of the routing, and a tensor that host code reads on the CPU.
    for name in ("topk_ids", "num_active_loras") if target is fused_moe_lora else ():
        del own[name]
    assert len(asked) == len(set(asked)) == len(own)


@settings(max_examples=150)
@given(small_cases[fused_moe_lora])
def test_fused_moe_lora_poisons_what_no_token_needs(case):
    inputs = fused_moe_lora.make_inputs(case, "cpu")
    adapters, experts = token_adapters(case), inputs.topk_ids.tolist()
    serving = [0 <= adapter < case.num_adapters and adapter not in case.disabled for adapter in adapters]
    served = [[serving[t] and experts[t][j] >= 0 for j in range(case.top_k)] for t in range(len(adapters))]
    assert inputs.served_pairs().tolist() == served

    rows = [pair for row in served for pair in row] if case.mul_routed_weight else [any(row) for row in served]
    assert inputs.x.shape == (len(rows), case.hidden)
    for used, row in zip(rows, inputs.x):
        assert all_finite(row) if used else all_nan(row)

    needed = {(adapters[t], experts[t][j]) for t in range(len(adapters)) for j in range(case.top_k) if served[t][j]}
    assert len(inputs.lora_a) == len(inputs.lora_b) == case.slices
    for a, b in zip(inputs.lora_a, inputs.lora_b):
        assert a.shape == (case.num_adapters, case.num_experts, case.rank, case.hidden)
        assert b.shape == (case.num_adapters, case.num_experts, case.columns, case.rank)
        for adapter in range(case.num_adapters):
            for expert in range(case.num_experts):
                check = all_finite if (adapter, expert) in needed else all_nan
                assert check(a[adapter, expert])
                assert check(b[adapter, expert])


@settings(max_examples=150)
@given(small_cases[fused_moe_lora])
def test_fused_moe_lora_metadata(case):
    inputs = fused_moe_lora.make_inputs(case, "cpu")
    tokens = case.batch.num_tokens
    assert {tensor.dtype for tensor in (inputs.x, *inputs.lora_a, *inputs.lora_b)} == {getattr(torch, case.dtype)}
    assert inputs.x.stride() == case.input_layout.strides(tuple(inputs.x.shape))
    assert inputs.x.storage_offset() == case.input_layout.offset
    assert inputs.token_adapters.tolist() == token_adapters(case)
    assert inputs.topk_weights.shape == inputs.topk_ids.shape == (tokens, case.top_k)
    assert bool(((inputs.topk_weights > 0) & (inputs.topk_weights <= 1)).all())
    assert bool(((inputs.topk_ids >= -1) & (inputs.topk_ids < case.num_experts)).all())
    visited = inputs.lora_ids[: int(inputs.num_active_loras)].tolist()
    assert set(visited) - {-1} == set(token_adapters(case)) - {-1}
    assert inputs.num_active_loras.device.type == "cpu"
    assert [i for i, enabled in enumerate(inputs.adapter_enabled.tolist()) if not enabled] == list(case.disabled)


@settings(max_examples=150)
@given(small_cases[fused_moe_lora])
def test_fused_moe_lora_alignment(case):
    inputs = fused_moe_lora.make_inputs(case, "cpu")
    flat = inputs.topk_ids.flatten()
    if not case.aligned:
        assert inputs.sorted_token_ids is None
        assert inputs.num_tokens_post_padded is None
        assert inputs.expert_ids.tolist() == flat.tolist()
        return
    pair_adapters = [adapter for adapter in token_adapters(case) for _ in range(case.top_k)]
    for adapter in range(case.num_adapters):
        row, experts = inputs.sorted_token_ids[adapter].tolist(), inputs.expert_ids[adapter].tolist()
        total = int(inputs.num_tokens_post_padded[adapter])
        if adapter not in pair_adapters or adapter in case.disabled:
            assert set(row) | set(experts) | {total} == {POISON_INTEGER}
            continue
        assert len(experts) * case.block_size == len(row) >= total
        found = {(pair, experts[i // case.block_size]) for i, pair in enumerate(row[:total]) if pair != flat.numel()}
        wanted = {i for i, owner in enumerate(pair_adapters) if owner == adapter and flat[i] >= 0}
        assert found == {(i, int(flat[i])) for i in wanted}
        assert set(row[total:]) <= {flat.numel()}
        assert set(experts[total // case.block_size :]) <= {-1}


@settings(max_examples=150)
@given(small_cases[lora_shrink_expand])
def test_lora_shrink_expand_inputs(case):
    inputs = lora_shrink_expand.make_inputs(case, "cpu")
    adapters = token_adapters(case)
    shrink = case.op == "shrink"
    slices, tokens = len(case.widths), len(adapters)
    assert inputs.x.shape == ((tokens, case.hidden) if shrink else (slices, tokens, case.rank))
    assert inputs.x.dtype == (torch.float32 if case.float32_input else getattr(torch, case.dtype))
    assert inputs.x.stride() == case.input_layout.strides(tuple(inputs.x.shape))
    assert inputs.token_adapters.tolist() == adapters
    for token, adapter in enumerate(adapters):
        assert (all_nan if adapter < 0 else all_finite)(inputs.x[..., token, :])
    assert len(inputs.weights) == slices
    for width, weight in zip(case.widths, inputs.weights):
        rows, columns = (case.rank, case.hidden) if shrink else (width, case.rank)
        one = (1,) if case.weights_4d else ()
        assert weight.shape == (case.num_adapters, *one, rows, columns)
        for adapter in range(case.num_adapters):
            assert (all_finite if adapter in adapters else all_nan)(weight[adapter])


@settings(max_examples=150)
@given(small_cases[bgmv])
def test_bgmv_inputs(case):
    inputs = bgmv.make_inputs(case, "cpu")
    adapters = token_adapters(case)
    assert inputs.x.shape == (len(adapters), case.width)
    assert inputs.x.dtype == (torch.float32 if case.float32_input else getattr(torch, case.dtype))
    assert inputs.weights.shape == (case.num_adapters, *((1,) if case.weights_4d else ()), case.rows, case.width)
    assert inputs.indices.dtype == torch.int64
    assert inputs.indices.tolist() == adapters
    for token, adapter in enumerate(adapters):
        assert (all_nan if adapter < 0 else all_finite)(inputs.x[token])
    for adapter in range(case.num_adapters):
        rows = inputs.weights[adapter].flatten(0, -2)
        assert (all_finite if adapter in adapters else all_nan)(rows[: case.columns])
        assert all_nan(rows[case.columns :])


@settings(max_examples=150)
@given(small_cases[moe_lora_align])
def test_moe_lora_align_inputs(case):
    inputs = moe_lora_align.make_inputs(case, "cpu")
    adapters = token_adapters(case)
    assert inputs.topk_ids.shape == (len(adapters), case.top_k)
    assert inputs.topk_ids.dtype == getattr(torch, case.ids_dtype)
    assert inputs.token_adapters.tolist() == adapters
    assert inputs.lora_ids.numel() > case.num_adapters
    assert inputs.adapter_enabled.numel() > max(case.num_adapters, *adapters, 0)
    # Whatever the order, the first num_adapters + 1 entries name every active adapter that is in range.
    in_range = set(range(case.num_adapters))
    assert set(inputs.lora_ids[: case.num_adapters + 1].tolist()) & in_range == set(adapters) & in_range
    assert (inputs.expert_map is None) == (case.expert_map == "none")
    if inputs.expert_map is not None:
        assert inputs.expert_map.shape == (case.num_experts,)
    if case.routing.invalid == "none":
        assert bool(((inputs.topk_ids >= 0) & (inputs.topk_ids < case.num_experts)).all())
    assert case.max_blocks * max(case.block_size, 1) >= case.capacity


@settings(max_examples=150)
@given(small_cases[moe_lora_align], st.lists(seeds(), min_size=1, max_size=4))
def test_an_item_of_a_stack_is_its_case_alone(case, several):
    stack = moe_lora_align.make_inputs(case, "cpu", seeds=several)
    assert stack.seeds == tuple(several)
    for i, seed in enumerate(several):
        item = stack.item(i)
        alone = moe_lora_align.make_inputs(dataclasses.replace(case, seed=seed), "cpu")
        assert item.case == alone.case
        together, apart = tensors_of(item), tensors_of(alone)
        assert {name: (tensor.dtype, tensor.shape, bits_of(tensor)) for name, tensor in together.items()} == {
            name: (tensor.dtype, tensor.shape, bits_of(tensor)) for name, tensor in apart.items()
        }
        assert all(tensor.is_contiguous() for tensor in together.values())


@settings(max_examples=60)
@given(small_cases[moe_lora_align], st.lists(seeds(), min_size=2, max_size=4))
def test_items_of_a_stack_lie_apart_in_one_allocation(case, several):
    storages = {}

    def allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout = CONTIGUOUS) -> torch.Tensor:
        assert name not in storages
        storages[name] = plain_allocator("cpu")(name, shape, dtype, layout)
        return storages[name]

    stack = moe_lora_align.make_inputs(case, "cpu", allocate, several)
    items = [tensors_of(stack.item(i)) for i in range(len(several))]
    for name in ("token_adapters", "lora_ids", "adapter_enabled"):
        assert len({item[name].data_ptr() for item in items}) == 1
    for name in {"topk_ids", "expert_map"} & set(items[0]):
        length = items[0][name].numel()
        starts = [item[name].storage_offset() for item in items]
        for start, end in zip(starts, starts[1:]) if length else ():
            assert (end - start) * storages[name].itemsize % 64 == 0
            between = storages[name].as_strided((end - start - length,), (1,), start + length)
            assert between.numel() >= 128
            assert set(between.tolist()) == {POISON_INTEGER}


def test_items_of_a_stack_differ():
    case = moe_lora_align.Case(
        seed=0,
        batch=Batch((Segment(0, 20),)),
        num_adapters=1,
        disabled=(),
        descending_ids=False,
        num_experts=30,
        top_k=2,
        routing=Routing("uniform"),
        expert_map="holes",
        block_size=16,
        rounded_capacity=True,
        ids_dtype="int64",
    )
    stack = moe_lora_align.make_inputs(case, "cpu", seeds=range(3))
    assert len({tuple(ids.flatten().tolist()) for ids in stack.topk_ids}) == 3
    assert len({tuple(mapping.tolist()) for mapping in stack.expert_map}) == 3
