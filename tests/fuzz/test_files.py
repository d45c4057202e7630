"""The files that a campaign leaves: written whole or not at all, and read back."""

import json

import pytest

from kernelfuzz.fuzz import events
from kernelfuzz.fuzz.executor import Request
from kernelfuzz.fuzz.failure_files import FailureFiles
from kernelfuzz.fuzz.files import InFlightFile, SummaryFile, read_case, write_json
from kernelfuzz.fuzz.summary import Summary
from kernelfuzz.fuzz.verdict import Failure, Verdict
from kernelfuzz.strategies.case import to_json
from kernelfuzz.strategies.errors import KernelfuzzError

WRONG = Failure("wrong_value", "output", "product", "wrong", ({"index": [0, 1], "expected": 1.5, "actual": "nan"},))
NAME = "bgmv.engine_kernels-right.wrong_value.output.product"


def names(folder):
    return sorted(path.name for path in folder.rglob("*"))


def test_json_is_written_with_its_folders(tmp_path):
    write_json(tmp_path / "a" / "b" / "file.json", {"x": [1, None]})
    assert names(tmp_path) == ["a", "b", "file.json"]
    assert json.loads((tmp_path / "a" / "b" / "file.json").read_text()) == {"x": [1, None]}


@pytest.mark.parametrize("document", [{"x": object()}, {"x": float("nan")}])
def test_json_that_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path, document):
    write_json(tmp_path / "file.json", "old")
    with pytest.raises((TypeError, ValueError)):
        write_json(tmp_path / "file.json", document)
    assert names(tmp_path) == ["file.json"]
    assert json.loads((tmp_path / "file.json").read_text()) == "old"


def test_old_file_is_whole_until_the_new_one_is(tmp_path):
    """Half-way through writing, a reader still sees the old one."""
    path = tmp_path / "file.json"
    write_json(path, "old")
    seen = []

    class Peek(dict):
        def items(self):
            seen.append(json.loads(path.read_text()))
            return super().items()

    write_json(path, ["new", Peek(x=1)])
    assert seen == ["old"]
    assert json.loads(path.read_text()) == ["new", {"x": 1}]


def test_files_can_be_read_by_whom_the_folder_is_for(tmp_path):
    """Like any other new file, not by their owner alone."""
    write_json(tmp_path / "file.json", 1)
    (tmp_path / "other").touch()
    assert (tmp_path / "file.json").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_case_is_read_back_as_it_was(tmp_path, shrink_case):
    case = shrink_case(9, tokens=3)
    write_json(tmp_path / "case.json", to_json(case))
    assert read_case(tmp_path / "case.json") == case


def test_case_file_that_is_none_is_named(tmp_path):
    (tmp_path / "case.json").write_text("{")
    with pytest.raises(KernelfuzzError, match=f"{tmp_path / 'case.json'} is not JSON"):
        read_case(tmp_path / "case.json")


def test_other_events_write_nothing(tmp_path, engine_job, shrink_case):
    summary, job = Summary(), engine_job("right")
    bus = events.Bus([summary, FailureFiles(tmp_path, 3), SummaryFile(tmp_path, summary)])
    bus.emit(events.CampaignStarted((job,), (), 3))
    bus.emit(events.JobStarted(job, "user"))
    bus.emit(events.CaseFinished(job, shrink_case(2), frozenset({"shrink"}), Verdict(ratio=0.5), 1, False))
    bus.emit(events.JobFinished(job, 1))
    assert names(tmp_path) == []


