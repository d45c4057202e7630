"""How a script gets a kernel and calls it."""

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kernelfuzz.fuzz.job import Job
from kernelfuzz.fuzz.reproducer import fp8_layout
from kernelfuzz.fuzz.reproducer.literals import namespace
from kernelfuzz.fuzz.testing.source import TestSource
from kernelfuzz.strategies import own
from kernelfuzz.strategies.errors import KernelfuzzError

NO_ARGUMENTS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Access:
    """Code that gets a kernel and code that calls it, with the names of the input and output variables.

    - imports: lines; setup: statements at the top level, before the tensors; call: statements
    - device: where the tensors are made
    """

    setup: str
    call: str
    device: str
    imports: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subject:
    """What a script is about: the job, the version of its kernel, the inputs of the case, the names of the output
    variables by output, and what else a kernel test's function is given."""

    job: Job
    version: str
    inputs: Any
    outputs: dict[str, str]
    arguments: Mapping[str, Any] = field(default_factory=dict)


def access(subject: Subject) -> Access:
    """Return how the kernel is got and called. Raises KernelfuzzError for one that no script can get."""
    package, test = subject.job.kernel.package, subject.job.test
    if test is not None and package == test.name:
        return _of_test(subject, test)
    if ":" in package:
        return _of_user(subject)
    make = _ACCESS.get((subject.job.target.name, package)) or _ACCESS.get(("", package))
    if make is None:
        raise KernelfuzzError(f"no script can get {subject.job.kernel} for {subject.job.target.name}")
    return make(subject)


def _device(subject: Subject) -> str:
    return subject.job.device.type


def _interpreted(subject: Subject) -> tuple[str, ...]:
    """Return what must stand before the other imports, so that a CPU can run Triton kernels."""
    return ("import os", 'os.environ["TRITON_INTERPRET"] = "1"') if _device(subject) == "cpu" else ()


def _of_user(subject: Subject) -> Access:
    module, _, function = subject.job.kernel.package.partition(":")
    return Access(
        "",
        f"{_bundle(subject)}{function}(inputs, outputs)\n",
        _device(subject),
        ("from types import SimpleNamespace", f"from {module} import {function}", *_interpreted(subject)),
    )


def _of_test(subject: Subject, test: TestSource) -> Access:
    """A kernel test's function, from its file. `kernel_test` leaves it there as it was written."""
    path, _, method = test.name.rpartition(".")
    owner = f"test_module.{path}()." if path else "test_module."
    load = f"""\
# The file of the test, whose function calls the kernel.
file = Path({test.file!r})
sys.path.insert(0, str(file.parent))
spec = importlib.util.spec_from_file_location(file.stem, file)
test_module = importlib.util.module_from_spec(spec)
sys.modules[file.stem] = test_module
spec.loader.exec_module(test_module)
launch = {owner}{method}.kernel_test.function


class Outputs(dict):
    __getattr__ = dict.__getitem__
"""
    given = "".join(f", {name}={value!r}" for name, value in subject.arguments.items())
    instance = f"test_module.{path}(), " if path else ""
    return Access(
        load,
        f"{_bundle(subject, 'Outputs(')}launch({instance}inputs, outputs{given})\n",
        _device(subject),
        (
            "import importlib.util",
            "from pathlib import Path",
            "from types import SimpleNamespace",
            *_interpreted(subject),
        ),
    )


def _bundle(subject: Subject, kind: str = "") -> str:
    """Return code that makes `inputs` and `outputs`, a dict or a `kind` of it, as kernelfuzz hands them to a kernel."""
    inputs = vars(subject.inputs).items()
    given = [f"{name}={_given(name, value)}" for name, value in inputs if name != "case"]
    outputs = ", ".join(f'"{name}": {variable}' for name, variable in subject.outputs.items())
    case = ""
    if not isinstance(subject.inputs.case, own.Case):  # which says no more than the inputs themselves
        given = ["case=case", *given]
        case = f"case = {namespace(subject.inputs.case)}\n"
    return f"{case}inputs = SimpleNamespace({', '.join(given)})\noutputs = {kind}{{{outputs}}}{')' if kind else ''}\n"


def _given(name: str, value: Any) -> str:
    return repr(value) if value is None or isinstance(value, (int, float, str)) else name


def _of_example(subject: Subject) -> Access:
    name = subject.job.target.name
    bug = repr(subject.job.kernel.version)
    return Access(
        f'kernel = {name}.load({bug}, torch.device("{_device(subject)}"))\n',
        f"{_bundle(subject)}kernel.launch(inputs, outputs)\n",
        _device(subject),
        (
            "from types import SimpleNamespace",
            f"from kernelfuzz.kernels.examples import {name}",
            *_interpreted(subject),
        ),
    )


