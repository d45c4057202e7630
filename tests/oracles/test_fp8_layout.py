"""The oracle of fp8_layout against weights that are quantised and moved one expert, block and row at a time."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelfuzz.fuzz.verdict import judge_output
from kernelfuzz.oracles import fp8_layout as oracle
from kernelfuzz.strategies import fp8_layout as strategy

NAMES = ("w13", "w2", "w13_scale", "w2_scale")
LEGAL = tuple(backend for backend in strategy.BACKENDS if backend != "NONE")
ONLINE = ("online", "online_block", "online_legacy")
FP8 = torch.float8_e4m3fn

PLAIN = strategy.Case(
    seed=7,
    entry="convert",
    platform="cpu",
    backend="TRITON",
    num_experts=2,
    hidden=6,
    intermediate=3,
    scales="per_tensor",
    dtype="float16",
    contents="random",
    input_scales=False,
    calls=1,
)
SQUARE_BLOCKS = dataclasses.replace(PLAIN, scales="block", hidden=256, intermediate=256)


pytestmark = pytest.mark.usefixtures("one_thread")


def values_of(bits):
    return bits.view(FP8).float()


def bits_of(values):
    """Round to fp8, saturating."""
    return values.clamp(-448.0, 448.0).to(FP8).view(torch.uint8)


def blocks_of(matrix):
    return [
        (down // 128, across // 128, (slice(down, down + 128), slice(across, across + 128)))
        for down in range(0, matrix.shape[0], 128)
        for across in range(0, matrix.shape[1], 128)
    ]


def scale_of(weights, *, smallest=0.0):
    return weights.abs().max().float().clamp(smallest) / 448.0


def quantised(weights, scales, *, reciprocal=False, smallest=0.0):
    """Quantise 16-bit weights with a scale for each expert or block; as a kernel that multiplies does, or divides."""

    def rounded(part, scale):
        return bits_of(part.float() * (1.0 / scale) if reciprocal else part.float() / scale)

    bits = torch.empty(weights.shape, dtype=torch.uint8)
    found = []
    for expert, matrix in zip(bits, weights):
        if scales == "per_tensor":
            found.append(scale_of(matrix, smallest=smallest))
            expert.copy_(rounded(matrix, found[-1]))
            continue
        grid = torch.empty(-(-matrix.shape[0] // 128), -(-matrix.shape[1] // 128))
        for i, j, place in blocks_of(matrix):
            grid[i, j] = scale_of(matrix[place], smallest=smallest)
            expert[place] = rounded(matrix[place], grid[i, j])
        found.append(grid)
    return bits, torch.stack(found)


def requantised(bits, scales, *, dtype=torch.float16):
    """Bring the halves of w13 to one scale, through a 16-bit or wider format."""
    result = bits.clone()
    half = bits.shape[1] // 2
    for expert, pair in zip(result, scales):
        for part, scale in zip((expert[:half], expert[half:]), pair):
            part.copy_(bits_of((values_of(part).to(dtype) * scale).float() / pair.max()))
    return result, scales.max(1).values


def before_layout(inputs, **how):
    case = inputs.case
    if case.entry in ONLINE:
        (w13, w13_scale), (w2, w2_scale) = (quantised(each, case.scales, **how) for each in (inputs.w13, inputs.w2))
        return {"w13": w13, "w2": w2, "w13_scale": w13_scale, "w2_scale": w2_scale}
    w13, w13_scale = inputs.w13, inputs.w13_scale
    if case.entry == "checkpoint" and case.scales == "per_tensor":
        w13, w13_scale = requantised(w13, w13_scale)
    return {"w13": w13, "w2": inputs.w2, "w13_scale": w13_scale, "w2_scale": inputs.w2_scale}


def transposed(tensors, names=NAMES):
    return {
        name: tensor.permute(0, 2, 1).contiguous() if name in names and tensor.ndim == 3 else tensor
        for name, tensor in tensors.items()
    }


def swapped_rows(tensor):
    half = tensor.shape[1] // 2
    return tensor[:, [*range(half, 2 * half), *range(half)]]


def gate_up_swapped(case, tensors):
    w13, w2 = tensors["w13"], tensors["w2"]
    size = case.intermediate
    if case.scales == "block":
        scales = {"w13_scale": swapped_rows(tensors["w13_scale"]), "w2_scale": tensors["w2_scale"]}
        least = torch.tensor(1e-10)
        return {"w13": swapped_rows(w13), "w2": w2} | {name: torch.maximum(s, least) for name, s in scales.items()}
    width = size
    while width % 16:
        width += 1
    new_w13 = torch.zeros((case.num_experts, 2 * width, case.hidden), dtype=torch.uint8)
    new_w2 = torch.zeros((case.num_experts, case.hidden, width), dtype=torch.uint8)
    new_w13[:, width : width + size] = w13[:, :size]
    new_w13[:, :size] = w13[:, size:]
    new_w2[:, :, :size] = w2
    return tensors | {"w13": new_w13, "w2": new_w2}


def laid_out(case, tensors):
    if case.backend == "XPU":
        return transposed(tensors)
    return gate_up_swapped(case, tensors) if case.backend == "FLASHINFER_CUTLASS" else tensors


def mistakes(expected, actual):
    """Return output and clause of whatever is wrong, as the engine tells it."""
    found = set()
    for name in NAMES:
        initial = torch.zeros_like(actual[name])
        failures, _ = judge_output(name, actual[name], initial, expected.outputs[name], from_sentinel=False)
        found |= {(failure.output, failure.clause) for failure in failures}
    return found


def expected_of(expectation, case):
    inputs = strategy.make_inputs(case, "cpu")
    _, expected = expectation(oracle, inputs)
    assert expected.error is None
    return inputs, expected


@settings(max_examples=150)
@given(strategy.cases(backend=LEGAL))
def test_results_are_those_of_loops(expectation, case):
    inputs, expected = expected_of(expectation, case)
    actual = laid_out(case, before_layout(inputs))
    assert {name: tuple(tensor.shape) for name, tensor in actual.items()} == case.result_shapes
    assert {name: tuple(output.values.shape) for name, output in expected.outputs.items()} == case.result_shapes
    assert not mistakes(expected, actual)


@settings(max_examples=150)
@given(
    strategy.cases(entry=ONLINE, max_experts=2),
    st.booleans(),
    st.sampled_from((0.0, 1e-4)),
)
def test_quantisation_is_exact_whatever_the_arithmetic(expectation, case, reciprocal, smallest):
    inputs, expected = expected_of(expectation, case)
    parts = before_layout(inputs, reciprocal=reciprocal, smallest=smallest)
    assert not mistakes(expected, laid_out(case, parts))
    for name in ("w13", "w2"):
        scale = parts[f"{name}_scale"]
        assert bool((torch.frexp(scale).mantissa == 0.5).all()), "a scale is no power of two"
        # The scale of the largest magnitude as a product with the rounded reciprocal of 448.
        assert torch.equal(scale * 448.0 * (1.0 / torch.tensor(448.0)), scale)
        weights = getattr(inputs, name)
        restored = values_of(parts[name]) * strategy.per_element(scale, *weights.shape[1:])
        assert torch.equal(restored, weights.float())


@settings(max_examples=150)
@given(strategy.cases(entry=("checkpoint",), scales=("per_tensor",), max_size=40))
def test_requantisation_is_exact_whatever_the_arithmetic(case):
    inputs = strategy.make_inputs(case, "cpu")
    narrow, scale = requantised(inputs.w13, inputs.w13_scale)
    wide, _ = requantised(inputs.w13, inputs.w13_scale, dtype=torch.float64)
    assert torch.equal(narrow, wide)
    rows = inputs.w13_scale.repeat_interleave(case.intermediate, 1)[:, :, None]
    assert torch.equal(values_of(narrow).double() * scale[:, None, None], values_of(inputs.w13).double() * rows)


@settings(max_examples=60)
@given(strategy.cases(backend=LEGAL, max_size=40), st.sampled_from(strategy.PLATFORMS))
def test_the_platform_changes_nothing(expectation, case, platform):
    _, expected = expected_of(expectation, case)
    _, other = expected_of(expectation, dataclasses.replace(case, platform=platform))
    for name in NAMES:
        assert torch.equal(expected.outputs[name].values, other.outputs[name].values)
        assert torch.equal(expected.outputs[name].region, other.outputs[name].region)


@pytest.mark.parametrize("backend", ["TRITON", "BATCHED_TRITON", "VLLM_CUTLASS", "BATCHED_VLLM_CUTLASS", "HPC"])
@pytest.mark.parametrize("entry", strategy.ENTRIES)
def test_weights_transposed_because_of_the_platform_are_told_where_the_shape_stays(expectation, entry, backend):
    scales = "block" if entry == "online_block" else "per_tensor"
    case = dataclasses.replace(SQUARE_BLOCKS, entry=entry, backend=backend, platform="xpu", scales=scales)
    inputs, expected = expected_of(expectation, case)
    actual = before_layout(inputs)
    wrong = actual | {"w2": actual["w2"].permute(0, 2, 1).contiguous()}
    assert mistakes(expected, wrong) == {("w2", "kept_weights")}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_transposed_is_told(expectation, name):
    for sizes in ({"intermediate": 256}, {"intermediate": 128}):
        case = dataclasses.replace(SQUARE_BLOCKS, backend="XPU", **sizes)
        inputs, expected = expected_of(expectation, case)
        right = before_layout(inputs)
        wrong = transposed(right, set(NAMES) - {name})
        if tuple(wrong[name].shape) == case.result_shapes[name]:
            clause = "transposed_scales" if name.endswith("scale") else "transposed_weights"
            assert mistakes(expected, wrong) == {(name, clause)}
        else:
            assert wrong[name].ndim == 3  # another shape: the adapter tells it


def test_scales_of_one_or_two_dimensions_are_kept_where_weights_are_transposed(expectation, clauses):
    for scales, clause in (
        ("per_tensor", "kept_scales"),
        ("per_channel_2d", "kept_scales"),
        ("per_channel", "transposed_scales"),
    ):
        case = dataclasses.replace(PLAIN, backend="XPU", scales=scales)
        _, expected = expected_of(expectation, case)
        assert {*clauses(expected.outputs["w13_scale"]), *clauses(expected.outputs["w2_scale"])} == {clause}


def test_halves_that_are_not_swapped_are_told(expectation):
    case = dataclasses.replace(SQUARE_BLOCKS, backend="FLASHINFER_CUTLASS")
    inputs, expected = expected_of(expectation, case)
    unswapped = before_layout(inputs)
    right = gate_up_swapped(case, unswapped)
    assert not mistakes(expected, right)
    assert mistakes(expected, right | {"w13": unswapped["w13"]}) == {("w13", "swapped_weights")}
    unswapped_scale = swapped_rows(right["w13_scale"])
    assert mistakes(expected, right | {"w13_scale": unswapped_scale}) == {("w13_scale", "swapped_scales")}


def test_scales_of_blocks_that_are_too_small_are_told(expectation):
    case = dataclasses.replace(SQUARE_BLOCKS, backend="FLASHINFER_CUTLASS", num_experts=4)
    inputs, expected = expected_of(expectation, case)
    right = gate_up_swapped(case, before_layout(inputs))
    unclamped = right | {"w13_scale": swapped_rows(inputs.w13_scale), "w2_scale": inputs.w2_scale}
    assert mistakes(expected, unclamped) == {("w13_scale", "swapped_scales"), ("w2_scale", "kept_scales")}


def test_padding_of_each_half_is_zero(expectation):
    case = dataclasses.replace(PLAIN, backend="FLASHINFER_CUTLASS", intermediate=17)
    inputs, expected = expected_of(expectation, case)
    right = gate_up_swapped(case, before_layout(inputs))
    assert case.result_shapes["w13"] == (2, 64, 6)
    garbage = {"w13": right["w13"].clone(), "w2": right["w2"].clone()}
    garbage["w13"][0, 20, 0] = garbage["w2"][1, 0, 31] = 0x38
    assert mistakes(expected, right | garbage) == {("w13", "swapped_weights"), ("w2", "kept_weights")}
    # All padding behind both halves.
    together = torch.nn.functional.pad(swapped_rows(inputs.w13), (0, 0, 0, 30))
    assert mistakes(expected, right | {"w13": together}) == {("w13", "swapped_weights")}


@pytest.mark.parametrize("entry", ONLINE)
def test_a_wrong_scale_or_rounding_is_told(expectation, entry):
    scales = "block" if entry == "online_block" else "per_tensor"
    case = dataclasses.replace(PLAIN, entry=entry, scales=scales, hidden=130, intermediate=70)
    inputs, expected = expected_of(expectation, case)
    right = before_layout(inputs)
    assert mistakes(expected, right | {"w2_scale": 1.0 / right["w2_scale"]}) == {("w2_scale", "kept_scales")}
    truncated = right["w13"] & 0xFE
    assert mistakes(expected, right | {"w13": truncated}) == {("w13", "kept_weights")}
    other_scales = "per_tensor" if entry == "online_block" else "block"
    wrong, _ = quantised(inputs.w13, other_scales)
    assert mistakes(expected, right | {"w13": wrong}) == {("w13", "kept_weights")}


def test_halves_that_are_not_requantised_are_told(expectation):
    case = dataclasses.replace(PLAIN, entry="checkpoint", num_experts=4)
    inputs, expected = expected_of(expectation, case)
    right = before_layout(inputs)
    assert mistakes(expected, right | {"w13": inputs.w13}) == {("w13", "kept_weights")}
    smaller = inputs.w13_scale.min(1).values
    assert mistakes(expected, right | {"w13_scale": smaller}) == {("w13_scale", "kept_scales")}


@pytest.mark.parametrize("platform", strategy.PLATFORMS)
def test_an_unknown_backend_must_be_refused(expectation, platform):
    case = dataclasses.replace(PLAIN, backend="NONE", platform=platform)
    _, expected = expectation(oracle, strategy.make_inputs(case, "cpu"))
    assert expected.error is not None
    assert expected.error.clause == "unknown_backend_is_refused"
    assert expected.error.text == "Unsupported FP8 MoE backend"
    assert not expected.outputs


@settings(max_examples=60)
@given(strategy.cases(max_size=40))
def test_output_specs(case):
    specs = oracle.outputs(strategy.make_inputs(case, "cpu"))
    assert {name: spec.shape for name, spec in specs.items()} == case.result_shapes
    assert {name: spec.dtype for name, spec in specs.items()} == {
        "w13": torch.uint8,
        "w2": torch.uint8,
        "w13_scale": torch.float32,
        "w2_scale": torch.float32,
    }


@settings(max_examples=60)
@given(strategy.cases(backend=LEGAL, max_size=40))
def test_outputs_start_as_what_no_result_is(expectation, case):
    """They are NaN: what a kernel never wrote is wrong, and no wrong byte passes for one that was never written."""
    inputs, expected = expected_of(expectation, case)
    initial = {name: spec.initial for name, spec in oracle.outputs(inputs).items()}
    for name, tensor in initial.items():
        assert bool((values_of(tensor) if tensor.dtype == torch.uint8 else tensor).isnan().all())
        (failure,) = judge_output(name, tensor, tensor, expected.outputs[name], from_sentinel=False)[0]
        assert (failure.kind, failure.message.split()[0]) == ("wrong_value", str(tensor.numel()))


@settings(max_examples=60)
@given(strategy.cases())
def test_nothing_waits_for_the_device(expectation, case):
    inputs = strategy.make_inputs(case, "meta")
    initial = {
        name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in oracle.outputs(inputs).items()
    }
    for output in oracle.expect(inputs, initial).outputs.values():
        assert output.values.device.type == output.region.device.type == "meta"
