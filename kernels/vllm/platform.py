"""The platform that vLLM's host code believes to run on."""

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch

from kernelfuzz.strategies.errors import KernelfuzzError

PlatformKind = Literal["cpu", "cuda", "rocm", "xpu"]
"""What vLLM's host code distinguishes. "cpu" is a machine whose torch knows no GPU."""

PLATFORM_KINDS: tuple[PlatformKind, ...] = get_args(PlatformKind)

_HOPPER = 90


class TouchedCudaError(RuntimeError):
    """Code under test used `torch.cuda` on a platform that has none."""


class EmulatedPlatform:
    """Answers vLLM's `current_platform` questions for one kind of device.

    `compute_units` is what host code is told about the device's size. It may be asked for by an integer index or None;
    a `torch.device` is refused, as vLLM's own platforms cannot take one. The capability is the GPU's that is here, or
    a Hopper's. Raises KernelfuzzError for an unknown kind.
    """

    simple_compile_backend = "eager"

    def __init__(self, kind: str) -> None:
        if kind not in PLATFORM_KINDS:
            raise KernelfuzzError(f"unknown platform {kind!r}: expected one of {', '.join(PLATFORM_KINDS)}")
        self.device_name = kind
        self.device_type = "cuda" if kind == "rocm" else kind  # as torch calls AMD's GPUs
        self.compute_units = 132
        self._kind = kind

    def is_cuda(self) -> bool:
        return self._kind == "cuda"

    def is_rocm(self) -> bool:
        return self._kind == "rocm"

    def is_cuda_alike(self) -> bool:
        return self.is_cuda() or self.is_rocm()

    def is_xpu(self) -> bool:
        return self._kind == "xpu"

    def is_cpu(self) -> bool:
        return self._kind == "cpu"

    def is_tpu(self) -> bool:
        return False

    def is_out_of_tree(self) -> bool:
        return False

    def fp8_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn

    def is_fp8_fnuz(self) -> bool:
        return False

    def supports_fp8(self) -> bool:
        return True

    def num_compute_units(self, device_id: int | None = 0) -> int:
        if device_id is not None and not isinstance(device_id, int):
            raise TypeError(f"num_compute_units takes an integer device index or None, got {device_id!r}")
        return self.compute_units

    def has_device_capability(self, capability: int | tuple[int, int], device_id: int = 0) -> bool:
        del device_id
        return self.is_cuda() and _capability() >= _as_integer(capability)

    def is_device_capability(self, capability: int | tuple[int, int], device_id: int = 0) -> bool:
        del device_id
        return self.is_cuda() and _capability() == _as_integer(capability)

    def is_device_capability_family(self, capability: int, device_id: int = 0) -> bool:
        del device_id
        return self.is_cuda() and _capability() // 10 == capability // 10


def _capability() -> int:
    if not torch.cuda.is_available():
        return _HOPPER
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _as_integer(capability: int | tuple[int, int]) -> int:
    return capability if isinstance(capability, int) else 10 * capability[0] + capability[1]


@contextmanager
def emulate_platform(
    platform: EmulatedPlatform | PlatformKind, code_under_test: tuple[str, ...] = ("vllm",)
) -> Iterator[EmulatedPlatform]:
    """Have host code run as if on `platform`, whatever device is here.

    - Each module of the packages `code_under_test` that has imported `current_platform`, of an installed vLLM or of a
      release's files, gets the emulated one.
    - On "xpu" and "cpu", `torch.cuda` and `Tensor.cuda` are closed to those packages: a use of them raises
      TouchedCudaError, which names the caller, at once and, should the caller swallow it, once more at the end. That is
      what vLLM's pull request 43646 mended. What torch and Triton do themselves is let through. On "rocm" torch.cuda is
      the way to AMD's GPUs and stays open.

    For one thread at a time. Everything is as before afterwards.
    """
    emulated = EmulatedPlatform(platform) if isinstance(platform, str) else platform
    packages = frozenset(code_under_test)
    believers = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith(code_under_test)  # sorts out nearly all, and quickly
        and name.partition(".")[0] in packages
        and "current_platform" in vars(module)
    ]
    before = [vars(module)["current_platform"] for module in believers]
    for module in believers:
        vars(module)["current_platform"] = emulated
    guard = _Guard(packages)
    try:
        if emulated.is_cuda_alike():
            yield emulated
        else:
            with guard.closed():
                yield emulated
    finally:
        for module, real in zip(believers, before):
            vars(module)["current_platform"] = real
    if guard.swallowed is not None:
        raise guard.swallowed


class _Guard:
    """Closes torch.cuda to some packages, and remembers the first time that one of them was turned away."""

    def __init__(self, packages: frozenset[str]) -> None:
        self.swallowed: TouchedCudaError | None = None
        self._packages = packages

    @contextmanager
    def closed(self) -> Iterator[None]:
        cuda, to_cuda = torch.cuda, torch.Tensor.cuda

        def guarded(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
            self.check("Tensor.cuda", sys._getframe(1))
            return to_cuda(tensor, *arguments, **options)

        torch.cuda = sys.modules["torch.cuda"] = _GuardedModule(cuda, self)
        torch.Tensor.cuda = guarded  # type: ignore[assignment,method-assign]
        try:
            yield
        finally:
            torch.cuda = sys.modules["torch.cuda"] = cuda
            torch.Tensor.cuda = to_cuda  # type: ignore[method-assign]

    def check(self, what: str, caller: types.FrameType) -> None:
        """Raise TouchedCudaError if the caller is under test."""
        module = str(caller.f_globals.get("__name__"))
        if module.partition(".")[0] not in self._packages:
            return
        error = TouchedCudaError(f"{module}.{caller.f_code.co_name}, line {caller.f_lineno}, uses {what}")
        self.swallowed = self.swallowed or error
        raise error


class _GuardedModule(types.ModuleType):
    """Stands in for torch.cuda."""

    def __init__(self, cuda: types.ModuleType, guard: _Guard) -> None:
        super().__init__("torch.cuda")
        self.__dict__.clear()  # so that every attribute is asked for
        object.__setattr__(self, "_real", (cuda, guard))

    def __getattr__(self, name: str) -> Any:
        cuda, guard = self.__dict__["_real"]
        if not name.startswith("__"):  # which an import asks for, and which is no use of the device
            guard.check(f"torch.cuda.{name}", sys._getframe(1))
        return getattr(cuda, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_real"][0], name, value)
