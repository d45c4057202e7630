"""vLLM's host code that lays fp8 MoE weights out for a backend, on CPU tensors, as if on any platform."""

import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from kernelfuzz.kernels.base import Kernel, UnsupportedCaseError, WrongResultError, deliver
from kernelfuzz.kernels.vllm import host_code, package
from kernelfuzz.kernels.vllm.platform import EmulatedPlatform, emulate_platform
from kernelfuzz.kernels.vllm.stand_in import StandIn, StandInLacksError
from kernelfuzz.strategies.errors import KernelfuzzError
from kernelfuzz.strategies.fp8_layout import BACKENDS, BLOCK, Case, Entry, Inputs

_LEFT_OUT = {
    "AITER": "their conversion needs AMD's aiter",
    "AITER_MXFP8": "their conversion needs AMD's aiter",
    "BATCHED_DEEPGEMM": "their conversion needs DeepGEMM",
    "CPU": "their conversion needs an operator of vLLM's CPU build",
    "CPU_W8A8": "their conversion needs an operator of vLLM's CPU build",
    "DEEPGEMM": "their conversion needs DeepGEMM",
    "FLASHINFER_TRTLLM": "their conversion needs FlashInfer",
    "HUMMING": "their conversion needs humming",
    "MARLIN": "their conversion needs a CUDA operator",
}
"""Backends whose conversion does not run on a CPU, and why."""

_METHODS: dict[Entry, tuple[str, str]] = {
    "checkpoint": ("quantization.fp8", "Fp8MoEMethod"),
    "online": ("quantization.online.fp8", "Fp8PerTensorOnlineMoEMethod"),
    "online_block": ("quantization.online.fp8", "Fp8PerBlockOnlineMoEMethod"),
    "online_legacy": ("quantization.fp8", "Fp8OnlineMoEMethod"),
}
"""The quantisation methods by entry: module and class."""


def load(root: Path | None, device: torch.device) -> Kernel:
    """Return the conversions of the vLLM under `root`, or of the installed one where it is None.

    Raises KernelfuzzError if it has none.
    """
    del device  # there is but one that these are for
    if root is None:
        host_code.emulate_operators()
    else:
        host_code.import_from(root, EmulatedPlatform("cpu"))
    # Imported late by the conversion, and on an XPU it would import Intel's kernels.
    xpu: Any = host_code.import_module("fused_moe.experts.xpu_moe")
    for_xpu = getattr(xpu, "prepare_fp8_moe_layer_for_xpu", None)
    takes_scales = for_xpu is not None and "w13_scale" in inspect.signature(for_xpu).parameters
    # Some helpers are decorated with torch.compile, which would compile them for every shape.
    torch.compiler.set_stance("force_eager")
    oracle: Any = host_code.import_module("fused_moe.oracle.fp8")
    version = package.version(root)
    if oracle is None:
        raise KernelfuzzError(f"vLLM {version} has no fused_moe/oracle/fp8.py: kernelfuzz knows it from 0.19 on")
    methods = {entry: method for entry, place in _METHODS.items() if (method := _method(*place)) is not None}

    def launch(inputs: Inputs, outputs: Mapping[str, torch.Tensor]) -> None:
        case = inputs.case
        if case.entry != "convert" and case.entry not in methods:
            raise UnsupportedCaseError(f"this release has no {' '.join(_METHODS[case.entry])}")
        if case.backend not in oracle.Fp8MoeBackend.__members__:
            raise UnsupportedCaseError(f"this release has no backend {case.backend}")
        if case.backend == "XPU" and case.scales != "per_tensor" and not takes_scales:
            raise UnsupportedCaseError("the XPU kernels of this release take one scale for an expert")
        backend = oracle.Fp8MoeBackend[case.backend]
        with emulate_platform(case.platform):
            if case.entry == "convert":
                results = _convert(oracle.convert_to_fp8_moe_kernel_format, backend, inputs)
            else:
                results = _load_weights(methods[case.entry], backend, inputs)
        for name, result in results.items():
            what = "scales" if name.endswith("_scale") else "weights"
            try:
                deliver(name, result, outputs[name])
            except WrongResultError as error:  # one mistake, whichever tensor shows it
                raise WrongResultError(what, f"{case.layout}_layout", str(error)) from error

    members = list(oracle.Fp8MoeBackend.__members__)
    offered = [name for name in members if name in BACKENDS and (name != "XPU" or for_xpu is not None)]
    return Kernel(launch, version, {"backend": offered, "entry": ["convert", *methods]}, _left_out(members, offered))


def _left_out(members: list[str], offered: list[str]) -> tuple[str, ...]:
    """Return a line for each reason why some of a release's backends are not run."""
    by_reason: dict[str, list[str]] = {}
    for name in members:
        if name not in offered:
            unknown = "this release has no conversion for them" if name in BACKENDS else "kernelfuzz does not know them"
            by_reason.setdefault(_LEFT_OUT.get(name, unknown), []).append(name)
    backends = [f"left out: backends {', '.join(names)}: {reason}" for reason, names in by_reason.items()]
    return (*backends, "left out: checkpoints with static scales of activations")


