"""`kernelfuzz replay` as a user meets it: what it says of saved failures, in which order, and its exit status."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from kernelfuzz.fuzz import isolated, sanitizer
from kernelfuzz.fuzz.campaign import Isolation
from kernelfuzz.fuzz.failure_folder import SCHEMA, SavedFailure
from kernelfuzz.fuzz.files import write_json
from kernelfuzz.fuzz.replay import Trial, plan, run_trials
from kernelfuzz.fuzz.verdict import Failure
from kernelfuzz.kernels import registry
from kernelfuzz.strategies.case import to_json

RIGHT, TWO_BUGS, FLAKY, MORTAL = (
    f"engine_kernels:{name}" for name in ("right", "two_bugs", "wrong_in_three_of_ten", "mortal")
)
WRONG = Failure("wrong_value", "output", "product", "1 of 9 elements of output wrong (product)")
RAISED = Failure("raised", "", "ValueError_in_two_bugs", "ValueError: too many tokens")
WRONG_NAME = "bgmv.engine_kernels-two_bugs.wrong_value.output.product"
RAISED_NAME = "bgmv.engine_kernels-two_bugs.raised.ValueError_in_two_bugs"


def save(folder, case, kernel=TWO_BUGS, failure=WRONG, **changes):
    """Write a failure's folder."""
    document = {
        "schema": SCHEMA,
        "fingerprint": "",
        "target": "bgmv",
        "kernel": kernel,
        "version": "user",
        "device": "cpu",
        **asdict(failure),
        "symptoms": [],
        "sanitizer": None,
        "failed_runs": 10,
        "runs": 10,
    }
    write_json(folder / "case.json", to_json(case))
    write_json(folder / "failure.json", {**document, **changes})
    return folder


def save_case(path, case):
    """Write a case file alone."""
    write_json(path, to_json(case))
    return path


