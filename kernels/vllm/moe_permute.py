"""vLLM's moe_permute and moe_unpermute: its Python half, on the compiled operators where there is a GPU, and on
stand-ins for them on a CPU."""

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from kernelfuzz.kernels.base import Kernel, UnsupportedCaseError, WrongResultError, deliver
from kernelfuzz.kernels.vllm import binary, host_code, package, permute_operators
from kernelfuzz.kernels.vllm.platform import EmulatedPlatform, emulate_platform
from kernelfuzz.strategies.errors import KernelfuzzError
from kernelfuzz.strategies.moe_permute import Inputs, PermuteInputs, UnpermuteInputs

_OPERATORS = ("moe_permute", "moe_unpermute")


def load(root: Path | None, device: torch.device) -> Kernel:
    """Return the functions of the vLLM under `root`, or of the installed one where it is None.

    Raises KernelfuzzError if it has none, or on a GPU if its library cannot be used here.
    """
    platform = EmulatedPlatform(device.type)
    if root is not None:
        host_code.import_from(root, platform)
    module: Any = host_code.import_module("fused_moe.moe_permute_unpermute")
    if module is None:
        raise KernelfuzzError(f"vLLM {package.version(root)} has no moe_permute_unpermute module")
    if device.type == "cpu":
        permute_operators.register()
        note = "its Python half, on stand-ins for the compiled operators of torch.ops._moe_C"
    else:
        for name in _OPERATORS:
            library = binary.load_operator(root, "_moe_C", name)
        binary.probe(library, device, lambda: _smallest_call(module, device))
        note = f"its Python half and the compiled operators of {library}"
    scratch: Any = getattr(module, "MoEPermuteScratch", None)
    keeps_rows = scratch is not None and "hidden_size" in inspect.signature(scratch).parameters

    def launch(inputs: Inputs, outputs: Mapping[str, torch.Tensor]) -> None:
        with emulate_platform(platform) if device.type == "cpu" else nullcontext():
            if isinstance(inputs, UnpermuteInputs):
                module.moe_unpermute(
                    outputs["output"], inputs.rows, inputs.topk_weights, inputs.inverse, inputs.offsets
                )
            else:
                assert isinstance(inputs, PermuteInputs)
                _permute(module, scratch, keeps_rows, inputs, outputs)

    offered = ["none"] if scratch is None else ["none", "metadata", "rows"] if keeps_rows else ["none", "metadata"]
    return Kernel(launch, package.version(root), {"scratch": offered}, (note,))


def _smallest_call(module: Any, device: torch.device) -> None:
    row = torch.ones((1, 8), dtype=torch.float16, device=device)
    weight = torch.ones((1, 1), dtype=torch.float32, device=device)
    module.moe_unpermute(torch.empty_like(row), row, weight, torch.zeros(1, dtype=torch.int32, device=device))


def _permute(
    module: Any, scratch_class: Any, keeps_rows: bool, inputs: PermuteInputs, outputs: Mapping[str, torch.Tensor]
) -> None:
    case = inputs.case
    dtype = getattr(torch, case.dtype)
    options: dict[str, Any] = {}
    if case.scratch != "none":
        if case.scratch == "metadata" and keeps_rows and not case.given_output:
            raise UnsupportedCaseError("a scratch of this release without rows needs the output to be given")
        if case.scratch == "rows" and not keeps_rows:
            raise UnsupportedCaseError("a scratch of this release keeps no rows")
        options["scratch"] = _scratch(scratch_class, keeps_rows, inputs)

    def call(x: torch.Tensor, topk_ids: torch.Tensor, scale: torch.Tensor | None, rows: torch.Tensor | None) -> Any:
        return module.moe_permute(
            x.view(dtype),
            scale,
            topk_ids,
            case.num_experts,
            inputs.num_local_experts,
            inputs.expert_map,
            None if rows is None else rows.view(dtype),
            **options,
        )

    for x, topk_ids in zip(inputs.earlier_x, inputs.earlier_topk_ids):
        rows = x.new_empty(x.shape[0] * case.top_k, case.hidden) if case.given_output else None
        call(x, topk_ids, None, rows)
    results = call(inputs.x, inputs.topk_ids, inputs.scale, outputs["permuted"] if case.given_output else None)
    if case.given_output and results[0].data_ptr() != outputs["permuted"].data_ptr():
        raise WrongResultError("permuted", "given_output_is_used", "the rows are not in the tensor that was given")
    for name, result in zip(("permuted", "permuted_scale", "offsets", "inverse", "permuted_idx"), results, strict=True):
        if name in outputs:
            deliver(name, result, outputs[name])


def _scratch(scratch_class: Any, keeps_rows: bool, inputs: PermuteInputs) -> Any:
    case = inputs.case
    device = case.placement.spelled(inputs.x.device)
    sizes = {"num_experts": case.num_experts, "num_local_experts": inputs.num_local_experts, "device": device}
    if not keeps_rows:
        return scratch_class(**sizes)
    if case.scratch == "rows":
        sizes |= {"hidden_size": case.hidden, "hidden_dtype": getattr(torch, case.dtype)}
    return scratch_class(max_num_tokens=case.scratch_tokens, topk=case.top_k, **sizes)
