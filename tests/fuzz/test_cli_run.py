"""`kernelfuzz run` as a user meets it: what it prints where, what it leaves, and its exit status."""

import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kernelfuzz.fuzz import sanitizer
from kernelfuzz.fuzz.targets import TARGETS

RIGHT, TWO_BUGS, FLAKY = (f"engine_kernels:{name}" for name in ("right", "two_bugs", "wrong_in_three_of_ten"))
WRONG_NAME = "bgmv.engine_kernels-two_bugs.wrong_value.output.product"
RAISED_NAME = "bgmv.engine_kernels-two_bugs.raised.ValueError_in_two_bugs"
FLAKY_NAME = "bgmv.engine_kernels-wrong_in_three_of_ten.wrong_value.output.product"


def as_json(text: str):
    """Parse JSON that has no NaN or infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def rank(case):
    return case["rows"] if case["op"] == "shrink" else case["width"]


def tokens(case):
    return sum(segment["length"] for segment in case["batch"]["segments"])


# One campaign of three kernels, in a process of its own, and what is to be seen of it.


def run_three(out, cwd, environment):
    command = ["-c", "from kernelfuzz.fuzz.cli import main; main()", "run", "bgmv"]
    kernels = [argument for name in (RIGHT, TWO_BUGS, FLAKY) for argument in ("--kernel", name)]
    options = ["--device", "cpu", "--examples", "60", "--seed", "7", "--out", str(out), "--json"]
    return subprocess.run(
        [sys.executable, *command, *kernels, *options],
        cwd=cwd,
        env={**environment, "KERNELFUZZ_HOME": str(cwd / "home"), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("campaign")


@pytest.fixture(scope="module")
def campaign(folder, worker_environment):
    return run_three(folder / "out", folder, worker_environment)


@pytest.fixture(scope="module")
def summary(campaign):
    return as_json(campaign.stdout)


def test_failures_are_exit_status_1(campaign):
    assert campaign.returncode == 1


def test_json_is_all_of_stdout_and_the_rest_is_on_stderr(campaign, summary, folder):
    assert as_json((folder / "out" / "summary.json").read_text()) == summary
    for name in (WRONG_NAME, RAISED_NAME, FLAKY_NAME, "see it again: kernelfuzz replay ", "3 failure(s)"):
        assert name in campaign.stderr
    assert "Traceback" not in campaign.stderr


def test_summary_has_the_promised_schema(summary):
    assert summary["schema"] == 1
    assert {"python", "platform", "kernelfuzz", "torch", "hypothesis"} <= set(summary["environment"])
    assert (summary["seed"], summary["interrupted"], summary["skipped"]) == (7, False, [])
    kinds = {
        "target": str,
        "kernel": str,
        "version": str,
        "device": str,
        "examples": int,
        "cases": int,
        "rejected": int,
        "seconds": float,
        "worst_ratio": float,
        "regimes": dict,
        "failures": list,
    }
    for result in summary["results"]:
        assert {name: type(result[name]) for name in kinds} == kinds
    assert [result["kernel"] for result in summary["results"]] == [RIGHT, TWO_BUGS, FLAKY]


def test_every_kernel_has_its_examples(summary):
    for result in summary["results"]:
        assert (result["target"], result["version"], result["device"]) == ("bgmv", "user", "cpu")
        assert (result["examples"], result["rejected"], result["error"]) == (60, 0, "")
        assert result["seconds"] > 0
        assert set(result["spent"]) == {"inputs", "oracle", "kernel", "check"}
        assert 0 <= result["worst_ratio"] <= 1
        assert result["worst_ratio"] == max(result["worst_ratios"].values())
        assert all(0 < count <= 60 for count in result["regimes"].values())
        assert {"shrink", "expand", "expand_slice", "base_and_adapters"} <= set(result["regimes"])
    assert summary["results"][0]["worst_ratio"] > 0


def test_every_failure_is_found_once(summary):
    right, two_bugs, flaky = (result["failures"] for result in summary["results"])
    assert right == []
    assert sorted(two_bugs) == sorted([WRONG_NAME, RAISED_NAME])
    assert flaky == [FLAKY_NAME]


def test_failures_are_saved_and_shrunk(summary, folder):
    failures = folder / "out" / "failures"
    assert {path.name for path in failures.iterdir()} == {WRONG_NAME, RAISED_NAME, FLAKY_NAME}
    for name, kind, output, clause in (
        (WRONG_NAME, "wrong_value", "output", "product"),
        (RAISED_NAME, "raised", "", "ValueError_in_two_bugs"),
        (FLAKY_NAME, "wrong_value", "output", "product"),
    ):
        files = {"README.md", "case.json", "failure.json", "repro.py", "writemap.png"}
        assert {path.name for path in (failures / name).iterdir()} == files
        failure = as_json((failures / name / "failure.json").read_text())
        assert (failure["schema"], failure["fingerprint"], failure["shrunk"]) == (2, name, True)
        assert failure["runs"] == 10
        assert (failure["failed_runs"] < 10) is (name == FLAKY_NAME)
        assert (failure["kind"], failure["output"], failure["clause"]) == (kind, output, clause)
        assert (failure["target"], failure["device"], failure["seed"]) == ("bgmv", "cpu", 7)
        assert 1 <= failure["examples"] <= 60
        assert failure["environment"]["torch"]
    wrong, raised = (as_json((failures / name / "case.json").read_text()) for name in (WRONG_NAME, RAISED_NAME))
    assert (wrong["schema"], wrong["target"]) == (1, "bgmv")
    assert (rank(wrong["case"]), tokens(wrong["case"])) == (9, 1)
    assert (rank(raised["case"]), tokens(raised["case"])) == (1, 4)
    message = as_json((failures / RAISED_NAME / "failure.json").read_text())["message"]
    assert message == "ValueError: too many tokens"
    (element,) = as_json((failures / WRONG_NAME / "failure.json").read_text())["elements"]
    assert math.isclose(element["actual"] - element["expected"], 1000, rel_tol=0.01)


def test_same_seed_same_result(summary, folder, worker_environment):
    again = as_json(run_three(folder / "again", folder, worker_environment).stdout)

    def without_times(document):
        results = [{k: v for k, v in r.items() if k not in ("seconds", "spent")} for r in document["results"]]
        return {**document, "results": results}

    assert without_times(again) == without_times(summary)
    for name in (WRONG_NAME, RAISED_NAME, FLAKY_NAME):
        first, second = (folder / out / "failures" / name for out in ("out", "again"))
        for file in ("case.json", "repro.py"):
            assert (first / file).read_text() == (second / file).read_text()
        assert (first / "writemap.png").read_bytes() == (second / "writemap.png").read_bytes()
        failures = [as_json((each / "failure.json").read_text()) for each in (first, second)]
        for failure in failures:
            del failure["first_seen"]
        assert failures[0] == failures[1]


# Other ways to end.


def test_right_kernel_is_exit_status_0_and_leaves_a_summary(kernelfuzz, tmp_path):
    outcome = kernelfuzz("run", "bgmv", "--kernel", RIGHT, "--examples", "20")
    assert (outcome.status, outcome.err) == (0, "")
    assert "no failure in 20 examples; seed " in outcome.out
    out = tmp_path / "kernelfuzz-out"
    assert {path.name for path in out.iterdir()} == {"summary.json"}
    (result,) = as_json((out / "summary.json").read_text())["results"]
    assert (result["examples"], result["failures"]) == (20, [])
    assert 10 <= result["cases"] <= 20, "a case that is drawn twice is run once"


def test_kernel_that_cannot_be_loaded_is_exit_status_2_and_the_others_run(kernelfuzz, tmp_path):
    arguments = ("--kernel", "engine_kernels:missing", "--kernel", RIGHT, "--time", "1s", "--out", tmp_path / "out")
    outcome = kernelfuzz("run", "bgmv", *arguments)
    assert outcome.status == 2
    assert outcome.out.count("error: bgmv on engine_kernels:missing (cpu): kernel 'engine_kernels:missing' cannot") == 1
    missing, right = as_json((tmp_path / "out" / "summary.json").read_text())["results"]
    assert (missing["cases"], right["error"]) == (0, "")
    assert "has no attribute 'missing'" in missing["error"]


def test_examples_run_through_the_interpreter(kernelfuzz):
    """Two builds of one kernel in one campaign: a version is a bug, or none."""
    pytest.importorskip("triton", reason="Triton exists for Linux only")
    options = ("--device", "cpu", "--examples", "100", "--seed", "1", "--json")
    outcome = kernelfuzz("run", "bgmv", "--kernel", "example", "--kernel", "example@padded_vocab", *options)
    assert outcome.status == 1
    correct, buggy = as_json(outcome.out)["results"]
    assert (correct["kernel"], correct["version"], correct["failures"]) == ("example", "correct", [])
    assert (buggy["version"], buggy["failures"]) == (
        "padded_vocab",
        ["bgmv.example.raised.RuntimeError_in_bgmv_expand_slice"],
    )


def interrupt(kernel, number, folder, environment):
    """Send a signal to the process group once `kernel` hangs; return the exit status, stdout and stderr.

    The process starts with SIGINT ignored, as a shell starts what it runs in the background.
    """
    mark = folder / "mark"
    start = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    command = ["-c", f"{start}; from kernelfuzz.fuzz.cli import main; main()", "run", "bgmv", "--kernel", kernel]
    with subprocess.Popen(
        [sys.executable, *command, "--examples", "100000", "--seed", "1", "--out", str(folder / "out")],
        cwd=folder,
        env={**environment, "KERNELFUZZ_HOME": str(folder / "home"), "ENGINE_KERNELS_MARK": str(mark)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            os.killpg(process.pid, number)
            out, err = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    return process.returncode, out, err


def test_interruption_ends_with_a_summary(tmp_path, worker_environment):
    status, out, err = interrupt(
        "engine_kernels:right_and_then_never_ends", signal.SIGINT, tmp_path, worker_environment
    )
    assert (status, err) == (130, "")
    assert "interrupted: this is what was done until then" in out
    assert "no failure in " in out
    summary = as_json((tmp_path / "out" / "summary.json").read_text())
    assert summary["interrupted"] is True
    (result,) = summary["results"]
    # Answers that were on their way are as good as cases that still run.
    assert 16 <= result["cases"] <= 20 <= result["examples"] < 100_000
    assert result["failures"] == []


def test_interruption_keeps_what_was_found(tmp_path, worker_environment):
    status, out, err = interrupt(
        "engine_kernels:wrong_and_then_never_ends", signal.SIGTERM, tmp_path, worker_environment
    )
    assert (status, err) == (1, "")
    name = "bgmv.engine_kernels-wrong_and_then_never_ends.wrong_value.output.product"
    assert name in out
    summary = as_json((tmp_path / "out" / "summary.json").read_text())
    assert (summary["interrupted"], summary["results"][0]["failures"]) == (True, [name])
    case = as_json((tmp_path / "out" / "failures" / name / "case.json").read_text())["case"]
    assert rank(case) > 8


# What goes wrong around a campaign.


def start(kernel, folder, environment, *options, before=""):
    """Start a campaign of `kernel` with a mark file in `folder`; the statements of `before` are run first."""
    command = ["-c", f"{before}\nfrom kernelfuzz.fuzz.cli import main; main()", "run", "bgmv", "--kernel", kernel]
    return subprocess.Popen(
        [sys.executable, *command, *options, "--seed", "1", "--out", str(folder / "out")],
        cwd=folder,
        env={
            **environment,
            "KERNELFUZZ_HOME": str(folder / "home"),
            "ENGINE_KERNELS_MARK": str(folder / "mark"),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_campaign_leaves_what_it_found_and_what_was_running(tmp_path, worker_environment):
    """The case that ran when it was killed is the first one of the next campaign."""
    kernel = "engine_kernels:wrong_and_then_never_ends"
    with start(kernel, tmp_path, worker_environment, "--examples", "100000") as killed:
        deadline = time.monotonic() + 60
        while not (tmp_path / "mark").exists() and killed.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        killed.kill()
    name = "bgmv.engine_kernels-wrong_and_then_never_ends.wrong_value.output.product"
    case = as_json((tmp_path / "out" / "failures" / name / "case.json").read_text())["case"]
    assert rank(case) > 8
    (running,) = (tmp_path / "out" / "running").iterdir()
    in_flight = [json.loads(line) for line in running.read_text().splitlines()]
    assert in_flight

    with start(kernel, tmp_path, worker_environment, "--examples", "20") as again:
        out, err = again.communicate(timeout=120)
    assert (again.returncode, err) == (1, "")
    assert f"starts with {len(in_flight)} case(s) that were running when an earlier campaign was cut off" in out
    assert not (tmp_path / "out" / "running").exists()
    assert not (tmp_path / "out" / "interrupted").exists()


FULL_DISK = """
import errno, os, pathlib
def full(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
os.fsync = pathlib.Path.write_bytes = full
"""


def test_folder_that_another_campaign_writes_is_refused(kernelfuzz, tmp_path):
    (tmp_path / "out").mkdir()
    lock = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    options = ("--kernel", RIGHT, "--examples", "1", "--out", "out")
    assert_one_line(kernelfuzz("run", "bgmv", *options), "--out out: another campaign writes there")
    os.close(lock)
    assert kernelfuzz("run", "bgmv", *options).status == 0


def test_full_disk_loses_nothing_that_was_found(tmp_path, worker_environment):
    """What was found is printed, cases included."""
    with start(TWO_BUGS, tmp_path, worker_environment, "--examples", "60", before=FULL_DISK) as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (1, "")
    assert "2 failure(s) in 60 examples" in out
    assert f"error: cannot write {tmp_path / 'out' / 'failures'}" in out
    assert "No space left on device" in out
    marker = "its case, which could not be saved: "
    cases = [json.loads(line.partition(marker)[2]) for line in out.splitlines() if marker in line]
    assert sorted(rank(case["case"]) for case in cases) == [1, 9]
    assert not (tmp_path / "out" / "summary.json").exists()


SIGNAL_WHILE_COLLECTING = """
import gc, os, signal
def collecting(phase, info):
    if getattr(signal.getsignal(signal.SIGINT), "__name__", "") == "request":
        gc.callbacks.remove(collecting)
        os.kill(os.getpid(), signal.SIGINT)
gc.callbacks.append(collecting)
"""


def test_signal_whose_exception_python_drops_ends_the_campaign_all_the_same(tmp_path, worker_environment):
    """An exception that is raised in a garbage collection goes no further."""
    options = ("--examples", "1000000", "--json")
    with start(RIGHT, tmp_path, worker_environment, *options, before=SIGNAL_WHILE_COLLECTING) as process:
        out, err = process.communicate(timeout=120)
    assert "Exception ignored" in err
    assert process.returncode == 130
    assert as_json(out)["interrupted"] is True


def test_case_that_the_harness_cannot_judge_is_reported_as_ours(kernelfuzz, tmp_path):
    outcome = kernelfuzz(
        "run", "bgmv", "--kernel", "broken_harness:launch", "--examples", "300", "--seed", "1", "--json"
    )
    assert outcome.status == 2
    (result,) = as_json(outcome.out)["results"]
    assert result["failures"] == []
    known = {"ZeroDivisionError: division by zero", "without launching the kernel: the worker died: exit_status_9"}
    assert set() < result["errors"].keys() <= known
    assert "kernelfuzz could not judge" in outcome.err
    saved = sorted((tmp_path / "kernelfuzz-out" / "errors").iterdir())
    assert len(saved) == len(result["errors"])
    assert {rank(as_json(path.read_text())["case"]) for path in saved} <= {5, 6}


def test_kernel_can_be_run_in_the_campaigns_own_process(tmp_path, worker_environment):
    options = ("--examples", "40", "--no-isolate", "--json")
    with start(TWO_BUGS, tmp_path, worker_environment, *options) as process:
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    (result,) = as_json(out)["results"]
    assert (result["examples"], result["workers_replaced"]) == (40, 0)
    assert sorted(result["failures"]) == sorted([WRONG_NAME, RAISED_NAME])


def test_several_workers_find_what_one_finds(kernelfuzz):
    found = []
    for workers in (1, 3):
        options = ("--examples", "60", "--seed", "7", "--workers", workers, "--out", f"out-{workers}", "--json")
        outcome = kernelfuzz("run", "bgmv", "--kernel", TWO_BUGS, *options)
        (result,) = as_json(outcome.out)["results"]
        found.append((outcome.status, sorted(result["failures"]), result["hits"], result["cases"], result["regimes"]))
    assert found[0] == found[1]


# Bad input.


def assert_one_line(outcome, *texts):
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    for text in texts:
        assert text in outcome.err


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["no_such_target"], ["unknown target 'no_such_target'", *TARGETS]),
        (["--kernel", "no-such-kernel"], ["no kernel 'no-such-kernel'", "vllm-xpu-kernels", "example"]),
        (["moe_lora_align", "--kernel", "vllm-torch@0.33.0"], ["no kernel 'vllm-torch@0.33.0'", "vllm-xpu-kernels"]),
        (["--kernel", "vllm@"], ["malformed kernel name 'vllm@'", "NAME@VERSION"]),
        (["--kernel", "two words"], ["malformed kernel name 'two words'"]),
        (["--kernel", ""], ["malformed kernel name ''"]),
        (["--kernel", "my_module:kernel"], ["'my_module:kernel': name the target it implements"]),
        (["lora_shrink_expand", "--kernel", "vllm@0.21.0"], ["run 'kernelfuzz releases fetch vllm==0.21.0'"]),
        (["lora_shrink_expand", "--kernel", "vllm@newest"], ["'newest' is neither a version"]),
        (["lora_shrink_expand", "--kernel", "vllm@no/such/path"], ["there is no folder no/such/path"]),
        (["lora_shrink_expand", "--kernel", "vllm@."], [". holds no vllm/ folder: give a checkout of vllm"]),
        (["bgmv", "--kernel", "example", "--device", "cuda:99"], ["device 'cuda:99': no "]),
        (["bgmv", "--kernel", "example", "--device", "tpu"], ["unknown device 'tpu': expected cpu, cuda"]),
        (
            ["bgmv", "--kernel", "example", "--device", "meta"],
            ["unknown device 'meta': expected one of cuda, xpu, cpu"],
        ),
        (["bgmv", "--kernel", "example", "--device", "cuda:x"], ["unknown device 'cuda:x'"]),
        (["bgmv", "--kernel", "example", "--device", ""], ["unknown device ''"]),
        (["bgmv", "--kernel", "example", "--workers", "0"], ["--workers 0: expected at least 1"]),
        (
            ["bgmv", "--kernel", "example", "--kernel", "example@padded_vocab", "--no-isolate"],
            ["--no-isolate runs one target and one kernel"],
        ),
        (["bgmv", "--kernel", "example", "--no-isolate", "--workers", "2"], ["--no-isolate runs one target"]),
        (["bgmv", "--kernel", "example", "--sanitizer", "valgrind"], ["'valgrind': expected one of memcheck, race"]),
        (
            ["bgmv", "--kernel", "example", "--sanitizer", "memcheck"],
            ["compute-sanitizer is not installed: it is part of NVIDIA's CUDA toolkit"],
        ),
        (["bgmv", "--kernel", "example", "--regime", "large"], ["--regime 'large': expected one of robustness, huge"]),
        (["bgmv", "--kernel", "example", "--regime", "robustness"], ["--regime robustness needs a GPU"]),
        (["--examples", "0"], ["--examples 0: expected at least 1"]),
        (["--examples", "-3"], ["--examples -3: expected at least 1"]),
        (["--time", "0"], ["--time '0': expected a positive time like 90s, 10m or 2h"]),
        (["--time", "abc"], ["--time 'abc'"]),
        (["--time", "-1s"], ["--time '-1s'"]),
        (["--time", "1d"], ["--time '1d'"]),
        (["--time", ""], ["--time ''"]),
        (["--examples", "5", "--time", "5s"], ["give --examples or --time, not both"]),
        (["--out", "a-file"], ["--out a-file: File exists; name a folder that can be written"]),
        (["--out", "a-file/below"], ["--out a-file/below: Not a directory"]),
        (["--out", "/proc/kernelfuzz-out"], ["--out /proc/kernelfuzz-out: No such file or directory"]),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line(kernelfuzz, tmp_path, monkeypatch, arguments, texts):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(sanitizer, "DEFAULT_CUDA", tmp_path)
    (tmp_path / "a-file").touch()
    if "--out" in arguments:
        arguments = ["bgmv", "--kernel", RIGHT, "--examples", "1", *arguments]
    assert_one_line(kernelfuzz("run", *arguments), *texts)
    assert {path.name for path in tmp_path.iterdir()} == {"a-file"}


def test_nothing_to_run_is_one_line(kernelfuzz, monkeypatch):
    assert_one_line(kernelfuzz("run", "fused_moe_lora", "--device", "cpu"), "nothing can run here", "releases fetch")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_out_that_may_not_be_written_is_one_line(kernelfuzz, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    outcome = kernelfuzz("run", "bgmv", "--kernel", RIGHT, "--examples", "1", "--out", "locked")
    assert_one_line(outcome, "--out locked: Permission denied")


def test_console_script_reports_without_a_traceback(tmp_path):
    script = Path(sys.executable).with_name("kernelfuzz")
    done = subprocess.run([script, "run", "no_such_target"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown target 'no_such_target'")
    assert done.stderr.count("\n") == 1