# vLLM.

_STAND_IN = '''
def stand_in(name, path=None, **names):
    """Have `import name` give a module with these names: the rest of vLLM is not needed for this."""
    module = types.ModuleType(name)
    if path is not None:
        module.__path__ = [str(path)]
    vars(module).update(names)
    sys.modules[name] = module
'''


def _root(subject: Subject, package: str) -> str:
    """Return code for `root`, the folder that holds the package: where it is installed, or kernelfuzz's copy."""
    version, folder = subject.job.kernel.version, package.replace("-", "_")
    if version is not None and ("/" in version or version.startswith("~")):
        return f'installed, root = None, Path("{Path(version).expanduser()}")\n'
    variable = f"{folder.upper()}_VERSION"
    return f"""\
# The installed package, or kernelfuzz's copy of a release: of the one in ${variable}, if that is set.
installed = None if "{variable}" in os.environ else importlib.util.find_spec("{folder}")
home = Path(os.environ.get("KERNELFUZZ_HOME", Path.home() / ".cache" / "kernelfuzz"))
version = os.environ.get("{variable}", "{subject.version}")
root = Path(installed.origin).parents[1] if installed else home / "releases" / "{package}" / version
if not root.is_dir():
    print(f"{package} is neither installed nor in {{root}}: kernelfuzz releases fetch {package}=={{version}}")
    sys.exit(2)
print(f"{package} in {{root}}")
"""


def _imported(*lines: str) -> str:
    """Return code that imports what the rest needs, or says that the script cannot run."""
    return (
        f"try:\n{''.join(f'    {line}' + chr(10) for line in lines)}"
        'except ImportError as error:\n    print(f"this vLLM cannot be imported: {error}")\n    sys.exit(2)\n'
    )


def _vllm_sources(subject: Subject, more: str = "") -> str:
    """Return code that makes `import vllm.lora.ops` lead to the installed vLLM, or to a copy of its files."""
    stand_ins = f"""\
stand_in("vllm", root / "vllm")
stand_in("vllm.lora", root / "vllm/lora")
stand_in("vllm.lora.ops", root / "vllm/lora/ops")
stand_in("vllm.logger", init_logger=MagicMock())
stand_in("vllm.utils", root / "vllm/utils")
stand_in(
    "vllm.utils.torch_utils",
    direct_register_custom_op=register,
    async_tensor_h2d=lambda data, dtype, device: torch.tensor(data, dtype=dtype, device=device),
)
{more}"""
    return f"""\
{_STAND_IN}

def register(op_name, op_func, mutates_args=(), **_):
    \"\"\"Register torch.ops.vllm.<op_name> as vLLM does.\"\"\"
    library.define(op_name + torch.library.infer_schema(op_func, mutates_args=list(mutates_args)))
    library.impl(op_name, op_func, "CompositeExplicitAutograd")


{_root(subject, "vllm")}
library = torch.library.Library("vllm", "FRAGMENT")
if installed is None:  # what the files of the copy import of the rest of vLLM
{textwrap.indent(stand_ins, "    ")}
"""


_BGMV_SHRINK = """
def bgmv_shrink(outputs, inputs, weights, indices, scale):
    weights = weights.flatten(0, -3)
    if outputs.size(1) != weights.size(-2):
        raise RuntimeError("output_tensor.size(1) must match lora_a_weights.size(-2)")
    for row, adapter in enumerate(indices.tolist()):
        if adapter >= 0:
            outputs[row] += (scale * (weights[adapter].float() @ inputs[row].float())).to(outputs.dtype)
"""
_BGMV_EXPAND = """
def bgmv_expand(outputs, inputs, weights, indices, add_to_output):
    bgmv_expand_slice(outputs, inputs, weights, indices, 0, outputs.size(1), add_to_output)


def bgmv_expand_slice(outputs, inputs, weights, indices, slice_offset, slice_size, add_to_output):
    weights = weights.flatten(0, -3)
    if weights.size(-2) != slice_size:
        raise RuntimeError("lora_b_weights.size(-2) must match slice_size")
    if slice_offset + slice_size > outputs.size(1):
        raise RuntimeError("slice_size + slice_offset out of bounds for output dimension")
    for row, adapter in enumerate(indices.tolist()):
        if adapter >= 0:
            old = outputs[row, slice_offset : slice_offset + slice_size]
            product = (weights[adapter].float() @ inputs[row].float()).to(outputs.dtype)
            old.copy_(old + product if add_to_output else product)
"""
_XPU_SCHEMAS = {
    "bgmv_shrink": "float scale",
    "bgmv_expand": "bool add_to_output",
    "bgmv_expand_slice": "int slice_offset, int slice_size, bool add_to_output",
}


