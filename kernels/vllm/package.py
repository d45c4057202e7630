"""Imports a vLLM release's LoRA ops from its files, without installing vLLM.

The ops need few names of vLLM's own: environment flags, a logger, the platform, and helpers for integers, copies and
custom ops. A stand-in `vllm` package provides those, and its `__path__` leads to the release's real files for
everything else.
"""

import importlib
import logging
import sys
import types
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from kernelfuzz.kernels import releases
from kernelfuzz.kernels.vllm.platform import EmulatedPlatform

_library = torch.library.Library("vllm", "FRAGMENT")  # type: ignore[no-untyped-call]

_ENVIRONMENT: dict[str, Any] = {
    "VLLM_BATCH_INVARIANT": False,
    "VLLM_TUNED_CONFIG_FOLDER": None,
    "VLLM_LORA_DISABLE_PDL": False,
    "VLLM_LORA_ENABLE_DUAL_STREAM": False,
}


class _Logger(logging.Logger):
    def warning_once(self, *args: Any, **kwargs: Any) -> None:
        """Say nothing: vLLM's hint that no tuned configuration was found is meant for its users."""

    info_once = debug_once = warning_once


def import_from(root: Path, platform: EmulatedPlatform) -> None:
    """Make `import vllm.lora.ops...` lead to the files under `root`, a folder that holds `vllm/`.

    One release a process: what is registered with torch and compiled by Triton cannot be undone.
    """
    import triton
    import triton.language as tl
    import triton.tools.tensor_descriptor  # vLLM's ops take it for granted, and triton imports it late

    package = root / "vllm"
    stand_in_module("vllm", path=package)
    stand_in_module("vllm.envs", **_ENVIRONMENT)
    stand_in_module("vllm.logger", init_logger=lambda name: _Logger(name, logging.ERROR))
    stand_in_module("vllm.platforms", current_platform=platform)
    stand_in_module(
        "vllm.distributed",
        tensor_model_parallel_all_gather=lambda tensor: tensor,
        tensor_model_parallel_all_reduce=lambda tensor: tensor,
    )
    stand_in_module("vllm.utils", path=package / "utils")
    stand_in_module(
        "vllm.utils.math_utils",
        next_power_of_2=lambda n: 1 if n <= 1 else 1 << (n - 1).bit_length(),
        cdiv=lambda a, b: -(-a // b),
        round_up=lambda a, b: -(-a // b) * b,
    )
    stand_in_module(
        "vllm.utils.torch_utils",
        direct_register_custom_op=register_custom_op,
        async_tensor_h2d=lambda data, dtype, device: torch.tensor(data, dtype=dtype, device=device),
    )
    stand_in_module("vllm.utils.mem_utils", get_max_shared_memory_bytes=_max_shared_memory_bytes)
    stand_in_module(
        "vllm.triton_utils",
        path=package / "triton_utils",
        HAS_TRITON=True,
        triton=triton,
        tl=tl,
        LOG2E=1.4426950408889634,
        LOGE2=0.6931471805599453,
    )
    stand_in_module("vllm.lora", path=package / "lora")
    stand_in_module("vllm.lora.ops", path=package / "lora" / "ops")


def import_module(name: str) -> Any:
    """Import a module of the vLLM that this process uses, stand-in or installed."""
    return importlib.import_module(f"vllm.{name}")


def version(root: Path | None) -> str:
    """Return the version of the vLLM under `root`, or of the installed one where it is None."""
    return metadata.version("vllm") if root is None else releases.version_of(root, "vllm")


def stand_in_module(name: str, path: Path | None = None, **attributes: Any) -> None:
    """Have `import name` give a module with these attributes; what lies below it is looked for in the folder `path`."""
    module = types.ModuleType(name)
    if path is not None:
        module.__path__ = [str(path)]
    module.__dict__.update(attributes)
    sys.modules[name] = module
    parent, _, leaf = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], leaf, module)


def register_custom_op(
    op_name: str,
    op_func: Callable[..., Any],
    mutates_args: Sequence[str] = (),
    fake_impl: Callable[..., Any] | None = None,
    **options: Any,
) -> None:
    """Register `torch.ops.vllm.<op_name>` for every backend, as vLLM does at import."""
    del fake_impl, options
    schema = torch.library.infer_schema(op_func, mutates_args=list(mutates_args))
    _library.define(op_name + schema)  # type: ignore[no-untyped-call]
    _library.impl(op_name, op_func, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


def _max_shared_memory_bytes(gpu: int | None = 0) -> int:
    if not torch.cuda.is_available():
        return 232_448  # an H100's, so that the CPU takes the host code's usual branch
    properties: Any = torch.cuda.get_device_properties(gpu or 0)
    return int(properties.shared_memory_per_block_optin)
