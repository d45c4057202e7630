"""`kernelfuzz repro`: the script of a saved failure, wherever the failure was found."""

import json
import subprocess
import sys

import pytest

from kernelfuzz.fuzz.files import write_json
from kernelfuzz.kernels import releases
from kernelfuzz.strategies.case import to_json

TWO_BUGS = "engine_kernels:two_bugs"


@pytest.fixture
def failures(kernelfuzz, tmp_path):
    """The folders of a campaign's failures, a wrong value and an exception, by their kinds."""
    campaign = kernelfuzz("run", "bgmv", "--kernel", TWO_BUGS, "--examples", "60", "--seed", "7")
    assert campaign.status == 1
    folders = (tmp_path / "kernelfuzz-out" / "failures").iterdir()
    return {json.loads((folder / "failure.json").read_text())["kind"]: folder for folder in folders}


def with_fields(folder, **fields):
    """Change what is recorded of a failure."""
    file = folder / "failure.json"
    write_json(file, {**json.loads(file.read_text()), **fields})


def assert_one_line(outcome, *texts):
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    for text in texts:
        assert text in outcome.err


def test_script_is_the_folders_own_and_shows_the_failure(kernelfuzz, failures, worker_environment, tmp_path):
    for folder in failures.values():
        outcome = kernelfuzz("repro", folder)
        assert (outcome.status, outcome.err) == (0, "")
        assert outcome.out == (folder / "repro.py").read_text()
        script = tmp_path / "script.py"
        script.write_text(outcome.out)
        done = subprocess.run([sys.executable, script], env=worker_environment, capture_output=True, text=True)
        assert done.returncode == 1


def test_script_for_another_kernel_passes_where_that_is_right(kernelfuzz, failures, worker_environment, tmp_path):
    outcome = kernelfuzz("repro", failures["wrong_value"], "--kernel", "engine_kernels:right")
    assert outcome.status == 0
    script = tmp_path / "script.py"
    script.write_text(outcome.out)
    done = subprocess.run([sys.executable, script], env=worker_environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_test_for_pytest_fails_where_the_failure_is(kernelfuzz, failures, worker_environment, tmp_path):
    for kernel, status in ((TWO_BUGS, 1), ("engine_kernels:right", 0)):
        outcome = kernelfuzz("repro", failures["wrong_value"], "--pytest", "--kernel", kernel)
        assert (outcome.status, outcome.err) == (0, "")
        assert "\ndef test_" in outcome.out
        test = tmp_path / f"test_{status}.py"
        test.write_text(outcome.out)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
        done = subprocess.run(command, env=worker_environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == status, done.stdout


def test_neither_the_kernel_nor_the_device_need_be_here(kernelfuzz, failures):
    """The kernel's release was not fetched, and there is no such GPU."""
    with_fields(failures["wrong_value"], kernel="vllm-torch@0.32.0", version="0.32.0", device="cuda:99")
    outcome = kernelfuzz("repro", failures["wrong_value"])
    assert (outcome.status, outcome.err) == (0, "")
    assert "0.32.0" in outcome.out
    assert "cuda:99" in outcome.out
    newest = kernelfuzz("repro", failures["wrong_value"], "--kernel", "vllm-torch", "--device", "cpu")
    assert newest.status == 0
    assert releases.PINNED["vllm"] in newest.out
    assert "0.32.0" not in newest.out
    assert "cuda" not in newest.out


def test_bad_input_is_one_line(kernelfuzz, failures, shrink_case, tmp_path):
    folder = failures["wrong_value"]
    assert_one_line(kernelfuzz("repro", folder / "case.json"), "is a case alone", "name the failure's folder")
    assert_one_line(kernelfuzz("repro", "nowhere"), "cannot read nowhere: No such file or directory")
    assert_one_line(kernelfuzz("repro", "kernelfuzz-out"), "cannot read kernelfuzz-out/failure.json: No such file")
    assert_one_line(kernelfuzz("repro", folder, "--kernel", "no_such"), "no kernel 'no_such' for this target")
    assert_one_line(kernelfuzz("repro", folder, "--kernel", "vllm@"), "malformed kernel name 'vllm@'")
    assert_one_line(kernelfuzz("repro", folder, "--device", "tpu"), "unknown device 'tpu'")
    in_intel = ("--kernel", "vllm-xpu-kernels", "--device", "cuda")
    assert_one_line(
        kernelfuzz("repro", folder, *in_intel), "vllm-xpu-kernels is not written for cuda: expected xpu, cpu"
    )
    write_json(folder / "case.json", {**to_json(shrink_case(1)), "schema": 99})
    assert_one_line(kernelfuzz("repro", folder), "case.json: case file has schema 99")
