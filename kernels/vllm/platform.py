"""The platform that vLLM's host code believes to run on."""

import sys
import types
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch

from kernelfuzz.kernels.vllm.stand_in import StandInLacksError
from kernelfuzz.strategies.devices import PLATFORMS, Platform
from kernelfuzz.strategies.errors import KernelfuzzError

_HOPPER = (9, 0)
_CUDA, _TO_CUDA = torch.cuda, torch.Tensor.cuda


class DeviceCapability(NamedTuple):
    """A GPU's compute capability, as vLLM's platforms give it."""

    major: int
    minor: int

    def to_int(self) -> int:
        """Return 90 for 9.0."""
        return 10 * self.major + self.minor

    def as_version_str(self) -> str:
        """Return "9.0" for 9.0."""
        return f"{self.major}.{self.minor}"


class TouchedCudaError(RuntimeError):
    """Code under test used `torch.cuda` on a platform that has none."""


class EmulatedPlatform:
    """Answers vLLM's `current_platform` questions for one kind of device.

    `compute_units` is what host code is told about the device's size. It may be asked for by an integer index or None;
    a `torch.device` is refused, as vLLM's own platforms cannot take one. `capability` is that of a CUDA device, a
    Hopper's unless told otherwise. A question that is not foreseen raises StandInLacksError, which is no failure of who
    asks. Raises KernelfuzzError for an unknown kind.
    """

    simple_compile_backend = "eager"

    def __init__(self, kind: str, capability: tuple[int, int] = _HOPPER) -> None:
        if kind not in PLATFORMS:
            raise KernelfuzzError(f"unknown platform {kind!r}: expected one of {', '.join(PLATFORMS)}")
        self.capability = DeviceCapability(*capability)
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

    def get_device_capability(self, device_id: int = 0) -> DeviceCapability | None:
        del device_id
        return self.capability if self.is_cuda() else None

    def has_device_capability(self, capability: int | tuple[int, int], device_id: int = 0) -> bool:
        del device_id
        return self.is_cuda() and self.capability >= _pair(capability)

    def is_device_capability(self, capability: int | tuple[int, int], device_id: int = 0) -> bool:
        del device_id
        return self.is_cuda() and self.capability == _pair(capability)

    def is_device_capability_family(self, capability: int, device_id: int = 0) -> bool:
        del device_id
        return self.is_cuda() and self.capability.major == capability // 10

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise StandInLacksError(f"current_platform.{name}")


def _pair(capability: int | tuple[int, int]) -> tuple[int, int]:
    return divmod(capability, 10) if isinstance(capability, int) else capability


@contextmanager
def emulate_platform(
    platform: EmulatedPlatform | Platform, code_under_test: tuple[str, ...] | str = ("vllm",)
) -> Iterator[EmulatedPlatform]:
    """Have host code run as if on `platform`, whatever device is here.

    - Each module of the packages `code_under_test` that has imported `current_platform`, of an installed vLLM or of a
      release's files, gets the emulated one, and so does whoever imports it meanwhile.
    - On "xpu" and "cpu", `torch.cuda` and `Tensor.cuda` are closed to those packages: a use of them raises
      TouchedCudaError, which names the caller, at once and, should the caller swallow it, once more at the end. That is
      what vLLM's pull request 43646 mended. What torch and Triton do themselves is let through, and so are functions
      of torch.cuda that a module imported by their names before. On "rocm" torch.cuda is the way to AMD's GPUs and
      stays open, as on "cuda".

    For one thread at a time; may be nested. Everything is as before afterwards.
    """
    emulated = EmulatedPlatform(platform) if isinstance(platform, str) else platform
    packages = (code_under_test,) if isinstance(code_under_test, str) else code_under_test
    guard = None if emulated.is_cuda_alike() else _Guard(frozenset(packages))
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            # The first condition sorts out nearly all, and quickly.
            if not name.startswith(packages) or name.partition(".")[0] not in packages:
                continue
            if "current_platform" in vars(module) or name.partition(".")[2] == "platforms":
                stack.enter_context(_replaced(vars(module), "current_platform", emulated))
            for attribute, value in list(vars(module).items()) if guard is not None else ():
                if value is _CUDA:
                    stack.enter_context(_replaced(vars(module), attribute, _CLOSED))
        if guard is not None:
            stack.enter_context(_replaced(vars(torch), "cuda", _CLOSED))
            stack.enter_context(_replaced(sys.modules, "torch.cuda", _CLOSED))
            stack.callback(setattr, torch.Tensor, "cuda", torch.Tensor.cuda)
            torch.Tensor.cuda = _to_cuda  # type: ignore[assignment,method-assign]
        stack.callback(setattr, _Guard, "active", _Guard.active)
        _Guard.active = guard  # none opens what is closed around it
        yield emulated
    if guard is not None and guard.swallowed is not None:
        raise guard.swallowed


@contextmanager
def _replaced(table: MutableMapping[str, Any], name: str, value: Any) -> Iterator[None]:
    """Have an entry be another one meanwhile."""
    had, before = name in table, table.get(name)
    table[name] = value
    try:
        yield
    finally:
        if had:
            table[name] = before
        else:
            table.pop(name, None)


class _Guard:
    """Turns some packages away from torch.cuda while it is the active one, and remembers the first time."""

    active: "_Guard | None" = None

    def __init__(self, packages: frozenset[str]) -> None:
        self.swallowed: TouchedCudaError | None = None
        self._packages = packages

    @classmethod
    def check(cls, what: str, caller: types.FrameType) -> None:
        """Raise TouchedCudaError if the caller is under test and CUDA is closed."""
        guard = cls.active
        module = str(caller.f_globals.get("__name__"))
        if guard is None or module.partition(".")[0] not in guard._packages:
            return
        error = TouchedCudaError(f"{module}.{caller.f_code.co_name}, line {caller.f_lineno}, uses {what}")
        guard.swallowed = guard.swallowed or error
        raise error


def _to_cuda(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
    """Stands in for Tensor.cuda."""
    _Guard.check("Tensor.cuda", sys._getframe(1))
    return _TO_CUDA(tensor, *arguments, **options)


class _ClosedModule(types.ModuleType):
    """Stands in for torch.cuda. Who keeps it for longer than a platform is emulated has torch.cuda through it."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")
        own: dict[str, Any] = vars(types.ModuleType)["__dict__"].__get__(self)
        own.clear()  # so that every attribute is asked for

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        """What is there is torch.cuda's, also for who patches it for a test."""
        return vars(_CUDA)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):  # which an import asks for, and which is no use of the device
            _Guard.check(f"torch.cuda.{name}", sys._getframe(1))
        return getattr(_CUDA, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("__"):
            _Guard.check(f"torch.cuda.{name}", sys._getframe(1))
        setattr(_CUDA, name, value)

    def __delattr__(self, name: str) -> None:
        _Guard.check(f"torch.cuda.{name}", sys._getframe(1))
        delattr(_CUDA, name)


_CLOSED = _ClosedModule()
