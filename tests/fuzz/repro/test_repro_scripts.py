"""Scripts that reproduce failures, run against a kernel with the bug and one without."""

import importlib.util
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from kernelfuzz.fuzz import isolated, repro
from kernelfuzz.fuzz.executor import Request
from kernelfuzz.fuzz.isolated import IsolatedExecutor
from kernelfuzz.fuzz.job import Job, named_jobs
from kernelfuzz.fuzz.launch import Conditions, judge_alone
from kernelfuzz.fuzz.targets import get_target
from kernelfuzz.fuzz.verdict import UNUSABLE_AFTERWARDS, Failure
from kernelfuzz.kernels import registry, releases
from kernelfuzz.kernels.base import Kernel, KernelName
from kernelfuzz.strategies.batches import Batch, Segment
from kernelfuzz.strategies.bgmv import Case as BgmvCase
from kernelfuzz.strategies.devices import Placement
from kernelfuzz.strategies.errors import KernelfuzzError
from kernelfuzz.strategies.moe_lora_align import Case as AlignCase
from kernelfuzz.strategies.reduction import Reduced
from kernelfuzz.strategies.routing import Routing

CPU = torch.device("cpu")
FUNCTIONS = {"bgmv": "bgmv", "moe_lora_align": "align"}
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def readable_module(monkeypatch):
    """The module that the kernels are named by can be found, and read, where scripts are written."""
    monkeypatch.syspath_prepend(HERE)


def bgmv_case(**changes):
    """A token of adapter 0, one of the base model, one of adapter 1; adapter 2 is not in the batch."""
    case = {
        "seed": 5,
        "layer": "operator",
        "op": "expand",
        "batch": Batch((Segment(0, 1), Segment(-1, 1), Segment(1, 1))),
        "num_adapters": 3,
        "width": 3,
        "rows": 4,
        "columns": 4,
        "slice_offset": 0,
        "slice_size": 0,
        "dtype": "float16",
        "float32_input": False,
        "float32_output": False,
        "contents": "signed",
        "scale": 1.0,
        "accumulate": False,
        "weights_4d": False,
    }
    return BgmvCase(**{**case, **changes})


def align_case(**changes):
    """Three tokens of adapter 0, two of adapter 1, one of the base model; two of three experts each."""
    case = {
        "seed": 5,
        "batch": Batch((Segment(0, 3), Segment(1, 2), Segment(-1, 1))),
        "num_adapters": 2,
        "disabled": (),
        "descending_ids": False,
        "num_experts": 3,
        "top_k": 2,
        "routing": Routing("distinct"),
        "expert_map": "none",
        "block_size": 4,
        "rounded_capacity": True,
        "ids_dtype": "int32",
    }
    return AlignCase(**{**case, **changes})


def job_of(target: str, kernel: str, device: str = "cpu") -> Job:
    name = KernelName.parse(kernel)
    implementation = registry.find(target, name)
    assert implementation is not None
    return Job(get_target(target), name, torch.device(device), implementation)


def failure_of(case, bug: str) -> Failure:
    """What the engine says of a kernel with that bug."""
    spec = importlib.util.spec_from_file_location("planted", HERE / "planted.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.BUG = bug
    kernel = Kernel(getattr(module, FUNCTIONS[case.target]), "planted")
    failures = judge_alone(get_target(case.target), kernel, case, Conditions(CPU)).failures
    assert failures
    return failures[0]


def source_of(case, failure: Failure, **options) -> str:
    """The script for one of the planted kernels, which is a whole program and needs no kernelfuzz."""
    job = job_of(case.target, f"planted:{FUNCTIONS[case.target]}")
    source = repro.script(job, case, failure, version="user", **options)
    compile(source, "repro.py", "exec")
    assert "kernelfuzz" not in source
    assert max(map(len, source.splitlines())) <= 120
    return source


class Done(NamedTuple):
    """How a script ended, and all that it printed."""

    status: int
    printed: str


def environment(bug: str, path: str = "") -> dict[str, str]:
    path = f"{path}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": str(HERE), "PATH": path, "PLANTED_BUG": bug}


def run(source: str, folder: Path, bug: str = "", *arguments: str, path: str = "") -> Done:
    """Run a script as a user does."""
    (folder / "repro.py").write_text(source)
    return started(["repro.py", *arguments], folder, bug, path)


def run_test(source: str, folder: Path, bug: str = "") -> Done:
    """Run a regression test."""
    (folder / "test_repro.py").write_text(source)
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir=.", "-c", "/dev/null", "test_repro.py"]
    return started(command, folder, bug)