def _xpu_operators(case: Any) -> str:
    """Return code for Intel's operators, which vLLM's wrapper calls."""
    names = ["bgmv_shrink"] if case.op == "shrink" else ["bgmv_expand", "bgmv_expand_slice"]
    registered = "".join(
        f'    xpu.define(f"{name}({{tensors}}, {_XPU_SCHEMAS[name]}) -> ()")\n    xpu.impl("{name}", {name}, "CPU")\n'
        for name in names
    )
    return f"""\
# Intel's operators below the wrapper; without an Intel GPU in plain torch, with the checks that they make.
{_BGMV_SHRINK if case.op == "shrink" else _BGMV_EXPAND}

if torch.xpu.is_available():
    import vllm_xpu_kernels._xpu_C  # noqa: F401
else:
    xpu = torch.library.Library("_xpu_C", "FRAGMENT")
    tensors = "Tensor! outputs, Tensor inputs, Tensor weights, Tensor indices"
{registered}
"""


def _bgmv_call(case: Any, prefix: str, first: str) -> str:
    if case.op == "shrink":
        return f"{prefix}bgmv_shrink({first}, {case.scale!r})\n"
    if case.op == "expand":
        return f"{prefix}bgmv_expand({first}, {case.accumulate})\n"
    return f"{prefix}bgmv_expand_slice({first}, {case.slice_offset}, {case.slice_size}, {case.accumulate})\n"


def _bgmv_wrapper(subject: Subject) -> Access:
    case = subject.inputs.case
    imported = _imported("from vllm.lora.ops.xpu_ops import lora_ops")
    setup = f"{_xpu_operators(case)}\n{_vllm_sources(subject)}\n{imported}"
    call = _bgmv_call(case, "lora_ops.", "x, weights, output, indices")
    return Access(setup, call, _device(subject), (*_PATHS, *_STAND_IN_IMPORTS))


def _bgmv_torch(subject: Subject) -> Access:
    imported = _imported("from vllm.lora.ops.torch_ops import lora_ops")
    call = _bgmv_call(subject.inputs.case, "lora_ops.", "x, weights, output, indices")
    return Access(_vllm_sources(subject) + imported, call, _device(subject), (*_PATHS, *_STAND_IN_IMPORTS))


_PATHS = ("import importlib.util", "import os", "import sys", "from pathlib import Path")
_STAND_IN_IMPORTS = ("import types", "from unittest.mock import MagicMock")

_NEEDS_XPU = """\
if not torch.xpu.is_available():
    print("this needs an Intel GPU")
    sys.exit(2)
"""


def _xpu_library(subject: Subject, name: str) -> str:
    root = _root(subject, "vllm-xpu-kernels")
    return f'{_NEEDS_XPU}{root}torch.ops.load_library(root / "vllm_xpu_kernels" / "{name}.abi3.so")\n'


def _bgmv_operator(subject: Subject) -> Access:
    call = _bgmv_call(subject.inputs.case, "torch.ops._xpu_C.", "output, x, weights, indices")
    return Access(_xpu_library(subject, "_xpu_C"), call, "xpu", _PATHS)


def _align_call(subject: Subject) -> str:
    mapping = "None" if subject.inputs.expert_map is None else "expert_map"
    return f"""\
torch.ops._moe_C.moe_lora_align_block_size(
    topk_ids,
    token_adapters,
    num_experts,
    block_size,
    num_adapters,
    capacity,
    max_blocks,
    sorted_token_ids,
    expert_ids,
    num_tokens_post_pad,
    adapter_enabled,
    lora_ids,
    {mapping},
)
"""


_NEEDS_CUDA = """\
if not torch.cuda.is_available():
    print("this needs an NVIDIA GPU")
    sys.exit(2)
"""


def _vllm_binary(subject: Subject) -> str:
    """Return code that loads vLLM's compiled MoE operators."""
    return f"""\
{_NEEDS_CUDA}
{_root(subject, "vllm")}
# Up to 0.23 it is _moe_C.abi3.so, then _moe_C_stable_libtorch.abi3.so.
torch.ops.load_library(next((root / "vllm").glob("_moe_C*.abi3.so")))
"""


def _align(subject: Subject) -> Access:
    return Access(_vllm_binary(subject), _align_call(subject), "cuda", _PATHS)


