"""vLLM's compiled operators: how a tree's library is found, loaded and called, and what is said where it cannot be.

The operator itself needs an NVIDIA GPU; the adapter is run here on a stand-in for it, see vllm_stand_in.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernelfuzz.kernels.vllm import binary, moe_lora_align
from kernelfuzz.strategies.errors import KernelfuzzError
from kernelfuzz.strategies.moe_lora_align import REGIMES

STAND_IN = Path(__file__).with_name("vllm_stand_in.py")
CPU = torch.device("cpu")
STABLE, OLD = "_moe_C_stable_libtorch.abi3.so", "_moe_C.abi3.so"


def tree(folder: Path, *libraries: str, version: str = "9.8.7", requires: str = "") -> Path:
    """A folder that holds a vLLM which must not be imported, with libraries of a few wrong bytes."""
    (folder / "vllm").mkdir(parents=True)
    (folder / "vllm" / "__init__.py").write_text("raise ImportError('vLLM itself was imported')\n")
    for name in libraries:
        (folder / "vllm" / name).write_bytes(b"this is no library" * 100)
    info = folder / f"vllm-{version}.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nRequires-Dist: numpy\n{requires}"
    (info / "METADATA").write_text(metadata)
    return folder


def run_stand_in(root: str, results: Path, **environment: str) -> dict:
    command = [sys.executable, str(STAND_IN), root, str(results)]
    subprocess.run(command, check=True, env={**os.environ, **environment})
    return json.loads(results.read_text())


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("adapter")
    return run_stand_in(str(tree(folder / "tree", STABLE)), folder / "results.json")


def test_the_adapter_passes_what_the_contract_asks_for(outcome):
    assert outcome["failures"] == outcome["rejected"] == []
    assert outcome["cases"] >= 100


def test_the_adapter_is_tried_on_every_regime_id_dtype_and_map(outcome):
    assert set(outcome["regimes"]) == set(REGIMES)
    assert outcome["seen"] == [
        ["torch.int32", False],
        ["torch.int32", True],
        ["torch.int64", False],
        ["torch.int64", True],
    ]


def test_the_operator_is_called_once_before_the_campaign(outcome):
    assert outcome["probed"] == 1


def test_the_release_is_loaded_without_importing_it(outcome):
    (path,) = outcome["loaded"]
    assert path.endswith(f"tree/vllm/{STABLE}")
    assert outcome["version"] == "9.8.7"
    assert not outcome["imported"]


def test_the_installed_vllm_is_loaded_without_importing_it(tmp_path):
    site = tree(tmp_path / "site", OLD, version="1.2.3")
    outcome = run_stand_in("", tmp_path / "results.json", PYTHONPATH=str(site))
    assert outcome["loaded"] == [str(site / "vllm" / OLD)]
    assert outcome["version"] == "1.2.3"
    assert not outcome["imported"]
    assert outcome["failures"] == []


def said(root: Path) -> str:
    """The one line that comes of loading the kernel of a tree."""
    with pytest.raises(KernelfuzzError) as error:
        moe_lora_align.load(root, CPU)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_checkout_that_was_not_built_says_so(tmp_path):
    line = said(tree(tmp_path, "_C.abi3.so"))
    assert line.startswith(f"{tmp_path}/vllm holds no compiled _moe_C: build the checkout")


@pytest.mark.parametrize("library", [STABLE, OLD])
def test_a_broken_library_says_so(tmp_path, library):
    line = said(tree(tmp_path, library))
    assert line.startswith(f"{library} does not load in torch {torch.__version__} (")
    assert line.endswith("): invalid ELF header; fetch it again, or build it on this machine")


@pytest.fixture
def loader(monkeypatch):
    """Have the dynamic loader refuse every library, in its own words; {library} is the library's path."""

    def refuse(words: str) -> None:
        def load_library(path):
            try:
                raise OSError(words.format(library=path))
            except OSError as error:
                raise OSError(f"Could not load this library: {path}") from error

        monkeypatch.setattr(torch.ops, "load_library", load_library)

    return refuse


