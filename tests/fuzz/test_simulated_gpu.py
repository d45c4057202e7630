"""What a GPU does to a worker, simulated: errors that are seen after the launch, contexts that are lost, and stacks."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings

from kernelfuzz.fuzz.executor import Request
from kernelfuzz.fuzz.isolated import IsolatedExecutor
from kernelfuzz.fuzz.job import named_jobs
from kernelfuzz.fuzz.launch import Conditions, judge, judge_alone
from kernelfuzz.fuzz.targets import get_target
from kernelfuzz.kernels.base import Kernel
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
        assert verdict.seed is None
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
