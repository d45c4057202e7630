"""Reproducers: a script for each kind of failure of each target, run against a kernel that has the bug and against one
that has not."""

import ast
import dataclasses
import os
import re
import runpy
import subprocess
import sys
import traceback
from pathlib import Path
from typing import get_args

import pytest
import torch

from kernelfuzz.fuzz import reproducer
from kernelfuzz.fuzz.campaign import Isolation
from kernelfuzz.fuzz.executor import Request, WorkerLostError
from kernelfuzz.fuzz.files import write_json
from kernelfuzz.fuzz.generation import draw
from kernelfuzz.fuzz.job import named_jobs, unchecked_job
from kernelfuzz.fuzz.targets import TARGETS
from kernelfuzz.fuzz.verdict import Failure, FailureKind
from kernelfuzz.kernels import releases
from kernelfuzz.kernels.registry import IMPLEMENTATIONS
from kernelfuzz.strategies.batches import Batch, Segment
from kernelfuzz.strategies.bgmv import Case as BgmvCase
from kernelfuzz.strategies.case import to_json
from kernelfuzz.strategies.devices import Placement
from kernelfuzz.strategies.errors import KernelfuzzError

HERE = Path(__file__).parent
script_module = sys.modules["kernelfuzz.fuzz.reproducer.script"]
CPU = torch.device("cpu")

KINDS = ("raised", "not_raised", "unwritten", "wrong_value", "overwritten", "input_mutated", "out_of_bounds")
NEVER = {
    ("lora_shrink_expand", "not_raised"),  # its contract refuses nothing
    ("moe_permute", "overwritten"),  # nor does theirs keep anything
    ("fp8_layout", "overwritten"),
    ("fp8_layout", "unwritten"),  # results are returned, so that they are wrong instead
}
COMBINATIONS = [(target, kind) for target in TARGETS for kind in KINDS if (target, kind) not in NEVER]


@pytest.fixture
def environment(monkeypatch):
    """Workers and scripts find `oracle_kernels`, with its bugs."""
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.delenv("ORACLE_KERNELS_FIXED", raising=False)


def job_of(target, function):
    return named_jobs([target], [f"oracle_kernels:{function}"], CPU)[0]


def first_failure(job, kind, cases):
    """The first of the cases that fails in this way, and how."""
    executor = Isolation(workers=1).executor(job)
    try:
        executor.loaded()
        for case in cases:
            try:
                verdict = executor.run(Request.alone(case))
            except WorkerLostError as lost:
                verdict = lost.verdict
            assert verdict.error == ""
            for failure in verdict.failures:
                if failure.kind == kind:
                    return case, failure
    finally:
        executor.close()
    raise AssertionError(f"none of the cases fails with {kind}")


def cases_of(target, **changes):
    target = TARGETS[target]
    return [*draw(target.cases(**target.small, **changes), 11, 100), *draw(target.cases(**changes), 11, 60)]


def environment_of(path, case, *, fixed):
    write_json(path.with_suffix(".case.json"), to_json(case))
    found = {**os.environ, "ORACLE_KERNELS_CASE": str(path.with_suffix(".case.json"))}
    return {**found, "ORACLE_KERNELS_FIXED": "1"} if fixed else found


def run_alone(path, case, *, fixed, arguments=()):
    """Run a script as a user does."""
    command = [sys.executable, *arguments, str(path)]
    return subprocess.run(command, env=environment_of(path, case, fixed=fixed), capture_output=True, text=True)


def run(path, case, *, fixed):
    """Run a script in a fork of this process, which has imported torch already: a twentieth of the time."""
    environment, output = environment_of(path, case, fixed=fixed), path.with_suffix(".out")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with output.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                sys.stdout = sys.stderr = file
                os.environ.update(environment)
                sys.argv[:], sys.path[:0] = [str(path)], [str(HERE)]
                try:
                    torch.set_num_threads(1)
                    runpy.run_path(str(path), run_name="__main__")
                    status = 0
                except SystemExit as end:
                    status = int(end.code or 0)
                except BaseException:
                    traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return subprocess.CompletedProcess([], status, output.read_text(), output.read_text())


def check(tmp_path, job, case, failure, *shown, run=run, **options):
    """Run the script with the bug and without it."""
    script = tmp_path / "repro.py"
    script.write_text(reproducer.script(job, case, failure, version="1.2.3", **options))
    assert "import kernelfuzz" not in script.read_text()
    assert "from kernelfuzz" not in script.read_text()
    bad, good = run(script, case, fixed=False), run(script, case, fixed=True)
    assert (bad.returncode, good.returncode) == (1, 0), bad.stderr + good.stderr
    for text in ("expected", "got", "FAILED", *shown):
        assert text in bad.stdout
    assert "passed" in good.stdout
    return script.read_text()


def check_test(tmp_path, job, case, failure, **options):
    """Run the regression test with the bug and without it."""
    test = tmp_path / "test_it.py"
    test.write_text(reproducer.script(job, case, failure, version="1.2.3", pytest=True, **options))
    pytest_ = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
    bad, good = (run_alone(test, case, fixed=fixed, arguments=pytest_) for fixed in (False, True))
    assert (bad.returncode, good.returncode) == (1, 0), bad.stdout + good.stdout
    assert "1 failed" in bad.stdout
    assert "1 passed" in good.stdout


