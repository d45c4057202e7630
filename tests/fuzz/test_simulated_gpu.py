"""What a GPU does to a worker, simulated: errors that are seen after the launch, contexts that are lost, and stacks."""

import dataclasses
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings

from kernelfuzz.fuzz import launch
from kernelfuzz.fuzz.executor import Request
from kernelfuzz.fuzz.isolated import IsolatedExecutor
from kernelfuzz.fuzz.job import named_jobs
from kernelfuzz.fuzz.launch import Conditions, judge, judge_alone
from kernelfuzz.fuzz.targets import get_target
from kernelfuzz.kernels.base import Kernel, UnsupportedCaseError
from kernelfuzz.strategies.batches import Batch, Segment
from kernelfuzz.strategies.devices import Placement
from kernelfuzz.strategies.moe_lora_align import Case as AlignCase
from kernelfuzz.strategies.routing import Routing

ALIGN = get_target("moe_lora_align")
CPU = Conditions(torch.device("cpu"))


@pytest.fixture(autouse=True)
def _environment(worker_environment, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", worker_environment["PYTHONPATH"])


def executor_of(target, kernel):
    (job,) = named_jobs([target], [f"simulated_gpu:{kernel}"], torch.device("cpu"))
    executor = IsolatedExecutor(job)
    executor.loaded()
    return executor


def align_case(seed=1):
    return AlignCase(
        seed=seed,
        batch=Batch((Segment(0, 7), Segment(1, 2), Segment(-1, 1))),
        num_adapters=3,
        disabled=(),
        descending_ids=False,
        num_experts=5,
        top_k=2,
        routing=Routing("distinct"),
        expert_map="none",
        block_size=4,
        rounded_capacity=True,
        ids_dtype="int32",
    )


@pytest.mark.parametrize("kernel", ["illegal_access", "illegal_access_that_raises"])
def test_lost_context_is_a_crash_with_the_devices_error(kernel, shrink_case):
    with executor_of("bgmv", kernel) as executor:
        for rank, clauses in ((5, []), (9, ["illegal_memory_access"]), (5, []), (12, ["illegal_memory_access"])):
            verdict = executor.run(Request.alone(shrink_case(rank)))
            assert [failure.clause for failure in verdict.failures] == clauses
            for failure in verdict.failures:
                assert failure.kind == "crash"
                assert failure.message == (
                    "the device is unusable: CUDA error: an illegal memory access was encountered"
                )
        assert executor.replacements.workers == 2


def test_error_that_is_left_pending_is_the_kernels_and_the_worker_lives_on(shrink_case):
    with executor_of("bgmv", "pending_error") as executor:
        empty = dataclasses.replace(shrink_case(5), batch=Batch(()))
        (failure,) = executor.run(Request.alone(empty)).failures
        assert (failure.kind, failure.clause) == ("raised", "invalid_configuration_argument_left_pending")
        assert executor.run(Request.alone(shrink_case(5))).failures == ()
        assert executor.replacements.workers == 0


def test_seed_that_loses_the_context_is_found_in_a_stack():
    with executor_of("moe_lora_align", "align") as executor:
        right = executor.run(Request(align_case(), (1, 2, 3, 4)))
        assert (right.failures, right.cases, right.seed) == ((), 4, None)
        verdict = executor.run(Request(align_case(), (1, 2, 3, 4, 10, 6, 15)))
        assert [failure.clause for failure in verdict.failures] == ["illegal_memory_access"]
        assert (verdict.seed, verdict.cases) == (10, 5)
        assert executor.run(Request(align_case(), (6, 7))).failures == ()


def test_seed_that_is_wrong_is_found_in_a_stack():
    with executor_of("moe_lora_align", "align_wrong") as executor:
        verdict = executor.run(Request(align_case(), (1, 2, 3, 20, 5)))
        (failure,) = verdict.failures
        assert (failure.kind, failure.output, failure.clause) == (
            "wrong_value",
            "num_tokens_post_pad",
            "active_adapter_row",
        )
        assert (verdict.seed, verdict.cases) == (20, 4)
        assert failure.elements[0]["index"] == [0], "of the case alone, not of the stack"


def test_what_fails_only_after_other_launches_is_a_failure_too(monkeypatch):
    monkeypatch.setenv("SIMULATED_STATE", "1")
    with executor_of("moe_lora_align", "align_wrong_after_another") as executor:
        verdict = executor.run(Request(align_case(), (1, 2, 3, 4)))
        assert [failure.kind for failure in verdict.failures] == ["wrong_value"]
        assert verdict.seed == 3, "the one that was wrong"
        assert verdict.failures[0].message.endswith("only when launched together with other seeds")
        monkeypatch.delenv("SIMULATED_STATE")


def reference(inputs, outputs):
    """moe_lora_align by its own oracle."""
    for name, expected in ALIGN.expect(inputs, dict(outputs)).outputs.items():
        written = expected.mask("write")
        outputs[name][written] = expected.values[written].to(torch.int32)


@settings(max_examples=60)
@given(ALIGN.cases(refusals=False, max_length=30))
def test_stack_of_a_right_kernel_passes_and_every_seed_alone_too(case):
    seeds = [case.seed, 1, 2, 2**32 - 1]
    kernel = Kernel(reference, "reference")
    together = judge(ALIGN, kernel, case, seeds, CPU)
    assert (together.failures, together.error, together.cases) == ((), "", 4)
    for seed in seeds:
        assert judge_alone(ALIGN, kernel, dataclasses.replace(case, seed=seed), CPU).failures == ()


@settings(max_examples=40)
@given(ALIGN.cases(refusals=False, max_length=30))
def test_write_between_the_items_of_a_stack_is_out_of_bounds(case):
    """One element behind an item's tensor lies in the gap before the next item."""

    def too_far(inputs, outputs):
        reference(inputs, outputs)
        output = outputs["num_tokens_post_pad"]
        output.as_strided((output.numel() + 1,), (1,))[-1] = 7

    kinds = [failure.kind for failure in judge(ALIGN, Kernel(too_far, "faulty"), case, [3, 4, 5], CPU).failures]
    assert kinds == ["out_of_bounds"]


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered",
        "Triton Error [CUDA]: an illegal memory access was encountered",
        "CUDA error: an illegal memory access was encountered\nSearch for `cudaErrorIllegalAddress'",
    ],
)
def test_one_error_of_the_device_has_one_name_whoever_passes_it_on(text, monkeypatch):
    def lose_the_context(inputs, outputs):
        monkeypatch.setattr(launch, "_probe", _raising(RuntimeError(text)))
        raise RuntimeError(text)

    (failure,) = judge_alone(ALIGN, Kernel(lose_the_context, "kernel"), align_case(), CPU).failures
    assert (failure.kind, failure.clause) == ("crash", "illegal_memory_access")


