"""The oracle of `fp8_layout`: exact bits of the weights and exact scales, in the layout that the backend wants.

The inputs make quantisation exact, so that a correct one has no choice.
"""

import torch

from kernelfuzz.oracles.expectation import (
    Axes,
    Clause,
    Expectation,
    ExpectedError,
    ExpectedOutput,
    OutputSpec,
    OutputSpecs,
)
from kernelfuzz.strategies.fp8_layout import BLOCK, MINIMUM_SCALE, Case, Inputs, fp8_values, per_element

FP8_MAX = 448.0
FP8_NAN = 0x7F

CLAUSES = (
    Clause("kept_weights", "write"),
    Clause("transposed_weights", "write"),
    Clause("swapped_weights", "write"),
    Clause("kept_scales", "write"),
    Clause("transposed_scales", "write"),
    Clause("swapped_scales", "write"),
)
(
    _KEPT_WEIGHTS,
    _TRANSPOSED_WEIGHTS,
    _SWAPPED_WEIGHTS,
    _KEPT_SCALES,
    _TRANSPOSED_SCALES,
    _SWAPPED_SCALES,
) = range(len(CLAUSES))


def outputs(inputs: Inputs) -> OutputSpecs:
    """Return w13 and w2, uint8 bits of float8_e4m3fn, w13_scale and w2_scale, float32, in the case's result shapes.

    They start as NaN and not as sentinels: the code returns its results, so that none of them is ever unwritten, and a
    wrong byte is a sentinel's often enough.
    """
    found = {}
    for name, shape in inputs.case.result_shapes.items():
        value, dtype = (float("nan"), torch.float32) if name.endswith("_scale") else (FP8_NAN, torch.uint8)
        initial = torch.full(shape, value, dtype=dtype, device=inputs.w13.device)
        found[name] = OutputSpec(shape, dtype, initial=initial, axes=_axes(shape))
    return found


def _axes(shape: tuple[int, ...]) -> Axes:
    """Return what the dimensions of weights [experts, rows, columns] and their scales are."""
    if len(shape) == 3:
        return Axes(f"expert · {shape[1]} + row", "column")
    return Axes("expert", "row") if len(shape) == 2 else Axes("", "expert")


def expect(inputs: Inputs, initial: dict[str, torch.Tensor]) -> Expectation:
    """Return what the outputs must hold. Nothing waits for the device."""
    del initial  # nothing is read before it is written
    case = inputs.case
    if case.backend == "NONE":
        return Expectation(error=ExpectedError("unknown_backend_is_refused", "Unsupported FP8 MoE backend"))
    w13, w13_scale = _quantised(case, inputs.w13, inputs.w13_scale)
    w2, w2_scale = _quantised(case, inputs.w2, inputs.w2_scale)
    if case.layout == "gate_up_swapped":
        return _gate_up_swapped(case, w13, w2, w13_scale, w2_scale)
    transposed = case.layout == "transposed"
    weights = _TRANSPOSED_WEIGHTS if transposed else _KEPT_WEIGHTS

    def scales(scale: torch.Tensor) -> ExpectedOutput:
        if transposed and scale.ndim == 3:
            return _expected(scale.transpose(1, 2), _TRANSPOSED_SCALES)
        return _expected(scale, _KEPT_SCALES)

    return Expectation(
        {
            "w13": _expected(w13.transpose(1, 2) if transposed else w13, weights),
            "w2": _expected(w2.transpose(1, 2) if transposed else w2, weights),
            "w13_scale": scales(w13_scale),
            "w2_scale": scales(w2_scale),
        }
    )


def _expected(values: torch.Tensor, region: int | torch.Tensor) -> ExpectedOutput:
    if isinstance(region, int):
        region = torch.full(values.shape, region, dtype=torch.uint8, device=values.device)
    exact = torch.float64 if values.dtype.is_floating_point else torch.int64
    return ExpectedOutput(CLAUSES, region, values.contiguous().to(exact))


def _gate_up_swapped(
    case: Case, w13: torch.Tensor, w2: torch.Tensor, w13_scale: torch.Tensor, w2_scale: torch.Tensor
) -> Expectation:
    """Exchange the halves of w13, pad the intermediate size, and keep the scales of blocks from zero."""
    missing = case.padded_intermediate - case.intermediate
    gate, up = (torch.nn.functional.pad(half, (0, 0, 0, missing)) for half in w13.chunk(2, dim=1))
    scales_clause = _KEPT_SCALES
    if case.scales == "block":
        scales_clause = _SWAPPED_SCALES
        w13_scale = torch.cat(w13_scale.chunk(2, dim=1)[::-1], 1).clamp_min(MINIMUM_SCALE)
        w2_scale = w2_scale.clamp_min(MINIMUM_SCALE)
    return Expectation(
        {
            "w13": _expected(torch.cat([up, gate], 1), _SWAPPED_WEIGHTS),
            "w2": _expected(torch.nn.functional.pad(w2, (0, missing)), _KEPT_WEIGHTS),
            "w13_scale": _expected(w13_scale, scales_clause),
            "w2_scale": _expected(w2_scale, _KEPT_SCALES),
        }
    )


def _quantised(case: Case, weights: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return uint8 bits and float32 scales before the backend's layout."""
    if scale is None:
        return _quantised_online(case, weights)
    if case.entry == "checkpoint" and scale.shape[1:] == (2,):
        largest = scale.amax(1)
        ratios = (scale / largest[:, None]).repeat_interleave(case.intermediate, 1)
        return _fp8_bits(fp8_values(weights) * ratios[:, :, None]), largest
    return weights, scale


def _quantised_online(case: Case, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise 16-bit weights so that the largest magnitude of each expert or block becomes 448."""
    experts, rows, columns = weights.shape
    magnitudes = weights.to(torch.float32).abs()
    if case.scales == "block":
        magnitudes = torch.nn.functional.pad(magnitudes, (0, -columns % BLOCK, 0, -rows % BLOCK))
        blocks_down, blocks_across = -(-rows // BLOCK), -(-columns // BLOCK)
        largest = magnitudes.view(experts, blocks_down, BLOCK, blocks_across, BLOCK).amax((2, 4))
    else:
        largest = magnitudes.amax((1, 2))
    scale = largest / FP8_MAX
    return _fp8_bits(weights.to(torch.float32) / per_element(scale, rows, columns)), scale


def _fp8_bits(values: torch.Tensor) -> torch.Tensor:
    """Return the bits of values that are float8_e4m3fn's."""
    return values.to(torch.float8_e4m3fn).view(torch.uint8)
