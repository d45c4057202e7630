"""compute-sanitizer's reports: read in every format of the tool, turned into failures with stable names."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelfuzz.fuzz import sanitizer
from kernelfuzz.fuzz.sanitizer import UNKNOWN_KERNEL, Log, Report, command, environment, failures, find, parse, unusable
from kernelfuzz.strategies.errors import KernelfuzzError

BANNER = "========= COMPUTE-SANITIZER\n"
SUMMARY = "========= ERROR SUMMARY: 3 errors\n"

# The tool of 2021: the offset first, host frames of two lines.
OUT_OF_BOUNDS_2021 = """\
========= Invalid __global__ write of size 4 bytes
=========     at 0x4b0 in scatter_rows(int const *, int, int *)
=========     by thread (3,0,0) in block (17,0,0)
=========     Address 0x7f12a8c00408 is out of bounds
=========     and is 9 bytes after the nearest allocation at 0x7f12a8c00200 of size 512 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========     Host Frame: [0x2a19ef]
=========                in /usr/lib/x86_64-linux-gnu/libcuda.so.1
=========     Host Frame:cudaLaunchKernel [0x6bedb]
=========                in /opt/example/libexample.so
=========
"""
# 2022, compiled with line information: the file comes first too.
TRITON_2022 = """\
========= Invalid __global__ read of size 16 bytes
=========     at 0xd90 in /srv/example/lora/shrink_rows.py:75:_shrink_rows_kernel
=========     by thread (96,0,0) in block (44,0,0)
=========     Address 0x7639a5f9f000 is out of bounds
=========     and is 1,241,911,296 bytes before the nearest allocation at 0x7639e0000000 of size 5,033,164,800 bytes
=========
"""
# 2023.3 and later: function and offset together.
OUT_OF_BOUNDS_2023 = """\
========= Invalid __global__ read of size 8 bytes
=========     at void example::<unnamed>::gather_rows<float, (int)4>(const T1 *, T1 *, long)+0x7f0 in gather.cu:88
=========     by thread (0,60,0) in block (0,8,0)
=========     Address 0x7f0605dfbde0 is out of bounds
=========     and is 32 bytes before the nearest allocation at 0x7f0605dfbe00 of size 8,600 bytes
=========
"""
# 2025: "Access to" or "Access at", device frames, shorter host frames. A German locale has dots for thousands.
DEVICE_FUNCTION_2025 = """\
========= Invalid __global__ atomic of size 4 bytes
=========     at example::add_to(int *, int)+0x1d40 in atomics.cuh:12
=========     by thread (31,0,0) in block (2,1,0)
=========     Access to 0x1001c3ecc00 is out of bounds
=========     and is 1.536 bytes before the nearest allocation at 0x1001c3ed200 of size 1.024 bytes
=========         Device Frame: example::count_block(int *)+0x12c0 in count.cu:61
=========         Device Frame: void example::count_rows<long>(const T1 *, int *)+0x90 in count.cu:122
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: launch_count_rows(at::Tensor, int) [0x9544e] in example.so
=========         Host Frame: main in main.cpp:25 [0x8a81] in python3.12
=========\x20
"""
TRITON_2025 = """\
========= Invalid __global__ write of size 2 bytes
=========     at _expand_rows_kernel+0xec0 in expand_rows.py:43
=========     by thread (18,0,0) in block (0,0,0)
=========     Access at 0x74505bcccca0 is out of bounds
=========     and is 161 bytes after the nearest allocation at 0x74505bccc800 of size 1,024 bytes
=========
"""
MISALIGNED = """\
========= Invalid __shared__ write of size 16 bytes
=========     at stage_rows(void *, const void *):0x160 in stage.cu:6
=========     by thread (1,0,0) in block (0,0,0)
=========     Address 0x82 is misaligned
=========     and is inside the nearest allocation at 0x80 of size 64 bytes
=========
"""
UNINITIALISED = """\
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void example::_GLOBAL__N__49_tmpxft_7d8_13_sum_cpp1_ii_049ed517::sum_rows<int=256>(float const *)+0x150
=========     by thread (31,0,0) in block (1,0,0)
=========     Address 0x7f3c7ec000fc
=========
"""
RACE_2021 = """\
========= WARN: Race reported between Read access at 0x00000170 in /srv/align.cu:51:align_rows(int*, int*)
=========     and Write access at 0x00000148 in /srv/align.cu:41:align_rows(int*, int*) [4 hazards]
=========     and Write access at 0x000001a8 in /srv/align.cu:44:align_rows(int*, int*) [1,024 hazards]
=========
"""
RACE_2022 = """\
========= Error: Race reported between Write access at 0xa60 in void align_rows<(int)256>(const int *, int, int *)
=========     and Read access at 0xcc0 in void align_rows<(int)256>(const int *, int, int *) [28 hazards]
=========
"""
RACE_2025 = """\
========= Error: Race reported between Write access at align_rows(int *, int *)+0x90 in align.cu:41
=========     and Read access at align_rows(int *, int *)+0x100 in align.cu:51 [508 hazards]
=========
"""
HAZARD = """\
========= Warning: (Warp Level Programming) Potential RAW hazard detected at __shared__ 0x8c in block (0,0,0) :
=========     Write Thread (35,0,0) at align_rows(int *, int *)+0x90 in align.cu:41
=========     Read Thread (32,0,0) at align_rows(int *, int *)+0x120 in align.cu:56
=========     Current Value : 35
=========
"""
CLUSTER_RACE = """\
========= Potential invalid __shared__ read of size 4 bytes
=========     at align_rows(int *, int *)+0x170 in align.cu:10
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x1000400 is located in a block that might have already exited
=========
"""
# What is no report about a kernel's access.
OTHER = """\
========= Program hit cudaErrorLaunchFailure (error 719) due to "unspecified launch failure" on CUDA API call to f.
=========     Saved host backtrace up to driver entry point at error
=========         Host Frame: main in demo.cu:33 [0x8a2d] in demo
=========
========= Host API memory access error at host access to 0x7f7fcdc01200 of size 400 bytes
=========     Uninitialized access at 0x7f7fcdc01300 on access by cudaMemcpy source
=========
========= Barrier error detected. Divergent thread(s) in warp
=========     at align_rows(int *, int *)+0xf0 in align.cu:79
=========     by thread (37,0,0) in block (0,0,0)
=========
========= Leaked 64 bytes at 0x400200200
=========
========= Target application returned an error
"""
FORMATS = [
    OUT_OF_BOUNDS_2021,
    TRITON_2022,
    OUT_OF_BOUNDS_2023,
    DEVICE_FUNCTION_2025,
    TRITON_2025,
    MISALIGNED,
    UNINITIALISED,
    RACE_2021,
    RACE_2022,
    RACE_2025,
    HAZARD,
    CLUSTER_RACE,
]
WHOLE_LOG = BANNER + "".join([*FORMATS[:4], OTHER, *FORMATS[4:]]) + SUMMARY

TORCHS = [
    "void at::native::<unnamed>::reduce_kernel<(int)512, float>(T3)",
    "void at_cuda_detail::cub::DeviceScanKernel<int>(T1)",
    "void cub::CUB_200500_NS::DeviceScanKernel<at::cuda::cub::Sum, int>(T1)",
    "void thrust::THRUST_200500_NS::cuda_cub::core::_kernel_agent<at::native::Op, long>(T1)",
    "void c10::fill<double>(T1 *)",
    "sgemm_32x32x32_NT_vec",
    "ampere_dgemm_64x32_nn",
    "sm80_xmma_gemm_f64f64_f64f64_f64_tn_n_tilesize32x32x16_stage4_kernel",
    "void cutlass::Kernel2<cutlass_80_tensorop_d884gemm_64x64_16x4_nn_align1>(T1::Params)",
    "void gemv2T_kernel_val<int, int, double, cublasGemvParams<double>>(T4)",
]
NOT_TORCHS = [
    "void attention::run<at::Half>(const T1 *)",
    "void cub::CUB_200500_NS::DeviceScanKernel<int>(T1)",
    "torchlike::copy(int *)",
    "_gemm_kernel",
    "my_sgemm_128x128(float *)",
]


def memcheck_report(function, offset="0x90"):
    return f"""\
