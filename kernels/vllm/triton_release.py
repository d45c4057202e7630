"""A vLLM whose Triton ops this process runs: its files or the installed package, on one device."""

from pathlib import Path
from typing import Any

import torch

from kernelfuzz.kernels import interpreter
from kernelfuzz.kernels.vllm import package
from kernelfuzz.kernels.vllm.platform import EmulatedPlatform


class TritonRelease:
    """Imports vLLM for `device`: from `root`, a folder that holds `vllm/`, or the installed one where `root` is None.

    On a CPU the process must have been started with TRITON_INTERPRET=1; Triton's interpreter is mended first.
    """

    def __init__(self, root: Path | None, device: torch.device) -> None:
        if device.type == "cpu":
            interpreter.install()
        self._platform = EmulatedPlatform(device.type)
        if root is not None:
            package.import_from(root, self._platform)
        self.version = package.version(root)

    def import_module(self, name: str) -> Any:
        """Import a module below `vllm`."""
        return package.import_module(name)

    def tell_compute_units(self, count: int) -> None:
        """Have the host code see a device of that many compute units. An installed vLLM sees its real device."""
        self._platform.compute_units = count