def test_summary_is_written_at_the_end(tmp_path, engine_job, shrink_case):
    summary, job = Summary(), engine_job("right")
    bus = events.Bus([summary, SummaryFile(tmp_path, summary)])
    bus.emit(events.CampaignStarted((job,), (), 3))
    bus.emit(events.JobStarted(job, "user"))
    bus.emit(
        events.CaseFinished(
            job, shrink_case(2), frozenset({"shrink"}), Verdict(ratio=0.5, seconds={"kernel": 0.25}), 1, False
        )
    )
    bus.emit(events.CaseFinished(job, shrink_case(3), frozenset({"expand"}), Verdict(rejected="not offered"), 2, False))
    bus.emit(events.CaseFinished(job, shrink_case(2), frozenset({"shrink"}), Verdict((WRONG,), ratio=9.0), 3, False))
    bus.emit(events.FailureFound(job, NAME, WRONG, shrink_case(100), 3))
    bus.emit(events.CaseFinished(job, shrink_case(2), frozenset({"shrink"}), Verdict((WRONG,), ratio=9.0), 3, True))
    bus.emit(events.FailureFound(job, NAME, WRONG, shrink_case(9), 3, shrunk=True))
    bus.emit(events.JobFinished(job, 3))
    bus.emit(events.CampaignFinished(interrupted=True))
    document = json.loads((tmp_path / "summary.json").read_text())
    assert (document["schema"], document["seed"], document["interrupted"]) == (1, 3, True)
    (result,) = document["results"]
    assert (result["examples"], result["cases"], result["rejected"]) == (3, 4, 1)
    # Rejected cases and the shrinker's reach no regime; a failing case's ratio is no worst ratio.
    assert result["regimes"] == {"shrink": 2}
    assert (result["worst_ratio"], result["worst_ratios"]) == (0.5, {"shrink": 0.5})
    assert result["spent"] == {"kernel": 0.25}
    assert result["failures"] == [NAME]


def test_what_a_kernel_says_of_what_was_left_out_is_in_the_summary(tmp_path, engine_job):
    summary, first, second = Summary(), engine_job("right"), engine_job("two_bugs")
    bus = events.Bus([summary, SummaryFile(tmp_path, summary)])
    bus.emit(events.CampaignStarted((first, second), (), 3))
    bus.emit(events.JobStarted(first, "user", notes=("on stand-ins", "backend A is left out")))
    bus.emit(events.JobFinished(first, 1))
    bus.emit(events.JobStarted(second, "user"))
    bus.emit(events.JobFinished(second, 1))
    bus.emit(events.CampaignFinished())
    results = json.loads((tmp_path / "summary.json").read_text())["results"]
    assert [result["notes"] for result in results] == [["on stand-ins", "backend A is left out"], []]


def test_case_that_the_harness_could_not_judge_is_saved(tmp_path, engine_job, shrink_case):
    files = FailureFiles(tmp_path, seed=3)
    verdict = Verdict(error="ZeroDivisionError: division by zero")
    files(events.CaseFinished(engine_job("right"), shrink_case(5), frozenset(), verdict, 1, False))
    (path,) = (tmp_path / "errors").iterdir()
    assert "ZeroDivisionError" in path.name
    assert read_case(path) == shrink_case(5)


def test_cases_that_were_running_are_there_after_a_kill(tmp_path, engine_job, shrink_case):
    requests = [Request(shrink_case(rank), (1, 2)) for rank in (3, 4)]
    killed = InFlightFile(tmp_path, engine_job("right")).__enter__()
    assert killed.left() == []
    killed.record(requests[:1])
    killed.record(requests)
    with InFlightFile(tmp_path, engine_job("two_bugs")) as other:
        assert other.left() == [], "another job's"
    with InFlightFile(tmp_path, engine_job("right")) as second:
        assert second.left() == requests
        second.record([])
    assert names(tmp_path) == []


def test_cases_that_end_the_campaign_twice_are_not_run_a_third_time_and_stay(tmp_path, engine_job, shrink_case):
    job, requests = engine_job("right"), [Request.alone(shrink_case(3))]
    InFlightFile(tmp_path, job).__enter__().record(requests)
    assert InFlightFile(tmp_path, job).__enter__().left() == requests
    with InFlightFile(tmp_path, job) as third:
        assert third.left() == []
    assert names(tmp_path) == ["bgmv-on-engine_kernels-right-cpu.jsonl", "interrupted"]


def test_record_that_is_cut_off_is_read_as_far_as_it_goes(tmp_path, engine_job, shrink_case):
    job, requests = engine_job("right"), [Request.alone(shrink_case(rank)) for rank in (3, 4)]
    InFlightFile(tmp_path, job).__enter__().record(requests)
    (path,) = (tmp_path / "running").iterdir()
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 40])
    assert InFlightFile(tmp_path, job).__enter__().left() == requests[:1]


def test_cases_stay_for_the_next_campaign_after_an_error(tmp_path, engine_job, shrink_case):
    job, requests = engine_job("right"), [Request.alone(shrink_case(3))]
    first = InFlightFile(tmp_path, job).__enter__()
    first.record(requests)
    error = KernelfuzzError("the device is gone")
    first.__exit__(KernelfuzzError, error, None)
    assert InFlightFile(tmp_path, job).__enter__().left() == requests
