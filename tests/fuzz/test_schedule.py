"""Who gets the next slice of a night."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelfuzz.fuzz.job import unchecked_job
from kernelfuzz.fuzz.nightly.schedule import FLOOR, Schedule

JOBS = [
    unchecked_job("moe_lora_align", "example", "cpu"),
    unchecked_job("bgmv", "example", "cpu"),
    unchecked_job("bgmv", "vllm-torch@0.33.0", "cpu"),
    unchecked_job("fp8_layout", "vllm@0.33.0", "cpu"),
]


def night(jobs, lanes, seconds, gain):
    """Hand out a night on lanes that take what they were granted; return the seconds of each job, and of all slices."""
    schedule = Schedule(jobs, {"cpu": lanes}, seconds)
    had = {str(job): 0.0 for job in jobs}
    slices = []
    free = [(0.0, lane) for lane in range(lanes)]
    running = {}
    while free:
        now, lane = min(free)
        free.remove((now, lane))
        if lane in running:
            schedule.finished(*running.pop(lane))
        slice_ = schedule.next("cpu", seconds - now)
        if slice_ is None:
            continue
        job, granted = slice_
        slices.append(granted)
        had[str(job)] += granted
        running[lane] = job, granted, granted, gain(job, len(slices))
        free.append((now + granted, lane))
    return had, slices


@given(
    jobs=st.integers(1, 4),
    lanes=st.integers(1, 6),
    seconds=st.floats(5, 20_000),
    gains=st.lists(st.floats(0, 100), min_size=1, max_size=9),
)
def test_every_job_has_its_floor_and_no_second_is_given_twice(jobs, lanes, seconds, gains):
    had, slices = night(JOBS[:jobs], lanes, seconds, lambda job, number: gains[number % len(gains)])
    assert sum(slices) <= lanes * seconds * 1.001
    assert sum(slices) >= lanes * seconds * 0.98 - 1
    floor = FLOOR * seconds * min(lanes, jobs) / jobs
    assert all(each >= 0.98 * floor - 1 for each in had.values())
    assert len(slices) <= 30 * (jobs + lanes)


def test_time_goes_to_what_gains():
    had, _ = night(JOBS, 1, 3600.0, lambda job, number: 5.0 if job is JOBS[2] else 0.0)
    rest = [seconds for name, seconds in had.items() if name != str(JOBS[2])]
    assert had[str(JOBS[2])] > 2 * max(rest)


def test_a_job_that_stops_gaining_makes_room():
    had, _ = night(JOBS[:2], 1, 3600.0, lambda job, number: 5.0 if job is JOBS[0] and number <= 2 else 0.0)
    assert had[str(JOBS[1])] > 0.3 * 3600


def test_a_job_runs_on_two_lanes_only_where_there_is_no_other():
    schedule = Schedule(JOBS[:2], {"cpu": 3}, 600.0)
    first, second, third = (schedule.next("cpu", 600.0)[0] for _ in range(3))
    assert first is not second
    assert third in (first, second)


def test_kinds_do_not_mix_and_dropped_jobs_are_gone():
    schedule = Schedule(JOBS[:1], {"cpu": 1}, 600.0)
    assert schedule.next("cuda", 600.0) is None
    assert schedule.next("cpu", 0.0) is None
    job, seconds = schedule.next("cpu", 600.0)
    schedule.drop(job)
    schedule.finished(job, seconds, 1.0, 0.0)
    assert schedule.next("cpu", 500.0) is None


@pytest.mark.parametrize("seconds", [1.0, 10.0, 30.0])
def test_in_a_short_night_every_job_has_its_turn(seconds):
    had, _ = night(JOBS, 1, seconds, lambda job, number: 0.0)
    assert min(had.values()) > 0
