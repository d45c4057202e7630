"""How a script gets vLLM's fp8 conversions, which lie deep in its quantisation layers, and calls them."""

from typing import Any

_LAYERS = "vllm.model_executor.layers"
_METHODS = {
    "checkpoint": ("quantization.fp8", "Fp8MoEMethod"),
    "online": ("quantization.online.fp8", "Fp8PerTensorOnlineMoEMethod"),
    "online_block": ("quantization.online.fp8", "Fp8PerBlockOnlineMoEMethod"),
    "online_legacy": ("quantization.fp8", "Fp8OnlineMoEMethod"),
}

IMPORTS = (
    "import importlib",
    "import importlib.abc",
    "import importlib.machinery",
    "import importlib.util",
    "import inspect",
    "import os",
    "import sys",
    "import types",
    "from pathlib import Path",
    "from types import SimpleNamespace",
    "from unittest.mock import MagicMock",
)

_ABSENT = f'''
class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for the modules of vLLM that the conversions import and do not need."""

    needed = (
        "{_LAYERS}.fused_moe.oracle.fp8",
        "{_LAYERS}.fused_moe.experts.xpu_moe",
        "{_LAYERS}.fused_moe.xpu_fused_moe",
        "{_LAYERS}.quantization.fp8",
        "{_LAYERS}.quantization.online",
        "{_LAYERS}.quantization.utils",
        "vllm.model_executor.utils",
    )

    def find_spec(self, name, path=None, target=None):
        is_needed = any(f"{{name}}.".startswith(f"{{each}}.") for each in self.needed) and "humming" not in name
        if name.partition(".")[0] != "vllm" or is_needed:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__path__ = [str(root / spec.name.replace(".", "/"))]
        module.__getattr__ = self.absent
        return module

    def exec_module(self, module):
        pass

    def absent(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name in used:
            return used[name]
        if name[0].islower():
            return MagicMock(name=name)
        return type(name, (Anything,), {{}})


class Anything:
    """Stands in for the classes of vLLM that others inherit from."""

    def __init__(self, moe=None, *_, **__):
        self.moe = moe

    def __class_getitem__(cls, item):
        return cls


def scaled_fp8_quant(values, scale=None, **_):
    """Quantise a tensor as vLLM's GPU operator does."""
    values = values.float()
    scale = (values.abs().amax().view(1) / 448.0).clamp(min=1.0 / (448.0 * 512.0)) if scale is None else scale
    return (values / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), scale
'''


def setup(case: Any, root: str) -> str:
    """Return code that imports the conversion; `root` is code that finds the package."""
    place = _METHODS.get(case.entry)
    method = "" if place is None else f"    from {_LAYERS}.{place[0]} import {place[1]} as Method\n"
    kind = case.platform
    return f"""\
{_ABSENT}

{root}
platform = MagicMock()  # what vLLM is told to run on
used = {{
    "current_platform": platform,
    "scaled_fp8_quant": scaled_fp8_quant,
    "cdiv": lambda a, b: -(-a // b),
    "round_up": lambda a, b: -(-a // b) * b,
}}
for question in ("is_cuda", "is_rocm", "is_cuda_alike", "is_xpu", "is_cpu", "is_tpu", "is_out_of_tree"):
    getattr(platform, question).return_value = False
platform.fp8_dtype.return_value = torch.float8_e4m3fn
platform.is_fp8_fnuz.return_value = False
if installed is None:
    sys.meta_path.insert(0, Absent())
torch.compiler.set_stance("force_eager")
try:
    fp8 = importlib.import_module("{_LAYERS}.fused_moe.oracle.fp8")
    # The conversion imports it late, and on an Intel GPU that would import Intel's kernels.
    importlib.import_module("{_LAYERS}.fused_moe.experts.xpu_moe")
{method}except ImportError as error:
    print(f"this vLLM cannot be imported: {{error}}")
    sys.exit(2)
platform.is_{kind}.return_value = True
platform.is_cuda_alike.return_value = {kind in ("cuda", "rocm")}
"""


def call(case: Any) -> str:
    """Return the call: of the conversion itself, or of the quantisation method that uses it after loading."""
    bits = case.layout == "gate_up_swapped"
    code = f"""\
moe = SimpleNamespace(
    is_act_and_mul=True,
    has_bias=False,
    w13_num_shards=2,
    tp_size=1,
    ep_size=1,
    moe_backend="auto",
    hidden_dim={case.hidden},
    hidden_dim_unpadded={case.hidden},
    intermediate_size_per_partition={case.intermediate},
    intermediate_size_per_partition_unpadded={case.intermediate},
    moe_parallel_config=SimpleNamespace(enable_eplb=False),
)
layer = torch.nn.Module()
vars(layer).update(
    num_experts={case.num_experts},
    local_num_experts={case.num_experts},
    global_num_experts={case.num_experts},
    intermediate_size_per_partition={case.intermediate},
    activation=SimpleNamespace(is_gated=True),
    moe_config=moe,
    w13_input_scale=None,
    w2_input_scale=None,
)
backend = fp8.Fp8MoeBackend.{case.backend}
"""
    if case.scales == "block":
        code += "layer.weight_block_size = [128, 128]\n"
    if case.entry == "convert":
        as_fp8 = "" if bits else ".view(torch.float8_e4m3fn)"
        clone = ".clone()" if bits else ""
        given = [f"w13_input_scale={'w13_input_scale' if case.input_scales else None}"]
        given += [f"w2_input_scale={'w2_input_scale' if case.input_scales else None}"]
        return f"""{code}results = fp8.convert_to_fp8_moe_kernel_format(
    fp8_backend=backend,
    layer=layer,
    w13=w13{as_fp8},
    w2=w2{as_fp8},
    w13_scale=w13_scale{clone},
    w2_scale=w2_scale{clone},
    {", ".join(given)},
)
w13_result, w2_result, w13_scale_result, w2_scale_result = results
w13_result, w2_result = w13_result.view(torch.uint8), w2_result.view(torch.uint8)
"""
    online = case.entry != "checkpoint"
    scale = "weight_scale_inv" if case.scales == "block" else "weight_scale"
    as_fp8 = "" if online else ".view(torch.float8_e4m3fn)"
    weights = f'("w13_weight", w13.clone(){as_fp8}), ("w2_weight", w2.clone(){as_fp8})'
    scales = "" if online else f', ("w13_{scale}", w13_scale.clone()), ("w2_{scale}", w2_scale.clone())'
    block = "[128, 128]" if not online and case.scales == "block" else None
    return f"""{code}for name, value in ({weights}{scales}):
    layer.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
vars(sys.modules[Method.__module__])["select_fp8_moe_backend"] = lambda **_: (backend, None)
vars(sys.modules[Method.__module__])["is_weights_pre_processed"] = lambda: False
config = SimpleNamespace(
    activation_scheme="dynamic", is_checkpoint_fp8_serialized={not online}, weight_block_size={block}
)
offered = {{"layer": layer, "moe": moe, "quant_config": config}}
wanted = inspect.signature(Method.__init__).parameters
method = Method(**{{name: value for name, value in offered.items() if name in wanted}})
method.get_fused_moe_quant_config = method._init_moe_kernel = lambda layer: None
for _ in range({case.calls}):
    method.process_weights_after_loading(layer)
w13_result, w2_result = layer.w13_weight.data.view(torch.uint8), layer.w2_weight.data.view(torch.uint8)
w13_scale_result, w2_scale_result = layer.w13_{scale}.data, layer.w2_{scale}.data
"""
