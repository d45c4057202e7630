"""The registry: which kernel a name means, and where it can run."""

import importlib
import warnings

import pytest
import torch

from kernelfuzz.kernels import registry, releases
from kernelfuzz.kernels.base import KernelName
from kernelfuzz.kernels.registry import DEVICE_KINDS, IMPLEMENTATIONS, parse_device
from kernelfuzz.strategies.errors import KernelfuzzError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELFUZZ_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def implementation(target, package):
    found = registry.find(target, KernelName(package))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("vllm", KernelName("vllm")),
        ("vllm@0.33.0", KernelName("vllm", "0.33.0")),
        ("vllm@/path/to/check@out", KernelName("vllm", "/path/to/check@out")),
        ("vllm-xpu-kernels@installed", KernelName("vllm-xpu-kernels", "installed")),
        ("package.module:function", KernelName("package.module:function")),
    ],
)
def test_kernel_name_is_parsed_and_printed(text, name):
    assert KernelName.parse(text) == name
    assert str(name) == text


@pytest.mark.parametrize("text", ["", "@", "@1.0", "vllm@", "two words", "vllm/0.33.0", "vllm==0.33.0", "vllm\n"])
def test_malformed_kernel_name_is_refused(text):
    with pytest.raises(KernelfuzzError, match=r"malformed kernel name .*: expected NAME, NAME@VERSION") as error:
        KernelName.parse(text)
    assert "\n" not in str(error.value)


def test_each_target_has_a_package_once():
    pairs = [(entry.target, entry.package) for entry in IMPLEMENTATIONS]
    assert len(set(pairs)) == len(pairs)
    for entry in IMPLEMENTATIONS:
        assert registry.find(entry.target, entry.default_name()) is entry
        assert registry.find(entry.target, KernelName(entry.package, "any version")) is entry


def test_each_loader_is_there():
    for entry in IMPLEMENTATIONS:
        module, _, function = entry.loader.partition(":")
        # Kernels in Triton are imported in a process that interprets or compiles them.
        if importlib.util.find_spec("triton") or not entry.triton:
            assert callable(getattr(importlib.import_module(f"kernelfuzz.kernels.{module}"), function))


def test_default_is_the_newest_release_and_examples_have_none():
    for entry in IMPLEMENTATIONS:
        expected = releases.PINNED[entry.releases[0]] if entry.releases else None
        assert entry.default_name() == KernelName(entry.package, expected)


@pytest.mark.parametrize(
    ("target", "package"), [("bgmv", "no-such"), ("no_such", "vllm"), ("fused_moe_lora", "vllm-torch")]
)
def test_unknown_kernel_is_not_found(target, package):
    assert registry.find(target, KernelName(package)) is None


def test_users_kernel_implements_whatever_it_is_asked_for():
    found = registry.find("bgmv", KernelName("my_module:launch"))
    assert (found.target, found.package, found.loader) == ("bgmv", "my_module:launch", "user:load")
    assert found.unavailable(KernelName("my_module:launch"), CPU) is None


def test_kernel_does_not_run_where_it_is_not_written_for():
    for entry in IMPLEMENTATIONS:
        for kind in set(DEVICE_KINDS) - set(entry.devices):
            assert entry.unavailable(entry.default_name(), torch.device(kind)) == f"not written for {kind}"


def test_release_that_is_not_fetched_says_how_to_get_it():
    entry = implementation("lora_shrink_expand", "vllm")
    remedy = "vllm 0.20.2 is not fetched: run 'kernelfuzz releases fetch vllm==0.20.2'"
    assert entry.unavailable(KernelName("vllm", "0.20.2"), CPU) == remedy


def test_every_release_that_a_kernel_needs_is_asked_for(tmp_path, monkeypatch):
    """vLLM's wrapper of bgmv calls the operators of vllm-xpu-kernels."""
    (tmp_path / "checkout" / "vllm").mkdir(parents=True)
    entry = implementation("bgmv", "vllm")
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 1)
    reason = entry.unavailable(KernelName("vllm", "./checkout"), torch.device("xpu"))
    assert "kernelfuzz releases fetch vllm-xpu-kernels==" in reason