@pytest.mark.parametrize(("target", "kind"), COMBINATIONS)
def test_script_fails_while_the_bug_is_there(target, kind, tmp_path, environment):
    job = job_of(target, kind)
    case, failure = first_failure(job, kind, cases_of(target))
    text = check(tmp_path, job, case, failure)
    ast.parse(reproducer.script(job, case, failure, version="1.2.3", pytest=True))
    assert text.startswith(f'"""oracle_kernels:{kind} 1.2.3: {target}: ')
    assert "Found on cpu by kernelfuzz." in text


@pytest.mark.parametrize(
    ("target", "kind"), [("bgmv", "raised"), ("moe_lora_align", "wrong_value"), ("fp8_layout", "not_raised")]
)
def test_script_and_regression_test_stand_alone(target, kind, tmp_path, environment):
    job = job_of(target, kind)
    case, failure = first_failure(job, kind, cases_of(target))
    check(tmp_path, job, case, failure, run=run_alone)
    check_test(tmp_path, job, case, failure)


@pytest.mark.parametrize("target", ["bgmv", "fused_moe_lora", "moe_permute"])
def test_nan_where_a_number_must_be(target, tmp_path, environment):
    job = job_of(target, "not_a_number")
    case, failure = first_failure(job, "wrong_value", cases_of(target))
    check(tmp_path, job, case, failure, "got nan")


def test_write_between_the_rows_of_an_output(tmp_path, environment):
    job = job_of("fused_moe_lora", "between_rows")
    cases = [case for case in cases_of("fused_moe_lora") if case.output_gap and case.pairs > 1]
    case, failure = first_failure(job, "out_of_bounds", cases)
    check(tmp_path, job, case, failure, "between the rows of output")


@pytest.mark.parametrize("target", TARGETS)
def test_crash_is_seen_from_outside(target, tmp_path, environment):
    job = job_of(target, "crash")
    case, failure = first_failure(job, "crash", cases_of(target))
    check(tmp_path, job, case, failure, "expected exit status 0, got -11", run=run_alone)
    if target == "bgmv":
        check_test(tmp_path, job, case, failure)


def test_read_behind_a_tensor_crashes_in_the_script_too(tmp_path, environment):
    job = job_of("bgmv", "reads_behind_a_tensor")
    case, failure = first_failure(job, "crash", [case for case in cases_of("bgmv") if case.seed % 2 == 0])
    text = check(tmp_path, job, case, failure, "expected exit status 0, got -11", run=run_alone)
    assert "at_the_end_of_a_page(indices)" in text


@pytest.mark.parametrize("target", ["moe_lora_align"])
def test_hang_ends_the_script_all_the_same(target, tmp_path, environment, monkeypatch):
    monkeypatch.setattr(script_module, "HANG_SECONDS", 8)
    job = job_of(target, "hang")
    case = next(case for case in cases_of(target) if TARGETS[target].expect(*made(target, case)).error is None)
    failure = Failure("hang", "", "no_answer", "no answer within 60 s")
    check(tmp_path, job, case, failure, "expected the call to return, got nothing in 8 s", run=run_alone)


def made(target, case):
    inputs = TARGETS[target].make_inputs(case, "cpu")
    specs = TARGETS[target].outputs(inputs)
    return inputs, {
        name: torch.zeros(spec.shape, dtype=spec.dtype) if spec.initial is None else spec.initial
        for name, spec in specs.items()
    }


