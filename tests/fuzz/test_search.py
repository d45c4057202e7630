"""The search: what it tries, what it finds, how small that gets, and when it ends. No kernel is run."""

import dataclasses
import random
from types import SimpleNamespace

import pytest
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase, InMemoryExampleDatabase

from kernelfuzz.fuzz import events, search
from kernelfuzz.fuzz.executor import Request, WorkerLostError
from kernelfuzz.fuzz.targets import get_target
from kernelfuzz.fuzz.verdict import Failure, Verdict
from kernelfuzz.strategies.errors import KernelfuzzError

BGMV = get_target("bgmv")
WRONG = Failure("wrong_value", "output", "product", "wrong")
RAISED = Failure("raised", "", "ValueError_in_launch", "ValueError")
PREFIX = "bgmv.engine_kernels-right."
WRONG_NAME, RAISED_NAME = PREFIX + "wrong_value.output.product", PREFIX + "raised.ValueError_in_launch"


def rank(case):
    return case.rows if case.op == "shrink" else case.width


def wrong_above_rank_8(case):
    return Verdict((WRONG,) if rank(case) > 8 else ())


def two_bugs(case):
    """Wrong above rank 8; raises from 4 tokens on."""
    return Verdict((*((WRONG,) if rank(case) > 8 else ()), *((RAISED,) if case.size >= 4 else ())))


class Run:
    """One search and everything that was seen of it. It is the search's executor too."""

    def __init__(self, job, judge, limit=None, deadline=None, seeds=1, delay=0):
        self.launched = []
        self.cases = []
        self.again = []
        """Launches: all; those that look for failures or shrink one; those that say how reliably one fails."""
        self.events = []
        self.judge = judge
        self.recorded = []
        self._delay = delay
        self._answers = []
        bus = events.Bus([self.events.append])
        self.search = search.Search(job, self, bus, limit, deadline, seeds, self.recorded.append)

    def run(self, request):
        self.launched.append(request.case)
        (self.again if request.maps else self.cases).append(request.case)
        for number, seed in enumerate(request.seeds, start=1):
            verdict = self.judge(dataclasses.replace(request.case, seed=seed))
            if verdict.failures:
                return dataclasses.replace(verdict, cases=number, seed=seed if len(request.seeds) > 1 else None)
        return dataclasses.replace(verdict, cases=len(request.seeds))

    def has_room(self):
        return len(self._answers) <= self._delay

    def submit(self, request):
        self._answers.append((request, self.run(request)))

    def receive(self, *, block):
        """Answers come as late as `delay` says."""
        ready = self._answers[: 1 if block else max(0, len(self._answers) - self._delay)]
        self._answers = self._answers[len(ready) :]
        return ready

    def __call__(self, strategy=None, seed=1, database=None, small=None):
        if strategy is None:
            strategy = BGMV.cases()
        self.search.run(strategy, seed, InMemoryExampleDatabase() if database is None else database, small)
        return self

    @property
    def found(self):
        return [event for event in self.events if isinstance(event, events.FailureFound)]

    @property
    def shrunk(self):
        return {event.fingerprint: event.case for event in self.found if event.shrunk}


@pytest.fixture
def run(engine_job):
    def make(judge, **options):
        return Run(engine_job("right"), judge, **options)

    return make


