"""`kernelfuzz regressions` as a user meets it, and what counts as passed."""

import dataclasses
import json

import pytest
import torch

from kernelfuzz.fuzz import regressions
from kernelfuzz.fuzz.cli import regressions as command
from kernelfuzz.fuzz.regressions import RegressionResult, missing_releases, run_regression
from kernelfuzz.kernels import registry, releases
from kernelfuzz.kernels.regressions import REGRESSIONS, find
from kernelfuzz.strategies.errors import KernelfuzzError

CPU = torch.device("cpu")
LAYOUT, COMPUTE_UNITS, DEVICE = find("40109"), find("43646"), find("44005")
no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")


@pytest.fixture
def fetched(monkeypatch):
    """Requires the releases of a regression."""

    def require(*chosen):
        for regression in chosen:
            for side in (regression.bad, regression.good):
                try:
                    releases.locate(regression.package, side.version)
                except KernelfuzzError as error:
                    pytest.skip(str(error))

    return require


@pytest.fixture
def few_cases(monkeypatch):
    """Has the good side run a hundred cases, and the bad side no more."""
    monkeypatch.setattr(regressions, "GOOD_CASES", 100)
    monkeypatch.setattr(regressions, "GOOD_TIMES", 1)
    monkeypatch.setattr(regressions, "BAD_CASES", 600)


def silent(text):
    del text


def test_a_bug_that_no_release_shipped_is_found_where_it_was_put_back_and_only_there(fetched, few_cases):
    fetched(DEVICE)
    said = []
    result = run_regression(DEVICE, CPU, [0, 1], said.append)
    assert (result.outcome, result.problem) == ("PASS", "")
    assert said[0] == "44005: 0.23.0 edited on cpu: 4 cases"
    assert len(result.bad) == len(result.cases_until_found) == 2
    for side in result.bad:
        assert side.version == "0.23.0"
        assert side.found.shrunk
        assert side.found.case.size == 1
        assert side.found.fingerprint == "moe_permute.vllm.raised.AssertionError_in_validate"
        assert side.found.cases <= side.cases
        assert "stand-ins" in side.notes[0]
    assert result.good.passed >= 100
    assert result.good.found is None


def test_a_side_without_the_bug_does_not_pass_for_one_with_it(fetched, few_cases):
    fetched(DEVICE)
    result = run_regression(dataclasses.replace(DEVICE, bad=DEVICE.good), CPU, [3], silent)
    assert result.outcome == "FAIL"
    assert result.problem.startswith("the bug was not found in 6")
    assert result.good is None


def test_a_mended_side_that_shows_the_bug_does_not_pass(fetched, few_cases):
    fetched(DEVICE)
    result = run_regression(dataclasses.replace(DEVICE, good=DEVICE.bad), CPU, [0], silent)
    assert result.outcome == "FAIL"
    assert result.problem.startswith("the good side shows the bug after ")


def test_other_failures_of_a_mended_side_are_listed(fetched, few_cases):
    fetched(LAYOUT)
    result = run_regression(LAYOUT, CPU, [0], silent)
    assert result.outcome == "PASS"
    assert result.bad[0].found.failure.clause == "kept_layout"
    assert result.bad[0].found.case.platform == "xpu"
    assert "fp8_layout.vllm.wrong_value.w13.swapped_weights" in result.good.others


def test_a_release_that_cannot_be_edited_fails_and_says_so(fetched):
    fetched(DEVICE)
    (edit,) = DEVICE.bad.edits
    wrong = dataclasses.replace(DEVICE.bad, edits=(dataclasses.replace(edit, anchor="is not there"),))
    result = run_regression(dataclasses.replace(DEVICE, bad=wrong), CPU, [0], silent)
    assert result.outcome == "FAIL"
    assert result.problem.startswith("the bad side cannot be judged: cannot edit vllm/model_executor/layers/fused_moe/")
    assert result.problem.endswith("it contains 'is not there' 0 times, not once")


def test_what_a_device_cannot_show_is_said_and_nothing_is_run():
    result = run_regression(find("40131"), CPU, [0], silent)
    assert (result.outcome, result.problem) == ("NOT RUN", "it shows on cuda, not on cpu")
    assert result.bad == []


def test_without_releases_the_command_says_what_to_fetch(kernelfuzz):
    outcome = kernelfuzz("regressions", 43646, 44005, "--device", "cpu")
    assert outcome.status == 2
    assert outcome.err == ("error: releases are missing: run 'kernelfuzz releases fetch vllm==0.22.0 vllm==0.23.0'\n")


def test_releases_for_another_device_are_not_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("KERNELFUZZ_HOME", str(tmp_path))
    assert missing_releases([find("40131"), COMPUTE_UNITS], CPU) == ["vllm==0.22.0"]


