"""Inputs and expectations are made without waiting for the device.

The device is torch's `meta`: its tensors have no contents, so whatever needs one of their elements on the CPU raises,
as do `item`, `nonzero`, `unique` and a mask that picks elements. A mask that is assigned through does not raise there,
so it is looked for.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernelfuzz.oracles import fused_moe_lora as fused_moe_lora_oracle
from kernelfuzz.oracles import lora_shrink_expand as lora_shrink_expand_oracle
from kernelfuzz.oracles import moe_lora_align as moe_lora_align_oracle
from kernelfuzz.strategies import fused_moe_lora, lora_shrink_expand, moe_lora_align
from kernelfuzz.strategies.batches import Batch, Segment
from kernelfuzz.strategies.routing import Routing

DEVICE = "meta"
TARGETS = {
    fused_moe_lora: fused_moe_lora_oracle,
    lora_shrink_expand: lora_shrink_expand_oracle,
    moe_lora_align: moe_lora_align_oracle,
}


class OnDevice(TorchDispatchMode):
    """Counts operations on the device, and refuses masks as indices there."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        tensors = [leaf for leaf in tree_leaves((arguments, options, result)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device.type == DEVICE for tensor in tensors):
            self.count += 1
            if operation.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_):
                indices = [index for index in arguments[1] if index is not None]
                assert all(index.dtype == torch.int64 for index in indices), f"a mask in {operation}"
                assert all(index.device.type == DEVICE for index in indices), f"an index of the CPU in {operation}"
        return result


def make_and_expect(strategy, case, **seeds):
    """Return how many operations on the device it takes."""
    oracle = TARGETS[strategy]
    with OnDevice() as operations:
        inputs = strategy.make_inputs(case, DEVICE, **seeds)
        specs = oracle.outputs(inputs)
    initial = {name: torch.empty(spec.shape, dtype=spec.dtype, device=DEVICE) for name, spec in specs.items()}
    with operations:
        expectation = oracle.expect(inputs, initial)
        for output in expectation.outputs.values():
            for rule in ("write", "keep", "free"):
                assert output.mask(rule).device.type == DEVICE
    return operations.count


@pytest.mark.parametrize("strategy", TARGETS, ids=lambda strategy: strategy.Case.target)
@settings(max_examples=60)
@given(data=st.data())
def test_nothing_waits_for_the_device(strategy, data):
    make_and_expect(strategy, data.draw(strategy.cases()))


@settings(max_examples=60)
@given(moe_lora_align.cases(), st.integers(1, 5))
def test_nothing_of_a_stack_waits_for_the_device(case, count):
    make_and_expect(moe_lora_align, case, seeds=range(count))


@pytest.mark.parametrize("style", ["distinct", "skewed"])
@pytest.mark.parametrize("expert_map", ["none", "reversed_holes"])
def test_a_stack_takes_as_many_operations_whatever_its_size(style, expert_map):
    def operations(seeds, adapters, tokens, experts):
        case = moe_lora_align.Case(
            seed=0,
            batch=Batch(tuple(Segment(adapter, tokens) for adapter in range(-1, adapters + 1))),
            num_adapters=adapters,
            disabled=(0,),
            descending_ids=False,
            num_experts=experts,
            top_k=2,
            routing=Routing(style, "both"),
            expert_map=expert_map,
            block_size=16,
            rounded_capacity=False,
            ids_dtype="int32",
        )
        return make_and_expect(moe_lora_align, case, seeds=range(seeds))

    assert 0 < operations(2, 2, 1, 3) == operations(32, 4, 50, 100) < 250


@pytest.mark.parametrize(
    "wait",
    [
        lambda tensor: tensor[0].item(),
        lambda tensor: tensor.tolist(),
        lambda tensor: bool((tensor > 0).any()),
        lambda tensor: tensor.nonzero(),
        lambda tensor: tensor.unique(),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: tensor.masked_select(tensor > 0),
        lambda tensor: tensor.repeat_interleave(tensor),
        lambda tensor: tensor.bincount(),
        lambda tensor: tensor.cpu(),
        lambda tensor: tensor.__setitem__(tensor > 0, tensor),
        lambda tensor: tensor[torch.tensor([0, 1])],
    ],
)
def test_what_waits_is_noticed(wait):
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)), OnDevice():
        wait(torch.zeros(3, dtype=torch.int64, device=DEVICE))
