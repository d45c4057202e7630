"""Imports the modules of vLLM's MoE and quantisation layers whose host code is tested, without the rest of vLLM."""

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch

from kernelfuzz.kernels.vllm import package, placeholders
from kernelfuzz.kernels.vllm.platform import EmulatedPlatform

_LAYERS = "vllm.model_executor.layers"

TESTED = (
    "vllm.envs",
    "vllm.lora",
    "vllm.model_executor.utils",
    "vllm.scalar_type",
    "vllm.triton_utils",
    "vllm.utils",
    f"{_LAYERS}.fused_moe.activation",
    f"{_LAYERS}.fused_moe.experts.cpu_moe",
    f"{_LAYERS}.fused_moe.experts.xpu_moe",
    f"{_LAYERS}.fused_moe.moe_permute_unpermute",
    f"{_LAYERS}.fused_moe.oracle.fp8",
    f"{_LAYERS}.fused_moe.xpu_fused_moe",
    f"{_LAYERS}.quantization.fp8",
    f"{_LAYERS}.quantization.online",
    f"{_LAYERS}.quantization.utils",
)
"""The modules, and what lies below them, that are imported from the release's files."""

_PACKAGES = ("cachetools", "compressed_tensors", "psutil", "pydantic", "regex", "requests", "transformers")
"""Packages that these modules import and, in what is tested, do not need."""


def import_from(root: Path, platform: EmulatedPlatform) -> None:
    """Make `import vllm.model_executor.layers...` lead to the files under `root`, a folder that holds `vllm/`, for the
    modules in `TESTED`, and to placeholders for the others. One release a process."""
    package.import_from(root, platform)
    package.stand_in_module("vllm._custom_ops", scaled_fp8_quant=scaled_fp8_quant)
    # No workspace manager: buffers are allocated when they are needed.
    for name in ("vllm.v1", "vllm.v1.worker"):
        package.stand_in_module(name)
    package.stand_in_module("vllm.v1.worker.workspace", is_workspace_manager_initialized=lambda: False)
    if (root / "vllm" / "envs.py").is_file():
        del sys.modules["vllm.envs"]  # the release's own has every flag
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    placeholders.install(root, TESTED, missing)


def emulate_operators() -> None:
    """Have the installed vLLM quantise on CPU tensors too."""
    operators: Any = importlib.import_module("vllm._custom_ops")
    operators.scaled_fp8_quant = scaled_fp8_quant


def import_module(name: str) -> types.ModuleType | None:
    """Import a module below `vllm.model_executor.layers` of the vLLM that this process uses; None if it has none of
    that name. What it does meanwhile is not watched by an emulated platform."""
    full = f"{_LAYERS}.{name}"
    with placeholders.importing():
        try:
            return importlib.import_module(full)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{full}.".startswith(f"{error.name}."):
                return None
            raise


def scaled_fp8_quant(
    input: torch.Tensor,
    scale: torch.Tensor | None = None,
    num_token_padding: int | None = None,
    scale_ub: torch.Tensor | None = None,
    use_per_token_if_dynamic: bool = False,
    output: torch.Tensor | None = None,
    group_shape: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise to float8_e4m3fn as vLLM's GPU operator of this name does: by `scale`, or by the largest magnitude of
    the tensor or, `use_per_token_if_dynamic`, of each row. Returns the quantised tensor and the float32 scale.

    Padding, upper bounds and groups are not needed by what is tested: raises NotImplementedError for them.
    """
    if any(option is not None for option in (num_token_padding, scale_ub, output, group_shape)):
        raise NotImplementedError("scaled_fp8_quant is emulated without padding, upper bounds, outputs and groups")
    values = input.to(torch.float32)
    largest = torch.finfo(torch.float8_e4m3fn).max
    if scale is None:
        magnitude = values.abs().amax(-1, keepdim=True) if use_per_token_if_dynamic else values.abs().amax().view(1)
        scale = (magnitude / largest).clamp(min=1.0 / (largest * 512.0))
    return (values / scale).clamp(-largest, largest).to(torch.float8_e4m3fn), scale