def started(command: list[str], folder: Path, bug: str, path: str = "") -> Done:
    command = [sys.executable, *command]
    done = subprocess.run(command, cwd=folder, env=environment(bug, path), capture_output=True, text=True)
    return Done(done.returncode, done.stdout + done.stderr)


WRAPPER = """\
import os, runpy, sys
os.chdir({folder!r})
os.environ["PLANTED_BUG"] = {bug!r}
sys.stdout = sys.stderr = open("printed", "w")
sys.argv = ["repro.py"]
runpy.run_path("repro.py", run_name="__main__")
"""


def run_quickly(source: str, folder: Path, bug: str = "") -> Done:
    """Run a script in a process that has imported torch already."""
    (folder / "repro.py").write_text(source)
    (folder / "wrapper.py").write_text(WRAPPER.format(folder=str(folder), bug=bug))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    process = context.Process(target=runpy.run_path, args=(str(folder / "wrapper.py"),))
    process.start()
    process.join()
    return Done(process.exitcode, (folder / "printed").read_text())


def assert_shows(source: str, folder: Path, bug: str, *printed: str, run=run_quickly) -> None:
    """The script exits with 1, and prints these texts, while the bug is there, and with 0 when it is fixed."""
    done = run(source, folder, bug)
    assert done.status == 1, done.printed
    for text in printed:
        assert text in done.printed
    fixed = run(source, folder)
    assert fixed.status == 0, fixed.printed
    assert fixed.printed.startswith("passed")


BGMV = [
    ("wrong", {}, "wrong_value", ["output[0, 0]: expected ", "FAILED: 2 elements"]),
    ("wrong", {"contents": "ones"}, "wrong_value", ["output[0, 0]: expected 3, got 4"]),
    ("wrong", {"op": "shrink", "accumulate": True, "scale": 0.7}, "wrong_value", ["output[2, 0]: expected "]),
    ("wrong", {"dtype": "bfloat16", "width": 30, "rows": 40, "columns": 40}, "wrong_value", ["output[0, 0]: exp"]),
    ("wrong", {"contents": "wide", "width": 30, "rows": 40, "columns": 40}, "wrong_value", ["output[0, 0]: exp"]),
    ("wrong", {"contents": "cancelling", "width": 31, "float32_output": True}, "wrong_value", ["output[0, 0]: exp"]),
    (
        "wrong",
        {"op": "expand_slice", "columns": 9, "slice_offset": 2, "slice_size": 4, "accumulate": True},
        "wrong_value",
        ["output[0, 2]: expected "],
    ),
    ("wrong", {"layer": "wrapper", "rows": 7, "weights_4d": True}, "wrong_value", ["output[0, 0]: expected "]),
    ("poison", {}, "wrong_value", ["output[0, 0]: expected ", "got nan"]),
    ("scratch", {}, "wrong_value", ["output[0, 0]: expected ", "got nan"]),
    ("last_column", {}, "unwritten", ["output[0, 3]: expected ", "got -768"]),
    ("base_row", {}, "overwritten", ["output[1, 0]: expected -768, got 0", "FAILED: 4 elements"]),
    ("stray_output", {}, "out_of_bounds", ["element 12 of output, which has 12: expected -768.0, got 7.0"]),
    ("stray_input", {}, "out_of_bounds", ["element -1 of x, which has 9: expected -768.0, got 7.0"]),
    ("mutates", {}, "input_mutated", ["x[1, 0]: expected nan, got nan", "FAILED: the call changed 3 elements of its"]),
    ("raises", {}, "raised", ["ValueError: no such tile"]),
    ("accepts", {"rows": 5}, "not_raised", ["FAILED: the call was accepted and must be refused with"]),
    ("other_words", {"rows": 5}, "raised", ["RuntimeError: something else"]),
]
ALIGN = [
    ("swapped", {}, "wrong_value", ["sorted_token_ids[", "FAILED: "]),
    ("short", {}, "wrong_value", ["num_tokens_post_pad[0]: expected 12, got 11"]),
    ("last_entry", {"batch": Batch((Segment(0, 1), Segment(1, 1), Segment(-1, 1)))}, "unwritten", ["got 999999999"]),
    ("disabled", {"disabled": (1,)}, "overwritten", ["num_tokens_post_pad[1]: expected 999999999, got 8"]),
    ("stray_output", {}, "out_of_bounds", ["element 14 of expert_ids, which has 12: expected 999999999, got 7"]),
    ("mutates", {}, "input_mutated", ["topk_ids[0, 0]: expected "]),
    ("raises", {"expert_map": "reversed_holes"}, "raised", ["ValueError: no such tile"]),
    ("accepts", {"block_size": 0}, "not_raised", ["block_size should be greater than 0"]),
]
CASES = [(bgmv_case, *each) for each in BGMV] + [(align_case, *each) for each in ALIGN]


