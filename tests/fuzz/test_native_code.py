"""Native code on a CPU that goes one element too far: a crash with its case, not luck."""

import pytest
from hypothesis.database import InMemoryExampleDatabase

from kernelfuzz.fuzz import events
from kernelfuzz.fuzz.isolated import IsolatedExecutor
from kernelfuzz.fuzz.search import Search
from kernelfuzz.fuzz.targets import get_target
from kernelfuzz.kernels import releases, xpu
from kernelfuzz.strategies.errors import KernelfuzzError


@pytest.fixture(autouse=True)
def _environment(worker_environment, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", worker_environment["PYTHONPATH"])


def found(job, limit, **narrowed):
    """Search `limit` examples; return what was shrunk, by kind and clause."""
    seen = []
    with IsolatedExecutor(job) as executor:
        executor.loaded()
        search = Search(job, executor, events.Bus([seen.append]), limit, None)
        search.run(get_target("bgmv").cases(**narrowed), 3, InMemoryExampleDatabase())
    shrunk = [event for event in seen if isinstance(event, events.FailureFound) and event.shrunk]
    return {(event.failure.kind, event.failure.clause): event.case for event in shrunk}


def test_read_behind_a_tensor_is_found_and_shrunk(engine_job):
    crashes = found(engine_job("reads_too_far"), 100)
    assert crashes.keys() == {("crash", "SIGSEGV")}
    case = crashes["crash", "SIGSEGV"]
    assert (case.rows if case.op == "shrink" else case.width) == 9
    assert case.size == 1


def test_shipped_kernel_that_is_led_one_adapter_too_far_is_found_and_shrunk(engine_job):
    """Intel's own code on its OpenCL runtime. In half of the cases it meets the weights' end, and else a neighbour."""
    if reason := xpu.unavailable():
        pytest.skip(reason)
    try:
        releases.locate("vllm-xpu-kernels", releases.PINNED["vllm-xpu-kernels"])
    except KernelfuzzError as error:
        pytest.skip(str(error))
    crashes = found(engine_job("one_adapter_too_far"), 60, op=("expand", "expand_slice"), layer=("operator",))
    assert ("crash", "SIGSEGV") in crashes
    assert crashes["crash", "SIGSEGV"].size == 1
