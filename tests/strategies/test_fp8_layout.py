"""Cases of fp8_layout: what is drawn, and the tensors it stands for."""

import dataclasses
import json
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings

from kernelfuzz.fuzz.buffers import Buffers
from kernelfuzz.strategies import fp8_layout as strategy
from kernelfuzz.strategies.case import from_json, to_json

ONLINE = ("online", "online_block", "online_legacy")
CONVERT_ONLY = {"EMULATION", "TRITON_MXFP8", "FLASHINFER_CUTLASS", "NONE"}
SMALL_CASES = strategy.cases(**strategy.SMALL)

SIMPLEST = strategy.Case(
    seed=0,
    entry="convert",
    platform="cpu",
    backend="TRITON",
    num_experts=1,
    hidden=1,
    intermediate=1,
    scales="per_tensor",
    dtype="float16",
    contents="ones",
    input_scales=False,
    calls=1,
)


pytestmark = pytest.mark.usefixtures("one_thread")


def tensors_of(inputs):
    fields = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    return {name: value for name, value in fields.items() if isinstance(value, torch.Tensor)}


def test_the_simplest_case_is_one_expert_and_ones(minimal):
    assert minimal(strategy.cases()) == SIMPLEST


@pytest.mark.parametrize(
    ("condition", "changed"),
    [
        (lambda case: case.layout == "transposed", {"backend": "XPU"}),
        (lambda case: case.platform == "xpu", {"platform": "xpu"}),
        (lambda case: case.entry == "online_block", {"entry": "online_block", "scales": "block"}),
        (lambda case: case.entry == "online_legacy", {"entry": "online_legacy"}),
        (lambda case: case.calls == 2, {"entry": "online", "calls": 2}),
        (lambda case: case.backend == "NONE", {"backend": "NONE"}),
        (
            lambda case: case.padded_intermediate > max(16, case.intermediate),
            {"backend": "FLASHINFER_CUTLASS", "intermediate": 17},
        ),
        (lambda case: case.scales == "block" and case.intermediate > 64, {"scales": "block", "intermediate": 65}),
    ],
    ids=["transposed", "platform", "online_block", "online_legacy", "twice", "refused", "padded", "more_than_a_block"],
)
def test_one_demand_changes_nothing_else(condition, changed, minimal):
    assert minimal(strategy.cases(), condition) == dataclasses.replace(SIMPLEST, **changed)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_500_examples_reach_every_regime_and_no_unknown_one(seed, drawn):
    counts = Counter(name for case in drawn(strategy.cases(), 500, seed) for name in strategy.regimes(case))
    assert set(counts) == set(strategy.REGIMES)
    assert len(set(strategy.REGIMES)) == len(strategy.REGIMES)
    assert counts["refused"] < 60


@settings(max_examples=300)
@given(strategy.cases())
def test_cases_are_legal_and_survive_json(case):
    assert from_json(strategy.Case, json.loads(json.dumps(to_json(case)))) == case
    assert case.entry == "convert" or case.backend not in CONVERT_ONLY
    legal = {"convert": strategy.SCALES, "checkpoint": ("per_tensor", "block"), "online_block": ("block",)}
    assert case.scales in legal.get(case.entry, ("per_tensor",))
    assert case.entry in ONLINE or (case.calls == 1 and case.dtype == "float16")
    assert case.entry == "convert" or not case.input_scales
    if case.backend == "FLASHINFER_CUTLASS":
        assert case.scales in ("per_tensor", "block")
    if case.scales == "block" and (case.backend == "FLASHINFER_CUTLASS" or case.entry == "checkpoint"):
        assert case.intermediate % 128 == 0
    assert 1 <= case.hidden <= 300
    assert 1 <= case.intermediate <= (300 if case.scales == "block" else 200)
    assert case.size == case.num_experts
    assert strategy.regimes(case) <= set(strategy.REGIMES)


def test_layouts_follow_from_the_backend_alone():
    wanted = {"XPU": "transposed", "FLASHINFER_CUTLASS": "gate_up_swapped"}
    for backend in strategy.BACKENDS:
        for platform in strategy.PLATFORMS:
            case = dataclasses.replace(SIMPLEST, backend=backend, platform=platform)
            assert case.layout == wanted.get(backend, "kept")