========= Invalid __global__ write of size 4 bytes
=========     at {function}+{offset}
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7f00 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7e00 of size 256 bytes
=========
"""


def only(text) -> Report:
    (report,) = parse(text)
    return report


@pytest.mark.parametrize(
    ("text", "kind", "access", "kernel", "address"),
    [
        (OUT_OF_BOUNDS_2021, "out_of_bounds", "write", "scatter_rows", 0x7F12A8C00408),
        (TRITON_2022, "out_of_bounds", "read", "_shrink_rows_kernel", 0x7639A5F9F000),
        (OUT_OF_BOUNDS_2023, "out_of_bounds", "read", "example::gather_rows", 0x7F0605DFBDE0),
        (DEVICE_FUNCTION_2025, "out_of_bounds", "atomic", "example::count_rows", 0x1001C3ECC00),
        (TRITON_2025, "out_of_bounds", "write", "_expand_rows_kernel", 0x74505BCCCCA0),
        (MISALIGNED, "out_of_bounds", "misaligned_write", "stage_rows", 0x82),
        (UNINITIALISED, "uninitialised_read", "read", "example::sum_rows", 0x7F3C7EC000FC),
        (RACE_2021, "race", "shared_memory", "align_rows", None),
        (RACE_2022, "race", "shared_memory", "align_rows", None),
        (RACE_2025, "race", "shared_memory", "align_rows", None),
        (HAZARD, "race", "shared_memory", "align_rows", 0x8C),
        (CLUSTER_RACE, "race", "shared_memory", "align_rows", 0x1000400),
    ],
)
def test_every_format_says_what_was_accessed_where_and_by_which_kernel(text, kind, access, kernel, address):
    report = only(text)
    assert (report.kind, report.access, report.kernel, report.address) == (kind, access, kernel, address)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (OUT_OF_BOUNDS_2021, "thread (3,0,0) in block (17,0,0)"),
        (TRITON_2022, "thread (96,0,0) in block (44,0,0), /srv/example/lora/shrink_rows.py:75"),
        (OUT_OF_BOUNDS_2023, "thread (0,60,0) in block (0,8,0), gather.cu:88"),
        (DEVICE_FUNCTION_2025, "thread (31,0,0) in block (2,1,0), atomics.cuh:12"),
    ],
)
def test_a_report_names_thread_block_and_source_line(text, where):
    assert only(text).where == where


def test_a_log_gives_its_reports_in_order_and_nothing_else():
    assert parse(WHOLE_LOG) == [only(text) for text in FORMATS]
    assert parse(BANNER + OTHER + SUMMARY) == []


@pytest.mark.parametrize(
    "frame",
    [
        "void example::scan_rows<int>(int*) (void example::scan_rows<int>(int*) : 0x3640)",
        "/srv/example/scan.cu:31:scan_rows<int> [0x3640]",
        "scan_rows [0x3640]",
    ],
)
def test_frames_of_old_tools_lead_to_the_kernel_too(frame):
    text = f"""\
