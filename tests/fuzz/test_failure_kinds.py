"""Each failure kind is found with a kernel that commits it, and what is no failure passes.

`crash` and `hang` are the executor's to find.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

from kernelfuzz.fuzz.launch import Conditions, judge_alone
from kernelfuzz.fuzz.targets import get_target
from kernelfuzz.fuzz.verdict import KINDS
from kernelfuzz.kernels.base import Kernel
from kernelfuzz.strategies.batches import Batch, Segment
from kernelfuzz.strategies.bgmv import Case as BgmvCase
from kernelfuzz.strategies.errors import KernelfuzzError
from kernelfuzz.strategies.moe_lora_align import Case as AlignCase
from kernelfuzz.strategies.routing import Routing


def _load_faulty_kernels():
    spec = importlib.util.spec_from_file_location("faulty_kernels", Path(__file__).with_name("faulty_kernels.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


faulty = _load_faulty_kernels()


def bgmv_case(**changes):
    """Two tokens of adapter 0, one of the base model, one of adapter 2; adapter 1 is not in the batch."""
    case = {
        "seed": 5,
        "layer": "operator",
        "op": "expand",
        "batch": Batch((Segment(0, 2), Segment(-1, 1), Segment(2, 1))),
        "num_adapters": 3,
        "width": 16,
        "rows": 24,
        "columns": 24,
        "slice_offset": 0,
        "slice_size": 0,
        "dtype": "float16",
        "float32_input": False,
        "float32_output": True,
        "contents": "signed",
        "scale": 1.0,
        "accumulate": False,
        "weights_4d": False,
    }
    return BgmvCase(**{**case, **changes})


def align_case(**changes):
    """Seven tokens of adapter 0, two of adapter 1, adapter 2 idle; two of five experts each."""
    case = {
        "seed": 5,
        "batch": Batch((Segment(0, 7), Segment(1, 2), Segment(-1, 1))),
        "num_adapters": 3,
        "disabled": (),
        "descending_ids": False,
        "num_experts": 5,
        "top_k": 2,
        "routing": Routing("distinct"),
        "expert_map": "none",
        "block_size": 4,
        "rounded_capacity": True,
        "ids_dtype": "int32",
    }
    return AlignCase(**{**case, **changes})


def verdict_of(kernel, case):
    return judge_alone(get_target(case.target), Kernel(kernel, "faulty"), case, Conditions(torch.device("cpu")))


def found(kernel, case):
    return {(failure.kind, failure.output, failure.clause) for failure in verdict_of(kernel, case).failures}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"op": "shrink", "accumulate": True, "scale": -1.75},
        {"op": "expand_slice", "columns": 30, "slice_offset": 3, "slice_size": 24, "accumulate": True},
        {"layer": "wrapper", "rows": 20},
        {"layer": "wrapper", "rows": 28, "dtype": "bfloat16", "float32_output": False},
        {"batch": Batch(())},
    ],
)
def test_right_bgmv_passes(changes, seed):
    verdict = verdict_of(faulty.bgmv, bgmv_case(seed=seed, **changes))
    assert verdict.failures == ()
    assert verdict.ratio <= 1.0


@pytest.mark.parametrize("changes", [{}, {"disabled": (0,)}, {"batch": Batch(())}, {"block_size": 1, "top_k": 1}])
def test_right_alignment_passes(changes):
    assert found(faulty.moe_lora_align, align_case(**changes)) == set()


REDZONE = ("out_of_bounds", "output", "redzone")
FAULTS = {
    "one_element_off": {("wrong_value", "output", "product")},
    "nan": {("wrong_value", "output", "product")},
    "last_column_unwritten": {("unwritten", "output", "product")},
    "base_row_zeroed": {("overwritten", "output", "row_without_adapter")},
    "element_after_the_output": {REDZONE},
    "element_before_the_output": {REDZONE},
    "element_after_an_input": {("out_of_bounds", "inputs", "redzone")},
    "interpreted_store_out_of_bounds": {("out_of_bounds", "output", "access_in__expand")},
    "input_scaled_in_place": {("input_mutated", "inputs", "inputs_are_not_written")},
    "nan_of_an_input_replaced_by_another": {("input_mutated", "inputs", "inputs_are_not_written")},
    "failing_host_code": {("raised", "", "ValueError_in_allocate")},
    "result_of_another_form": {("wrong_value", "output", "form_of_result")},
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found_by_its_kind(name):
    assert found(getattr(faulty, name), bgmv_case()) == FAULTS[name]


def test_every_kind_has_a_fault():
    kinds = {kind for failures in FAULTS.values() for kind, _, _ in failures}
    # What is left is proved below, or belongs to the executor and the sanitizer.
    assert set(KINDS) - kinds == {"not_raised", "crash", "hang", "race", "uninitialised_read"}


def test_redzone_failure_says_where():
    (after,) = verdict_of(faulty.element_after_the_output, bgmv_case()).failures
    (before,) = verdict_of(faulty.element_before_the_output, bgmv_case()).failures
    assert "1 element(s) of output changed, first at element 96:" in after.message
    assert "1 element(s) of output changed, first at element -1:" in before.message


def test_error_is_reported_in_one_line():
    (failure,) = verdict_of(faulty.failing_host_code, bgmv_case()).failures
    assert failure.message == "ValueError: negative dimension"


REFUSED = {"rows": 23}


def test_accepting_what_must_be_refused_is_a_failure():
    assert found(faulty.nothing, bgmv_case(**REFUSED)) == {("not_raised", "", "shapes_are_checked")}
    assert found(faulty.nothing, align_case(block_size=0)) == {("not_raised", "", "block_size_is_positive")}


def test_refusing_what_must_be_refused_passes():
    assert found(faulty.refusal_of_shapes, bgmv_case(**REFUSED)) == set()


def test_refusal_in_other_words_is_a_failure():
    assert found(faulty.failing_host_code, bgmv_case(**REFUSED)) == {("raised", "", "ValueError_in_allocate")}


def test_refusing_what_is_legal_is_a_failure():
    assert found(faulty.refusal_of_shapes, bgmv_case()) == {("raised", "", "RuntimeError_in_refusal_of_shapes")}


def test_result_of_another_form_is_told_in_the_kernels_words():
    (failure,) = verdict_of(faulty.result_of_another_form, bgmv_case()).failures
    assert failure.message == "output is float32 [3] on cpu and must be float32 [4] on cpu"
    assert failure.elements == ()


@pytest.mark.parametrize("changes", [{}, REFUSED])
def test_what_kernelfuzz_itself_says_is_not_the_kernels_failure(changes):
    with pytest.raises(KernelfuzzError, match="kernelfuzz does not load it"):
        verdict_of(faulty.without_what_it_needs, bgmv_case(**changes))


def test_case_that_is_not_offered_is_no_failure():
    verdict = verdict_of(faulty.not_offered, bgmv_case())
    assert verdict.failures == ()
    assert verdict.rejected == "ranks above 8 are not offered"


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("float32_output", [False, True])
def test_writing_a_sentinel_is_seen(seed, float32_output):
    case = bgmv_case(seed=seed, float32_output=float32_output)
    kernel = faulty.base_row_filled_with_its_first_element
    assert found(kernel, case) == {("overwritten", "output", "row_without_adapter")}


def test_poison_shows_through_a_factor_of_zero():
    case = bgmv_case()
    assert found(faulty.sum_over_every_adapter, case) == {("wrong_value", "output", "product")}
    every_adapter = Batch((Segment(0, 1), Segment(1, 1), Segment(2, 1)))
    assert found(faulty.sum_over_every_adapter, bgmv_case(batch=every_adapter)) == set()


@pytest.mark.parametrize(
    ("kernel", "changes"),
    [
        # Results so small that `atol` hides them whole.
        (faulty.last_k_left_out, {"contents": "subnormal"}),
        # A lost product below 2^-8, and rounding errors below 2^-7: `atol` is wider.
        (faulty.last_k_left_out, {"op": "shrink", "scale": 2.0**-8, "width": 64}),
        (faulty.bfloat16_accumulator, {"op": "shrink", "scale": 0.25, "width": 4}),
    ],
)
def test_bound_rejects_what_allclose_accepts(kernel, changes):
    case = bgmv_case(**changes)
    written = {}

    def keeping_its_output(name, kernel):
        def launch(inputs, outputs):
            kernel(inputs, outputs)
            written[name] = outputs["output"].clone()

        return launch

    assert found(keeping_its_output("right", faulty.bgmv), case) == set()
    assert found(keeping_its_output("faulty", kernel), case) == {("wrong_value", "output", "product")}
    assert torch.allclose(written["faulty"], written["right"], rtol=1e-2, atol=1e-2)


def test_integers_are_compared_exactly():
    case = align_case(batch=Batch((Segment(0, 20001),)), num_experts=1, top_k=1, block_size=1)
    (failure,) = verdict_of(faulty.total_one_short, case).failures
    assert (failure.kind, failure.output) == ("wrong_value", "num_tokens_post_pad")
    (element,) = failure.elements
    assert (element["expected"], element["actual"]) == (20001, 20000)
    assert torch.allclose(torch.tensor(20000.0), torch.tensor(20001.0), rtol=1e-2, atol=1e-2)


def test_order_inside_an_experts_group_is_free():
    assert found(faulty.groups_reversed, align_case()) == set()


def test_token_in_another_experts_group_is_found():
    assert found(faulty.first_tokens_of_two_groups_swapped, align_case()) == {
        ("wrong_value", "sorted_token_ids", "active_adapter_row")
    }
