"""Where a call runs."""

from dataclasses import dataclass

import pytest
import torch

from kernelfuzz.strategies.devices import Placement, placements, with_tensor_on_cpu

CUDA, CUDA_1 = torch.device("cuda:0"), torch.device("cuda:1")


def test_minimal_placement_is_the_usual_one(minimal):
    assert minimal(placements("cpu")) == minimal(placements("cuda", other_devices=True)) == Placement()
    assert minimal(placements("cuda", tensor_on_cpu=True)) == Placement(tensor_on_cpu=0)


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (torch.device("cuda"), {"cuda", "cuda:0", torch.device("cuda"), torch.device("cuda:0")}),
        (CUDA, {"cuda", "cuda:0", torch.device("cuda"), torch.device("cuda:0")}),
        (CUDA_1, {"cuda:1", torch.device("cuda:1")}),
        (torch.device("cpu"), {"cpu", "cpu:0", torch.device("cpu"), torch.device("cpu:0")}),
    ],
)
def test_every_spelling_of_a_device_is_drawn(drawn, device, expected):
    assert {placement.spelled(device) for placement in drawn(placements(device.type), 80)} == expected


def test_device_that_is_not_current_is_named_with_its_index():
    assert Placement("kind", other_device_current=True).spelled(CUDA) == "cuda:0"


def test_dimensions_of_a_gpu_are_drawn_and_a_cpu_has_none(drawn):
    on_gpu = set(drawn(placements("cuda", other_devices=True), 100))
    assert {(placement.side_stream, placement.other_device_current) for placement in on_gpu} == {
        (False, False),
        (False, True),
        (True, False),
        (True, True),
    }
    assert {placement.tensor_on_cpu for placement in on_gpu} == {None}
    assert {(p.side_stream, p.other_device_current, p.tensor_on_cpu) for p in drawn(placements("cpu"), 50)} == {
        (False, False, None)
    }


@dataclass(frozen=True)
class Inputs:
    case: str
    x: torch.Tensor
    weights: list[torch.Tensor]
    missing: torch.Tensor | None
    count: torch.Tensor


def test_every_tensor_that_is_elsewhere_can_be_forgotten_on_the_cpu(monkeypatch):
    """The meta device stands for a GPU; the copy has no contents there."""
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: torch.empty_like(tensor, device="cpu"))
    inputs = Inputs("case", torch.empty(3, device="meta"), [torch.empty(2, device="meta")] * 2, None, torch.ones(1))
    forgotten = []
    for number in range(6):
        moved = with_tensor_on_cpu(inputs, number)
        tensors = {"x": moved.x, "weights[0]": moved.weights[0], "weights[1]": moved.weights[1]}
        forgotten.append([name for name, tensor in tensors.items() if tensor.device.type == "cpu"])
        assert moved.count is inputs.count
    assert forgotten == [["x"], ["weights[0]"], ["weights[1]"]] * 2
    assert {tensor.device.type for tensor in (inputs.x, *inputs.weights)} == {"meta"}, "the guarded ones stay"


def test_inputs_that_are_all_on_the_cpu_stay_as_they_are():
    inputs = Inputs("case", torch.ones(3), [], None, torch.ones(1))
    assert with_tensor_on_cpu(inputs, 5) is inputs