@pytest.mark.parametrize(
    ("words", "point", "remedy"),
    [
        (
            "libcudart.so.12: cannot open shared object file: No such file or directory",
            "libcudart.so.12: cannot open shared object file",
            "install a torch built for CUDA 12",
        ),
        (
            "{library}: undefined symbol: cudaNewThing, version libcudart.so.14",
            "undefined symbol: cudaNewThing, version libcudart.so.14",
            "install a torch built for CUDA 14",
        ),
        (
            "libtorch_cuda.so: cannot open shared object file: No such file or directory",
            "libtorch_cuda.so: cannot open shared object file",
            "it needs NVIDIA's driver and a torch built with CUDA",
        ),
        (
            "libcuda.so.1: cannot open shared object file: No such file or directory",
            "libcuda.so.1: cannot open shared object file",
            "it needs NVIDIA's driver and a torch built with CUDA",
        ),
        (
            "{library}: undefined symbol: _ZN3c104cuda9SetDeviceEab",
            "undefined symbol: _ZN3c104cuda9SetDeviceEab",
            "install torch==2.99.0, which it was built for",
        ),
        (
            "/lib/libc.so.6: version `GLIBC_2.99' not found (required by {library})",
            "/lib/libc.so.6: version `GLIBC_2.99' not found (required by {library})",
            "fetch it again, or build it on this machine",
        ),
    ],
)
@pytest.mark.parametrize(("cuda", "named"), [(None, "no CUDA"), ("13.0", "CUDA 13.0")])
def test_a_library_that_does_not_load_says_why_and_what_helps(
    tmp_path, monkeypatch, loader, words, point, remedy, cuda, named
):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    root = tree(tmp_path, STABLE, requires="Requires-Dist: torchaudio==2.98.0\nRequires-Dist: torch==2.99.0\n")
    loader(words)
    point = point.format(library=root / "vllm" / STABLE)
    assert said(root) == f"{STABLE} does not load in torch {torch.__version__} ({named}): {point}; {remedy}"


def test_the_torch_of_a_checkout_without_metadata_is_not_guessed(tmp_path, loader):
    loader("{library}: undefined symbol: _ZN3c104cuda9SetDeviceEab")
    assert said(tree(tmp_path, OLD)).endswith("; install the torch that this vLLM requires, which it was built for")


def test_of_both_libraries_the_one_of_the_later_vllm_is_loaded(tmp_path, loader):
    loader("{library}: invalid ELF header")
    assert said(tree(tmp_path, OLD, STABLE)).startswith(STABLE)


def test_a_library_without_the_operator_says_so(tmp_path, monkeypatch):
    root = tree(tmp_path, "_older_C.abi3.so")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    with pytest.raises(KernelfuzzError, match=r"^_older_C\.abi3\.so has no operator align: use a vLLM that has it"):
        binary.load_operator(root, "_older_C", "align")


@pytest.fixture
def old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))


def fails_with(text: str):
    def call() -> None:
        raise RuntimeError(f"{text}\nCUDA kernel errors might be reported asynchronously\nCompile with ...")

    return call


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("no kernel image is available for execution on the device", "use a build of it for this GPU"),
        ("invalid device function", "use a build of it for this GPU"),
        ("device kernel image is invalid", "use a build of it for this GPU"),
        ("the provided PTX was compiled with an unsupported toolchain.", "update NVIDIA's driver"),
        ("a PTX JIT compilation failed", "update NVIDIA's driver"),
        ("CUDA driver version is insufficient for CUDA runtime version", "update NVIDIA's driver"),
    ],
)
def test_code_for_other_gpus_and_drivers_is_one_line(old_gpu, reason, remedy):
    with pytest.raises(KernelfuzzError) as error:
        binary.probe(STABLE, CPU, fails_with(f"CUDA error: {reason}"))
    assert str(error.value) == f"{STABLE} does not run on Tesla V100 (compute capability 7.0): {reason}; {remedy}"


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: out of memory",
        "block_size should be greater than 0. ",
        "Could not run '_moe_C::moe_lora_align_block_size' with arguments from the 'CUDA' backend.",
        "",
    ],
)
def test_another_failure_of_the_probe_is_left_to_the_campaign(old_gpu, text):
    called = []

    def call() -> None:
        called.append(text)
        fails_with(text)()

    binary.probe(STABLE, CPU, call)
    assert called == [text]


def test_an_error_that_the_launch_left_pending_is_found(old_gpu, monkeypatch):
    """vLLM's host code does not ask for launch errors; torch meets them at its own next launch."""

    def launch() -> None:
        monkeypatch.setattr(torch, "ones", lambda *_, **__: fails_with("CUDA error: no kernel image is available")())

    with pytest.raises(KernelfuzzError, match=rf"^{STABLE} does not run on Tesla V100"):
        binary.probe(STABLE, CPU, launch)


def test_a_torch_that_was_not_built_for_the_gpu_is_not_held_against_the_library(old_gpu, monkeypatch):
    monkeypatch.setattr(torch, "ones", lambda *_, **__: fails_with("CUDA error: no kernel image is available")())
    with pytest.raises(
        KernelfuzzError, match=r"^torch \S+ does not run on Tesla V100 \(compute capability 7\.0\): no "
    ):
        binary.probe(STABLE, CPU, lambda: None)
