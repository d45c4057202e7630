"""Spellings of a device."""

import pytest
import torch

from kernelfuzz.strategies.devices import device_spellings


def test_minimal_device_spelling_is_the_bare_string(minimal):
    assert minimal(device_spellings("cpu")) == "cpu"
    assert minimal(device_spellings("cuda:1")) == "cuda:1"


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cuda", {"cuda", "cuda:0", torch.device("cuda"), torch.device("cuda:0")}),
        (torch.device("xpu:0"), {"xpu", "xpu:0", torch.device("xpu"), torch.device("xpu:0")}),
        ("cuda:1", {"cuda:1", torch.device("cuda:1")}),
    ],
)
def test_every_spelling_of_a_device_is_drawn(drawn, device, expected):
    assert set(drawn(device_spellings(device), 50)) == expected