def as_json(text):
    """Parse JSON that has no NaN or infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def rows(outcome):
    """What is said of each path: the outcome, and the rest of its line with single spaces."""
    lines = [line.split() for line in outcome.out.splitlines() if line.startswith(("FIXED ", "FAILED ", "ERROR "))]
    return {path: f"{word} {' '.join(rest)}".strip() for word, path, *rest in lines}


def assert_one_line(outcome, *texts):
    """An error of usage."""
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    for text in texts:
        assert text in outcome.err


def assert_error(outcome, path, *texts):
    """All that is said is that one path is an error."""
    assert (outcome.status, outcome.err) == (2, "")
    assert outcome.out.startswith(f"ERROR   {path}  ")
    for text in texts:
        assert text in outcome.out.splitlines()[0]


# One failure.


def test_failure_that_is_still_there_is_shown_in_full(kernelfuzz, shrink_case, tmp_path):
    save(tmp_path / WRONG_NAME, shrink_case(9))
    outcome = kernelfuzz("replay", WRONG_NAME)
    assert (outcome.status, outcome.err) == (1, "")
    first, *details = outcome.out.splitlines()
    assert first == f"FAILED  {WRONG_NAME}  bgmv on {TWO_BUGS} (cpu) [user]"
    assert "rows=9" in "".join(details)
    assert f"  wrong_value  {WRONG_NAME}" in details
    assert "  1 of 9 elements of output wrong (product)" in details
    assert details[-1].startswith("    [0, 0] expected 1.0, got 1001.0  (err/bound ")


def test_mended_kernel_is_fixed_and_a_relapse_failed(kernelfuzz, shrink_case, tmp_path):
    save(tmp_path / "it", shrink_case(9), "mine:kernel")
    kernel = tmp_path / "mine.py"
    for body, status, word in (("wrong_above_rank_8", 1, "FAILED"), ("right", 0, "FIXED"), ("two_bugs", 1, "FAILED")):
        kernel.write_text(f"from engine_kernels import {body} as kernel\n")
        outcome = kernelfuzz("replay", "it")
        assert (outcome.status, outcome.err) == (status, "")
        assert rows(outcome) == {"it": f"{word} bgmv on mine:kernel (cpu) [user]"}


def test_other_kernel_can_be_named(kernelfuzz, shrink_case, tmp_path):
    save(tmp_path / "it", shrink_case(9))
    both = kernelfuzz("replay", "it", "--kernel", TWO_BUGS, "--kernel", RIGHT, "--device", "cpu")
    assert (both.status, both.err) == (1, "")
    lines = both.out.splitlines()
    assert [" ".join(line.split()) for line in lines if " on " in line] == [
        f"FAILED it bgmv on {TWO_BUGS} (cpu) [user]",
        f"FIXED it bgmv on {RIGHT} (cpu) [user]",
    ]
    assert f"  wrong_value  {WRONG_NAME}" in lines
    assert both.out.count("rows=9") == 1
    assert lines[-1] == "1 FIXED, 1 FAILED"


def test_another_failure_is_named(kernelfuzz, shrink_case, tmp_path):
    save(tmp_path / "it", shrink_case(1, tokens=4))
    outcome = kernelfuzz("replay", "it")
    assert outcome.status == 1
    assert rows(outcome)["it"].endswith(f"[user] with another failure: {RAISED_NAME}")
    known = save(tmp_path / "known", shrink_case(1, tokens=4), symptoms=[asdict(RAISED)])
    assert "with another" not in kernelfuzz("replay", known).out


def test_kernel_of_another_name_shows_the_same_failure(kernelfuzz, shrink_case, tmp_path):
    save(tmp_path / "it", shrink_case(9), RIGHT)
    outcome = kernelfuzz("replay", "it", "--kernel", "engine_kernels:wrong_above_rank_8")
    assert outcome.status == 1
    assert "with another" not in outcome.out


@pytest.mark.parametrize(
    ("kernel", "failed_runs", "status", "row"),
    [
        (FLAKY, 3, 1, "FAILED bgmv on {} (cpu) [user] failed in 3 of 10 runs"),
        (FLAKY, 0, 1, "FAILED bgmv on {} (cpu) [user] failed in 3 of 10 runs"),
        (FLAKY, 10, 0, "FIXED bgmv on {} (cpu) [user]"),
        (RIGHT, 3, 0, "FIXED bgmv on {} (cpu) [user] passed in 10 runs"),
    ],
)
def test_unreliable_failure_is_run_ten_times(kernelfuzz, shrink_case, tmp_path, kernel, failed_runs, status, row):
    save(tmp_path / "it", shrink_case(9), kernel, failed_runs=failed_runs)
    outcome = kernelfuzz("replay", "it", "--workers", 1)
    assert (outcome.status, outcome.err) == (status, "")
    assert rows(outcome)["it"] == row.format(kernel)


def test_unreliable_failure_that_shows_another_one_says_both(kernelfuzz, shrink_case, tmp_path):
    save(tmp_path / "it", shrink_case(9), FLAKY, failure=RAISED, failed_runs=3)
    outcome = kernelfuzz("replay", "it", "--workers", 1)
    name = "bgmv.engine_kernels-wrong_in_three_of_ten.wrong_value.output.product"
    assert rows(outcome)["it"].endswith(f"failed in 3 of 10 runs; with another failure: {name}")


def test_crash_and_hang_are_failures_and_the_rest_goes_on(kernelfuzz, shrink_case, tmp_path, monkeypatch):
    monkeypatch.setattr(isolated, "FIRST_SECONDS", 1.0)
    monkeypatch.setattr(isolated, "LEAST_SECONDS", 1.0)
    monkeypatch.setenv("ENGINE_KERNELS_MARK", str(tmp_path / "mark"))
    for rank, clause in ((1, "exit_status_3"), (2, "exit_status_3"), (3, "SIGSEGV"), (4, "no_answer"), (5, "SIGSEGV")):
        kind = "hang" if clause == "no_answer" else "crash"
        save(tmp_path / "all" / f"rank-{rank}", shrink_case(rank), MORTAL, Failure(kind, "", clause, "it died"))
    outcome = kernelfuzz("replay", "all", "--json")
    assert outcome.status == 1
    results = as_json(outcome.out)
    words = {Path(result["path"]).name: result["outcome"] for result in results}
    assert words == {"rank-1": "FIXED", **dict.fromkeys(("rank-2", "rank-3", "rank-4"), "FAILED"), "rank-5": "FIXED"}
    assert [result["reason"] for result in results] == [""] * 5
    assert [failure["clause"] for result in results for failure in result["failures"]] == [
        "exit_status_3",
        "SIGSEGV",
        "no_answer",
    ]


# A case file alone.


def test_case_alone_is_run_on_the_kernel_that_is_named(kernelfuzz, shrink_case, tmp_path):
    save_case(tmp_path / "case.json", shrink_case(9))
    wrong = kernelfuzz("replay", "case.json", "--kernel", TWO_BUGS)
    assert (wrong.status, wrong.err) == (1, "")
    assert rows(wrong)["case.json"] == f"FAILED bgmv on {TWO_BUGS} (cpu) [user]"
    right = kernelfuzz("replay", "case.json", "--kernel", RIGHT)
    assert right.status == 0
    assert rows(right) == {"case.json": f"FIXED bgmv on {RIGHT} (cpu) [user]"}
    assert "rows=9" in right.out


def test_case_alone_is_run_on_the_newest_releases(kernelfuzz, shrink_case, tmp_path):
    """None of which was fetched here."""
    save_case(tmp_path / "case.json", shrink_case(9))
    outcome = kernelfuzz("replay", "case.json")
    assert_error(outcome, "case.json", "no kernel for bgmv can run here: ", "releases fetch vllm-xpu-kernels==")


def test_infinite_error_is_json_too(kernelfuzz, tmp_path, shrink_case):
    save_case(tmp_path / "case.json", shrink_case(2))
    (tmp_path / "kernels_here.py").write_text("def nan(inputs, outputs):\n    outputs['output'].fill_(float('nan'))\n")
    outcome = kernelfuzz("replay", "case.json", "--kernel", "kernels_here:nan", "--json")
    (result,) = as_json(outcome.out)
    assert (outcome.status, result["outcome"]) == (1, "FAILED")
    element = result["failures"][0]["elements"][0]
    assert (element["actual"], element["error_over_bound"]) == ("nan", "inf")


def test_one_case_can_be_run_in_the_commands_own_process(tmp_path, worker_environment, shrink_case):
    save_case(tmp_path / "case.json", shrink_case(9))
    command = ["-c", "from kernelfuzz.fuzz.cli import main; main()", "replay", "case.json", "--kernel", TWO_BUGS]
    environment = {**worker_environment, "KERNELFUZZ_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, *command, "--no-isolate"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert f"wrong_value  {WRONG_NAME}" in done.stdout


# Many failures.


def test_folder_is_searched_at_any_depth_and_printed_in_order(kernelfuzz, shrink_case, tmp_path):
    out = tmp_path / "kernelfuzz-out"
    save(out / "failures" / "b", shrink_case(9))
    save(out / "failures" / "a", shrink_case(9), RIGHT)
    save(out / "failures" / "c" / "d", shrink_case(9), RIGHT)
    (out / "examples").mkdir()
    write_json(out / "summary.json", {"schema": 1})
    alone = save_case(out / "errors" / "error.json", shrink_case(9))
    write_json(out / "killed" / "case.json", to_json(shrink_case(9)))
    outcome = kernelfuzz("replay", out, alone, "--kernel", RIGHT)
    assert outcome.status == 0
    assert list(rows(outcome)) == [
        *(str(out / "failures" / name) for name in ("a", "b", "c/d")),
        str(out / "killed" / "case.json"),
        str(alone),
    ]
    assert outcome.out.splitlines()[-1] == "5 FIXED"


def test_lines_of_many_are_short_and_aligned(kernelfuzz, shrink_case, tmp_path):
    save(tmp_path / "all" / "a", shrink_case(9))
    save(tmp_path / "all" / "longer", shrink_case(9), RIGHT, failed_runs=1)
    save(tmp_path / "all" / "m", shrink_case(1, tokens=4))
    outcome = kernelfuzz("replay", "all", "nowhere")
    assert (outcome.status, outcome.err) == (1, "")
    assert outcome.out.splitlines() == [
        "FAILED  all/a       bgmv on engine_kernels:two_bugs (cpu) [user]  1 of 9 elements of output wrong (product)",
        "FIXED   all/longer  bgmv on engine_kernels:right (cpu)    [user]  passed in 10 runs",
        f"FAILED  all/m       bgmv on engine_kernels:two_bugs (cpu) [user]  ValueError: too many tokens; "
        f"with another failure: {RAISED_NAME}",
        "ERROR   nowhere     cannot read nowhere: No such file or directory",
        "1 FIXED, 2 FAILED, 1 ERROR",
    ]
    in_full = kernelfuzz("replay", "all", "nowhere", "--verbose").out
    assert in_full.count("rows=9") == 2
    assert f"  wrong_value  {WRONG_NAME}\n  1 of 9 elements" in in_full


def test_broken_files_are_errors_and_the_rest_goes_on(kernelfuzz, shrink_case, tmp_path):
    every = tmp_path / "all"
    for name in ("a-right", "b-junk", "c-newer", "d-foreign", "e-no-case", "f-truncated", "g-kind", "z-wrong"):
        save(every / name, shrink_case(9), RIGHT if name == "a-right" else TWO_BUGS)
    (every / "b-junk" / "case.json").write_bytes(b"\x89PNG\r\n\xff\x00")
    write_json(every / "c-newer" / "failure.json", {"schema": 99})
    write_json(every / "d-foreign" / "failure.json", {"name": "of another program"})
    (every / "e-no-case" / "case.json").unlink()
    truncated = every / "f-truncated" / "failure.json"
    truncated.write_text(truncated.read_text()[:100])
    save(every / "g-kind", shrink_case(9), clause=["not", "a", "clause"])
    (tmp_path / "empty").mkdir()
    outcome = kernelfuzz("replay", every, "empty", "all/b-junk/case.json")
    assert (outcome.status, outcome.err) == (1, "")
    said = {path.removeprefix(f"{every}/"): text for path, text in rows(outcome).items()}
    assert said.pop("a-right") == f"FIXED bgmv on {RIGHT} (cpu) [user]"
    assert said.pop("z-wrong").startswith(f"FAILED bgmv on {TWO_BUGS} (cpu) [user] 1 of 9 elements")
    expected = {
        "b-junk": "case.json is not JSON",
        "c-newer": "failure.json has schema 99, this kernelfuzz reads schema 2",
        "d-foreign": "failure.json has no schema number",
        "e-no-case": "case.json: No such file or directory",
        "f-truncated": "failure.json is not JSON",
        "g-kind": "failure.json is malformed: TypeError: clause is ['not', 'a', 'clause']",
        "empty": "no failure in this folder",
        "all/b-junk/case.json": "all/b-junk/case.json is not JSON",
    }
    assert list(said) == list(expected)
    for path, text in expected.items():
        assert said[path].startswith("ERROR ")
        assert text in said[path]
    assert outcome.out.splitlines()[-1] == "1 FIXED, 1 FAILED, 8 ERROR"


def test_kernels_that_cannot_run_here_are_errors_and_the_rest_goes_on(kernelfuzz, shrink_case, tmp_path):
    save(tmp_path / "a", shrink_case(9), "engine_kernels:missing")
    save(tmp_path / "b", shrink_case(9), "vllm-torch@0.21.0")
    save(tmp_path / "c", shrink_case(9), device="cuda:99")
    save(tmp_path / "d", shrink_case(9), "no-such-kernel@1.0")
    save(tmp_path / "e", shrink_case(9), "\x1b[31m\nred")
    save(tmp_path / "f", shrink_case(9), RIGHT)
    outcome = kernelfuzz("replay", *"abcdef")
    assert (outcome.status, outcome.err) == (2, "")
    said = rows(outcome)
    for path, text in {
        "a": "has no attribute 'missing'",
        "b": "run 'kernelfuzz releases fetch vllm==0.21.0'",
        "c": "name another one with --device",
        "d": "no kernel 'no-such-kernel@1.0' for this target: expected one of ",
        "e": "malformed kernel name '\\x1b[31m\\nred'",
    }.items():
        assert said[path].startswith("ERROR bgmv on ")
        assert text in said[path]
    assert "\x1b" not in outcome.out
    assert said["f"].startswith("FIXED ")
    assert len(outcome.out.splitlines()) == 7
    assert kernelfuzz("replay", "c", "--device", "cpu").status == 1


def test_cases_that_cannot_be_judged_are_errors(kernelfuzz, shrink_case, tmp_path):
    save(tmp_path / "a", shrink_case(5), "broken_harness:launch")
    save(tmp_path / "b", shrink_case(9), "mine:refuses")
    (tmp_path / "mine.py").write_text(
        "from kernelfuzz.kernels.base import UnsupportedCaseError\n"
        "def refuses(inputs, outputs):\n    raise UnsupportedCaseError('no rank 9')\n"
    )
    outcome = kernelfuzz("replay", "a", "b")
    assert outcome.status == 2
    said = rows(outcome)
    assert "ERROR bgmv on broken_harness:launch (cpu) [user] the case cannot be judged: ZeroDivisionError" in said["a"]
    assert said["b"] == "ERROR bgmv on mine:refuses (cpu) [user] the kernel does not offer this case: no rank 9"


def test_crash_after_which_the_kernel_cannot_be_loaded_keeps_its_verdict(kernelfuzz, shrink_case, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os, pathlib\npathlib.Path('loaded').mkdir()\ndef kernel(inputs, outputs):\n    os._exit(3)\n"
    )
    crash = Failure("crash", "", "exit_status_3", "the worker died: exit_status_3")
    for name in "ab":
        save(tmp_path / name, shrink_case(9), "mine:kernel", crash)
    outcome = kernelfuzz("replay", "a", "b", "--workers", 1)
    assert outcome.status == 1
    said = rows(outcome)
    assert said["a"] == "FAILED bgmv on mine:kernel (cpu) [user] the worker died: exit_status_3"
    assert said["b"].startswith("ERROR bgmv on mine:kernel (cpu) [user] ")
    assert "File exists" in said["b"]


COUNTED = """
import os, pathlib
from engine_kernels import right
def kernel(inputs, outputs):
    pathlib.Path("pids", str(os.getpid())).touch()
    right(inputs, outputs)
