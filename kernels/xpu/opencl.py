"""Intel's OpenCL runtime for CPUs: build a SPIR-V module once, and launch its kernels on torch's own memory.

One process has one context and one queue, made at first use and never closed. They do not survive a fork: a child
process must not use what its parent made.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kernelfuzz.kernels.releases import home
from kernelfuzz.kernels.xpu.spirv import Instantiation, entry_points
from kernelfuzz.strategies.errors import KernelfuzzError

_REMEDY = "pip install 'kernelfuzz[xpu-cpu]'"
_UNSUPPORTED = "use a release of vllm-xpu-kernels whose launch code kernelfuzz knows"
_LIBRARY = "libintelocl.so"
_VENDORS = "OCL_ICD_VENDORS"


@dataclass(frozen=True)
class LocalMemory:
    """A kernel argument that stands for this many bytes of memory shared by a work-group."""

    size: int


Argument = torch.Tensor | np.generic | LocalMemory | None
"""What a launch passes: a CPU tensor's memory, a number or a structure by value, local memory, or a null pointer."""


class Entry:
    """A kernel that is ready to be launched, any number of times, from one thread at a time."""

    def __init__(self, queue: Any, kernel: Any) -> None:
        self._queue = queue
        self._kernel = kernel

    def launch(self, global_range: Sequence[int], local_range: Sequence[int], arguments: Sequence[Argument]) -> None:
        """Run the kernel and wait for it.

        The ranges are in SYCL's order, the slowest dimension first. Tensors are passed by the address of their first
        element, whatever their strides, alignment and extent, and without a copy; an empty tensor is a null pointer.
        Raises KernelfuzzError if the kernel takes another number of arguments.
        """
        import pyopencl as cl

        if len(arguments) != self._kernel.num_args:
            raise KernelfuzzError(
                f"{self._kernel.function_name} takes {self._kernel.num_args} arguments where kernelfuzz knows "
                f"{len(arguments)}: {_UNSUPPORTED}"
            )
        for position, argument in enumerate(arguments):
            self._kernel.set_arg(position, _encode(argument))
        cl.enqueue_nd_range_kernel(
            self._queue, self._kernel, tuple(reversed(global_range)), tuple(reversed(local_range))
        ).wait()


def _encode(argument: Argument) -> Any:
    import pyopencl as cl

    if isinstance(argument, torch.Tensor):
        address = argument.data_ptr()
        return cl.SVM((ctypes.c_char * 1).from_address(address)) if address else None
    return cl.LocalMemory(argument.size) if isinstance(argument, LocalMemory) else argument


