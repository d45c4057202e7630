"""The folder of a failure: what a campaign writes into it, and how it is read back."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from kernelfuzz.fuzz import events, picture
from kernelfuzz.fuzz.campaign import Budget, run_campaign
from kernelfuzz.fuzz.failure_files import FailureFiles
from kernelfuzz.fuzz.failure_folder import SCHEMA, read_failure
from kernelfuzz.fuzz.files import read_case, write_json
from kernelfuzz.fuzz.verdict import Failure, Verdict
from kernelfuzz.strategies.case import to_json
from kernelfuzz.strategies.errors import KernelfuzzError

WRONG = Failure("wrong_value", "output", "product", "wrong", ({"index": [0, 1], "expected": 1.5, "actual": "nan"},))
RAISED = Failure("raised", "", "ValueError_in_launch", "ValueError: too many tokens")
PREFIX = "bgmv.engine_kernels-right."
NAME, RAISED_NAME = PREFIX + "wrong_value.output.product", PREFIX + "raised.ValueError_in_launch"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def without_moment(path):
    document = json.loads(path.read_text())
    assert document.pop("first_seen").endswith("+00:00")
    assert document.pop("environment")["torch"] == torch.__version__
    return document


def test_failure_is_saved_as_found_and_again_when_shrunk(tmp_path, engine_job, shrink_case):
    files, job = FailureFiles(tmp_path, seed=3), engine_job("right")
    files(events.JobStarted(job, "user"))
    files(events.FailureFound(job, NAME, WRONG, shrink_case(100), 17))
    folder = tmp_path / "failures" / NAME
    assert names(folder) == ["case.json", "failure.json"]
    assert read_case(folder / "case.json") == shrink_case(100)
    found = {
        "schema": SCHEMA,
        "fingerprint": NAME,
        "target": "bgmv",
        "kernel": "engine_kernels:right",
        "version": "user",
        "device": "cpu",
        "kind": "wrong_value",
        "output": "output",
        "clause": "product",
        "message": "wrong",
        "elements": [{"index": [0, 1], "expected": 1.5, "actual": "nan"}],
        "output_tail": "",
        "symptoms": [],
        "shrunk": False,
        "failed_runs": 1,
        "runs": 1,
        "examples": 17,
        "seed": 3,
        "test": None,
        "sanitizer": None,
    }
    assert without_moment(folder / "failure.json") == found

    shrunk = events.FailureFound(
        job, NAME, WRONG, shrink_case(9), 17, shrunk=True, symptoms=(RAISED,), failed_runs=4, runs=10
    )
    files(shrunk)
    assert names(folder) == ["README.md", "case.json", "failure.json", "repro.py"]
    assert read_case(folder / "case.json") == shrink_case(9)
    changed = {"shrunk": True, "failed_runs": 4, "runs": 10, "symptoms": [{**asdict(RAISED), "elements": []}]}
    assert without_moment(folder / "failure.json") == {**found, **changed}


def test_what_turns_out_to_be_the_same_bug_loses_its_folder(tmp_path, engine_job, shrink_case):
    files, job = FailureFiles(tmp_path, seed=3), engine_job("right")
    files(events.FailureFound(job, NAME, WRONG, shrink_case(100), 17))
    before = json.loads((tmp_path / "failures" / NAME / "failure.json").read_text())["first_seen"]
    files(events.FailureFound(job, RAISED_NAME, RAISED, shrink_case(9), 20, shrunk=True, symptoms=(WRONG,)))
    assert names(tmp_path / "failures") == [RAISED_NAME]
    document = json.loads((tmp_path / "failures" / RAISED_NAME / "failure.json").read_text())
    assert document["first_seen"] == before


def test_second_kernel_with_the_same_fingerprint_gets_a_folder_of_its_own(tmp_path, engine_job, shrink_case):
    files, first = FailureFiles(tmp_path, seed=3), engine_job("right")
    second = replace(first, device=torch.device("cuda"))
    for job in (first, second):
        files(events.FailureFound(job, NAME, WRONG, shrink_case(9), 17))
    assert names(tmp_path / "failures") == [NAME, f"{NAME}.engine_kernels-right.cuda"]


def test_text_for_an_issue_tracker_says_it_all(tmp_path, engine_job, shrink_case):
    files, job = FailureFiles(tmp_path, seed=3), engine_job("right")
    files(events.JobStarted(job, "user"))
    symptom = Failure("unwritten", "output", "product", "2 of 9 elements of output never written (product)")
    found = events.FailureFound(job, NAME, WRONG, shrink_case(9), 17, True, (symptom,), failed_runs=4, runs=10)
    files(found)
    text = (tmp_path / "failures" / NAME / "README.md").read_text()
    assert text.startswith("# engine_kernels:right: bgmv computes wrong values\n\nWrong.\n")
    assert "[0, 1] expected 1.5, got nan" in text
    assert "The same case shows: 2 of 9 elements of output never written (product)." in text
    assert "failed in 4 of 10 runs" in text
    assert "rows=9" in text
    assert f"| fingerprint | {NAME} |" in text
    assert "example 17 with seed 3" in text
    assert f"| torch | {torch.__version__} |" in text
    files(replace(found, failed_runs=10))
    assert "failed each time it was run again (10 of 10)" in (tmp_path / "failures" / NAME / "README.md").read_text()
    files(replace(found, failed_runs=0))
    assert "passed in 10 runs of it alone" in (tmp_path / "failures" / NAME / "README.md").read_text()


def test_failure_that_cannot_be_written_is_written_later(tmp_path, engine_job, shrink_case):
    (tmp_path / "failures").touch()  # where a folder has to be
    files = FailureFiles(tmp_path, seed=3)
    found = events.FailureFound(engine_job("right"), NAME, WRONG, shrink_case(100), 17)
    files(found)
    assert not files.is_saved(found)
    assert files.problem == f"cannot write {tmp_path / 'failures' / NAME / 'case.json'}: Not a directory"
    (tmp_path / "failures").unlink()
    files(events.CampaignFinished())
    assert files.is_saved(found)
    assert files.problem == ""
    assert read_case(tmp_path / "failures" / NAME / "case.json") == shrink_case(100)


def test_picture_that_cannot_be_drawn_ends_nothing(tmp_path, engine_job, shrink_case, monkeypatch, worker_environment):
    def breaks(*_):
        raise ZeroDivisionError("no pixels")

    monkeypatch.setattr(picture, "draw", breaks)
    monkeypatch.setenv("PYTHONPATH", worker_environment["PYTHONPATH"])
    files = FailureFiles(tmp_path, seed=3)
    run_campaign([engine_job("wrong_above_rank_8")], [], Budget(examples=200), 3, tmp_path, events.Bus([files]))
    (folder,) = (tmp_path / "failures").iterdir()
    assert names(folder) == ["README.md", "case.json", "failure.json", "repro.py"]
    assert files.problem == f"cannot write {folder / 'writemap.png'}: ZeroDivisionError: no pixels"


def test_campaign_leaves_everything_that_a_failure_needs(tmp_path, engine_job, monkeypatch, worker_environment):
    monkeypatch.setenv("PYTHONPATH", worker_environment["PYTHONPATH"])
    files = FailureFiles(tmp_path, seed=3)
    run_campaign([engine_job("wrong_above_rank_8")], [], Budget(examples=200), 3, tmp_path, events.Bus([files]))
    (folder,) = (tmp_path / "failures").iterdir()
    assert names(folder) == ["README.md", "case.json", "failure.json", "repro.py", "writemap.png"]
    document = json.loads((folder / "failure.json").read_text())
    assert (document["failed_runs"], document["runs"], document["shrunk"]) == (10, 10, True)
    script = subprocess.run(
        [sys.executable, folder / "repro.py"], env=worker_environment, capture_output=True, text=True
    )
    assert script.returncode == 1, script.stderr
    assert "1001" in script.stdout


# Reading.


@pytest.fixture
def folder(tmp_path: Path, engine_job, shrink_case) -> Path:
    files, job = FailureFiles(tmp_path, seed=3), engine_job("right")
    files(events.JobStarted(job, "user"))
    files(events.FailureFound(job, NAME, WRONG, shrink_case(9), 17, True, (RAISED,), failed_runs=4, runs=10))
    return tmp_path / "failures" / NAME


def test_folder_is_read_back(folder, shrink_case):
    saved = read_failure(folder)
    assert (saved.path, saved.case, saved.failures) == (folder, shrink_case(9), (WRONG, RAISED))
    assert (saved.kernel, saved.version, saved.device, saved.sanitizer) == ("engine_kernels:right", "user", "cpu", None)
    assert (saved.fingerprint, saved.failed_runs, saved.runs, saved.is_reliable) == (NAME, 4, 10, False)


def test_bug_is_known_by_any_of_its_failures_on_any_kernel(folder):
    saved = read_failure(folder)
    assert saved.shown_by(Verdict((replace(WRONG, message="other numbers", elements=()),)))
    assert saved.shown_by(Verdict((RAISED,)))
    assert not saved.shown_by(Verdict((replace(WRONG, kind="unwritten"),)))
    assert not saved.shown_by(Verdict())


def test_case_file_alone_is_a_failure_of_which_no_more_is_known(tmp_path, shrink_case):
    write_json(tmp_path / "case.json", to_json(shrink_case(9)))
    saved = read_failure(tmp_path / "case.json")
    assert (saved.case, saved.failures, saved.fingerprint, saved.kernel) == (shrink_case(9), (), "", "")
    assert saved.shown_by(Verdict((RAISED,)))
    assert not saved.shown_by(Verdict())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"schema": 99}, r"has schema 99, this kernelfuzz reads schema 2"),
        ({"schema": None}, r"has schema None"),
        ({"symptoms": None}, "is malformed: TypeError"),
        ({"elements": 3}, "is malformed: TypeError"),
        ({"runs": "many"}, "is malformed: ValueError"),
    ],
)
def test_folder_of_another_kind_is_refused_in_one_line(folder, changes, problem):
    document = json.loads((folder / "failure.json").read_text())
    write_json(folder / "failure.json", {**document, **changes})
    with pytest.raises(KernelfuzzError, match=problem) as refusal:
        read_failure(folder)
    assert str(refusal.value).startswith(str(folder / "failure.json"))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["case.json", "failure.json"])
def test_folder_with_a_truncated_file_is_refused(folder, name):
    path = folder / name
    path.write_text(path.read_text()[:40])
    with pytest.raises(KernelfuzzError, match=f"{name} is not JSON"):
        read_failure(folder)
    path.unlink()
    with pytest.raises(KernelfuzzError, match=f"cannot read .*{name}: No such file"):
        read_failure(folder)