@pytest.mark.parametrize(("make", "bug", "changes", "kind", "printed"), CASES)
def test_script_fails_while_the_bug_is_there_and_passes_when_it_is_fixed(make, bug, changes, kind, printed, tmp_path):
    case = make(**changes)
    failure = failure_of(case, bug)
    assert failure.kind == kind
    assert_shows(source_of(case, failure), tmp_path, bug, *printed)


PYTEST = [
    (bgmv_case, "wrong", {"contents": "wide", "width": 30, "rows": 40, "columns": 40}),
    (bgmv_case, "mutates", {}),
    (bgmv_case, "accepts", {"rows": 5}),
    (align_case, "last_entry", {"batch": Batch((Segment(0, 1), Segment(1, 1), Segment(-1, 1)))}),
]


@pytest.mark.parametrize(("make", "bug", "changes"), PYTEST)
def test_regression_test_fails_while_the_bug_is_there_and_passes_when_it_is_fixed(make, bug, changes, tmp_path):
    case = make(**changes)
    source = source_of(case, failure_of(case, bug), pytest=True)
    assert "def test_" in source
    assert "sys.exit" not in source
    assert "1 failed" in run_test(source, tmp_path, bug).printed
    assert "1 passed" in run_test(source, tmp_path).printed


# What ends, hangs, or is seen by a tool.


@pytest.mark.parametrize(
    ("bug", "kind", "clause", "printed"),
    [
        ("exits", "crash", "exit_status_3", "status 3"),
        ("reads_too_far", "crash", "SIGSEGV", "status -11"),
        ("hangs", "hang", "no_answer", "has not returned within 10 s"),
    ],
)
def test_call_that_may_end_or_hang_its_process_is_made_in_another(bug, kind, clause, printed, tmp_path, monkeypatch):
    case = bgmv_case(seed=6)  # an even seed: before unreadable pages
    failure = worker_failure(case, bug, monkeypatch)
    assert (failure.kind, failure.clause) == (kind, clause)
    source = source_of(case, failure).replace("(60)", "(10)").replace("60 s", "10 s")
    assert_shows(source, tmp_path, bug, printed, run=run)


def test_regression_test_makes_such_a_call_in_another_process_too(tmp_path):
    source = source_of(bgmv_case(), Failure("crash", "", "exit_status_3", "the worker died"), pytest=True)
    assert "1 failed" in run_test(source, tmp_path, "exits").printed
    assert "1 passed" in run_test(source, tmp_path).printed


def test_interpreted_access_outside_a_tensor_meets_an_unreadable_page(tmp_path, monkeypatch):
    case = bgmv_case(batch=Batch((Segment(0, 1),)), num_adapters=1)
    failure = worker_failure(case, "too_far", monkeypatch, "planted_triton:expand")
    assert (failure.kind, failure.clause) == ("out_of_bounds", "load_in__expand")
    source = repro.script(job_of("bgmv", "planted_triton:expand"), case, failure, version="user")
    assert_shows(source, tmp_path, "too_far", "status -11", run=run)


def test_interpreted_bfloat16_needs_a_gpu():
    case = bgmv_case(dtype="bfloat16")
    failure = Failure("wrong_value", "output", "product", "wrong")
    source = repro.script(job_of("bgmv", "planted_triton:expand"), case, failure, version="user")
    assert 'cannot_run("this needs an NVIDIA GPU")' in source
    assert "computes with the bits of bfloat16 numbers" in source


def worker_failure(case, bug, monkeypatch, kernel="planted:bgmv") -> Failure:
    for name in ("PYTHONPATH", "PLANTED_BUG"):
        monkeypatch.setenv(name, environment(bug)[name])
    monkeypatch.setattr(isolated, "FIRST_SECONDS", 2.0)
    (job,) = named_jobs([case.target], [kernel], CPU)
    with IsolatedExecutor(job) as executor:
        executor.loaded()
        return executor.run(Request.alone(case)).failures[0]