@pytest.fixture
def clock(monkeypatch):
    """The time that the search sees; nothing but a test moves it."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(search, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def passes(case):
    return Verdict()


# What is found.


@pytest.mark.parametrize("seed", range(3))
def test_bug_is_found_and_shrunk_to_its_minimum(run, seed):
    done = run(wrong_above_rank_8, limit=100)(seed=seed)
    first, last = done.found
    assert (first.fingerprint, first.shrunk) == (last.fingerprint, not last.shrunk) == (WRONG_NAME, False)
    assert (rank(last.case), last.case.size, last.case.seed) == (9, 1, 0)
    assert first.failure == last.failure == WRONG
    assert first.examples == last.examples <= 100


@pytest.mark.parametrize("seed", range(3))
def test_search_goes_on_to_the_second_bug(run, seed):
    done = run(two_bugs, limit=150)(seed=seed)
    assert len(done.found) == 4
    assert {event.fingerprint for event in done.found} == {WRONG_NAME, RAISED_NAME}
    wrong, raised = done.shrunk[WRONG_NAME], done.shrunk[RAISED_NAME]
    assert (rank(wrong), wrong.size) == (9, 1)
    assert (rank(raised), raised.size) == (1, 4)


def test_failure_that_was_seen_in_passing_is_shrunk_in_the_end(run, shrink_case):
    """Ranks from 10 to 50 fail in a way that is met only while those above are shrunk."""

    def judge(case):
        return Verdict((RAISED,) if rank(case) > 50 else (WRONG,) if rank(case) >= 10 else ())

    ranks = st.integers(1, 10**6).map(shrink_case)
    done = run(judge, limit=3)(ranks, small=st.integers(1, 60).map(shrink_case))
    assert {name: rank(case) for name, case in done.shrunk.items()} == {RAISED_NAME: 51, WRONG_NAME: 10}
    assert len(done.found) == 4
    assert done.search.examples == 3
    for name in done.shrunk:
        assert len({event.examples for event in done.found if event.fingerprint == name}) == 1, "when it was first seen"


def test_what_the_smallest_case_shows_is_one_bug(run):
    done = run(lambda case: Verdict((RAISED, WRONG) if rank(case) > 8 else ()), limit=100)()
    first, last = done.found
    assert (first.fingerprint, last.fingerprint) == (RAISED_NAME, RAISED_NAME)
    assert (rank(last.case), last.failure, last.symptoms) == (9, RAISED, (WRONG,))
    assert last.withdrawn == [WRONG_NAME]
    assert done.search.reported.keys() == {RAISED_NAME, WRONG_NAME}


@pytest.mark.parametrize("seed", range(3))
def test_bug_that_is_met_under_a_lesser_name_is_called_by_its_first_failure(run, seed, shrink_case):
    """Above rank 100 one of two failures is hidden; the smallest case shows both."""

    def judge(case):
        return Verdict(() if rank(case) <= 8 else (WRONG,) if rank(case) > 100 else (RAISED, WRONG))

    ranks = st.one_of(st.integers(1, 300), st.integers(101, 300)).map(shrink_case)
    done = run(judge, limit=60)(ranks, seed=seed)
    assert {name: rank(case) for name, case in done.shrunk.items()} == {RAISED_NAME: 9}
    assert [event.symptoms for event in done.found if event.shrunk][-1] == (WRONG,)


@pytest.mark.parametrize("seed", range(3))
def test_failure_that_shows_with_two_bugs_takes_neither_away(run, seed):
    unwritten = Failure("unwritten", "output", "product", "2 elements")

    def judge(case):
        found = two_bugs(case).failures
        return Verdict((*found, unwritten) if len(found) == 2 else found)

    done = run(judge, limit=200)(seed=seed)
    last = {event.fingerprint: event for event in done.found}
    assert {name for name in last if last[name].shrunk} == {WRONG_NAME, RAISED_NAME}
    assert [unwritten] == [symptom for name in (WRONG_NAME, RAISED_NAME) for symptom in last[name].symptoms]
    assert not {WRONG_NAME, RAISED_NAME} & {name for event in done.found for name in event.withdrawn}


def test_shrinking_does_not_slip_from_one_bug_to_another(run):
    """Every case below rank 9 fails too, in another way."""
    done = run(lambda case: Verdict((WRONG if rank(case) > 8 else RAISED,)), limit=100)()
    assert rank(done.shrunk[WRONG_NAME]) == 9
    assert rank(done.shrunk[RAISED_NAME]) == 1


@pytest.mark.parametrize("seed", range(3))
def test_kernel_that_fails_now_and_then_is_reported_once(run, seed):
    chance = random.Random(seed)
    failed = set()

    def flaky(case):
        if chance.random() >= 0.3:
            return Verdict()
        failed.add(case)
        return Verdict((WRONG,))

    done = run(flaky, limit=100)(seed=seed)
    first, last = done.found
    assert (first.shrunk, last.shrunk) == (False, True)
    assert {first.case, last.case} <= failed
    assert done.search.examples == 100
    launches = sum(isinstance(event, events.CaseFinished) for event in done.events[: done.events.index(last)])
    launches -= len(done.again)
    assert 10 <= len(done.again) <= 20, "what was shrunk to, and then what was found"
    assert last.runs == 10
    assert 0 < last.failed_runs < 10
    assert len(set(done.cases[:launches])) == launches, "a case keeps the verdict that it had until its bug is shrunk"


def test_failure_left_with_many_tokens_is_looked_for_among_small_cases(run):
    """Shrinking tokens alone ends at five; only a larger rank allows fewer."""
    needs_tokens_or_rank = lambda case: Verdict((WRONG,) if case.size >= 5 or rank(case) > 60 else ())  # noqa: E731
    strategy = BGMV.cases(max_rank=8)
    assert run(needs_tokens_or_rank, limit=50)(strategy).shrunk[WRONG_NAME].size == 5
    small = BGMV.cases(max_segments=2, max_length=2)
    done = run(needs_tokens_or_rank, limit=50)(strategy, small=small)
    assert (done.shrunk[WRONG_NAME].size, rank(done.shrunk[WRONG_NAME])) == (1, 61)
    assert done.search.examples == 50, "the small cases are part of shrinking"


@pytest.mark.parametrize("judge", [wrong_above_rank_8, two_bugs])
def test_answers_that_come_late_change_nothing(run, judge):
    """A worker answers while Hypothesis draws on: what is tried, found and shrunk is the same."""
    at_once, late = run(judge, limit=120)(seed=3), run(judge, limit=120, delay=5)(seed=3)
    assert late.events == at_once.events
    assert late.cases == at_once.cases


def test_what_failed_among_drawn_cases_is_not_launched_again_to_shrink_it(run):
    done = run(wrong_above_rank_8, limit=120)(seed=3)
    until_shrunk = done.events[: done.events.index(done.found[-1])]
    launches = sum(isinstance(event, events.CaseFinished) for event in until_shrunk) - len(done.again)
    assert len(set(done.cases[:launches])) == launches


def test_first_failing_seed_of_a_structure_is_pinned(run):
    """Half of all seeds fail. The saved case has one that does."""
    fails = lambda case: Verdict((WRONG,) if case.seed % 2 and rank(case) > 8 else ())  # noqa: E731
    done = run(fails, limit=60, seeds=4)(seed=1)
    assert done.shrunk.keys() == {WRONG_NAME}
    for event in done.found:
        assert fails(event.case).failures
    finished = [event for event in done.events if isinstance(event, events.CaseFinished)]
    assert all(event.verdict.cases == 4 for event in finished if not (event.verdict.failures or event.shrinking))
    assert sum(not event.shrinking for event in finished) <= 60


def test_every_request_is_recorded_before_it_is_run(run):
    done = run(wrong_above_rank_8, limit=60, delay=3)()
    recorded = {request.case for requests in done.recorded for request in requests}
    assert recorded == set(done.cases)
    assert max(map(len, done.recorded)) == 4, "with those that are not answered yet"


def test_requests_of_a_campaign_that_was_killed_come_first(run, shrink_case):
    left = [Request.alone(shrink_case(40)), Request.alone(shrink_case(2))]
    done = run(wrong_above_rank_8, limit=5)
    done.search.run(BGMV.cases(max_rank=8), 1, InMemoryExampleDatabase(), None, left)
    assert done.cases[:2] == [request.case for request in left]
    assert done.found[0].case == left[0].case
    assert WRONG_NAME in done.shrunk or done.found[-1].case == left[0].case
    assert not any(request in requests for requests in done.recorded for request in left)


def test_what_is_run_first_is_part_of_the_budget(run, shrink_case):
    left = [Request.alone(shrink_case(rank)) for rank in range(1, 8)]
    done = run(passes, limit=4)
    done.search.run(BGMV.cases(), 1, InMemoryExampleDatabase(), None, left)
    assert done.cases == [request.case for request in left[:4]]
    assert done.search.examples == 4


@pytest.mark.parametrize("delay", [0, 3])
def test_crash_over_which_the_last_worker_was_lost_is_reported(run, delay):
    done = run(passes, limit=100, delay=delay)
    crash = Failure("crash", "", "SIGABRT", "the worker died: SIGABRT")
    receive = done.receive

    def lost(*, block):
        answers = receive(block=block)
        if len(done.cases) > 20 and answers:
            raise WorkerLostError("the kernel cannot be loaded again", answers[0][0], Verdict((crash,)))
        return answers

    done.receive = lost
    with pytest.raises(WorkerLostError, match="cannot be loaded again"):
        done()
    assert [event.failure for event in done.found] == [crash]
    assert done.found[0].case in done.cases


def test_case_that_the_harness_cannot_judge_is_no_failure(run):
    done = run(lambda case: Verdict(error="ZeroDivisionError: ours") if case.size == 2 else Verdict(), limit=200)()
    assert done.found == []
    assert done.search.examples == 200
    errors = [event for event in done.events if isinstance(event, events.CaseFinished) and event.verdict.error]
    assert {event.case.size for event in errors} == {2}


def test_search_gives_up_when_the_harness_judges_next_to_nothing(run):
    with pytest.raises(KernelfuzzError, match=r"could not judge \d+ cases: ours"):
        run(lambda case: Verdict(error="ours"), limit=200)()


# What is emitted.


def test_every_launch_is_emitted_with_its_regimes(run):
    done = run(two_bugs, limit=60)()
    finished = [event for event in done.events if isinstance(event, events.CaseFinished)]
    assert [event.regimes for event in finished] == [BGMV.regimes(case) for case in done.launched]
    assert [event.verdict for event in finished] == [two_bugs(case) for case in done.launched]
    assert any(event.shrinking for event in finished)
    assert len([event for event in finished if not event.shrinking]) <= 60
    counts = [event.examples for event in finished]
    assert counts == sorted(counts)


# When it ends.


@pytest.mark.parametrize("limit", [1, 2, 50])
@pytest.mark.parametrize("judge", [passes, two_bugs])
def test_budget_of_examples_is_kept_exactly(run, judge, limit):
    done = run(judge, limit=limit)()
    assert done.search.examples == limit
    tried = [event for event in done.events if isinstance(event, events.CaseFinished) and not event.shrinking]
    assert len(tried) <= limit


@pytest.mark.parametrize("offered", [lambda case: False, lambda case: rank(case) == 1])
def test_kernel_that_rejects_most_cases_gets_no_more_examples(run, offered):
    """Hypothesis gives up long before and refuses a test that it cannot satisfy."""
    done = run(lambda case: Verdict(rejected="" if offered(case) else "not offered"), limit=700)()
    assert done.search.examples == 700
    assert done.found == []


def test_budget_of_examples_spans_rounds(run, monkeypatch):
    monkeypatch.setattr(search, "LARGEST_CHUNK", 20)
    done = run(wrong_above_rank_8, limit=70)()
    assert done.search.examples == 70
    assert len(done.found) == 2


def test_strategy_with_a_few_cases_ends_too(run, shrink_case):
    done = run(passes, limit=30)(st.sampled_from([shrink_case(1), shrink_case(2)]))
    assert set(done.cases) == {shrink_case(1), shrink_case(2)}
    assert done.search.examples == 30


def test_budget_of_time_ends_the_search(run, clock):
    def takes_a_second(case):
        clock.seconds += 1.0
        return Verdict()

    done = run(takes_a_second, deadline=25.0)()
    assert len(done.cases) == 25
    assert done.found == []


def test_spent_time_runs_nothing(run, clock):
    assert run(passes, deadline=0.0)().cases == []


def test_failure_found_at_the_last_moment_is_still_shrunk(run, clock):
    def takes_a_second(case):
        clock.seconds += 1.0
        return wrong_above_rank_8(case)

    finder = run(takes_a_second, deadline=100.0)()
    when = next(i for i, case in enumerate(finder.cases) if rank(case) > 8)
    clock.seconds = 0.0
    done = run(takes_a_second, deadline=when + 1.0)()
    assert rank(done.shrunk[WRONG_NAME]) == 9
    assert done.search.examples <= when + 1


def test_shrinking_past_its_deadline_keeps_the_smallest_so_far(run, clock, monkeypatch, shrink_case):
    monkeypatch.setattr(search, "SHRINK_SECONDS", 3.0)

    def takes_a_second(case):
        clock.seconds += 1.0
        return wrong_above_rank_8(case)

    ranks = st.integers(1, 10**6).map(shrink_case)
    done = run(takes_a_second, deadline=1.0)(ranks, seed=3)
    while not done.found:  # the one example that the time allows may pass
        clock.seconds = 0.0
        done = run(takes_a_second, deadline=20.0)(ranks, seed=3)
    failing = [rank(case) for case in done.cases if rank(case) > 8]
    smallest = min(failing)
    assert 9 < smallest < failing[0], "cut off half-way"
    assert rank(done.shrunk[WRONG_NAME]) == smallest


def test_interruption_keeps_what_was_found(run, shrink_case):
    ranks = st.integers(1, 10**6).map(shrink_case)
    whole = run(wrong_above_rank_8, limit=50)(ranks)
    drawn = len([event for event in whole.events if isinstance(event, events.CaseFinished) and not event.shrinking])
    first = next(i for i, case in enumerate(whole.cases) if rank(case) > 8)
    assert first < drawn - 8
    for after in (*range(first + 1, first + 8), *range(drawn, drawn + 8)):
        done = run(wrong_above_rank_8, limit=50)

        def interrupted(case, done=done, after=after):
            if len(done.cases) > after:
                raise KeyboardInterrupt
            return wrong_above_rank_8(case)

        done.judge = interrupted
        with pytest.raises(KeyboardInterrupt):
            done(ranks)
        assert len(done.cases) == after + 1
        shrinking = [done.cases[first], *(case for case in done.cases[drawn:-1] if rank(case) > 8)]
        smallest = [min(shrinking, key=rank)] if after >= drawn else []
        assert [event.case for event in done.found] == [done.cases[first], *smallest]


def test_interruption_before_anything_was_found(run):
    def interrupted(case):
        raise KeyboardInterrupt

    done = run(interrupted, limit=50)
    with pytest.raises(KeyboardInterrupt):
        done()
    assert (len(done.cases), done.found) == (1, [])


def test_kernel_that_cannot_be_loaded_again_ends_the_search_at_once(run):
    """What was found until then is kept as it was found."""
    done = run(two_bugs, limit=50)

    def breaks_down(case):
        if done.shrunk:
            raise KernelfuzzError("the worker died while it loaded the kernel")
        return two_bugs(case)

    done.judge = breaks_down
    database = InMemoryExampleDatabase()
    with pytest.raises(KernelfuzzError, match="the worker died while it loaded"):
        done(database=database)
    assert done.shrunk.keys() == {WRONG_NAME, RAISED_NAME}
    assert done.found[-1].failure in two_bugs(done.found[-1].case).failures
    launched = [event for event in done.events if isinstance(event, events.CaseFinished)]
    assert len(done.launched) == len(launched) + 1


# What a seed and a database decide.


@pytest.mark.parametrize("judge", [passes, two_bugs])
def test_same_seed_same_cases_and_events(run, judge):
    first, second = run(judge, limit=80)(seed=5), run(judge, limit=80)(seed=5)
    assert first.cases == second.cases
    assert first.events == second.events
    assert run(judge, limit=80)(seed=6).cases != first.cases


def test_order_in_which_a_database_answers_decides_nothing(run):
    """Hypothesis draws at random among what was saved."""

    class Ordered(InMemoryExampleDatabase):
        reverse = False

        def fetch(self, key):
            return sorted(super().fetch(key), reverse=self.reverse)

    def second_search(reverse):
        database = Ordered()
        run(two_bugs, limit=80)(seed=5, database=database)
        database.reverse = reverse
        return run(two_bugs, limit=30)(seed=6, database=database).cases

    assert second_search(reverse=False) == second_search(reverse=True)


def test_saved_failures_are_tried_first(run, tmp_path):
    """Both of them, and a second search deletes neither."""
    saved = run(two_bugs, limit=150)(seed=1, database=DirectoryBasedExampleDatabase(tmp_path)).shrunk
    assert len(saved) == 2
    for seed in (2, 3):
        done = run(two_bugs, limit=20)(seed=seed, database=DirectoryBasedExampleDatabase(tmp_path))
        assert done.cases[0] in saved.values()
        assert done.shrunk == saved
        assert all(event.examples <= 3 for event in done.found)


def test_failure_that_is_mended_is_forgotten(run):
    database = InMemoryExampleDatabase()
    run(wrong_above_rank_8, limit=100)(database=database)
    assert any(database.data.values())
    mended = run(passes, limit=300)(seed=2, database=database)
    assert mended.found == []
    assert not any(database.data.values())


def test_right_kernel_leaves_nothing_in_the_database(run, clock):
    database = InMemoryExampleDatabase()

    def takes_a_second(case):
        clock.seconds += 1.0
        return Verdict()

    run(takes_a_second, deadline=20.0)(database=database)
    assert database.data == {}