def test_a_wrapper_needs_what_it_wraps(monkeypatch, tmp_path):
    monkeypatch.setenv("KERNELFUZZ_HOME", str(tmp_path))
    monkeypatch.setattr(registry.find("bgmv", registry.KernelName("vllm")).__class__, "cpu_runtime", lambda _: None)
    wrapped = f"vllm-xpu-kernels=={releases.PINNED['vllm-xpu-kernels']}"
    assert missing_releases([find("39989")], CPU) == ["vllm==0.19.1", "vllm==0.20.0", wrapped]


@no_cuda
def test_nothing_that_can_run_is_exit_status_2(kernelfuzz):
    outcome = kernelfuzz("regressions", 40131)
    assert outcome.status == 2
    assert "NOT RUN vllm 40131" in outcome.out
    assert "no cuda device here" in outcome.out
    assert outcome.err == "error: none of these can run here\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([1], "error: no regression 1: expected one of 39989, 40109, 40131, 43646, 44005"),
        (["--seeds", 0], "error: --seeds 0: expected at least 1"),
        (["--device", "tpu"], "error: unknown device 'tpu'"),
    ],
)
def test_bad_arguments_are_one_line(kernelfuzz, arguments, message):
    outcome = kernelfuzz("regressions", *arguments)
    assert outcome.status == 2
    assert outcome.err.startswith(message)
    assert outcome.err.count("\n") == 1


@pytest.fixture
def fake_runs(monkeypatch):
    """Has every regression come out as told."""

    def come_out(outcomes):
        def run(regression, device, seeds, progress):
            del device, seeds, progress
            outcome = outcomes[regression.pull_request]
            if isinstance(outcome, KeyboardInterrupt):
                return RegressionResult(regression, interrupted=True)
            return RegressionResult(regression, skipped=outcome)

        monkeypatch.setattr(command, "missing_releases", lambda *_: [])
        monkeypatch.setattr(command, "run_regression", run)

    return come_out


def test_an_interruption_keeps_what_was_done(kernelfuzz, fake_runs):
    fake_runs({39989: "no such device", 40109: KeyboardInterrupt()})
    outcome = kernelfuzz("regressions", "--json")
    assert outcome.status == 130
    assert "NOT RUN vllm 39989" in outcome.err
    assert "NOT RUN vllm 40109" in outcome.err
    assert outcome.err.endswith("5 NOT RUN\n")
    problems = [each["problem"] for each in json.loads(outcome.out)["results"]]
    assert problems == ["no such device", *["interrupted"] * 4]


@pytest.fixture
def unloadable(monkeypatch):
    """Has no kernel load, anywhere."""

    def cannot(*_):
        raise KernelfuzzError("library.so does not load here")

    monkeypatch.setattr("kernelfuzz.fuzz.campaign.Isolation.executor", cannot)


def test_a_library_that_does_not_fit_a_gpu_does_not_count(fetched, unloadable, monkeypatch):
    fetched(DEVICE)
    monkeypatch.setattr(registry, "missing_device", lambda _: None)
    result = run_regression(DEVICE, torch.device("cuda"), [0], silent)
    assert (result.outcome, result.problem) == ("NOT RUN", "0.23.0 edited on cuda: library.so does not load here")


def test_code_that_cannot_be_loaded_on_a_cpu_is_broken(fetched, unloadable):
    fetched(DEVICE)
    result = run_regression(DEVICE, CPU, [0], silent)
    assert (result.outcome, result.problem) == ("FAIL", "the bad side cannot be judged: library.so does not load here")


def test_cases_that_fail_otherwise_do_not_speak_for_the_mended_side(fetched, few_cases):
    fetched(DEVICE)
    (edit,) = DEVICE.bad.edits
    anchors = ("    n_token, n_hidden = hidden_states.size()\n", "    topk = topk_weights.size(1)\n")
    broken = (
        dataclasses.replace(edit, anchor=each, replacement="    raise RuntimeError('broken')\n") for each in anchors
    )
    good = dataclasses.replace(DEVICE.good, edits=tuple(broken))
    result = run_regression(dataclasses.replace(DEVICE, good=good), CPU, [7], silent)
    assert result.outcome == "FAIL"
    assert "cases passed of 100 that must" in result.problem
    assert "moe_permute.vllm.raised.RuntimeError_in_moe_permute" in result.good.others


def test_an_interrupted_campaign_is_no_failure(fetched, monkeypatch):
    fetched(DEVICE)

    def interrupt(text):
        raise KeyboardInterrupt

    result = run_regression(DEVICE, CPU, [0], interrupt)
    assert (result.outcome, result.problem) == ("NOT RUN", "interrupted")


def test_a_failure_is_exit_status_1_and_json_is_all_of_stdout(kernelfuzz, fake_runs):
    fake_runs({regression.pull_request: "" for regression in REGRESSIONS})  # nothing was run: none passed
    outcome = kernelfuzz("regressions", "--json")
    assert outcome.status == 1
    document = json.loads(outcome.out)
    assert document["schema"] == 1
    assert [each["outcome"] for each in document["results"]] == ["FAIL"] * 5
    assert "FAIL" in outcome.err
