"""A vLLM whose Triton ops this process runs: its files or the installed package, on one device."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kernelfuzz.kernels import interpreter
from kernelfuzz.kernels.vllm import package
from kernelfuzz.kernels.vllm.platform import DeviceCapability, EmulatedPlatform, emulate_platform


class TritonRelease:
    """Imports vLLM for `device`: from `root`, a folder that holds `vllm/`, or the installed one where `root` is None.

    On a CPU the process must have been started with TRITON_INTERPRET=1; Triton's interpreter is mended first.
    """

    def __init__(self, root: Path | None, device: torch.device) -> None:
        if device.type == "cpu":
            interpreter.install()
        self._emulates = device.type == "cpu" or (device.type == "xpu" and root is not None)
        self._platform = EmulatedPlatform(device.type)
        if device.type == "cuda":
            self._platform.capability = DeviceCapability(*torch.cuda.get_device_capability(device))
        if root is not None:
            package.import_from(root, self._platform)
        self.version = package.version(root)

    def import_module(self, name: str) -> Any:
        """Import a module below `vllm`."""
        return package.import_module(name)

    @contextmanager
    def on_platform(self, compute_units: int | None = None) -> Iterator[None]:
        """Have the host code see the device's platform, with that many compute units, and close `torch.cuda` to it
        where the platform is not CUDA's. An installed vLLM sees a real GPU as it is."""
        if compute_units is not None:
            self._platform.compute_units = compute_units
        if not self._emulates:
            yield
            return
        with emulate_platform(self._platform):
            yield
