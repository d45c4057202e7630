"""`kernelfuzz list`: what runs here, and why the rest does not."""

import json

import pytest
import torch

from kernelfuzz.fuzz.targets import TARGETS
from kernelfuzz.kernels import registry
from kernelfuzz.kernels.registry import DEVICE_KINDS, IMPLEMENTATIONS


@pytest.fixture
def rows(kernelfuzz):
    outcome = kernelfuzz("list", "--json")
    assert (outcome.status, outcome.err) == (0, "")
    return json.loads(outcome.out)


def test_json_has_every_kernel_on_every_device(rows):
    assert {tuple(row) for row in rows} == {("target", "kernel", "device", "runs", "reason")}
    places = [(row["target"], row["kernel"], row["device"]) for row in rows]
    assert sorted(places) == sorted(
        (implementation.target, str(implementation.default_name()), device)
        for implementation in IMPLEMENTATIONS
        for device in DEVICE_KINDS
    )
    assert {row["target"] for row in rows} == set(TARGETS)


def test_what_cannot_run_says_why_in_one_line(rows):
    for row in rows:
        assert row["runs"] is (row["reason"] == "")
        assert "\n" not in row["reason"]
    reasons = {(row["target"], row["kernel"], row["device"]): row["reason"] for row in rows}
    not_fetched = "vllm 0.33.0 is not fetched: run 'kernelfuzz releases fetch vllm==0.33.0'"
    assert reasons["lora_shrink_expand", "vllm@0.33.0", "cpu"] == not_fetched
    assert reasons["bgmv", "vllm-xpu-kernels@0.1.16.2", "cuda"] == "not written for cuda"
    assert reasons["bgmv", "example", "cpu"] == ""
    if not torch.xpu.is_available():
        assert reasons["bgmv", "example", "xpu"] == "no xpu device here"


def test_table_shows_the_same(kernelfuzz, rows, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    outcome = kernelfuzz("list")
    assert (outcome.status, outcome.err) == (0, "")
    header, *lines = [line.rstrip().split(maxsplit=3) for line in outcome.out.splitlines()]
    assert header == ["target", "kernel", "device", "here"]
    assert lines == [[r["target"], r["kernel"], r["device"], "runs" if r["runs"] else r["reason"]] for r in rows]


def test_table_shows_reasons_as_they_are(kernelfuzz, monkeypatch):
    """Brackets in a reason are no markup."""
    monkeypatch.setenv("COLUMNS", "200")
    remedy = "pyopencl is not installed: pip install 'kernelfuzz[xpu-cpu]'"
    monkeypatch.setattr(registry.Implementation, "unavailable", lambda self, name, device: remedy)
    lines = kernelfuzz("list").out.splitlines()[1:]
    assert lines
    assert all(line.rstrip().endswith(remedy) for line in lines)
