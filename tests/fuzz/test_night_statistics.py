"""What a night counts: statistics of a job, and the coverage of its cases."""

import json

import pytest

from kernelfuzz.fuzz import events
from kernelfuzz.fuzz.generation import draw
from kernelfuzz.fuzz.job import unchecked_job
from kernelfuzz.fuzz.nightly.coverage import Coverage
from kernelfuzz.fuzz.nightly.statistics import MOST_POINTS, RATIO_EDGES, Statistics
from kernelfuzz.fuzz.targets import TARGETS
from kernelfuzz.fuzz.verdict import Failure, Verdict

JOB = unchecked_job("bgmv", "example", "cpu")
CASES = draw(JOB.target.cases(), 1, 30)
WRONG = Failure("wrong_value", "output", "value", "wrong")


PASSED = Verdict()


def finished(case=CASES[0], verdict=PASSED, regimes=("a",), shrinking=False):
    return events.CaseFinished(JOB, case, frozenset(regimes), verdict, 1, shrinking)


def test_launches_are_counted_by_what_came_of_them():
    statistics = Statistics(JOB)
    for verdict in (Verdict(cases=4), Verdict(rejected="no"), Verdict(error="oh"), Verdict((WRONG,), ratio=3.0)):
        statistics.take(finished(verdict=verdict), 1.0)
    statistics.take(finished(verdict=Verdict(cases=2), shrinking=True), 2.0)
    counted = statistics.to_json()
    assert (counted["examples"], counted["cases"], counted["rejected"]) == (4, 9, 1)
    assert counted["errors"] == {"oh": 1}
    assert counted["hits"] == {"bgmv.example.wrong_value.output.value": 1}
    assert counted["regimes"] == {"a": 2}


def test_a_ratio_falls_into_its_bin_and_only_passing_ones_are_the_worst():
    statistics = Statistics(JOB)
    for ratio in (0.02, 0.05, 0.051, 1.0):
        statistics.take(finished(verdict=Verdict(ratio=ratio)), 1.0)
    for ratio in (1.5, 50.0):
        statistics.take(finished(verdict=Verdict((WRONG,), ratio=ratio), regimes=("b",)), 1.0)
    counted = statistics.to_json()
    bins = dict(zip((*RATIO_EDGES, None), counted["ratios"]["all"]))
    assert {edge: n for edge, n in bins.items() if n} == {0.05: 2, 0.1: 1, 1.0: 1, 2.0: 1, None: 1}
    assert sum(counted["ratios"]["a"]) == 4
    assert counted["worst_ratio"] == 1.0
    assert counted["worst_ratios"] == {"a": 1.0}


def test_growth_never_falls_and_stays_short():
    statistics = Statistics(JOB)
    for second in range(3000):
        statistics.take(finished(regimes=(f"r{second // 500}",)), float(second))
    growth = statistics.to_json()["growth"]
    assert len(growth) <= MOST_POINTS + 1
    assert growth[0][0] == 0
    assert all(one <= other for before, after in zip(growth, growth[1:]) for one, other in zip(before, after))
    statistics.take(events.JobFinished(JOB), 3001.0)
    assert statistics.to_json()["growth"][-1][1:3] == [3000, 6]


def test_a_slice_gains_what_none_before_it_had():
    statistics = Statistics(JOB)
    statistics.take(finished(verdict=Verdict(ratio=0.5), regimes=("a", "b")), 1.0)
    assert statistics.slice_gain() == pytest.approx(2 + 5)
    statistics.take(finished(verdict=Verdict(ratio=0.4), regimes=("a", "b")), 2.0)
    assert statistics.slice_gain() == 0
    statistics.take(events.FailureFound(JOB, "a.bug", WRONG, CASES[0], 1), 3.0)
    assert statistics.slice_gain() == 1


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_coverage_counts_every_case_of_every_target(target):
    coverage = Coverage(target.case_type)
    cases = draw(target.cases(), 2, 60)
    for case in cases:
        coverage.add(case)
    counted = coverage.to_json()
    text = json.dumps(counted, allow_nan=False)
    assert len(text) < 200_000
    dimensions = counted["dimensions"]
    assert len({each["name"] for each in dimensions}) == len(dimensions)
    for each in dimensions:
        assert 0 < sum(each["counts"]) <= len(cases)
        assert len(each["values"]) == len(set(each["values"])) == len(each["counts"])
    for i, j, counts in counted["pairs"]:
        first, second = dimensions[i], dimensions[j]
        assert (len(counts), len(counts[0])) == (len(first["values"]), len(second["values"]))
        assert sum(map(sum, counts)) <= min(sum(first["counts"]), sum(second["counts"]))
    assert any(each["closed"] for each in dimensions)


def test_coverage_shows_what_was_not_tried():
    coverage = Coverage(JOB.target.case_type)
    coverage.add(CASES[0])
    (op,) = [each for each in coverage.to_json()["dimensions"] if each["name"] == "op"]
    assert op["values"] == ["shrink", "expand", "expand_slice"]
    assert sorted(op["counts"]) == [0, 0, 1]
