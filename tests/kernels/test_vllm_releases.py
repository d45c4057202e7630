"""vLLM releases from their wheels' files: every one of them runs, the newest without a failure."""

import re
from pathlib import Path

import pytest
import torch

from kernelfuzz.fuzz import events
from kernelfuzz.fuzz.campaign import Budget, run_campaign
from kernelfuzz.fuzz.job import named_jobs
from kernelfuzz.fuzz.summary import JobSummary, Summary
from kernelfuzz.kernels import releases
from kernelfuzz.kernels.vllm import moe_lora_align
from kernelfuzz.strategies import fp8_layout, moe_permute
from kernelfuzz.strategies.errors import KernelfuzzError

VERSIONS = ("0.19.1", "0.20.0", "0.21.0", "0.22.0", "0.24.0", "0.30.0", "0.33.0")
EXAMPLES = 15
CPU = torch.device("cpu")

BROKEN_BEFORE = {
    # Up to 0.21 float16 operands are cast to bfloat16.
    "fused_moe_lora.vllm.wrong_value.output.lora_delta",
    # From 0.22 to 0.30 a rank above 64 or 128 is refused.
    "fused_moe_lora.vllm.raised.AssertionError_in__run_fused_moe_lora_one_shot",
    # Up to 0.24 shrink refuses a strided input.
    "lora_shrink_expand.vllm.raised.AssertionError_in__lora_shrink",
}
"""What the older releases do against the newest one's contract."""


def fetched(version: str) -> Path:
    """The release's folder; skip if it has not been fetched."""
    try:
        return releases.locate("vllm", version)
    except KernelfuzzError as error:
        pytest.skip(str(error))


def run(target: str, kernel: str, folder: Path, examples: int = EXAMPLES, device: torch.device = CPU) -> JobSummary:
    """Run a short campaign; skip if the release has not been fetched."""
    fetched(kernel.partition("@")[2])
    summary = Summary()
    jobs = named_jobs([target], [kernel], device)
    run_campaign(jobs, [], Budget(examples=examples), seed=3, out=folder, bus=events.Bus([summary]))
    return summary.jobs[0]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("target", ["fused_moe_lora", "lora_shrink_expand"])
def test_triton_kernels_of_every_release_run(target: str, version: str, tmp_path: Path) -> None:
    done = run(target, f"vllm@{version}", tmp_path)
    assert done.error == ""
    assert done.examples == EXAMPLES
    assert done.version == version
    assert set(done.failures) <= (set() if version == releases.PINNED["vllm"] else BROKEN_BEFORE)


def test_the_wrapper_of_0_19_1_refuses_a_padded_vocabulary(tmp_path: Path) -> None:
    done = run("bgmv", "vllm@0.19.1", tmp_path, examples=200)
    (found,) = done.failures.values()
    assert found.failure.kind == "raised"
    assert "must match slice_size" in found.failure.message
    case = found.case
    assert (case.op, case.size, case.width, case.rows, case.columns) == ("expand", 1, 1, 1, 2)


@pytest.mark.parametrize("version", ["0.20.0", "0.33.0"])
def test_the_wrapper_accepts_a_padded_vocabulary_since_0_20(version: str, tmp_path: Path) -> None:
    done = run("bgmv", f"vllm@{version}", tmp_path, examples=200)
    assert done.failures == {}
    assert done.regimes["padded_columns"] > 0
    assert done.regimes["truncated_weights"] > 0


def test_the_newest_cpu_implementation_passes(tmp_path: Path) -> None:
    done = run("bgmv", "vllm-torch@0.33.0", tmp_path, examples=200)
    assert done.failures == {}
    assert done.examples == 200


def test_moe_permute_of_the_newest_passes_on_stand_ins_for_its_operators(tmp_path: Path) -> None:
    done = run("moe_permute", "vllm@0.33.0", tmp_path, examples=200)
    assert (done.error, done.errors, done.failures, done.rejected) == ("", {}, {}, 0)
    assert set(done.regimes) == set(moe_permute.REGIMES) - {"scratch_rows"}
    (note,) = done.notes
    assert "stand-ins for the compiled operators" in note


@pytest.mark.parametrize(("version", "scratches"), [("0.22.0", {"none"}), ("0.23.0", {"none", "metadata", "rows"})])
def test_moe_permute_of_older_releases_is_asked_for_the_scratch_that_it_has(
    version: str, scratches: set[str], tmp_path: Path
) -> None:
    done = run("moe_permute", f"vllm@{version}", tmp_path, examples=80)
    assert (done.error, done.errors, done.failures) == ("", {}, {})
    assert {name for name in done.regimes if name.startswith("scratch_") and name != "scratch_reused"} == {
        f"scratch_{each}" for each in scratches
    }


def test_fp8_layout_of_the_newest_passes(tmp_path: Path) -> None:
    done = run("fp8_layout", "vllm@0.33.0", tmp_path, examples=200)
    assert (done.error, done.errors, done.failures, done.rejected) == ("", {}, {}, 0)
    assert set(done.regimes) == set(fp8_layout.REGIMES) - {"entry_online_legacy"}
    (marlin,) = [note for note in done.notes if "MARLIN" in note]
    assert "left out" in marlin


@pytest.mark.parametrize(("version", "one_scale_on_xpu"), [("0.23.0", False), ("0.20.0", True)])
def test_fp8_layout_of_older_releases_has_the_bug_that_was_mended_since(
    version: str, one_scale_on_xpu: bool, tmp_path: Path
) -> None:
    done = run("fp8_layout", f"vllm@{version}", tmp_path, examples=200)
    assert (done.error, done.errors) == ("", {})
    assert (done.rejected > 0) == one_scale_on_xpu
    # Padding behind both halves of w13 and not behind each.
    assert set(done.failures) == {"fp8_layout.vllm.wrong_value.w13.swapped_weights"}
    assert all(each.case.size == 1 for each in done.failures.values())


def test_before_there_was_a_conversion_for_xpus_it_is_left_out(tmp_path: Path) -> None:
    done = run("fp8_layout", "vllm@0.19.1", tmp_path, examples=60)
    assert (done.error, done.errors, done.rejected) == ("", {}, 0)
    assert "backend_xpu" not in done.regimes
    assert "left out: backends XPU: this release has no conversion for them" in done.notes


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
@pytest.mark.parametrize(
    ("version", "library"),
    [("0.19.1", "_moe_C.abi3.so"), ("0.22.0", "_moe_C.abi3.so"), ("0.33.0", "_moe_C_stable_libtorch.abi3.so")],
)
def test_the_compiled_operators_say_that_they_need_a_torch_with_cuda(version: str, library: str) -> None:
    root = fetched(version)
    with pytest.raises(KernelfuzzError) as error:
        moe_lora_align.load(root, torch.device("cuda"))
    # Which of CUDA's libraries is missed first depends on the machine.
    remedy = r"(it needs NVIDIA's driver and a torch built with CUDA|install a torch built for CUDA \d+)"
    line = rf"{library} does not load in torch \S+ \(no CUDA\): lib\w+\.so\S*: cannot open shared object file; {remedy}"
    assert re.fullmatch(line, str(error.value))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("version", ["0.22.0", "0.33.0"])
def test_the_compiled_align_passes_on_a_gpu(version: str, tmp_path: Path) -> None:
    done = run("moe_lora_align", f"vllm@{version}", tmp_path, examples=200, device=torch.device("cuda"))
    assert done.error == ""
    assert done.failures == {}
    assert done.examples == 200
