"""The example kernels: right on what their targets draw, and each named bug found.

A process interprets Triton's kernels or compiles them, so they run in one of their own: example_runs.py.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernelfuzz.strategies.errors import KernelfuzzError

pytest.importorskip("triton", reason="Triton exists for Linux only")

RUNS = Path(__file__).with_name("example_runs.py")
TARGETS = ("moe_lora_align", "bgmv")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("examples") / "results.json"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(RUNS), str(path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text("utf-8"))


@pytest.mark.parametrize("target", TARGETS)
def test_correct_build_passes(results, target):
    runs = results[target]["correct"]
    assert len(runs) == 150
    assert [run for run in runs if run["failures"]] == []
    assert any(not run["case"]["case"]["batch"]["segments"] for run in runs), "no case without tokens was drawn"


def test_both_layers_of_bgmv_run(results):
    assert {run["case"]["case"]["layer"] for run in results["bgmv"]["correct"]} == {"operator", "wrapper"}


@pytest.mark.parametrize(
    ("target", "bug", "kind", "clause", "outputs"),
    [
        (
            "moe_lora_align",
            "last_adapter_unwritten",
            "unwritten",
            "active_adapter_row",
            {"sorted_token_ids", "expert_ids", "num_tokens_post_pad"},
        ),
        (
            "moe_lora_align",
            "disabled_adapter_touched",
            "overwritten",
            "disabled_adapter_row",
            {"sorted_token_ids", "expert_ids"},
        ),
        ("moe_lora_align", "adapter_out_of_range", "out_of_bounds", "access_in__lay_out", {"num_tokens_post_pad"}),
        ("bgmv", "padded_vocab", "raised", "RuntimeError_in_bgmv_expand_slice", {""}),
    ],
)
def test_named_bug_is_found_and_nothing_else(results, target, bug, kind, clause, outputs):
    found = results[target]["bugs"][bug]
    assert {(k, c) for k, _, c in found["failures"]} == {(kind, clause)}
    assert {output for _, output, _ in found["failures"]} == outputs
    assert found["correct_build"] == []


@pytest.mark.parametrize("target", TARGETS)
def test_version_is_the_bug(results, target):
    example = importlib.import_module(f"kernelfuzz.kernels.examples.{target}")
    assert results[target]["versions"] == ["correct", *example.BUGS]
    assert set(results[target]["bugs"]) == set(example.BUGS)


@pytest.mark.parametrize("target", TARGETS)
def test_unknown_bug_is_refused_with_the_ones_there_are(target):
    example = importlib.import_module(f"kernelfuzz.kernels.examples.{target}")
    with pytest.raises(KernelfuzzError) as refusal:
        example.load("no_such_bug", torch.device("cpu"))
    assert "'no_such_bug'" in str(refusal.value)
    assert all(bug in str(refusal.value) for bug in example.BUGS)