========= Uninitialized __global__ memory read of size 4 bytes
=========     at 0xa0a50 in /usr/include/example/load.cuh:272:ThreadLoad<LOAD_CG,const unsigned int *>
=========     by thread (30,0,0) in block (1,0,0)
=========     Address 0x7f65e5204710
=========     Device Frame:/usr/include/example/load.cuh:119:Load<example::Block, (int)2> [0x520]
=========     Device Frame:{frame}
=========
"""
    assert only(text).kernel.removeprefix("example::") == "scan_rows"


@pytest.mark.parametrize(
    ("function", "kernel"),
    [
        ("void ns::(anonymous namespace)::k<float, 4>(int*)", "ns::k"),
        ("void ns::<unnamed>::k<(bool)1, ns::Op<(int)2>>(const T1 *, void (*)(int))", "ns::k"),
        ("ns::Type<int>::value_type *ns::k<T1>(T2) const", "ns::k"),
        ("k", "k"),
        ("_INTERNAL_8_k_cu_0124cb94::k(int)", "k"),
        ("void cub::CUB_200500_600_700_NS::k<int>(T1)", "cub::k"),
        ("void ns::run<ns::f(int)::[lambda(int) (instance 1)]>(T1)", "ns::run"),
        ("[clone ns::outer(int *)] outline_sync()", "outline_sync"),
    ],
)
def test_a_kernels_name_has_no_types_in_it(function, kernel):
    assert only(memcheck_report(function)).kernel == kernel


def test_a_report_without_a_place_is_kept():
    report = only("========= Invalid __local__ write of size 8 bytes\n=========     at 0x79d8\n=========\n")
    assert (report.kernel, report.address) == (UNKNOWN_KERNEL, None)


def test_lines_of_the_program_between_the_tools_are_passed_over():
    lines = TRITON_2025.splitlines(keepends=True)
    noisy = "case 7\n".join(["== 3 passed ==\n========== done ==========\n", *lines])
    assert parse(noisy) == parse(TRITON_2025)


def test_reports_of_two_processes_that_interleave_are_told_apart():
    ours, theirs = TRITON_2025.splitlines(), RACE_2025.splitlines()
    theirs += ["========= note"] * (len(ours) - len(theirs))
    mixed = "".join(f"[0]<out>:{a}\n(worker 1) {b}\n" for a, b in zip(ours, theirs))
    assert parse(mixed) == [only(RACE_2025), only(TRITON_2025)]


def test_a_log_that_ends_at_any_byte_gives_the_first_of_its_reports():
    whole = parse(WHOLE_LOG)
    counts = []
    for length in range(len(WHOLE_LOG) + 1):
        reports = parse(WHOLE_LOG[:length])
        assert reports == whole[: len(reports)]
        counts.append(len(reports))
    assert counts == sorted(counts)
    assert counts[-1] == len(whole)


@given(st.data())
def test_damaged_logs_never_raise(data):
    lines = WHOLE_LOG.splitlines(keepends=True)
    pieces = st.one_of(
        st.sampled_from(lines), st.text(), st.sampled_from(["=========", "=========     at ", "\n", "(<["])
    )
    text = "".join(data.draw(st.lists(pieces, max_size=20)))
    for failure in failures(parse(text)):
        assert "\n" not in failure.message
        assert failure.clause.split("_in_", 1)[1]
    unusable(text)


@given(st.lists(st.integers(0, len(WHOLE_LOG)), max_size=8).map(sorted))
def test_a_growing_log_gives_each_report_once(tmp_path_factory, cuts):
    path = tmp_path_factory.mktemp("log") / "log"
    log = Log(path)
    assert log.new_reports() == []
    seen, written = [], 0
    for cut in [*cuts, len(WHOLE_LOG)]:
        with path.open("a") as file:
            file.write(WHOLE_LOG[written:cut])
        written = cut
        seen += log.new_reports()
        assert seen == parse(WHOLE_LOG[:cut])
    assert seen == parse(WHOLE_LOG)
    assert log.new_reports() == []


def test_a_log_with_bytes_that_are_no_text_is_read(tmp_path):
    (tmp_path / "log").write_bytes(b"\xff\xfe\x00\n" + TRITON_2025.encode() + b"\xe2\x82")
    assert Log(tmp_path / "log").new_reports() == parse(TRITON_2025)


def test_a_failure_says_kernel_size_address_distance_and_how_many_reports():
    (failure,) = failures(parse(OUT_OF_BOUNDS_2023 * 3))
    assert (failure.kind, failure.output, failure.clause) == ("out_of_bounds", "", "read_in_example::gather_rows")
    assert failure.message == (
        "Invalid __global__ read of size 8 bytes: Address 0x7f0605dfbde0 is out of bounds and is 32 bytes before the "
        "nearest allocation at 0x7f0605dfbe00 of size 8,600 bytes; in example::gather_rows, "
        "thread (0,60,0) in block (0,8,0), gather.cu:88; 3 report(s)"
    )


def test_a_race_says_what_races_and_how_sure_the_tool_is():
    assert [failure.message for failure in failures(parse(RACE_2025 + RACE_2021.replace("align_rows", "other")))] == [
        "Error: race in shared memory, write at align.cu:41 and read at align.cu:51 [508 hazards]; in align_rows; "
        "1 report(s)",
        "WARN: race in shared memory, read at /srv/align.cu:51 and write at /srv/align.cu:41 [4 hazards] and write at "
        "/srv/align.cu:44 [1,024 hazards]; in other; 1 report(s)",
    ]


def test_a_race_between_two_functions_has_one_name_whichever_the_tool_names_first():
    text = """\