def test_path_takes_the_place_of_a_version(tmp_path):
    (tmp_path / "checkout" / "vllm").mkdir(parents=True)
    entry = implementation("lora_shrink_expand", "vllm")
    for path in ("./checkout", str(tmp_path / "checkout"), "checkout"):
        name = KernelName("vllm", path)
        assert entry.unavailable(name, CPU) is None
        assert entry.root(name) == tmp_path / "checkout"
    assert "holds no vllm/ folder" in entry.unavailable(KernelName("vllm", "."), CPU)


def test_installed_package_is_used_where_it_is_installed(tmp_path, monkeypatch):
    entry = implementation("lora_shrink_expand", "vllm")
    name = KernelName("vllm", "installed")
    if importlib.util.find_spec("vllm") is None:
        assert entry.unavailable(name, CPU) == "vllm@installed: vllm is not installed here"
    (tmp_path / "site" / "vllm").mkdir(parents=True)
    (tmp_path / "site" / "vllm" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert entry.unavailable(name, CPU) is None
    assert entry.root(name) is None


def test_package_that_cannot_be_used_installed_says_so():
    entry = implementation("bgmv", "vllm-xpu-kernels")
    with pytest.raises(KernelfuzzError, match="vllm-xpu-kernels@installed: vllm-xpu-kernels is not installed here"):
        entry.root(KernelName("vllm-xpu-kernels", "installed"))


def test_bug_of_an_example_is_its_version():
    entry = implementation("bgmv", "example")
    assert entry.root(KernelName("example")) is None
    assert entry.root(KernelName("example", "padded_vocab")) == "padded_vocab"


def test_cpu_needs_its_runtime(monkeypatch):
    entry = implementation("bgmv", "vllm-torch")
    without = type(entry)(**{**vars(entry), "cpu_runtime": lambda: "install the runtime"})
    assert without.unavailable(entry.default_name(), CPU) == "install the runtime"


def test_device_is_parsed():
    assert parse_device("cpu") == CPU


@pytest.mark.parametrize("text", ["", "tpu", "cuda:x", "cuda:-1", "cpu cuda", "meta"])
def test_unknown_device_is_refused(text):
    with pytest.raises(KernelfuzzError, match=f"unknown device {text!r}: expected "):
        parse_device(text)


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_device_that_is_not_there_is_refused(kind, monkeypatch):
    backend = getattr(torch, kind)
    monkeypatch.setattr(backend, "is_available", lambda: False)
    with pytest.raises(KernelfuzzError, match=f"device '{kind}': no {kind} device here"):
        parse_device(kind)
    monkeypatch.setattr(backend, "is_available", lambda: True)
    monkeypatch.setattr(backend, "device_count", lambda: 2)
    assert parse_device(kind) == torch.device(kind)
    assert parse_device(f"{kind}:1") == torch.device(kind, 1)
    with pytest.raises(KernelfuzzError, match=f"device '{kind}:2': no device {kind}:2 here: there are 2"):
        parse_device(f"{kind}:2")


def why_no_cuda():
    with pytest.raises(KernelfuzzError) as error:
        parse_device("cuda")
    return str(error.value).removeprefix("device 'cuda': no cuda device here: ")


def test_torch_without_cuda_is_why_there_is_no_cuda_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert why_no_cuda() == f"torch {torch.__version__} is built without CUDA"


@pytest.mark.parametrize(
    "reason",
    [
        "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver",
        "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver",
        "No CUDA GPUs are available",
    ],
)
def test_torchs_own_reason_is_why_there_is_no_cuda_device(reason, monkeypatch, recwarn):
    def is_available():
        warnings.warn(f"CUDA initialization: {reason} (Triggered internally at CUDAFunctions.cpp:109.)", stacklevel=2)
        return False

    def init():
        raise RuntimeError(f"{reason}\nmore that nobody needs")

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", init)
    assert why_no_cuda() == reason
    assert recwarn.list == []
