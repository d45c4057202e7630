"""What a job draws: the palette of a compiled kernel, and compiling ahead."""

import time
from collections import Counter
from functools import partial

import pytest
import torch

from kernelfuzz.fuzz import events
from kernelfuzz.fuzz.campaign import Budget, Conditions, Isolation, run_campaign, saved_examples
from kernelfuzz.fuzz.drawing import PALETTE, Drawing, compile_ahead
from kernelfuzz.fuzz.executor import LoadedKernel
from kernelfuzz.fuzz.files import InFlightFile
from kernelfuzz.fuzz.job import Job, named_jobs
from kernelfuzz.strategies import fused_moe_lora
from kernelfuzz.strategies.errors import KernelfuzzError


@pytest.fixture(autouse=True)
def _environment(worker_environment, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", worker_environment["PYTHONPATH"])
    monkeypatch.setattr(Job, "compiles", property(lambda job: True))


def job_of(target, kernel):
    (job,) = named_jobs([target], [kernel], torch.device("cpu"))
    return job


FUSED = job_of("fused_moe_lora", "drawn_kernels:fused")


def classes(case):
    return tuple(getattr(case, name) for name in fused_moe_lora.SPECIALISED)


def test_half_of_a_palette_belongs_to_the_release_and_half_to_the_campaign():
    first, second = (Drawing.of(FUSED, LoadedKernel("1.0", {}), None, seed) for seed in (1, 2))
    other = Drawing.of(FUSED, LoadedKernel("2.0", {}), None, 1)
    of_first, of_second, of_other = ({classes(case) for case in each.ahead} for each in (first, second, other))
    assert len(of_first) == PALETTE
    assert PALETTE / 2 <= len(of_first & of_second) < PALETTE * 3 / 4
    assert PALETTE / 4 < len(of_first & of_other) < PALETTE * 3 / 4
    assert len(first.ahead) > 3 * PALETTE, "with different batches"
    assert first.ahead == Drawing.of(FUSED, LoadedKernel("1.0", {}), None, 1).ahead


def test_refused_calls_take_no_place_in_a_palette():
    drawing = Drawing.of(FUSED, LoadedKernel("1.0", {}), None, 1)
    assert not any("refused_overwrite" in fused_moe_lora.regimes(case) for case in drawing.ahead)


def test_nothing_is_compiled_ahead_where_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(Job, "compiles", property(lambda job: False))
    assert Drawing.of(FUSED, LoadedKernel("1.0", {}), None, 1).ahead == ()


@pytest.mark.parametrize(("kernel", "found"), [("fused", False), ("fused_wrong_with_two_tokens", True)])
def test_kernels_are_compiled_before_the_search_and_what_failed_there_is_reported(tmp_path, kernel, found):
    seen = []
    job = job_of("fused_moe_lora", f"drawn_kernels:{kernel}")
    budget, bus = Budget(examples=120), events.Bus([seen.append])
    run_campaign([job], [], budget, 5, tmp_path, bus, Isolation(workers=1))
    assert [type(event) for event in seen[1:3]] == [events.JobStarted, events.KernelsCompiled]
    assert seen[2].cases > 3 * PALETTE
    finished = [event.case for event in seen if isinstance(event, events.CaseFinished)]
    shared = Counter(map(classes, finished))
    assert sum(count > 1 for count in shared.values()) > PALETTE / 4
    assert isinstance(seen[-2], events.JobFinished)
    assert (seen[-2].error, seen[-2].examples) == ("", 120)
    assert any(isinstance(event, events.FailureFound) for event in seen) == found


def test_no_kernel_to_compile_is_an_error_and_no_endless_wait():
    job = job_of("fused_moe_lora", "engine_kernels:no_such_function")
    case = Drawing.of(FUSED, LoadedKernel("1.0", {}), None, 1).ahead[0]
    with pytest.raises(KernelfuzzError, match="no_such_function"):
        compile_ahead(job, (case,), None, lambda requests: None)


def test_compiling_keeps_to_its_deadline_and_records_what_runs():
    cases = Drawing.of(FUSED, LoadedKernel("1.0", {}), None, 1).ahead[:12]
    recorded = []
    assert compile_ahead(FUSED, cases, 0.0, recorded.append) == (0, [])
    assert recorded == []
    assert compile_ahead(FUSED, cases, None, recorded.append) == (12, [])
    assert {request.case for requests in recorded for request in requests} == set(cases)


@pytest.mark.parametrize(("compiles", "compiled"), [(True, [(0, False)]), (False, [])])
def test_a_job_whose_time_went_by_while_it_compiled_still_runs_cases(tmp_path, compiles, compiled):
    seen = []
    ends = iter([0.0, time.monotonic() + 600] if compiles else [time.monotonic() + 600])
    places = partial(saved_examples, tmp_path), partial(InFlightFile, tmp_path)
    conditions = Conditions(events.Bus([seen.append]), Isolation(workers=1), *places, examples=3, compiles=compiles)
    conditions.run(FUSED, None, lambda: next(ends), 1)
    found = [(event.cases, event.complete) for event in seen if isinstance(event, events.KernelsCompiled)]
    assert found == compiled
    assert (seen[-1].error, seen[-1].examples) == ("", 3)
