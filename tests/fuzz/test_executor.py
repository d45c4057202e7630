"""The executor: cases in a worker process that may die, hang, or never come up."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.database import InMemoryExampleDatabase

from kernelfuzz.fuzz import events, forkserver, isolated, worker_process
from kernelfuzz.fuzz.executor import LoadedKernel, Request, WorkerLostError
from kernelfuzz.fuzz.isolated import Fleet, IsolatedExecutor
from kernelfuzz.fuzz.job import named_jobs
from kernelfuzz.fuzz.search import Search
from kernelfuzz.strategies.case import to_json
from kernelfuzz.strategies.errors import KernelfuzzError

PATIENCE = 60.0
"""Seconds after which something that should happen soon counts as never happening."""


def state_and_parent(pid: int) -> tuple[str, int]:
    """Return a process's state and its parent; ("gone", 0) if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "gone", 0
    state, parent = stat.rpartition(")")[2].split()[:2]
    return state, int(parent)


def is_running(pid: int) -> bool:
    """Whether the process is there; one that only waits to be reaped is not."""
    return state_and_parent(pid)[0] not in ("gone", "Z")


def children_of(pid: int) -> set[int]:
    processes = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return {child for child in processes if is_running(child) and state_and_parent(child)[1] == pid}


def wait_until(condition) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture(scope="module")
def mark(tmp_path_factory):
    """The file in which a kernel that never ends writes its process's id."""
    return tmp_path_factory.mktemp("executor") / "mark"


@pytest.fixture(scope="module", autouse=True)
def _environment(worker_environment, mark):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", worker_environment["PYTHONPATH"])
        patch.setenv("ENGINE_KERNELS_MARK", str(mark))
        yield


@pytest.fixture(scope="module")
def mortal(engine_job):
    """A loaded executor of the kernel that ranks 2, 3 and 4 end."""
    with IsolatedExecutor(engine_job("mortal")) as loaded:
        assert loaded.loaded() == LoadedKernel("user", {})
        yield loaded


def run(executor, case, *seeds):
    return executor.run(Request(case, seeds or (case.seed,)))


def assert_right(verdict):
    assert verdict.failures == ()
    assert (verdict.rejected, verdict.error) == ("", "")
    assert set(verdict.seconds) == {"inputs", "oracle", "kernel", "check"}


def test_verdict_of_a_right_kernel(mortal, shrink_case):
    verdict = run(mortal, shrink_case(5, tokens=3))
    assert_right(verdict)
    assert 0.0 <= verdict.ratio <= 1.0


@pytest.mark.parametrize(
    ("rank", "clause", "message"),
    [
        (2, "exit_status_3", "the worker died: exit_status_3: the last words"),
        (3, "SIGSEGV", "the worker died: SIGSEGV"),
    ],
)
def test_death_fails_its_case_and_the_next_one_has_a_new_worker(mortal, shrink_case, rank, clause, message):
    (failure,) = run(mortal, shrink_case(rank)).failures
    assert (failure.kind, failure.output, failure.clause) == ("crash", "", clause)
    assert failure.message.startswith(message)
    assert_right(run(mortal, shrink_case(5)))


@pytest.fixture
def impatient(monkeypatch):
    """Silence is noticed soon."""
    monkeypatch.setattr(isolated, "FIRST_SECONDS", 1.0)
    monkeypatch.setattr(isolated, "LEAST_SECONDS", 1.0)
    monkeypatch.setattr(isolated, "CONFIRMING_TIMES", 10.0)