def _align_xpu(subject: Subject) -> Access:
    return Access(_xpu_library(subject, "_moe_C"), _align_call(subject), "xpu", _PATHS)


def _triton_sources(subject: Subject) -> str:
    """Return code that makes vLLM's Triton ops importable from a copy of their files."""
    kind = _device(subject)
    units = getattr(subject.inputs.case, "compute_units", 132)
    lines = f"""\
stand_in(
    "vllm.envs",
    VLLM_BATCH_INVARIANT=False,
    VLLM_TUNED_CONFIG_FOLDER=None,
    VLLM_LORA_DISABLE_PDL=False,
    VLLM_LORA_ENABLE_DUAL_STREAM=False,
)
platform = MagicMock()  # answers no to what is not set here
for question in ("is_cuda", "is_rocm", "is_cuda_alike", "is_xpu", "is_cpu", "is_tpu", "is_out_of_tree"):
    getattr(platform, question).return_value = question in ("is_{kind}", "is_{kind}_alike")
platform.num_compute_units.return_value = {units}
platform.get_device_name.return_value = platform.device_name = "{kind}"
platform.has_device_capability.return_value = True
stand_in("vllm.platforms", current_platform=platform)
stand_in("vllm.distributed", tensor_model_parallel_all_gather=lambda t: t, tensor_model_parallel_all_reduce=lambda t: t)
stand_in("vllm.triton_utils", root / "vllm/triton_utils", HAS_TRITON=True, triton=triton, tl=tl)
stand_in(
    "vllm.utils.math_utils",
    next_power_of_2=triton.next_power_of_2,
    cdiv=triton.cdiv,
    round_up=lambda a, b: triton.cdiv(a, b) * b,
)
stand_in("vllm.utils.mem_utils", get_max_shared_memory_bytes=lambda gpu=0: 232448)
"""
    return _vllm_sources(subject, lines)


def _triton_imports(subject: Subject) -> tuple[str, ...]:
    triton = ("import triton", "import triton.language as tl", "import triton.tools.tensor_descriptor")
    return (*_PATHS, *_STAND_IN_IMPORTS, *_interpreted(subject), *triton)


def _fused(subject: Subject) -> Access:
    case, kind = subject.inputs.case, _device(subject)
    setup = _triton_sources(subject)
    setup += _imported("from vllm.lora.ops.triton_ops.fused_moe_lora_op import fused_moe_lora")
    aligned = subject.inputs.sorted_token_ids is not None
    tiles = "".join(
        f"    {step}_block_size_m={case.block_size},\n    {step}_block_size_n={tile.block_n},\n"
        f"    {step}_block_size_k={tile.block_k},\n    {step}_group_size_m={tile.group_m},\n"
        f"    {step}_num_warps=4,\n    {step}_num_stages=2,\n    {step}_split_k={tile.split_k},\n"
        for step, tile in (("shrink", case.shrink), ("expand", case.expand))
    )
    call = f"""\
fused_moe_lora(
    output=output,
    qcurr_hidden_states=x,
    lora_a_stacked=lora_a,
    lora_b_stacked=lora_b,
    topk_weights=topk_weights,
    sorted_token_ids={"sorted_token_ids" if aligned else None},
    expert_ids=expert_ids,
    num_tokens_post_padded={"num_tokens_post_padded" if aligned else None},
    token_lora_mapping=token_adapters,
    max_lora_rank={case.rank},
    top_k_num={case.top_k},
    lora_ids=lora_ids,
    num_active_loras=num_active_loras,
    adapter_enabled=adapter_enabled,
    mul_routed_weight={case.mul_routed_weight},
    fully_sharded={case.fully_sharded},
    offset={case.column_offset},
{tiles}{"" if case.add_inputs else "    add_inputs=False," + chr(10)})
"""
    return Access(setup, call, kind, _triton_imports(subject))