"""


@pytest.mark.parametrize(("workers", "most"), [(1, 1), (2, 2)])
def test_failures_of_one_kernel_share_its_workers(kernelfuzz, shrink_case, tmp_path, workers, most):
    (tmp_path / "mine.py").write_text(COUNTED)
    (tmp_path / "pids").mkdir()
    for rank in range(1, 13):
        kernel = "mine:kernel" if rank % 2 else RIGHT
        save(tmp_path / "all" / f"rank-{rank:02}", shrink_case(rank), kernel)
    outcome = kernelfuzz("replay", "all", "--workers", workers)
    assert outcome.status == 0
    assert list(rows(outcome)) == [f"all/rank-{rank:02}" for rank in range(1, 13)]
    assert 1 <= len(list((tmp_path / "pids").iterdir())) <= most


def test_next_kernel_is_loaded_while_one_runs(kernelfuzz, shrink_case, tmp_path):
    """The first one waits for it; that it is not loaded is a hang."""
    (tmp_path / "first.py").write_text(
        "import pathlib, time\n"
        "from engine_kernels import right\n"
        "def kernel(inputs, outputs):\n"
        "    while not pathlib.Path('loaded').exists():\n        time.sleep(0.01)\n"
        "    right(inputs, outputs)\n"
    )
    (tmp_path / "second.py").write_text(
        "import pathlib\nfrom engine_kernels import right as kernel\npathlib.Path('loaded').touch()\n"
    )
    for name in ("first", "second"):
        save(tmp_path / name, shrink_case(9), f"{name}:kernel")
    assert kernelfuzz("replay", "first", "second").status == 0


def test_json_is_all_of_stdout(kernelfuzz, shrink_case, tmp_path):
    save(tmp_path / "a", shrink_case(9))
    save(tmp_path / "b", shrink_case(9), RIGHT, failed_runs=1)
    save(tmp_path / "c", shrink_case(9), "engine_kernels:missing")
    outcome = kernelfuzz("replay", "a", "b", "c", "nowhere", "--json")
    assert outcome.status == 1
    results = as_json(outcome.out)
    names = {"path", "outcome", "kernel", "version", "device", "runs", "failed_runs", "failures", "reason"}
    assert all(result.keys() == names for result in results)
    assert [result["path"] for result in results] == ["a", "b", "c", "nowhere"]
    assert [result["outcome"] for result in results] == ["FAILED", "FIXED", "ERROR", "ERROR"]
    assert [(result["runs"], result["failed_runs"]) for result in results] == [(1, 1), (10, 0), (0, 0), (0, 0)]
    assert [result["version"] for result in results] == ["user", "user", "", ""]
    assert [result["kernel"] for result in results] == [TWO_BUGS, RIGHT, "engine_kernels:missing", ""]
    (failure,) = results[0]["failures"]
    assert (failure["fingerprint"], failure["kind"], failure["message"]) == (WRONG_NAME, "wrong_value", WRONG.message)
    assert outcome.err.splitlines()[-1] == "1 FIXED, 1 FAILED, 2 ERROR"


def test_what_a_campaign_saved_is_replayed(kernelfuzz, tmp_path):
    found = kernelfuzz("run", "bgmv", "--kernel", TWO_BUGS, "--examples", "60", "--seed", "7")
    assert found.status == 1
    again = f"see it again: kernelfuzz replay kernelfuzz-out/failures/{WRONG_NAME}"
    assert again in found.out
    outcome = kernelfuzz(*again.split()[4:])
    assert outcome.status == 1
    assert f"  wrong_value  {WRONG_NAME}" in outcome.out.splitlines()
    every = kernelfuzz("replay", "kernelfuzz-out")
    assert every.out.splitlines()[-1] == "2 FAILED"
    assert "with another" not in every.out
    assert kernelfuzz("replay", "kernelfuzz-out", "--kernel", RIGHT).out.splitlines()[-1] == "2 FIXED"


# Other ways to end.


def test_interruption_says_what_was_done(tmp_path, worker_environment, shrink_case):
    for rank in (1, 4, 5):
        save(tmp_path / f"rank-{rank}", shrink_case(rank), MORTAL)
    mark = tmp_path / "mark"
    start = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"  # as a shell does in the background
    command = [f"{start}; from kernelfuzz.fuzz.cli import main; main()", "replay", "rank-1", "rank-4", "rank-5"]
    with subprocess.Popen(
        [sys.executable, "-c", *command, "--workers", "1"],
        cwd=tmp_path,
        env={**worker_environment, "KERNELFUZZ_HOME": str(tmp_path / "home"), "ENGINE_KERNELS_MARK": str(mark)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            first = process.stdout.readline()
            while not mark.exists() and process.poll() is None:
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert (process.returncode, err) == (130, "")
    assert first.startswith("FIXED   rank-1  bgmv on engine_kernels:mortal (cpu) [user]")
    assert out == "interrupted: 1 of 3 were replayed\n"


# Sanitizers, which need a GPU: what they are told, and what is made of what they say.


def test_failure_of_a_sanitizer_is_replayed_under_it(shrink_case, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "missing_device", lambda device: None)
    save(tmp_path / "a", shrink_case(9), device="cuda", sanitizer="racecheck")
    save(tmp_path / "b", shrink_case(9), device="cuda")

    def tools(device=None, tool=None):
        return [each.tool for each in plan([tmp_path / "a", tmp_path / "b"], [], device, tool)]

    assert tools() == ["racecheck", None]
    assert tools(tool="memcheck") == ["memcheck", "memcheck"]
    assert tools(device=torch.device("cpu")) == [None, None]


def test_report_of_a_sanitizer_is_a_failure(engine_job, shrink_case, tmp_path, monkeypatch, worker_environment):
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    shutil.copy(Path(__file__).with_name("fake_sanitizer.py"), tool)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", worker_environment["PYTHONPATH"])
    trials = [
        Trial(SavedFailure(Path(f"rank-{rank}"), shrink_case(rank)), engine_job("reported"), "memcheck")
        for rank in (5, 9)
    ]
    results = dict(run_trials(trials, Isolation()))
    assert [results[index].outcome for index in (0, 1)] == ["FIXED", "FAILED"]
    assert [failure.kind for failure in results[1].failures.values()] == ["out_of_bounds"]


def test_sanitizer_that_is_not_installed_is_an_error(kernelfuzz, shrink_case, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(sanitizer, "DEFAULT_CUDA", tmp_path)
    monkeypatch.setattr(registry, "missing_device", lambda device: None)
    save(tmp_path / "a", shrink_case(9), device="cuda", sanitizer="racecheck")
    outcome = kernelfuzz("replay", "a")
    assert_error(outcome, "a", f"bgmv on {TWO_BUGS} (cuda)", "compute-sanitizer is not installed: ")


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--device", "tpu"], ["unknown device 'tpu': expected cpu, cuda"]),
        (["--device", "cuda:99"], ["device 'cuda:99': no "]),
        (["--workers", "0"], ["--workers 0: expected at least 1"]),
        (["--sanitizer", "valgrind"], ["'valgrind': expected one of memcheck, race"]),
        (["--sanitizer", "memcheck"], ["compute-sanitizer is not installed: it is part of NVIDIA's CUDA toolkit"]),
        (["--no-isolate", "--workers", "2"], ["--no-isolate runs one target and one kernel"]),
        (["--no-isolate", "other"], ["--no-isolate runs one target and one kernel"]),
    ],
    ids=" ".join,
)
def test_bad_option_is_one_line(kernelfuzz, tmp_path, monkeypatch, shrink_case, arguments, texts):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(sanitizer, "DEFAULT_CUDA", tmp_path)
    save(tmp_path / "it", shrink_case(9))
    save(tmp_path / "other", shrink_case(9), RIGHT)
    assert_one_line(kernelfuzz("replay", "it", *arguments), *texts)


@pytest.mark.parametrize("options", [("--regime", "huge"), ("--seed", "1"), ("--time", "5s"), ("--examples", "5")])
def test_option_that_means_nothing_for_saved_cases_is_refused(kernelfuzz, tmp_path, shrink_case, options):
    save_case(tmp_path / "case.json", shrink_case(1))
    outcome = kernelfuzz("replay", "case.json", "--kernel", RIGHT, *options)
    assert (outcome.status, outcome.out) == (2, "")
    assert f"No such option: {options[0]}" in outcome.err


SAVED = {
    "truncated": ('{"schema": 1, "target": "bg', "is not JSON"),
    "empty": ("", "is not JSON"),
    "binary": (b"\x89PNG\r\n\xff", "is not JSON"),
    "list": ("[]", "case.json: not an object"),
    "no_schema": ('{"target": "bgmv", "case": {}}', "it has no schema number"),
    "other_schema": ('{"schema": 2, "target": "bgmv", "case": {}}', "has schema 2, this kernelfuzz reads schema 1"),
    "unknown_target": ('{"schema": 1, "target": "no_such", "case": {}}', "unknown target 'no_such'"),
    "no_target": ('{"schema": 1, "case": {}}', "unknown target 'None'"),
    "no_fields": (
        '{"schema": 1, "target": "bgmv", "case": {}}',
        "fields of case missing or unknown: accumulate, batch",
    ),
    "no_case": ('{"schema": 1, "target": "bgmv"}', "case is None, expected an object"),
}


@pytest.mark.parametrize("name", SAVED)
def test_malformed_case_file_is_one_line(kernelfuzz, tmp_path, name):
    content, text = SAVED[name]
    (tmp_path / "case.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    outcome = kernelfuzz("replay", "case.json")
    assert_error(outcome, "case.json", text)
    assert outcome.out.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"width": "1"}, "case.width is '1', expected int"),
        ({"width": None}, "case.width is None, expected int"),
        ({"scale": True}, "case.scale is True, expected float"),
        ({"op": "shrinks"}, "case.op is 'shrinks'"),
        ({"batch": {"segments": [{"adapter": 0}]}}, "fields of case.batch.segments[0] missing or unknown: length"),
        ({"colour": "red"}, "fields of case missing or unknown: colour"),
    ],
)
def test_wrong_field_of_a_case_file_is_named(kernelfuzz, tmp_path, shrink_case, change, text):
    document = to_json(shrink_case(1))
    document["case"] |= change
    write_json(tmp_path / "case.json", document)
    outcome = kernelfuzz("replay", "case.json")
    assert_error(outcome, "case.json", "case.json: malformed case file: ", text)
    assert outcome.out.count("\n") == 1


def test_path_that_cannot_be_read_is_an_error(kernelfuzz, tmp_path):
    missing = kernelfuzz("replay", "missing.json")
    assert_error(missing, "missing.json", "cannot read missing.json: No such file or directory")
    assert_error(kernelfuzz("replay", "."), ".", "no failure in this folder: none below it has a failure.json")


def test_unknown_kernel_is_an_error(kernelfuzz, tmp_path, shrink_case):
    save_case(tmp_path / "case.json", shrink_case(1))
    assert_error(kernelfuzz("replay", "case.json", "--kernel", "no_such"), "case.json", "no kernel 'no_such'")