def test_worker_that_somebody_kills_says_nothing_of_the_kernel(engine_job, shrink_case, mark):
    """Whether it was a person or the system that needed memory: the case is run again, and passes."""
    mark.unlink(missing_ok=True)

    def kill():
        if wait_until(mark.exists):
            os.kill(int(mark.read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    with IsolatedExecutor(engine_job("waits_once")) as waits_once:
        waits_once.loaded()
        killer.start()
        verdict = run(waits_once, shrink_case(4))
        killer.join()
        assert_right(verdict)
        assert waits_once.replacements.workers == 1


def test_kernel_that_kills_its_process_every_time_is_a_crash(engine_job, shrink_case):
    with IsolatedExecutor(engine_job("kills_itself")) as kills_itself:
        kills_itself.loaded()
        (failure,) = run(kills_itself, shrink_case(4)).failures
    assert (failure.kind, failure.clause) == ("crash", "SIGKILL")


def test_silence_is_a_hang_and_its_worker_is_gone(mortal, shrink_case, mark, impatient, monkeypatch):
    monkeypatch.setattr(isolated, "CONFIRMING_TIMES", 2.0)
    mark.unlink(missing_ok=True)
    assert_right(run(mortal, shrink_case(5)))
    (failure,) = run(mortal, shrink_case(4)).failures
    assert (failure.kind, failure.clause, failure.message) == ("hang", "no_answer", "no answer within 2 s")
    assert wait_until(mark.exists)
    # It was told to end; nobody waits for it, since a driver may hold it.
    assert wait_until(lambda: not is_running(int(mark.read_text())))
    assert_right(run(mortal, shrink_case(5)))


def test_worker_that_is_stopped_is_no_hang(engine_job, shrink_case, mark, impatient):
    mark.unlink(missing_ok=True)
    with IsolatedExecutor(engine_job("stops_once")) as stops_once:
        stops_once.loaded()
        assert_right(run(stops_once, shrink_case(4)))
        assert stops_once.replacements.workers == 1
    assert not is_running(int(mark.read_text()))


def test_patience_grows_with_the_slowest_case_seen(engine_job, monkeypatch, shrink_case):
    """A kernel whose cases take long is no kernel that hangs."""
    monkeypatch.setattr(isolated, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(isolated, "FIRST_SECONDS", 1e6)
    with IsolatedExecutor(engine_job("slow")) as slow:
        slow.loaded()
        for _ in range(3):
            run(slow, shrink_case(5))
        monkeypatch.setattr(isolated, "SLOWEST_TIMES", 5000.0)
        assert 0 < slow.seconds_left < 1e6
        monkeypatch.setattr(isolated, "SLOWEST_TIMES", 0.0)
        assert slow.seconds_left == 0


def test_child_of_a_kernel_neither_hides_its_death_nor_outlives_it(engine_job, shrink_case, mark):
    mark.unlink(missing_ok=True)
    with IsolatedExecutor(engine_job("dies_and_leaves_a_child")) as leaves_a_child:
        leaves_a_child.loaded()
        (failure,) = run(leaves_a_child, shrink_case(3)).failures
        assert (failure.kind, failure.clause) == ("crash", "SIGSEGV")
        assert_right(run(leaves_a_child, shrink_case(5)))
    assert wait_until(lambda: not is_running(int(mark.read_text())))


def test_what_a_kernel_changes_in_its_process_is_not_held_against_later_cases(engine_job, shrink_case):
    with IsolatedExecutor(engine_job("changes_its_process")) as changes:
        changes.loaded()
        for rank in (5, 3, 5, 4, 3, 3):
            assert_right(run(changes, shrink_case(rank)))
        assert changes.replacements.workers == 2, "for each case that met a change"


def test_kernel_after_which_the_harness_fails_every_time_is_named(engine_job, shrink_case):
    with IsolatedExecutor(engine_job("breaks_the_comparison")) as breaks:
        breaks.loaded()
        (failure,) = run(breaks, shrink_case(3)).failures
        assert (failure.kind, failure.clause) == ("crash", "breaks_its_process")
        assert_right(run(breaks, shrink_case(5)))


def test_kernel_that_writes_over_the_connection_is_named(engine_job, shrink_case):
    with IsolatedExecutor(engine_job("writes_over_the_connection")) as writes:
        writes.loaded()
        (failure,) = run(writes, shrink_case(3)).failures
        assert (failure.kind, failure.clause) == ("crash", "garbled_answer")
        assert_right(run(writes, shrink_case(5)))


def test_exception_that_has_no_text_is_the_kernels(engine_job, shrink_case):
    with IsolatedExecutor(engine_job("raises_without_a_text")) as raises:
        raises.loaded()
        (failure,) = run(raises, shrink_case(3)).failures
    assert (failure.kind, failure.clause) == ("raised", "Unspeakable_in_raises_without_a_text")
    assert failure.message == "Unspeakable: (no text: RuntimeError)"


# Several requests, several seeds, several workers.


def test_result_of_another_form_is_one_wrong_value_and_its_worker_goes_on(engine_job, shrink_case):
    with IsolatedExecutor(engine_job("of_another_form")) as of_another_form:
        of_another_form.loaded()
        (failure,) = run(of_another_form, shrink_case(3)).failures
        assert (failure.kind, failure.output, failure.clause) == ("wrong_value", "output", "form_of_result")
        assert failure.message == "output is NoneType and must be a tensor"
        assert_right(run(of_another_form, shrink_case(4)))
        assert of_another_form.replacements.workers == 0


@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
def test_what_kernelfuzz_itself_says_during_a_launch_is_no_failure(engine_job, shrink_case, seeds):
    with IsolatedExecutor(engine_job("needs_what_is_not_loaded")) as needs:
        needs.loaded()
        verdict = run(needs, shrink_case(3), *seeds)
        assert verdict.failures == ()
        assert (verdict.error, verdict.own_error) == ("kernelfuzz does not load the configuration", True)
        assert_right(run(needs, shrink_case(4)))


def test_seed_that_ends_the_process_is_found_among_several(engine_job, shrink_case):
    with IsolatedExecutor(engine_job("mortal_seed")) as mortal_seed:
        mortal_seed.loaded()
        verdict = run(mortal_seed, shrink_case(5), 4, 1, 2, 3)
        assert (verdict.failures[0].kind, verdict.seed, verdict.cases) == ("crash", 2, 3)
        right = run(mortal_seed, shrink_case(5), 4, 1, 3)
        assert (right.failures, right.seed, right.cases) == ((), None, 3)


def seeds_of(answers):
    return [request.case.seed for request, _ in answers]


def test_requests_behind_one_that_ends_the_worker_are_answered_all_the_same(engine_job, shrink_case):
    with IsolatedExecutor(engine_job("mortal_seed")) as mortal_seed:
        mortal_seed.loaded()
        cases = [dataclasses.replace(shrink_case(5), seed=seed) for seed in (1, 2, 3, 2)]
        for case in cases:
            assert mortal_seed.has_room()
            mortal_seed.submit(Request.alone(case))
        answers = []
        while len(answers) < len(cases):
            answers += mortal_seed.receive(block=True)
        assert seeds_of(answers) == [1, 2, 3, 2]
        assert [len(verdict.failures) for _, verdict in answers] == [0, 1, 0, 1]
        assert mortal_seed.receive(block=True) == []


def test_fleet_answers_in_order_and_loses_nothing(engine_job, shrink_case):
    """Of 60 requests to three workers, 20 end theirs."""
    fleet = Fleet(engine_job("dies_of_every_third"), 3)
    try:
        assert fleet.loaded() == LoadedKernel("user", {})
        answers = []
        for seed in range(60):
            while not fleet.has_room():
                answers += fleet.receive(block=True)
            fleet.submit(Request.alone(dataclasses.replace(shrink_case(5), seed=seed)))
            answers += fleet.receive(block=False)
        while more := fleet.receive(block=True):
            answers += more
        assert seeds_of(answers) == list(range(60))
        crashed = [request.case.seed for request, verdict in answers if verdict.failures]
        assert crashed == list(range(0, 60, 3))
        assert fleet.replacements.workers == 20
    finally:
        fleet.close()


# Under a sanitizer, here a stand-in for it.


@pytest.fixture
def fake_sanitizer(tmp_path, monkeypatch):
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    shutil.copy(Path(__file__).with_name("fake_sanitizer.py"), tool)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")


def test_sanitizers_report_fails_its_case(engine_job, shrink_case, fake_sanitizer):
    with IsolatedExecutor(engine_job("reported"), "memcheck") as watched:
        watched.loaded()
        for rank, kinds in ((5, []), (9, ["out_of_bounds"]), (5, []), (17, ["out_of_bounds", "crash"]), (5, [])):
            verdict = run(watched, shrink_case(rank))
            assert sorted(failure.kind for failure in verdict.failures) == sorted(kinds)
            for failure in verdict.failures:
                if failure.kind == "out_of_bounds":
                    assert failure.clause == "write_in__expand_rows"
                    assert "0x1000 is out of bounds" in failure.message
        processes = descendants_of(watched._worker.process.pid) | {watched._worker.process.pid}
    assert len(processes) == 2
    assert wait_until(lambda: not any(map(is_running, processes)))


@pytest.mark.parametrize(("tool", "fails"), [(None, True), ("memcheck", True), ("initcheck", False)])
def test_scratch_is_filled_but_where_that_hides_what_is_looked_for(
    engine_job, shrink_case, fake_sanitizer, tool, fails
):
    with IsolatedExecutor(engine_job("keeps_its_scratch"), tool) as watched:
        watched.loaded()
        assert bool(run(watched, shrink_case(5)).failures) == fails


def test_crash_is_kept_where_no_worker_can_take_its_place(engine_job, shrink_case, monkeypatch):
    """A machine whose device is gone has no more to say than what took it away."""
    with IsolatedExecutor(engine_job("mortal")) as mortal:
        mortal.loaded()
        monkeypatch.setattr(worker_process, "LOAD_SECONDS", -1.0)
        with pytest.raises(WorkerLostError, match="not loaded within") as lost:
            run(mortal, shrink_case(2))
    assert lost.value.request.case == shrink_case(2)
    assert [failure.clause for failure in lost.value.verdict.failures] == ["exit_status_3"]


def test_sanitizer_that_does_not_start_is_one_line(engine_job, fake_sanitizer, tmp_path):
    (tmp_path / "bin" / "compute-sanitizer").write_text("#!/bin/sh\necho no such option >&2\nexit 255\n")
    with (
        IsolatedExecutor(engine_job("right"), "memcheck") as watched,
        pytest.raises(KernelfuzzError, match="exit_status_255: no such option"),
    ):
        watched.loaded()


# What is ours.


@pytest.fixture(scope="module")
def broken_harness():
    (job,) = named_jobs(["bgmv"], ["broken_harness:launch"], torch.device("cpu"))
    with IsolatedExecutor(job) as loaded:
        loaded.loaded()
        yield loaded


@pytest.mark.parametrize(
    ("rank", "error"),
    [
        (5, "ZeroDivisionError: division by zero"),
        (6, "without launching the kernel: the worker died: exit_status_9"),
    ],
)
def test_what_breaks_the_oracle_is_not_the_kernels_failure(broken_harness, shrink_case, rank, error):
    verdict = run(broken_harness, shrink_case(rank))
    assert (verdict.failures, verdict.error) == ((), error)
    assert_right(run(broken_harness, shrink_case(7)))


def test_case_runs_in_this_process_too(engine_job, shrink_case, monkeypatch):
    """In one of its own, since loading a kernel changes it."""
    script = f"""
import os, torch
from kernelfuzz.fuzz.executor import LocalExecutor, Request
from kernelfuzz.fuzz.job import named_jobs
from kernelfuzz.fuzz.targets import get_target
from kernelfuzz.strategies.case import from_json
(job,) = named_jobs(["bgmv"], ["engine_kernels:wrong_above_rank_8"], torch.device("cpu"))
local = LocalExecutor(job)
print(local.loaded().version)
for document in {[to_json(shrink_case(8)), to_json(shrink_case(9))]!r}:
    local.submit(Request.alone(from_json(get_target("bgmv").case_type, document)))
print([[failure.kind for failure in verdict.failures] for _, verdict in local.receive(block=True)])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["user", "[[], ['wrong_value']]"]


def test_crash_shrinks_like_any_other_failure(mortal, shrink_case, engine_job):
    """Each try of the shrinker that dies takes a new worker. The first example passes, the second one cannot."""
    seen = []
    bus = events.Bus([seen.append])
    cases = st.integers(0, 3).map(lambda tokens: shrink_case(2, tokens) if tokens else shrink_case(5))
    Search(engine_job("mortal"), mortal, bus, 2, None).run(cases, 1, InMemoryExampleDatabase())
    first, last = [event for event in seen if isinstance(event, events.FailureFound)]
    assert first.fingerprint == last.fingerprint == "bgmv.engine_kernels-mortal.crash.exit_status_3"
    assert last.case == shrink_case(2)


def test_what_a_kernel_prints_disturbs_nothing(engine_job, shrink_case, capfd):
    with IsolatedExecutor(engine_job("chatty")) as chatty:
        chatty.loaded()
        for rank in (5, 6):
            assert_right(run(chatty, shrink_case(rank)))
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A folder of modules that cannot be imported."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "raises_at_import.py").write_text("raise ValueError('first line\\nsecond line')\n")
    (folder / "ends_at_import.py").write_text("import os\nprint('good night', flush=True)\nos._exit(4)\n")
    (folder / "sleeps_at_import.py").write_text("import time\ntime.sleep(3600)\n")
    (folder / "needs_more.py").write_text("import no_such_dependency\n")
    (folder / "syntax.py").write_text("def launch(:\n")
    return folder


def test_kernel_that_cannot_be_loaded_is_one_line(broken, worker_environment, monkeypatch):
    reasons = {
        "no_such_module:launch": "kernel 'no_such_module:launch' cannot be imported: No module named 'no_such_module'",
        "engine_kernels:no_such_function": "module 'engine_kernels' has no attribute 'no_such_function'",
        "needs_more:launch": "No module named 'no_such_dependency'",
        "syntax:launch": "SyntaxError: ",
        "raises_at_import:launch": "ValueError: first line",
        "ends_at_import:launch": "while it loaded the kernel the worker died: exit_status_4: good night",
    }
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(broken), worker_environment["PYTHONPATH"]]))
    jobs = {name: named_jobs(["bgmv"], [name], torch.device("cpu"))[0] for name in reasons}
    executors = {name: IsolatedExecutor(job) for name, job in jobs.items()}
    for name, reason in reasons.items():
        with executors[name] as starting, pytest.raises(KernelfuzzError) as error:
            starting.loaded()
        message = str(error.value)
        assert message.startswith(f"bgmv on {name} (cpu): ")
        assert reason in message
        assert "\n" not in message


def test_kernel_that_takes_too_long_to_load_is_one_line(broken, worker_environment, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(broken), worker_environment["PYTHONPATH"]]))
    monkeypatch.setattr(worker_process, "LOAD_SECONDS", 0.01)
    (job,) = named_jobs(["bgmv"], ["sleeps_at_import:launch"], torch.device("cpu"))
    with (
        IsolatedExecutor(job) as starting,
        pytest.raises(KernelfuzzError, match=r"not loaded within 0\.01 s"),
    ):
        starting.loaded()


def test_nothing_that_starts_workers_is_one_line(engine_job, monkeypatch):
    monkeypatch.setattr(forkserver, "_servers", lambda: {})
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(KernelfuzzError, match="the process that starts workers died: exit status 1"):
        IsolatedExecutor(engine_job("right"))


def test_fork_server_that_was_killed_is_replaced(engine_job, shrink_case, monkeypatch):
    servers = {}
    monkeypatch.setattr(forkserver, "_servers", lambda: servers)
    with IsolatedExecutor(engine_job("right")) as right:
        right.loaded()
        (server,) = servers.values()
        server.close()
        assert_right(run(right, shrink_case(5)))
        servers.popitem()[1].close()


def test_close_ends_the_worker(engine_job):
    starting = IsolatedExecutor(engine_job("right"))
    worker = starting._worker.process.pid
    assert is_running(worker)
    starting.close()
    assert not is_running(worker)
    starting.close()


PARENT = """
import torch
from kernelfuzz.fuzz.executor import Request
from kernelfuzz.fuzz.isolated import IsolatedExecutor
from kernelfuzz.fuzz.job import named_jobs
from kernelfuzz.fuzz.targets import get_target
from kernelfuzz.strategies.case import from_json

job, = named_jobs(["bgmv"], ["engine_kernels:{kernel}"], torch.device("cpu"))
idle, busy = IsolatedExecutor(job), IsolatedExecutor(job)
idle.loaded()
busy.loaded()
busy.run(Request.alone(from_json(get_target("bgmv").case_type, {case})))
"""


def descendants_of(pid):
    children = children_of(pid)
    return children.union(*map(descendants_of, children))


@pytest.mark.parametrize("kernel", ["mortal", "stops_once"])
def test_no_process_outlives_a_parent_that_is_killed(shrink_case, mark, kernel):
    """Neither a worker that waits for a case nor one that hangs in its kernel, or is stopped, nor what forked them."""
    mark.unlink(missing_ok=True)
    script = PARENT.replace("{case}", repr(to_json(shrink_case(4)))).replace("{kernel}", kernel)
    with subprocess.Popen([sys.executable, "-c", script]) as parent:
        try:
            assert wait_until(lambda: mark.exists() or parent.poll() is not None)
            processes = descendants_of(parent.pid)
        finally:
            parent.kill()
    assert len(processes) == 3
    assert int(mark.read_text()) in processes
    assert wait_until(lambda: not any(map(is_running, processes)))