def _shrink_expand(subject: Subject) -> Access:
    case = subject.inputs.case
    ops = "vllm.lora.ops.triton_ops"
    tiles = f"block_n={case.block_n}, block_k={case.block_k}"
    tiles += f", split_k={case.split_k}" if case.op == "shrink" else ""
    setup = _triton_sources(subject) + _imported(
        f"from {ops} import lora_{case.op}_op, utils",
        f"from {ops}.lora_kernel_metadata import LoRAKernelMeta",
    )
    setup += f"""
# The tiles with which it fails, whatever this release's table says.
table = utils.get_lora_op_configs
lora_{case.op}_op.get_lora_op_configs = lambda *a, **k: {{**table(*a, **k), **dict({tiles})}}
"""
    tokens = case.batch.num_tokens
    call = f"""\
meta = LoRAKernelMeta.make({case.num_adapters}, {tokens}, device="{_device(subject)}")
meta.prepare_tensors(token_adapters)
arguments = meta.meta_args({tokens}, specialize_active_lora={not case.visit_all})
"""
    if case.op == "shrink":
        call += f"lora_shrink_op.lora_shrink(x, weights, output, *arguments, {case.scale!r})\n"
    else:
        options = f"offset_start={case.column_offset}, add_inputs={case.add_inputs}"
        call += f"lora_expand_op.lora_expand(x, weights, output, *arguments, {options})\n"
    return Access(setup, call, _device(subject), _triton_imports(subject))


def _permute(subject: Subject) -> Access:
    case, names = subject.inputs.case, "moe_permute, moe_unpermute"
    layers = "vllm.model_executor.layers"
    scratch = case.op == "permute" and case.scratch != "none"
    imported = _imported(
        f"from {layers}.fused_moe.moe_permute_unpermute import {names}{', MoEPermuteScratch' if scratch else ''}"
    )
    setup = f"""\
{_STAND_IN}

{_vllm_binary(subject)}
if installed is None:  # what this file of the copy imports of the rest of vLLM
    for package in ("vllm", "vllm.model_executor", "{layers}", "{layers}.fused_moe"):
        stand_in(package, root / package.replace(".", "/"))
    for package in ("vllm.v1", "vllm.v1.worker"):
        stand_in(package)
    stand_in(
        "vllm.v1.worker.workspace",
        is_workspace_manager_initialized=lambda: False,
        current_workspace_manager=None,
    )

{imported}"""
    return Access(setup, _permute_call(subject), "cuda", (*_PATHS, "import types"))


def _permute_call(subject: Subject) -> str:
    """Return the call of moe_permute, with those before it that used the same scratch, or of moe_unpermute."""
    case, inputs = subject.inputs.case, subject.inputs
    if case.op == "unpermute":
        offsets = "None" if inputs.offsets is None else "offsets"
        return f"moe_unpermute(output, rows, topk_weights, inverse, {offsets})\n"
    as_dtype = f".view(torch.{case.dtype})" if case.dtype.startswith("float8") else ""
    mapping = "None" if inputs.expert_map is None else "expert_map"
    code, more = "", ""
    if case.scratch != "none":
        rows = (
            f", max_num_tokens={case.scratch_tokens}, topk=top_k, hidden_size={case.hidden}, "
            f"hidden_dtype=torch.{case.dtype}"
            if case.scratch == "rows"
            else ""
        )
        local = inputs.num_local_experts
        code += f"scratch = MoEPermuteScratch(num_experts, {local}, device=torch.device('cuda'){rows})\n"
        more = ", scratch=scratch"
    shared = f"num_experts, {inputs.num_local_experts}, {mapping}"
    if inputs.earlier_x:
        code += f"""\
for earlier, ids in zip(earlier_x, earlier_topk_ids):
    moe_permute(earlier{as_dtype}, None, ids, {shared}, None{more})
"""
    scale = "None" if inputs.scale is None else "scale"
    given = f"permuted{as_dtype}" if case.given_output else "None"
    results = f"permuted, {'permuted_scale' if inputs.scale is not None else '_'}, offsets, inverse, permuted_idx"
    code += f"{results} = moe_permute(x{as_dtype}, {scale}, topk_ids, {shared}, {given}{more})\n"
    if as_dtype:
        code += "permuted = permuted.view(torch.uint8)\n"
    return code


def _fp8(subject: Subject) -> Access:
    case = subject.inputs.case
    return Access(fp8_layout.setup(case, _root(subject, "vllm")), fp8_layout.call(case), "cpu", fp8_layout.IMPORTS)


_ACCESS: dict[tuple[str, str], Callable[[Subject], Access]] = {
    ("", "example"): _of_example,
    ("bgmv", "vllm"): _bgmv_wrapper,
    ("bgmv", "vllm-torch"): _bgmv_torch,
    ("bgmv", "vllm-xpu-kernels"): _bgmv_operator,
    ("fp8_layout", "vllm"): _fp8,
    ("moe_lora_align", "vllm"): _align,
    ("moe_permute", "vllm"): _permute,
    ("moe_lora_align", "vllm-xpu-kernels"): _align_xpu,
    ("fused_moe_lora", "vllm"): _fused,
    ("lora_shrink_expand", "vllm"): _shrink_expand,
}
"""By target, or "" for any, and package."""