@pytest.mark.parametrize(
    ("kind", "tool"), [("race", "racecheck"), ("uninitialised_read", "initcheck"), ("out_of_bounds", "memcheck")]
)
@pytest.mark.parametrize("target", ["moe_lora_align"])
def test_what_only_a_sanitizer_sees_is_run_under_it(target, kind, tool, tmp_path, environment, monkeypatch):
    """The tool is a stand-in that runs its program and reports the bug."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "compute-sanitizer").write_text(
        "#!/bin/sh\n"
        f'test "$1 $2 $3 $4" = "--tool {tool} --error-exitcode 9" || exit 77\n'
        'shift 4; "$@" || exit $?\n'
        'test -n "$ORACLE_KERNELS_FIXED" || exit 9\n'
    )
    (tools / "compute-sanitizer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    job = job_of(target, "right")
    case = next(case for case in cases_of(target) if TARGETS[target].expect(*made(target, case)).error is None)
    failure = Failure(kind, "", f"{tool}_in_kernel", f"{tool} reports something")
    check(tmp_path, job, case, failure, "expected exit status 0, got 9", run=run_alone, sanitizer=tool)


def test_small_tensors_are_written_out_and_large_ones_packed(tmp_path, environment):
    job = job_of("bgmv", "wrong_value")
    for packed in (False, True):
        chosen = [
            case
            for case in cases_of("bgmv")
            if (case.rows * case.width > 96) is packed and (case.contents == "signed") is packed
        ]
        case, failure = first_failure(job, "wrong_value", chosen)
        text = check(tmp_path, job, case, failure)
        assert ("weights = unpack(" in text) is packed


def test_tensors_that_nobody_would_scroll_past_are_refused(environment):
    case = TARGETS["bgmv"].case_type(**{**vars(EXPAND), "rows": 2000, "width": 400, "contents": "signed"})
    with pytest.raises(KernelfuzzError, match=r"a tensor of 1,600,000 bytes is too large"):
        reproducer.script(job_of("bgmv", "right"), case, Failure("raised", "", "E_in_f", "E"), version="1")


EXPAND = BgmvCase(
    seed=0,
    layer="wrapper",
    op="expand",
    batch=Batch((Segment(0, 1),)),
    num_adapters=1,
    width=1,
    rows=1,
    columns=2,
    slice_offset=0,
    slice_size=0,
    dtype="float16",
    float32_input=False,
    float32_output=False,
    contents="ones",
    scale=1.0,
    accumulate=False,
    weights_4d=False,
)
PADDED_VOCABULARY = Failure(
    "raised",
    "",
    "RuntimeError_in_bgmv_expand",
    "RuntimeError: lora_b_weights.size(-2) must match slice_size",
)


def test_padded_vocabulary_on_released_wrappers(tmp_path, environment):
    """vLLM's pull request 39989: 0.19.1 has the bug, 0.20.0 has not. The script needs kernelfuzz's copy only."""
    for version, status in {"0.19.1": 1, "0.20.0": 0}.items():
        try:
            releases.locate("vllm", version)
        except KernelfuzzError as error:
            pytest.skip(str(error))
        job = named_jobs(["bgmv"], [f"vllm@{version}"], CPU)[0]
        script = tmp_path / "repro.py"
        script.write_text(reproducer.script(job, EXPAND, PADDED_VOCABULARY, version=version))
        done = run_alone(script, EXPAND, fixed=False)
        assert done.returncode == status, done.stdout + done.stderr
    assert done.stdout == f"vllm in {releases.locate('vllm', version)}\npassed\n"


def test_script_says_what_it_lacks(tmp_path, environment, monkeypatch):
    """No copy of the release: exit status 2, which is neither failed nor passed."""
    monkeypatch.setenv("KERNELFUZZ_HOME", str(tmp_path))
    script = tmp_path / "repro.py"
    job = job_of("bgmv", "right")
    job = type(job)(job.target, type(job.kernel)("vllm", "0.19.1"), CPU, job.implementation)
    script.write_text(reproducer.script(job, EXPAND, PADDED_VOCABULARY, version="0.19.1"))
    done = run_alone(script, EXPAND, fixed=False)
    assert done.returncode == 2
    assert re.fullmatch(r"vllm is neither installed nor in .*: kernelfuzz releases fetch vllm==0\.19\.1\n", done.stdout)
    assert done.stderr == ""


def test_script_of_an_example(tmp_path, environment):
    """Its package is kernelfuzz itself."""
    bad, good = (
        named_jobs(["moe_lora_align"], [name], CPU)[0] for name in ("example@last_adapter_unwritten", "example")
    )
    case, failure = first_failure(bad, "unwritten", cases_of("moe_lora_align"))
    script = tmp_path / "repro.py"
    for job, status in ((bad, 1), (good, 0)):
        script.write_text(reproducer.script(job, case, failure, version="1"))
        done = run_alone(script, case, fixed=False)
        assert done.returncode == status, done.stdout + done.stderr


ON_CUDA = [(each.target, each.package) for each in IMPLEMENTATIONS if "cuda" in each.devices]


@pytest.mark.parametrize("pytest_form", [False, True])
@pytest.mark.parametrize("tensor_on_cpu", [None, 3])
@pytest.mark.parametrize(("target", "package"), ON_CUDA)
def test_scripts_for_a_gpu_are_programs(target, package, tensor_on_cpu, pytest_form):
    """They cannot be run here: their text is parsed, and what the placement asks for is in it."""
    placement = Placement("indexed", side_stream=True, other_device_current=True, tensor_on_cpu=tensor_on_cpu)
    case = dataclasses.replace(cases_of(target)[7], placement=placement)
    job = unchecked_job(target, package, "cuda")
    for kind in get_args(FailureKind):
        clause = "tensor_on_cpu" if tensor_on_cpu is not None else "invalid_argument_left_pending"
        expected = TARGETS[target].expect(*made(target, case)).error
        if (kind == "not_raised" and expected is None) or (target, package) == ("fp8_layout", "vllm"):
            continue
        output, on_cpu = "", tensor_on_cpu is not None
        if kind in ("input_mutated", "out_of_bounds") and not on_cpu:
            output = next(name for name, value in vars(made(target, case)[0]).items() if torch.is_tensor(value))
            clause = "redzone"
        failure = Failure(kind, output, clause, "what is wrong")
        text = reproducer.script(job, case, failure, version="1", pytest=pytest_form)
        ast.parse(text)
        assert "torch.cuda.stream(torch.cuda.Stream())" in text
        assert "with torch.cuda.device(1):" in text
