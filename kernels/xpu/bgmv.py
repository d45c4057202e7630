"""Intel's bgmv operators, straight."""

from collections.abc import Mapping
from pathlib import Path

import torch

from kernelfuzz.kernels import releases
from kernelfuzz.kernels.base import Kernel, UnsupportedCaseError
from kernelfuzz.kernels.xpu.operators import load_operators
from kernelfuzz.strategies.bgmv import Inputs


def load(root: Path, device: torch.device) -> Kernel:
    """Return the operators of the vllm-xpu-kernels under `root`."""
    load_operators(root, device)
    operators = torch.ops._xpu_C

    def launch(inputs: Inputs, outputs: Mapping[str, torch.Tensor]) -> None:
        case = inputs.case
        if case.layer != "operator":
            raise UnsupportedCaseError("this case is for the wrapper above the operators")
        operands = (outputs["output"], inputs.x, inputs.weights, inputs.indices)
        if case.op == "shrink":
            operators.bgmv_shrink(*operands, case.scale)
        elif case.op == "expand":
            operators.bgmv_expand(*operands, case.accumulate)
        else:
            operators.bgmv_expand_slice(*operands, case.slice_offset, case.slice_size, case.accumulate)

    return Kernel(launch, releases.version_of(root, "vllm-xpu-kernels"), {"layer": ["operator"]})
