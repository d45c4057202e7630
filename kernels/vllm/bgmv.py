"""vLLM's bgmv functions: the wrapper above Intel's operators, and its own CPU implementation."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from kernelfuzz.kernels import releases
from kernelfuzz.kernels.base import Kernel, Launch, UnsupportedCaseError
from kernelfuzz.kernels.vllm import package
from kernelfuzz.kernels.vllm.platform import EmulatedPlatform, emulate_platform
from kernelfuzz.kernels.xpu.operators import load_operators
from kernelfuzz.strategies.bgmv import Inputs


def load_wrapper(root: Path | None, device: torch.device) -> Kernel:
    """Return `lora/ops/xpu_ops` of the vLLM under `root`, or of the installed one where it is None.

    Its calls of `torch.ops._xpu_C` land in the pinned vllm-xpu-kernels.
    """
    operators = releases.locate("vllm-xpu-kernels", releases.PINNED["vllm-xpu-kernels"])
    load_operators(operators, device)
    platform = EmulatedPlatform("xpu")
    module, version = _import("lora.ops.xpu_ops.lora_ops", root, platform)
    # An installed vLLM on an Intel GPU sees its real platform.
    launch = _launch(module, platform if root is not None or device.type == "cpu" else None)
    return Kernel(launch, version, {"layer": ["wrapper"]})


def load_torch(root: Path | None, device: torch.device) -> Kernel:
    """Return `lora/ops/torch_ops` of the vLLM under `root`, or of the installed one where it is None.

    Its shrink overwrites instead of accumulating.
    """
    module, version = _import("lora.ops.torch_ops.lora_ops", root, EmulatedPlatform(device.type))
    return Kernel(_launch(module, overwrites=True), version, {"layer": ["wrapper"], "accumulating_shrink": [False]})


def _import(name: str, root: Path | None, platform: EmulatedPlatform) -> tuple[Any, str]:
    if root is not None:
        package.import_from(root, platform)
    return package.import_module(name), package.version(root)


def _launch(module: Any, platform: EmulatedPlatform | None = None, *, overwrites: bool = False) -> Launch:
    """Return the launch of a module's functions, as if on `platform`."""

    def launch(inputs: Inputs, outputs: Mapping[str, torch.Tensor]) -> None:
        with nullcontext() if platform is None else emulate_platform(platform):
            call(inputs, outputs)

    def call(inputs: Inputs, outputs: Mapping[str, torch.Tensor]) -> None:
        case = inputs.case
        if case.layer != "wrapper" or (overwrites and case.op == "shrink" and case.accumulate):
            raise UnsupportedCaseError("this case is for Intel's operators")
        operands = (inputs.x, inputs.weights, outputs["output"], inputs.indices)
        if case.op == "shrink":
            module.bgmv_shrink(*operands, case.scale)
        elif case.op == "expand":
            module.bgmv_expand(*operands, case.accumulate)
        else:
            module.bgmv_expand_slice(*operands, case.slice_offset, case.slice_size, case.accumulate)

    return launch
