"""Kernels of every target that answer by the oracle, each with a bug that $ORACLE_KERNELS_FIXED takes away.

A script hands them plain namespaces instead of a case and its inputs; the case is then read from $ORACLE_KERNELS_CASE.
"""

import ctypes
import dataclasses
import os
import time
from pathlib import Path

import torch

from kernelfuzz.fuzz.files import read_case
from kernelfuzz.fuzz.targets import get_target
from kernelfuzz.strategies.case import Case


def is_fixed():
    return "ORACLE_KERNELS_FIXED" in os.environ


def _expectation(inputs, outputs):
    """The inputs as they come from make_inputs, and what is expected of the outputs."""
    if not isinstance(inputs.case, Case):
        case = read_case(Path(os.environ["ORACLE_KERNELS_CASE"]))
        made = get_target(case.target).make_inputs(case, "cpu")
        given = {name: value for name, value in vars(inputs).items() if name != "case"}
        inputs = dataclasses.replace(made, **given)
    before = {name: output.clone() for name, output in outputs.items()}
    return get_target(inputs.case.target).expect(inputs, before)


def right(inputs, outputs):
    expectation = _expectation(inputs, outputs)
    if expectation.error is not None:
        raise RuntimeError(expectation.error.text)
    for name, output in outputs.items():
        written = expectation.outputs[name].mask("write")
        output[written] = expectation.outputs[name].values[written].to(output.dtype)


def raised(inputs, outputs):
    if not is_fixed():
        raise ValueError("no such thing")
    right(inputs, outputs)


def not_raised(inputs, outputs):
    try:
        right(inputs, outputs)
    except RuntimeError:
        if is_fixed():
            raise


def _first(inputs, outputs, rule):
    """An output and a place in it that falls under the rule, if there is one."""
    for name, expected in _expectation(inputs, outputs).outputs.items():
        places = expected.mask(rule).nonzero()
        if len(places):
            return outputs[name], tuple(places[-1].tolist())
    return None


def unwritten(inputs, outputs):
    before = {name: output.clone() for name, output in outputs.items()}
    right(inputs, outputs)
    if not is_fixed():
        for name, output in outputs.items():
            output.copy_(before[name])


def wrong_value(inputs, outputs):
    found = None if is_fixed() else _first(inputs, outputs, "write")
    right(inputs, outputs)
    if found is not None:
        output, place = found
        output[place] += 3 if output.dtype == torch.uint8 else 100


def not_a_number(inputs, outputs):
    found = None if is_fixed() else _first(inputs, outputs, "write")
    right(inputs, outputs)
    if found is not None and found[0].is_floating_point():
        found[0][found[1]] = float("nan")


def overwritten(inputs, outputs):
    found = None if is_fixed() else _first(inputs, outputs, "keep")
    right(inputs, outputs)
    if found is not None:
        found[0][found[1]] = 5


def input_mutated(inputs, outputs):
    right(inputs, outputs)
    if not is_fixed():
        tensor = next(value for value in vars(inputs).values() if isinstance(value, torch.Tensor) and value.numel())
        tensor[(0,) * tensor.ndim] = 3


def _write_outside(tensor, place):
    tensor.as_strided((1,), (1,), tensor.storage_offset() + place)[0] = 9


def out_of_bounds(inputs, outputs):
    """Writes two elements behind the first output, and one before it."""
    right(inputs, outputs)
    output = next(iter(outputs.values()))
    if not is_fixed():
        extent = 1 + sum((size - 1) * stride for size, stride in zip(output.shape, output.stride()))
        _write_outside(output, extent + 1)
        _write_outside(output, -1)


def between_rows(inputs, outputs):
    """Writes into the gap behind the first row."""
    right(inputs, outputs)
    if not is_fixed():
        _write_outside(outputs["output"], outputs["output"].shape[-1])


def crash(inputs, outputs):
    right(inputs, outputs)
    if not is_fixed():
        ctypes.string_at(0)


def hang(inputs, outputs):
    right(inputs, outputs)
    while not is_fixed():
        time.sleep(3600)


def reads_behind_a_tensor(inputs, outputs):
    """Reads the byte behind the last input that is a tensor, which only a guard page shows."""
    right(inputs, outputs)
    if not is_fixed():
        tensor = [value for value in vars(inputs).values() if isinstance(value, torch.Tensor)][-1]
        ctypes.string_at(tensor.data_ptr() + tensor.numel() * tensor.element_size(), 1)