class Runtime:
    """The Intel CPU as an OpenCL device. Use `runtime()`; a process needs one."""

    def __init__(self, device: Any) -> None:
        import pyopencl as cl

        self._device = device
        self._context = cl.Context([device])
        self._queue = cl.CommandQueue(self._context)
        self._programs: dict[bytes, Any] = {}

    def entry(self, module: bytes, symbol: str) -> Entry:
        """The kernel `symbol` of a SPIR-V module.

        The module is built when it is first asked for (seconds), or its binary is taken from the cache (hundredths).
        """
        import pyopencl as cl

        if module not in self._programs:
            self._programs[module] = self._program(module)
        return Entry(self._queue, cl.Kernel(self._programs[module], symbol))

    def _program(self, module: bytes) -> Any:
        import pyopencl as cl

        path = home() / "opencl" / f"{self._digest(module)}.bin"
        binary = _read_binary(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", cl.CompilerWarning)  # the compiler talks even where it has nothing to say
            if binary is not None:
                try:
                    return cl.Program(self._context, [self._device], [binary]).build()
                except cl.Error:
                    pass  # a binary that this runtime refuses is as good as none
            program = cl.Program(self._context, module).build()
        _write_binary(path, program.get_info(cl.program_info.BINARIES)[0])
        return program

    def _digest(self, module: bytes) -> str:
        """Names what a binary depends on: the module, the compiler, and the instructions that this CPU has."""
        device = self._device
        identity = (device.platform.version, device.driver_version, device.version, device.name, _cpu_features())
        return hashlib.sha256("\n".join(identity).encode() + b"\0" + module).hexdigest()


class Library:
    """Chosen kernels of a shared library that holds SPIR-V, each built when it is first asked for.

    Raises KernelfuzzError if the library cannot be read or lacks one of the kernels named altogether.
    """

    def __init__(self, path: Path, kernels: Sequence[str]) -> None:
        self._path = path
        try:
            self._points = entry_points(path, kernels)
        except OSError as error:
            raise KernelfuzzError(f"cannot read {path}: {error.strerror or error}") from error
        if missing := set(kernels) - {found.name for found in self._points}:
            raise KernelfuzzError(f"{path} has no SPIR-V of {', '.join(sorted(missing))}: {_UNSUPPORTED}")
        self._entries: dict[tuple[str | int, ...], Entry] = {}

    def entry(self, kernel: str, *arguments: str | int) -> Entry:
        """The kernel with these template arguments. Raises KernelfuzzError if the library has no such instantiation."""
        key = (kernel, *arguments)
        if key not in self._entries:
            wanted = Instantiation(kernel, arguments)
            if wanted not in self._points:
                raise KernelfuzzError(f"{self._path} has no instantiation {wanted}: {_UNSUPPORTED}")
            point = self._points[wanted]
            self._entries[key] = runtime().entry(point.module, point.symbol)
        return self._entries[key]


@functools.cache
def runtime() -> Runtime:
    """This process's runtime. Raises KernelfuzzError with `unavailable()`'s line where there is none."""
    if reason := unavailable():
        raise KernelfuzzError(reason)
    return Runtime(_intel_cpu())


@functools.cache
def unavailable() -> str | None:
    """Why nothing can run here, in one line with the remedy; None if it can. Loads pyopencl and the runtime."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"Intel's OpenCL runtime for CPUs needs x86-64 Linux, this is {platform.machine()} {platform.system()}"
    try:
        device = _intel_cpu()
    except ImportError:
        return f"pyopencl is not installed: {_REMEDY}"
    if device is None:
        return f"no Intel CPU among the OpenCL devices: {_REMEDY}"
    import pyopencl as cl

    if not device.svm_capabilities & cl.device_svm_capabilities.FINE_GRAIN_SYSTEM:
        return f"the OpenCL device {device.name!r} cannot use torch's memory: upgrade it with {_REMEDY}"
    return None


@functools.cache
def _intel_cpu() -> Any:
    """The Intel runtime's CPU device, or None. Raises ImportError without pyopencl."""
    import pyopencl as cl

    with _vendors():
        try:
            platforms = cl.get_platforms()
        except cl.Error:  # what an ICD loader that finds no vendor says
            return None
    devices = [device for found in platforms if "Intel" in found.vendor for device in found.get_devices()]
    return next((device for device in devices if device.type & cl.device_type.CPU), None)


@contextmanager
def _vendors() -> Iterator[None]:
    """Lead the OpenCL loader, which looks once per process, to the Intel runtime that pip installed.

    A user's own setting stands if it leads to an Intel CPU runtime; without pip's, the system's vendors are asked.
    """
    chosen, library = os.environ.get(_VENDORS), _installed_library()
    if library is None or (chosen and _names_intel_cpu(Path(chosen))):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="kernelfuzz-") as folder:
        (Path(folder) / "intel-cpu.icd").write_text(f"{library}\n")
        os.environ[_VENDORS] = folder
        try:
            yield
        finally:
            os.environ.pop(_VENDORS)
            if chosen is not None:
                os.environ[_VENDORS] = chosen


def _installed_library() -> Path | None:
    try:
        files = importlib.metadata.files("intel-opencl-rt") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    libraries = (Path(str(file.locate())).resolve() for file in files if file.name == _LIBRARY)
    return next((library for library in libraries if library.exists()), None)


def _names_intel_cpu(vendors: Path) -> bool:
    """Whether a vendor file, or one of a folder of them, holds the name of an Intel CPU runtime that is there."""
    for icd in [vendors] if vendors.is_file() else sorted(vendors.glob("*.icd")):
        library = Path(icd.read_text(errors="replace").strip())
        if library.name.startswith(_LIBRARY) and (library.exists() or not library.is_absolute()):
            return True
    return False


def _cpu_features() -> str:
    """The model and the instruction sets of the first processor, as the kernel of the operating system lists them."""
    lines = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n", 1)[0].splitlines()
    return "\n".join(
        line for line in lines if re.match(r"(vendor_id|model name|cpu family|model|stepping|flags)\b", line)
    )


def _read_binary(path: Path) -> bytes | None:
    """A cached binary, which stands behind its own digest; None if there is none that is whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, binary = content[:32], content[32:]
    return binary if hashlib.sha256(binary).digest() == digest else None


def _write_binary(path: Path, binary: bytes) -> None:
    """Cache a binary, whole or not at all. Where nothing can be written, the next process builds it again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".binary-")
    except OSError:
        return
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(hashlib.sha256(binary).digest() + binary)
        Path(temporary).replace(path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