========= Error: Race reported between {} access at {}(int *)+0x90
=========     and {} access at {}(int *)+0x100 [508 hazards]
=========
"""
    reports = parse(text.format("Write", "put", "Read", "get") + text.format("Read", "get", "Write", "put"))
    assert [failure.clause for failure in failures(reports)] == ["shared_memory_in_get"]


def test_there_is_one_failure_for_each_kind_and_clause():
    found = failures(parse(WHOLE_LOG + WHOLE_LOG))
    assert [(failure.kind, failure.clause) for failure in found] == [
        ("out_of_bounds", "write_in_scatter_rows"),
        ("out_of_bounds", "read_in__shrink_rows_kernel"),
        ("out_of_bounds", "read_in_example::gather_rows"),
        ("out_of_bounds", "atomic_in_example::count_rows"),
        ("out_of_bounds", "write_in__expand_rows_kernel"),
        ("out_of_bounds", "misaligned_write_in_stage_rows"),
        ("uninitialised_read", "read_in_example::sum_rows"),
        ("race", "shared_memory_in_align_rows"),
    ]


def test_a_bug_keeps_its_name_from_release_to_release():
    old = memcheck_report("void ns::moe::<unnamed>::align_rows<int, (int)8>(const T1 *, int *)")
    new = memcheck_report("void ns::moe::_GLOBAL__N__1f_align_cu_77::align_rows<long, (bool)0, (int)9>(T1 *)", "0x1a0")
    assert [failure.clause for failure in failures(parse(old))] == ["write_in_ns::moe::align_rows"]
    assert [failure.clause for failure in failures(parse(new))] == ["write_in_ns::moe::align_rows"]


@pytest.mark.parametrize("function", TORCHS)
def test_reports_in_torchs_own_kernels_are_left_out(function):
    assert failures(parse(memcheck_report(function) + TRITON_2025)) == failures(parse(TRITON_2025))


@pytest.mark.parametrize("function", NOT_TORCHS)
def test_kernels_that_only_look_like_torchs_are_kept(function):
    assert len(failures(parse(memcheck_report(function)))) == 1


@pytest.mark.parametrize(
    "line",
    [
        'Error: Device not supported. Please refer to the "Supported Devices" section of the sanitizer documentation',
        "Error: Failed to initialize WDDM debugger interface. Please run EnableDebuggerInterface.bat",
        "Error: Target application terminated before first instrumented API call",
        "Target application terminated before first instrumented API call",
        "Target application doesn't exist or is not a valid executable",
        "Unable to find injection library libsanitizer-collection.so",
        "Error: No attachable process found. compute-sanitizer timed-out.",
        "Internal Sanitizer Error: The Sanitizer encountered an error while launching k and didn't track the launch.",
        "Error: a reason that no release has given yet",
    ],
)
def test_a_tool_that_cannot_check_is_quoted(line):
    text = f"{BANNER}========= {line}\n{SUMMARY}"
    assert unusable(text) == f"compute-sanitizer: {line}"
    assert parse(text) == []


def test_reports_and_programs_that_fail_do_not_make_the_tool_unusable():
    died = "========= Error: process didn't terminate successfully\n========= Error: couldn't find exit code.\n"
    text = WHOLE_LOG + died
    assert [unusable(text[:length]) for length in range(len(text) + 1)] == [None] * (len(text) + 1)


@pytest.fixture
def no_tool(monkeypatch, tmp_path):
    """A machine without the tool."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(sanitizer, "DEFAULT_CUDA", tmp_path / "cuda")