def test_shapes_of_scales_and_results():
    case = dataclasses.replace(SIMPLEST, num_experts=2, hidden=130, intermediate=70)
    assert case.weight_shapes == {"w13": (2, 140, 130), "w2": (2, 130, 70)}
    for scales, w13, w2 in (
        ("per_tensor", (2,), (2,)),
        ("per_channel", (2, 140, 1), (2, 130, 1)),
        ("per_channel_2d", (2, 140), (2, 130)),
        ("block", (2, 2, 2), (2, 2, 1)),
    ):
        kept = dataclasses.replace(case, scales=scales)
        assert kept.scale_shapes == {"w13_scale": w13, "w2_scale": w2}
        assert kept.result_shapes == kept.weight_shapes | kept.scale_shapes
    transposed = dataclasses.replace(case, scales="per_channel", backend="XPU")
    assert transposed.result_shapes == {
        "w13": (2, 130, 140),
        "w2": (2, 70, 130),
        "w13_scale": (2, 1, 140),
        "w2_scale": (2, 1, 130),
    }
    padded = dataclasses.replace(case, backend="FLASHINFER_CUTLASS")
    assert padded.result_shapes == {"w13": (2, 160, 130), "w2": (2, 130, 80), "w13_scale": (2,), "w2_scale": (2,)}


@settings(max_examples=60)
@given(
    strategy.cases(
        entry=("online", "convert"),
        platform=("xpu",),
        backend=("HPC", "EMULATION"),
        scales=("per_tensor", "block"),
        max_experts=2,
        max_size=9,
    )
)
def test_narrowed(case):
    assert case.entry == "convert" or (case.entry == "online" and case.backend == "HPC")
    assert case.platform == "xpu"
    assert case.backend in ("HPC", "EMULATION")
    assert case.scales in ("per_tensor", "block")
    assert case.num_experts <= 2
    assert max(case.hidden, case.intermediate) <= 9


@settings(max_examples=150)
@given(SMALL_CASES)
def test_inputs(case):
    first, second = (tensors_of(strategy.make_inputs(case, "cpu")) for _ in range(2))
    assert {name: tensor.flatten().tolist() for name, tensor in first.items()} == {
        name: tensor.flatten().tolist() for name, tensor in second.items()
    }
    online = case.entry in ONLINE
    shapes = case.weight_shapes | ({} if online else case.scale_shapes)
    if case.entry == "checkpoint" and case.scales == "per_tensor":
        shapes["w13_scale"] = (case.num_experts, 2)
    if case.input_scales:
        shapes |= {"w13_input_scale": (case.num_experts,), "w2_input_scale": (case.num_experts,)}
    assert {name: tuple(tensor.shape) for name, tensor in first.items()} == shapes
    for name, tensor in first.items():
        assert tensor.is_contiguous()
        weights = getattr(torch, case.dtype) if online else torch.uint8
        assert tensor.dtype == (torch.float32 if "scale" in name else weights)
        values = strategy.fp8_values(tensor) if tensor.dtype == torch.uint8 else tensor.float()
        assert bool(values.isfinite().all())
        if "scale" in name:
            assert bool((values > 0).all())
        if case.contents == "ones" and not online:
            assert values.unique().tolist() == [1.0]


@settings(max_examples=40)
@given(strategy.cases(entry=ONLINE, max_experts=2))
def test_every_expert_or_block_has_its_largest_magnitude(case):
    inputs = strategy.make_inputs(case, "cpu")
    for weights in (inputs.w13, inputs.w2):
        height, width = (128, 128) if case.scales == "block" else weights.shape[1:]
        for expert in weights.float():
            for rows in expert.split(height):
                for part in rows.split(width, dim=1):
                    largest = float(part.abs().max())
                    assert math.frexp(largest / 448)[0] == 0.5
                    assert largest >= 448 * 2.0**-15
                    negative_zeros = (part == 0) & part.signbit()
                    assert not bool(negative_zeros.any())


def test_random_contents_vary():
    case = dataclasses.replace(SIMPLEST, contents="random", num_experts=4, hidden=60, intermediate=30)
    inputs = strategy.make_inputs(case, "cpu")
    assert len(inputs.w13.unique()) == 254  # every finite value
    assert len(inputs.w13_scale.unique()) == 4
    online = strategy.make_inputs(dataclasses.replace(case, entry="online"), "cpu")
    assert len(online.w13.float().abs().amax((1, 2)).unique()) > 1
    pairs = strategy.make_inputs(dataclasses.replace(case, entry="checkpoint", num_experts=40), "cpu").w13_scale
    ratios = pairs[:, 0] / pairs[:, 1]
    assert bool((ratios > 1).any() & (ratios < 1).any() & (ratios == 1).any())


@settings(max_examples=60)
@given(SMALL_CASES)
def test_inputs_lie_in_guarded_buffers(case):
    buffers = Buffers("cpu", case.seed)
    inputs = strategy.make_inputs(case, "cpu", buffers.allocate)
    buffers.freeze()
    assert not buffers.stray_writes()
    inputs.w2.view(torch.uint8).view(-1)[0] += 1
    assert [(write.name, write.is_input) for write in buffers.stray_writes()] == [("w2", True)]