def _raising(error):
    def raise_it(device):
        raise error

    return raise_it


def test_memory_that_is_used_up_is_not_the_kernels_fault():
    def out_of_memory(inputs, outputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with pytest.raises(torch.OutOfMemoryError):  # which a worker reports as the harness's own error
        judge_alone(ALIGN, Kernel(out_of_memory, "kernel"), align_case(), CPU)


class FakeBackend:
    """Stands for torch.cuda with two devices, and tells what was current during the launch."""

    def __init__(self, monkeypatch, count=2):
        self.current = []
        self.synchronised = []
        self._count = count
        monkeypatch.setattr(torch, "cuda", self)
        monkeypatch.setattr(launch, "synchronize", self.synchronised.append)
        monkeypatch.setattr(launch, "_probe", lambda device: None)

    def device_count(self):
        return self._count

    @contextmanager
    def device(self, device):
        self.current.append(("device", str(device)))
        yield
        self.current.pop()

    @contextmanager
    def stream(self, stream):
        self.current.append(("stream", stream))
        yield
        self.current.pop()

    def Stream(self, device):
        return f"a stream of {device}"


@pytest.mark.parametrize(
    ("placement", "current", "settled"),
    [
        (Placement(), [("device", "cuda:1")], ["cuda:1"]),
        (
            Placement(side_stream=True),
            [("stream", "a stream of cuda:1"), ("device", "cuda:1")],
            ["cuda:1"],
        ),
        (Placement(other_device_current=True), [("device", "cuda:0")], ["cuda:1", "cuda:0"]),
    ],
)
def test_launch_sees_the_placement_and_every_device_it_may_use_is_waited_for(monkeypatch, placement, current, settled):
    backend = FakeBackend(monkeypatch)
    seen = []
    kernel = Kernel(lambda inputs, outputs: seen.append(list(backend.current)), "kernel")
    device = torch.device("cuda:1")
    with launch._placed(placement, device) as devices:
        launch._launch(kernel, [(None, {})], None, Conditions(device), devices, lenient=False)
    assert seen == [current]
    assert [str(each) for each in backend.synchronised] == settled
    assert backend.current == []


def test_case_that_needs_another_gpu_is_not_offered_with_one(monkeypatch):
    FakeBackend(monkeypatch, count=1)
    with (
        pytest.raises(UnsupportedCaseError, match="no other cuda device"),
        launch._placed(Placement(other_device_current=True), torch.device("cuda:0")),
    ):
        pass


# One tensor left on the CPU: here every tensor is, so only what the verdict makes of it is shown.


@pytest.mark.parametrize(
    ("kernel", "kinds"),
    [
        (reference, []),
        (lambda inputs, outputs: None, ["unwritten"]),
        (lambda inputs, outputs: 1 / 0, []),
    ],
)
def test_robustness_lets_an_error_pass_and_a_wrong_result_not(kernel, kinds):
    case = dataclasses.replace(align_case(), placement=Placement(tensor_on_cpu=0))
    verdict = judge_alone(ALIGN, Kernel(kernel, "kernel"), case, CPU)
    assert {failure.kind for failure in verdict.failures} == set(kinds)
    assert {failure.clause for failure in verdict.failures} <= {"tensor_on_cpu"}
    usual = judge_alone(ALIGN, Kernel(kernel, "kernel"), align_case(), CPU)
    assert bool(usual.failures) == (kernel is not reference)
