"""What is tried with a shrunk case: simpler contents, and sizes that are raised to round ones."""

import dataclasses
import typing
from graphlib import TopologicalSorter

import pytest
import torch
from hypothesis.database import InMemoryExampleDatabase

from kernelfuzz.fuzz import events
from kernelfuzz.fuzz.executor import Request
from kernelfuzz.fuzz.failures import fingerprint
from kernelfuzz.fuzz.generation import draw
from kernelfuzz.fuzz.isolated import IsolatedExecutor
from kernelfuzz.fuzz.job import named_jobs
from kernelfuzz.fuzz.search import Search
from kernelfuzz.fuzz.simplify import simpler
from kernelfuzz.fuzz.smallest import Sighting, simplify
from kernelfuzz.fuzz.targets import TARGETS, get_target
from kernelfuzz.fuzz.verdict import Failure, Verdict
from kernelfuzz.strategies import fused_moe_lora, huge, lora_shrink_expand
from kernelfuzz.strategies.batches import Batch, Segment
from kernelfuzz.strategies.layouts import CONTIGUOUS
from kernelfuzz.strategies.reduction import PATTERNS, Reduced

SHRINK_EXPAND = get_target("lora_shrink_expand")
ROUNDABLE = [target for target in TARGETS.values() if target.roundable]
SIMPLEST = lora_shrink_expand.Case(
    seed=0,
    op="shrink",
    batch=Batch((Segment(0, 1),)),
    num_adapters=1,
    hidden=1,
    rank=1,
    widths=(1,),
    dtype="float16",
    float32_input=False,
    contents="ones",
    scale=1.0,
    add_inputs=False,
    column_offset=0,
    column_tail=0,
    weights_4d=False,
    visit_all=False,
    block_n=64,
    block_k=64,
    split_k=1,
    input_layout=CONTIGUOUS,
)


def candidates(target=SHRINK_EXPAND, case=SIMPLEST, **changes):
    return list(simpler(dataclasses.replace(case, **changes), target.reducible, target.roundable))


def rounded(target, case):
    """The candidates of a case in which a size is another one."""
    return [
        each
        for each in candidates(target, case)
        if any(getattr(each, name) != getattr(case, name) for name in target.roundable)
    ]


# What is tried.


def test_nothing_is_simpler_than_the_simplest_case():
    assert candidates() == []


@pytest.mark.parametrize(("size", "round_size"), [(3, 4), (5, 8), (9, 16), (127, 128), (129, 256), (600, 1024)])
@pytest.mark.parametrize("name", ["hidden", "rank"])
def test_size_that_is_not_round_is_raised_to_the_next_power_of_two(name, size, round_size):
    assert candidates(**{name: size}) == [dataclasses.replace(SIMPLEST, **{name: round_size})]


@pytest.mark.parametrize("size", [1, 2, 4, 128, 1024])
def test_round_size_stays(size):
    assert candidates(hidden=size, rank=size) == []


def test_sizes_are_raised_one_by_one():
    case = dataclasses.replace(SIMPLEST, hidden=5, rank=3)
    assert candidates(case=case) == [dataclasses.replace(case, hidden=8), dataclasses.replace(case, rank=4)]


def test_tokens_adapters_and_slices_stay():
    assert candidates(batch=Batch((Segment(2, 3),)), num_adapters=3, widths=(1, 1, 1)) == []


def test_sizes_are_raised_after_everything_else_was_tried():
    case = dataclasses.replace(SIMPLEST, seed=7, contents="small_integers", hidden=5)
    reduced = [Reduced(tensor, pattern) for tensor in ("x", "weights") for pattern in PATTERNS]
    assert candidates(case=case) == [
        dataclasses.replace(case, seed=0),
        dataclasses.replace(case, contents="ones"),
        *(dataclasses.replace(case, reduced=(each,)) for each in reduced),
        dataclasses.replace(case, hidden=8),
    ]


def test_target_that_names_no_size_has_none_raised(shrink_case):
    assert candidates(get_target("bgmv"), shrink_case(9)) == []