def _method(module_name: str, class_name: str) -> Any:
    module: Any = host_code.import_module(module_name)
    if module is None:
        return None
    if hasattr(module, "is_weights_pre_processed"):
        # A question to the loader, which is not there. The weights come from a checkpoint.
        module.is_weights_pre_processed = lambda: False
    return vars(module).get(class_name)


def _fp8(bits: torch.Tensor) -> torch.Tensor:
    return bits.view(torch.float8_e4m3fn)


def _convert(convert: Callable[..., tuple[torch.Tensor, ...]], backend: Any, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Call the conversion itself. It may only return its arguments or new tensors, but in the layout
    gate_up_swapped, where it is the caller's scales that are clamped."""
    case = inputs.case
    w13_scale, w2_scale = inputs.w13_scale, inputs.w2_scale
    assert w13_scale is not None
    assert w2_scale is not None
    w13, w2 = _fp8(inputs.w13), _fp8(inputs.w2)
    if case.layout == "gate_up_swapped":
        w13, w2 = inputs.w13, inputs.w2  # torch cannot flip float8 on a CPU, and bytes are as good
        w13_scale, w2_scale = w13_scale.clone(), w2_scale.clone()
    results = convert(
        fp8_backend=backend,
        layer=_layer(case),
        w13=w13,
        w2=w2,
        w13_scale=w13_scale,
        w2_scale=w2_scale,
        w13_input_scale=inputs.w13_input_scale,
        w2_input_scale=inputs.w2_input_scale,
    )
    return dict(zip(("w13", "w2", "w13_scale", "w2_scale"), results, strict=True))


class _Layer(torch.nn.Module):
    """A layer of vLLM's with as much of it as is needed."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise StandInLacksError(f"{name} of RoutedExperts") from None


def _layer(case: Case) -> torch.nn.Module:
    """Return a layer with what the conversions ask of one."""
    layer = _Layer()
    attributes: dict[str, Any] = {
        "num_experts": case.num_experts,
        "local_num_experts": case.num_experts,
        "global_num_experts": case.num_experts,
        "intermediate_size_per_partition": case.intermediate,
        "activation": StandIn("MoEActivation", is_gated=True),
        "moe_config": _moe_config(case),
        "w13_input_scale": None,
        "w2_input_scale": None,
    }
    if case.scales == "block":
        attributes["weight_block_size"] = [BLOCK, BLOCK]
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def _quant_config(case: Case) -> StandIn:
    return StandIn(
        "Fp8Config",
        activation_scheme="dynamic",
        is_checkpoint_fp8_serialized=case.entry == "checkpoint",
        weight_block_size=[BLOCK, BLOCK] if case.entry == "checkpoint" and case.scales == "block" else None,
    )


def _moe_config(case: Case) -> StandIn:
    return StandIn(
        "FusedMoEConfig",
        is_act_and_mul=True,
        has_bias=False,
        w13_num_shards=2,
        tp_size=1,
        ep_size=1,
        moe_backend="auto",
        hidden_dim=case.hidden,
        hidden_dim_unpadded=case.hidden,
        intermediate_size_per_partition=case.intermediate,
        intermediate_size_per_partition_unpadded=case.intermediate,
        moe_parallel_config=StandIn("FusedMoEParallelConfig", enable_eplb=False),
    )


def _load_weights(method_class: Any, backend: Any, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Have a quantisation method process the weights of a layer after they were loaded."""
    case = inputs.case
    block = case.scales == "block"
    scale_name = "weight_scale_inv" if block else "weight_scale"
    layer = _layer(case)
    online = case.entry != "checkpoint"
    for name in ("w13", "w2"):
        weights = getattr(inputs, name).clone()  # the layer's own, which may be changed in place
        _set_parameter(layer, f"{name}_weight", weights if online else _fp8(weights))
        if not online:
            _set_parameter(layer, f"{name}_{scale_name}", getattr(inputs, f"{name}_scale").clone())
    method = _make(method_class, backend, layer, _quant_config(case))
    for _ in range(case.calls):
        method.process_weights_after_loading(layer)
    results = {name: getattr(layer, f"{name}_weight").data for name in ("w13", "w2")}
    return results | {f"{name}_scale": getattr(layer, f"{name}_{scale_name}").data for name in ("w13", "w2")}


def _make(method_class: Any, backend: Any, layer: Any, quant_config: StandIn) -> Any:
    """Return a quantisation method that was told its backend, and that ends before it would make a kernel, which needs
    a GPU."""
    sys.modules[method_class.__module__].__dict__["select_fp8_moe_backend"] = lambda **_: (backend, None)
    offered = {"layer": layer, "moe": layer.moe_config, "quant_config": quant_config}
    wanted = inspect.signature(method_class.__init__).parameters
    method = method_class(**{name: value for name, value in offered.items() if name in wanted})
    method.get_fused_moe_quant_config = method._init_moe_kernel = _nothing
    return method


def _nothing(layer: torch.nn.Module) -> None:
    del layer


def _set_parameter(layer: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    layer.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