@pytest.mark.parametrize(
    ("kind", "clause", "tool"),
    [
        ("race", "shared_memory_in_k::bgmv_kernel", "racecheck"),
        ("uninitialised_read", "read_in_k::bgmv_kernel", "initcheck"),
        ("out_of_bounds", "read_in_k::bgmv_kernel", "memcheck"),
    ],
)
def test_what_a_tool_has_reported_is_looked_for_with_that_tool(kind, clause, tool, tmp_path):
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    shutil.copy(HERE.parent / "fake_sanitizer.py", bin_folder / "compute-sanitizer")
    (bin_folder / "compute-sanitizer").chmod(0o755)
    source = source_of(bgmv_case(), Failure(kind, "", clause, "reported"), sanitizer=tool)
    assert_shows(
        source, tmp_path, "races", "access at k::bgmv_kernel", "FAILED: ", run=partial(run, path=str(bin_folder))
    )


def test_without_the_tool_a_script_says_that_it_cannot_run(tmp_path):
    failure = Failure("race", "", "shared_memory_in_k::bgmv_kernel", "reported")
    done = run_quickly(source_of(bgmv_case(), failure, sanitizer="racecheck"), tmp_path)
    assert done == (2, "cannot run: compute-sanitizer, a part of NVIDIA's CUDA toolkit, is not on PATH\n")


def test_without_the_module_a_script_says_that_it_cannot_run(tmp_path):
    source = source_of(bgmv_case(), failure_of(bgmv_case(), "wrong"))
    done = run_quickly(source.replace("from planted", "from implanted"), tmp_path)
    assert done == (2, "cannot run: No module named 'implanted'\n")


# What needs a GPU is a whole program here, and says so.

GPU_FAILURES = [
    Failure("unwritten", "sorted_token_ids", "active_adapter_row", "never written"),
    Failure("crash", "", "illegal_memory_access", "the device is unusable"),
    Failure("crash", "", UNUSABLE_AFTERWARDS, "the device is unusable"),
    Failure("raised", "", "invalid_configuration_argument_left_pending", "left pending"),
    Failure("wrong_value", "", "tensor_on_cpu", "wrong"),
    Failure("crash", "", "tensor_on_cpu", "the device is unusable"),
    Failure("wrong_value", "expert_ids", "form_of_result", "expert_ids is NoneType"),
    Failure("raised", "", "AssertionError_in_launch", "AssertionError"),
    Failure("race", "", "shared_memory_in_align", "race"),
]


@pytest.mark.parametrize("failure", GPU_FAILURES, ids=lambda failure: f"{failure.kind}-{failure.clause}")
@pytest.mark.parametrize("pytest_form", [False, True])
@pytest.mark.parametrize("kernel", ["vllm@0.21.0", "vllm@installed", "vllm@/srv/vllm", "planted:align"])
def test_script_for_a_gpu_is_a_whole_program(failure, pytest_form, kernel):
    placement = Placement(side_stream=True, other_device_current=True)
    if failure.clause == "tensor_on_cpu":
        placement = Placement(tensor_on_cpu=5)
    job, case = job_of("moe_lora_align", kernel, "cuda:1"), align_case(placement=placement)
    sanitizer = "racecheck" if failure.kind == "race" else None
    source = repro.script(job, case, failure, version="0.21.0", sanitizer=sanitizer, pytest=pytest_form)
    compile(source, "repro.py", "exec")
    assert ("token_lora_mapping = token_lora_mapping.to(device)" in source) == (failure.clause != "tensor_on_cpu")
    assert ("not the device of the tensors" in source) == (failure.clause != "tensor_on_cpu")
    assert "import kernelfuzz" not in source
    assert "from kernelfuzz" not in source


