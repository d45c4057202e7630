"""The benchmarks, run as a person runs them, on a CPU and on small kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernelfuzz.oracles.expectation import Clause, ExpectedOutput

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    """Runs a script of the folder benchmarks in an empty folder, where kernels of the engine's tests can be found."""
    path = [str(ROOT / "tests" / "fuzz"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))

    def run(script, *arguments):
        command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    return run


@pytest.fixture
def agrees(monkeypatch):
    """The comparison of the naive loop."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import naive

    return naive.agrees


CLAUSES = (Clause("active", "write"), Clause("inactive", "keep"), Clause("scratch", "free"))
REGION = torch.tensor([0, 0, 0, 0, 1, 2], dtype=torch.uint8)
VALUES = torch.tensor([1, 2, 3, 4, 5, 6])
INITIAL = torch.tensor([9, 9, 9, 9, 9, 9])


@pytest.mark.parametrize(
    ("actual", "passes"),
    [
        ([1, 2, 3, 4, 9, 0], True),
        ([1, 2, 3, 5, 9, 9], False),
        ([1, 2, 3, 9, 9, 9], False),
        ([1, 2, 3, 4, 5, 9], False),
        ([2, 1, 3, 4, 9, 9], False),
    ],
)
def test_the_naive_loop_wants_what_is_written_right_and_what_is_kept_unchanged(agrees, actual, passes):
    expected = ExpectedOutput(CLAUSES, REGION, VALUES)
    assert agrees(torch.tensor(actual), INITIAL, expected) is passes


@pytest.mark.parametrize(
    ("actual", "passes"),
    [
        ([2, 1, 4, 3, 9, 9], True),
        ([1, 3, 2, 4, 9, 9], False),
        ([1, 1, 3, 4, 9, 9], False),
        ([-1, 2, 3, 4, 9, 9], False),
    ],
)
def test_the_naive_loop_lets_elements_of_one_group_stand_in_any_order(agrees, actual, passes):
    expected = ExpectedOutput(CLAUSES, REGION, VALUES, groups=torch.tensor([0, 0, 1, 1, 2, 2]))
    assert agrees(torch.tensor(actual), INITIAL, expected) is passes


@pytest.mark.parametrize(("error", "passes"), [(0.5, True), (0.6, False), (float("nan"), False)])
def test_the_naive_loop_allows_an_error_up_to_the_bound(agrees, error, passes):
    bound = torch.full((6,), 0.5, dtype=torch.float64)
    actual = torch.tensor([1, 2 + error, 3, 4, 9, 0], dtype=torch.float64)
    assert agrees(actual, INITIAL.double(), ExpectedOutput(CLAUSES, REGION, VALUES.double(), bound)) is passes


def test_speed_measures_the_naive_loop_and_kernelfuzz_on_one_kernel(benchmark, tmp_path):
    arguments = ("--target", "bgmv", "--kernel", "engine_kernels:right", "--device", "cpu", "--seconds", 5)
    done = benchmark("speed.py", *arguments, "--json", tmp_path / "speed.json")
    assert done.returncode == 0, done.stderr
    naive, campaign = json.loads((tmp_path / "speed.json").read_text())["measurements"]
    assert (naive["loop"], campaign["loop"]) == ("naive", "kernelfuzz")
    for measured in (naive, campaign):
        assert measured["cases"] > 0
        assert measured["failing"] == 0
        assert measured["problem"] == ""
        assert 0 < sum(measured["spent"].values()) <= measured["workers"] * measured["seconds"]
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_speed_shows_that_the_naive_loop_ends_where_kernelfuzz_goes_on(benchmark, tmp_path):
    arguments = ("--target", "bgmv", "--kernel", "engine_kernels:dies_of_every_third", "--device", "cpu")
    done = benchmark("speed.py", *arguments, "--seconds", 5, "--json", tmp_path / "speed.json")
    assert done.returncode == 0, done.stderr
    naive, campaign = json.loads((tmp_path / "speed.json").read_text())["measurements"]
    assert "status 5" in naive["problem"]
    assert campaign["failing"] == 1
    assert naive["problem"] in done.stdout


def test_speed_says_which_kernels_there_are(benchmark):
    done = benchmark("speed.py", "--target", "bgmv", "--kernel", "nonesuch", "--device", "cpu")
    assert done.returncode == 2
    assert "nonesuch" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_campaign_loses_no_crash(benchmark, tmp_path):
    done = benchmark("crash_campaign.py", "--device", "cpu", "--examples", 100, "--json", tmp_path / "crash.json")
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = json.loads((tmp_path / "crash.json").read_text())
    assert numbers["examples"] == 100
    assert numbers["crashes counted"] == numbers["crashes expected"] > 0
    assert numbers["crashes lost"] == numbers["crashes invented"] == 0
    assert numbers["workers replaced"] >= numbers["crashes expected"]


def test_on_gpu_says_what_each_step_found_and_which_could_not_be_run(benchmark, tmp_path):
    override = ("--device", "cpu", "--kernel", "example@last_adapter_unwritten", "--examples", 100)
    done = benchmark("on_gpu.py", tmp_path / "out", *override, "--only", "align-bad,fused")
    assert done.returncode == 1
    table = done.stdout.splitlines()
    (found,) = [line for line in table if "sorted_token_ids.active_adapter_row" in line]
    assert "shrunk to" in found
    assert json.loads((tmp_path / "out" / "align-bad" / "summary.json").read_text())["results"][0]["examples"] == 100
    assert any("did not run: error: no kernel 'example@last_adapter_unwritten'" in line for line in table)


def test_on_gpu_names_its_steps(benchmark, tmp_path):
    done = benchmark("on_gpu.py", tmp_path / "out", "--only", "nonesuch")
    assert done.returncode == 2
    assert "memcheck" in done.stderr


def test_on_gpu_overwrites_nothing(benchmark, tmp_path):
    (tmp_path / "out" / "crash").mkdir(parents=True)
    done = benchmark("on_gpu.py", tmp_path / "out", "--only", "crash")
    assert done.returncode == 2
    assert "name a new folder" in done.stderr