def install(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("fake_sanitizer.py"), path)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("folder", ["bin", "cuda/bin", "cuda/compute-sanitizer"])
def test_the_tool_is_found_on_path_and_in_the_toolkit(no_tool, tmp_path, folder):
    path = install(tmp_path / folder / "compute-sanitizer")
    assert find() == path


def test_cuda_home_goes_before_the_default_toolkit(no_tool, tmp_path, monkeypatch):
    install(tmp_path / "cuda/bin/compute-sanitizer")
    path = install(tmp_path / "mine/bin/compute-sanitizer")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "mine"))
    assert find() == path


def test_a_machine_without_the_tool_is_told_where_it_comes_from(no_tool, tmp_path):
    with pytest.raises(KernelfuzzError, match=r"compute-sanitizer is not installed.*CUDA toolkit") as error:
        command("memcheck", tmp_path / "log")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_a_watched_program_keeps_its_arguments_and_its_exit_status(no_tool, tmp_path, tool):
    """On a path that the tool would take for an escape sequence."""
    install(tmp_path / "bin/compute-sanitizer")
    log = tmp_path / "100%p.log"
    program = "import os, sys; open(os.environ['FAKE_SANITIZER_LOG'], 'a').write(sys.argv[1]); sys.exit(7)"
    prefix = [sys.executable, *command(tool, log)]  # PATH has no interpreter for the first line of the stand-in
    done = subprocess.run([*prefix, sys.executable, "-c", program, TRITON_2025], check=False)
    assert done.returncode == 7
    assert Log(log).new_reports() == parse(TRITON_2025)


def test_a_worker_allocates_each_tensor_by_itself():
    assert environment() == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
