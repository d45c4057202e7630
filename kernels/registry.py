"""Which kernels there are: for each target and package, where it runs, what it needs, and how it is loaded."""

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernelfuzz.kernels import releases, xpu
from kernelfuzz.kernels.base import Kernel, KernelName
from kernelfuzz.strategies.errors import KernelfuzzError

INSTALLED = "installed"
"""The version that means: the package that is installed here, through no stand-in."""

DEVICE_KINDS = ("cuda", "xpu", "cpu")
"""Device kinds in the order in which a campaign prefers them."""


def _anything() -> None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to get a target's kernel.

    - package: what a user writes before the @
    - loader: "module:function" below kernelfuzz.kernels, called as (root or None, device) in the process that will run
      it
    - releases: the packages whose files it needs; the version that a user names is the first one's
    - devices: the device kinds it can run on
    - cpu_runtime: why the CPU cannot run it here, or None
    - importable: the module that `package@installed` imports, if that is offered
    - triton: whether a CPU needs Triton's interpreter
    - guard_pages: whether it is, or may be, native code on a CPU, which goes past a tensor unseen unless the memory
      there cannot be touched
    """

    target: str
    package: str
    loader: str
    releases: tuple[str, ...] = ()
    devices: tuple[str, ...] = DEVICE_KINDS
    cpu_runtime: Callable[[], str | None] = _anything
    importable: str | None = None
    triton: bool = False
    guard_pages: bool = False

    def default_name(self) -> KernelName:
        """Return the name a campaign uses unless told otherwise: the newest pinned release, or the package alone."""
        return KernelName(self.package, releases.PINNED[self.releases[0]] if self.releases else None)

    def unavailable(self, name: KernelName, device: torch.device) -> str | None:
        """Return why this kernel cannot run on `device` here, in one line, or None if it can."""
        if device.type not in self.devices:
            return f"not written for {device.type}"
        missing = missing_device(device)
        if missing is not None:
            return missing
        if self.triton and ":" not in self.package and importlib.util.find_spec("triton") is None:
            return "Triton is not installed: pip install 'triton>=3.6'"
        if device.type == "cpu" and (reason := self.cpu_runtime()) is not None:
            return reason
        try:
            self.root(name)
            for package in self.releases[1:]:
                releases.locate(package, releases.PINNED[package])
        except KernelfuzzError as error:
            return str(error)
        return None

    def root(self, name: KernelName) -> Path | str | None:
        """Return what the loader is given: a release's folder or None for the installed one, an example's bug, a user's
        name.

        Raises KernelfuzzError if there is no such release.
        """
        if ":" in self.package:
            return self.package
        if not self.releases:
            return name.version
        if name.version == INSTALLED:
            if self.importable is None or importlib.util.find_spec(self.importable) is None:
                raise KernelfuzzError(f"{name}: {self.package} is not installed here")
            return None
        return releases.locate(self.releases[0], name.version or releases.PINNED[self.releases[0]])

    def load(self, name: KernelName, device: torch.device) -> Kernel:
        """Load the kernel in this process."""
        module, _, function = self.loader.partition(":")
        loader = getattr(importlib.import_module(f"kernelfuzz.kernels.{module}"), function)
        kernel: Kernel = loader(self.root(name), device)
        return kernel


IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("fused_moe_lora", "vllm", "vllm.fused_moe_lora:load", ("vllm",), importable="vllm", triton=True),
    Implementation(
        "lora_shrink_expand", "vllm", "vllm.lora_shrink_expand:load", ("vllm",), importable="vllm", triton=True
    ),
    Implementation(
        "bgmv",
        "vllm-xpu-kernels",
        "xpu.bgmv:load",
        ("vllm-xpu-kernels",),
        devices=("xpu", "cpu"),
        cpu_runtime=xpu.unavailable,
        guard_pages=True,
    ),
    Implementation(
        "bgmv",
        "vllm",
        "vllm.bgmv:load_wrapper",
        ("vllm", "vllm-xpu-kernels"),
        devices=("xpu", "cpu"),
        cpu_runtime=xpu.unavailable,
        importable="vllm",
        guard_pages=True,
    ),
    Implementation("bgmv", "vllm-torch", "vllm.bgmv:load_torch", ("vllm",), importable="vllm"),
    Implementation(
        "moe_lora_align", "vllm", "vllm.moe_lora_align:load", ("vllm",), devices=("cuda",), importable="vllm"
    ),
    Implementation(
        "moe_lora_align",
        "vllm-xpu-kernels",
        "xpu.moe_lora_align:load",
        ("vllm-xpu-kernels",),
        devices=("xpu", "cpu"),
        cpu_runtime=xpu.unavailable,
        guard_pages=True,
    ),
    Implementation(
        "moe_permute", "vllm", "vllm.moe_permute:load", ("vllm",), devices=("cuda", "cpu"), importable="vllm"
    ),
    Implementation("fp8_layout", "vllm", "vllm.fp8_layout:load", ("vllm",), devices=("cpu",), importable="vllm"),
    Implementation("bgmv", "example", "examples.bgmv:load", triton=True),
    Implementation("moe_lora_align", "example", "examples.moe_lora_align:load", triton=True),
)
"""Every kernel that kernelfuzz knows. A user's own is named `module:function`."""


def find(target: str, name: KernelName) -> Implementation | None:
    """Return what implements `target` under that name, or None."""
    if ":" in name.package:
        return Implementation(target, name.package, "user:load", triton=True, guard_pages=True)
    for implementation in IMPLEMENTATIONS:
        if implementation.target == target and implementation.package == name.package:
            return implementation
    return None


def missing_device(device: torch.device) -> str | None:
    """Return why `device` is not to be had here, in one line, or None."""
    if device.type == "cpu":
        return f"no device {device} here: there is one CPU" if device.index else None
    backend: Any = getattr(torch, device.type)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they say what is returned here
        if not backend.is_available():
            reason = _why_no_cuda() if device.type == "cuda" else ""
            return f"no {device.type} device here" + (f": {reason}" if reason else "")
        if (device.index or 0) >= backend.device_count():
            return f"no device {device} here: there are {backend.device_count()}"
    return None


def _why_no_cuda() -> str:
    """Return the first line of what torch says when it is told to use CUDA all the same."""
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return ""


def spelled_device(text: str) -> torch.device:
    """Return the device of that name, whether or not it is there. Raises KernelfuzzError if it is malformed."""
    try:
        device = torch.device(text)
    except RuntimeError:
        raise KernelfuzzError(f"unknown device {text!r}: expected cpu, cuda, cuda:1, xpu, ...") from None
    if device.type not in DEVICE_KINDS:
        raise KernelfuzzError(f"unknown device {text!r}: expected one of {', '.join(DEVICE_KINDS)}")
    return device


def parse_device(text: str) -> torch.device:
    """Return the device of that name. Raises KernelfuzzError if it is malformed or not there."""
    device = spelled_device(text)
    reason = missing_device(device)
    if reason is not None:
        raise KernelfuzzError(f"device {text!r}: {reason}")
    return device