@pytest.mark.skipif(torch.cuda.is_available() or torch.xpu.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(
    ("kernel", "device", "needs"),
    [
        ("vllm@0.21.0", "cuda", "an NVIDIA GPU"),
        ("vllm-xpu-kernels@0.1.16.2", "cpu", "an Intel GPU"),
        ("planted:align", "cuda", "an NVIDIA GPU"),
    ],
)
def test_without_the_device_a_script_says_that_it_cannot_run(kernel, device, needs, tmp_path):
    job = job_of("moe_lora_align", kernel, device)
    source = repro.script(job, align_case(), GPU_FAILURES[0], version=job.kernel.version or "user")
    assert run_quickly(source, tmp_path) == (2, f"cannot run: this needs {needs}\n")


# Released kernels.


def fetched(version: str) -> Path:
    """The release's folder; skip if it has not been fetched."""
    try:
        return releases.locate("vllm", version)
    except KernelfuzzError as error:
        pytest.skip(str(error))


PADDED = {"layer": "wrapper", "batch": Batch((Segment(0, 1),)), "num_adapters": 1, "width": 1, "rows": 1, "columns": 2}
REFUSED = Failure("raised", "", "RuntimeError_in_bgmv_expand", "RuntimeError: lora_b_weights.size(-2) must match s")


def test_the_wrapper_of_0_19_1_fails_and_that_of_0_20_passes(tmp_path):
    fetched("0.19.1")
    source = repro.script(job_of("bgmv", "vllm@0.19.1"), bgmv_case(**PADDED), REFUSED, version="0.19.1")
    assert "import kernelfuzz" not in source
    done = run(source, tmp_path)
    assert done.status == 1
    assert "RuntimeError: lora_b_weights.size(-2) must match slice_size" in done.printed
    for version in ("0.20.0", "0.33.0"):
        assert run(source, tmp_path, "", str(fetched(version))) == (0, "passed\n")


@pytest.mark.parametrize("changes", [{}, {"rows": 3}, {"op": "shrink", "rows": 2, "float32_output": True}])
def test_the_newest_wrapper_passes(changes, tmp_path):
    fetched("0.33.0")
    case = bgmv_case(**{**PADDED, "accumulate": True, **changes})
    failure = Failure("wrong_value", "output", "product", "wrong")
    source = repro.script(job_of("bgmv", "vllm@0.33.0"), case, failure, version="0.33.0")
    assert run_quickly(source, tmp_path) == (0, "passed\n")


def test_a_release_that_is_nowhere_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELFUZZ_HOME", str(tmp_path))
    source = repro.script(job_of("bgmv", "vllm@0.19.1"), bgmv_case(**PADDED), REFUSED, version="0.19.1")
    done = run(source, tmp_path)
    assert done.status == 2
    assert done.printed.startswith("cannot run: there is no vllm/ in ")
    assert "pip install vllm==0.19.1" in done.printed


def test_the_wrapper_is_tested_in_vllms_own_suite(tmp_path, monkeypatch):
    """vLLM as its suite sees it: the release's files, and the little that they import."""
    source = repro.script(job_of("bgmv", "vllm@0.19.1"), bgmv_case(**PADDED), REFUSED, version="0.19.1", pytest=True)
    assert "stand_in" not in source
    for version, outcome in (("0.19.1", "1 failed"), ("0.20.0", "1 passed")):
        folder = tmp_path / version
        (folder / "vllm").mkdir(parents=True)
        (folder / "vllm" / "lora").symlink_to(fetched(version) / "vllm" / "lora")
        (folder / "vllm" / "__init__.py").touch()
        (folder / "vllm" / "logger.py").write_text("from logging import getLogger as init_logger\n")
        assert outcome in run_test(source, folder).printed


def test_the_torch_implementation_of_a_release_is_imported_from_its_files(tmp_path):
    fetched("0.33.0")
    case = bgmv_case(layer="wrapper", float32_output=True)
    failure = Failure("wrong_value", "output", "product", "wrong")
    source = repro.script(job_of("bgmv", "vllm-torch@0.33.0"), case, failure, version="0.33.0")
    assert run_quickly(source, tmp_path) == (0, "passed\n")


def test_a_script_for_an_example_imports_the_example(tmp_path):
    case = bgmv_case(**{**PADDED, "contents": "ones"})
    source = repro.script(job_of("bgmv", "example@padded_vocab"), case, REFUSED, version="padded_vocab")
    done = run(source, tmp_path)
    assert done.status == 1
    assert "must match slice_size" in done.printed
    assert run(source.replace('"padded_vocab"', "None"), tmp_path) == (0, "passed\n")


def test_every_other_target_is_refused_in_one_line():
    job = job_of("fp8_layout", "vllm@0.33.0")
    with pytest.raises(KernelfuzzError, match=r"^no reproducer for target fp8_layout yet$"):
        repro.script(job, bgmv_case(), REFUSED, version="0.33.0")


# Tensors.


@pytest.mark.parametrize("reduced", [(), (Reduced("x", "first"), Reduced("weights", "last"))])
def test_what_is_too_large_to_be_written_out_is_made_by_a_few_lines(reduced, tmp_path):
    case = bgmv_case(width=300, rows=140, columns=140, dtype="bfloat16", reduced=reduced)
    source = source_of(case, failure_of(case, "wrong"))
    assert len(source) < 5000
    assert_shows(source, tmp_path, "wrong", "output[0, 0]: expected ")
