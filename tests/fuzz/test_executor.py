"""The executor: cases in a worker process that may die, hang, or never come up."""

import os
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

from kernelfuzz.fuzz import events, executor
from kernelfuzz.fuzz.executor import Executor, LoadedKernel
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
    with Executor(engine_job("mortal")) as loaded:
        assert loaded.loaded() == LoadedKernel("user", {})
        yield loaded


def assert_right(verdict):
    assert verdict.failures == ()
    assert verdict.rejected == ""
    assert set(verdict.seconds) == {"inputs", "oracle", "kernel", "check"}


def test_verdict_of_a_right_kernel(mortal, shrink_case):
    verdict = mortal.run(shrink_case(5, tokens=3))
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
    (failure,) = mortal.run(shrink_case(rank)).failures
    assert (failure.kind, failure.output, failure.clause) == ("crash", "", clause)
    assert failure.message.startswith(message)
    assert_right(mortal.run(shrink_case(5)))


def test_worker_that_is_killed_from_outside_is_a_crash(mortal, shrink_case, mark):
    mark.unlink(missing_ok=True)
    assert_right(mortal.run(shrink_case(5)))

    def kill():
        if wait_until(mark.exists):
            os.kill(int(mark.read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    (failure,) = mortal.run(shrink_case(4)).failures
    killer.join()
    assert (failure.kind, failure.clause) == ("crash", "SIGKILL")
    assert_right(mortal.run(shrink_case(5)))


def test_silence_is_a_hang_and_its_worker_is_gone(mortal, shrink_case, mark, monkeypatch):
    mark.unlink(missing_ok=True)
    assert_right(mortal.run(shrink_case(5)))
    with monkeypatch.context() as patch:
        patch.setattr(executor, "CASE_SECONDS", 1.0)
        (failure,) = mortal.run(shrink_case(4)).failures
    assert (failure.kind, failure.clause, failure.message) == ("hang", "no_answer", "no answer within 1 s")
    assert wait_until(mark.exists)
    assert not is_running(int(mark.read_text()))
    assert_right(mortal.run(shrink_case(5)))


def test_crash_shrinks_like_any_other_failure(mortal, shrink_case, engine_job):
    """Each try of the shrinker that dies takes a new worker. The first example passes, the second one cannot."""
    seen = []
    bus = events.Bus([seen.append])
    cases = st.integers(0, 3).map(lambda tokens: shrink_case(2, tokens) if tokens else shrink_case(5))
    Search(engine_job("mortal"), mortal.run, bus, 2, None).run(cases, 1, InMemoryExampleDatabase())
    first, last = [event for event in seen if isinstance(event, events.FailureFound)]
    assert first.fingerprint == last.fingerprint == "bgmv.engine_kernels-mortal.crash.exit_status_3"
    assert last.case == shrink_case(2)


def test_what_a_kernel_prints_disturbs_nothing(engine_job, shrink_case, capfd):
    with Executor(engine_job("chatty")) as chatty:
        chatty.loaded()
        for rank in (5, 6):
            assert_right(chatty.run(shrink_case(rank)))
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A folder of modules that cannot be imported."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "raises_at_import.py").write_text("raise ValueError('first line\\nsecond line')\n")
    (folder / "ends_at_import.py").write_text("import os\nprint('good night', flush=True)\nos._exit(4)\n")
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
        "ends_at_import:launch": "the worker died while it loaded the kernel: exit_status_4: good night",
    }
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(broken), worker_environment["PYTHONPATH"]]))
    jobs = {name: named_jobs(["bgmv"], [name], torch.device("cpu"))[0] for name in reasons}
    executors = {name: Executor(job) for name, job in jobs.items()}
    for name, reason in reasons.items():
        with executors[name] as starting, pytest.raises(KernelfuzzError) as error:
            starting.loaded()
        message = str(error.value)
        assert message.startswith(f"bgmv on {name} (cpu): ")
        assert reason in message
        assert "\n" not in message


def test_kernel_that_takes_too_long_to_load_is_one_line(engine_job, monkeypatch):
    monkeypatch.setattr(executor, "CASE_SECONDS", 0.01)
    with Executor(engine_job("right")) as starting, pytest.raises(KernelfuzzError, match=r"not loaded within 0\.01 s"):
        starting.loaded()


def test_worker_that_dies_before_it_listens_is_one_line(engine_job, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Executor(engine_job("right")) as starting, pytest.raises(KernelfuzzError, match="exit_status_1"):
        starting.loaded()


def test_close_ends_the_worker(engine_job):
    before = children_of(os.getpid())
    starting = Executor(engine_job("right"))
    (worker,) = children_of(os.getpid()) - before
    starting.close()
    assert not is_running(worker)
    starting.close()


PARENT = """
import torch
from kernelfuzz.fuzz.executor import Executor
from kernelfuzz.fuzz.job import named_jobs
from kernelfuzz.fuzz.targets import get_target
from kernelfuzz.strategies.case import from_json

job, = named_jobs(["bgmv"], ["engine_kernels:mortal"], torch.device("cpu"))
idle, busy = Executor(job), Executor(job)
idle.loaded()
busy.loaded()
busy.run(from_json(get_target("bgmv").case_type, {case}))
"""


def test_no_worker_outlives_a_parent_that_is_killed(shrink_case, mark):
    """Neither one that waits for a case nor one that hangs in its kernel."""
    mark.unlink(missing_ok=True)
    script = PARENT.replace("{case}", repr(to_json(shrink_case(4))))
    with subprocess.Popen([sys.executable, "-c", script]) as parent:
        try:
            assert wait_until(lambda: mark.exists() or parent.poll() is not None)
            workers = children_of(parent.pid)
        finally:
            parent.kill()
    assert len(workers) == 2
    assert int(mark.read_text()) in workers
    assert wait_until(lambda: not any(map(is_running, workers)))