def test_steps_end_whatever_is_chosen():
    first = dataclasses.replace(SIMPLEST, seed=7, contents="signed", hidden=5, rank=3)
    steps, ahead = {}, [first]
    while ahead:
        case = ahead.pop()
        if case not in steps:
            steps[case] = candidates(case=case)
            ahead += steps[case]
    TopologicalSorter(steps).prepare()  # raises CycleError where steps lead back
    ends = [case for case in steps if not steps[case]]
    assert {(case.seed, case.hidden, case.rank) for case in ends} == {(0, 8, 4)}


# What a target may name.


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_what_may_be_raised_are_integers_of_the_case(target):
    types = typing.get_type_hints(target.case_type)
    assert [name for name in target.roundable if types.get(name) is not int] == []


@pytest.mark.parametrize("target", ROUNDABLE, ids=lambda target: target.name)
def test_case_with_a_raised_size_can_be_made_and_judged(target, one_thread):
    cases = [each for case in draw(target.cases(), 1, 40) for each in rounded(target, case)]
    assert len(cases) > 20
    for case in cases:
        inputs = target.make_inputs(case, "cpu")
        initial = {
            name: spec.initial if spec.initial is not None else inputs.x.new_zeros(spec.shape, dtype=spec.dtype)
            for name, spec in target.outputs(inputs).items()
        }
        expectation = target.expect(inputs, initial)
        assert (expectation.error is not None) == ("refused_overwrite" in target.regimes(case))
        for output in expectation.outputs.values():
            assert output.values[output.mask("write")].isfinite().all()


def test_raised_rank_keeps_the_path_that_a_split_needs():
    target = get_target("fused_moe_lora")
    cases = [(case, each) for case in draw(target.cases(), 2, 300) for each in rounded(target, case)]
    assert {case.path for case, _ in cases} == {"small_batch", "one_shot", "two_kernel"}
    for case, each in cases:
        assert (each.path == "two_kernel") == (case.path == "two_kernel")


@pytest.mark.parametrize("module", [fused_moe_lora, lora_shrink_expand], ids=lambda module: module.Case.target)
def test_raised_sizes_take_no_more_memory_than_huge_cases_may(module):
    target = get_target(module.Case.target)
    cases = [each for case in draw(module.huge_cases(), 1, 60) for each in rounded(target, case)]
    assert len(cases) > 10
    assert max(map(module.huge_bytes, cases)) <= huge.MOST_BYTES


# What a search makes of it.


@pytest.mark.parametrize(
    ("kernel", "hidden"), [("shrink_wrong_from_hidden_5", 8), ("shrink_wrong_from_odd_hidden_5", 5)]
)
def test_shrunk_case_has_a_round_size_where_that_fails_too(kernel, hidden, worker_environment, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", worker_environment["PYTHONPATH"])
    (job,) = named_jobs(["lora_shrink_expand"], [f"drawn_kernels:{kernel}"], torch.device("cpu"))
    seen = []
    with IsolatedExecutor(job) as executor:
        executor.loaded()
        search = Search(job, executor, events.Bus([seen.append]), 40, None)
        search.run(job.target.cases(), 3, InMemoryExampleDatabase())
    (shrunk,) = (event for event in seen if isinstance(event, events.FailureFound) and event.shrunk)
    assert (shrunk.failure.kind, shrunk.failure.clause) == ("wrong_value", "product")
    case = shrunk.case
    assert (case.op, case.size, case.hidden, case.rank, case.contents) == ("shrink", 1, hidden, 1, "ones")
    assert (shrunk.failed_runs, shrunk.runs) == (10, 10)


def test_a_simpler_case_does_not_take_another_bug_along():
    """Where a round size shows a second bug too, the size stays: both would be taken for one."""
    job = named_jobs(["lora_shrink_expand"], ["drawn_kernels:right"], torch.device("cpu"))[0]
    first, second = (Failure("wrong_value", "output", clause, "") for clause in ("first", "second"))

    def judge(request):
        hidden = request.case.hidden
        return Verdict(tuple(each for each, least in ((first, 5), (second, 7)) if hidden >= least))

    case = dataclasses.replace(SIMPLEST, hidden=5, rank=3)
    found = Sighting(first, case, judge(Request.alone(case)))
    best = simplify(job, judge, fingerprint(job, first), found, hurries=False)
    assert (best.case.hidden, best.case.rank) == (5, 4)
