"""A script as a whole: its parts for a kind of failure, put together."""

import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kernelfuzz.fuzz.job import Job
from kernelfuzz.fuzz.reproducer import literals
from kernelfuzz.fuzz.reproducer.kernels import NO_ARGUMENTS, Access, Subject, access
from kernelfuzz.fuzz.reproducer.references import REFERENCES, SIZES, literal_reference
from kernelfuzz.fuzz.verdict import UNUSABLE_AFTERWARDS, Failure
from kernelfuzz.oracles.expectation import Expectation, OutputSpec
from kernelfuzz.strategies.case import Case
from kernelfuzz.strategies.layouts import plain_allocator

HANG_SECONDS = 120
"""How long a script waits for a kernel that hung."""

_GUARD = 64
"""Elements on either side of a tensor that is written past."""

_SANITIZERS = {"race": "racecheck", "uninitialised_read": "initcheck"}
_IN_A_CHILD = ("crash", "hang", "race", "uninitialised_read")

_EXITS = "Exits with 1 while the bug is there, with 0 when it is fixed, with 2 if it cannot run here."

_DIFFERENCES = '''
def differences(name, got, expected, tolerance=0.0):
    """Print where `got` is not what it must be; return whether that is so anywhere."""
    if got.shape != expected.shape:
        print(f"{name}: expected shape {tuple(expected.shape)}, got {tuple(got.shape)}: FAILED")
        return True
    wrong = ~((got.double() - expected).abs() <= tolerance)
    shown = expected if got.is_floating_point() else expected.long()
    for index in wrong.nonzero().tolist()[:8]:
        place = tuple(index)
        print(f"{name}{index}: expected {shown[place].item()}, got {got[place].item()}")
    return bool(wrong.any())

'''

_BITS = '''
def bits(tensor):
    """Return the bytes of a tensor: NaN compares as different from itself."""
    return tensor.contiguous().view(torch.uint8)

'''

_AMID_POISON = '''
def amid_poison(tensor):
    """Return a copy of a tensor between elements that no kernel may read."""
    poison = nan if tensor.is_floating_point() else 127 if tensor.dtype == torch.uint8 else -0x5A5A5A5B
    memory = torch.full((tensor.numel() + 256,), poison, dtype=tensor.dtype, device=tensor.device)
    return memory[128 : tensor.numel() + 128].view(tensor.shape).copy_(tensor)

'''

_BEFORE_A_PAGE = '''
def at_the_end_of_a_page(tensor):
    """Return a copy of a tensor behind which no memory can be read."""
    page, size = mmap.PAGESIZE, tensor.numel() * tensor.element_size()
    length = -(-max(size, 1) // page) * page
    memory = torch.frombuffer(mmap.mmap(-1, length + page), dtype=torch.uint8, count=length)
    address = ctypes.c_void_p(memory.data_ptr() + length)
    assert ctypes.CDLL(None).mprotect(address, ctypes.c_size_t(page), 0) == 0
    return memory[length - size :].view(tensor.dtype).view(tensor.shape).copy_(tensor)

'''


@dataclass(frozen=True)
class _Bug:
    """What a script is written for: the failure, the case's tensors on the CPU, and what is expected of it."""

    subject: Subject
    case: Case
    failure: Failure
    tensors: dict[str, torch.Tensor | list[torch.Tensor]]
    specs: dict[str, OutputSpec]
    expectation: Expectation
    sanitizer: str | None

    @property
    def needs_pages(self) -> bool:
        """Whether reading past a tensor must end the process to be seen."""
        failure, job = self.failure, self.subject.job
        native = failure.kind == "crash" and job.implementation.guard_pages and job.device.type == "cpu"
        return native or self.reads_outside

    @property
    def reads_outside(self) -> bool:
        """Whether Triton's interpreter said that the kernel reads or writes outside a tensor."""
        return self.failure.kind == "out_of_bounds" and "_in_" in self.failure.clause and self.sanitizer is None

    @property
    def needs_poison(self) -> bool:
        """Whether what lies around the inputs may matter: to whatever may come of reading it."""
        plain = self.failure.kind in ("raised", "not_raised", "input_mutated", "hang", *_SANITIZERS)
        return not (plain or self.needs_pages or self.is_from_sanitizer)

    @property
    def in_a_child(self) -> bool:
        """Whether the call must be made in a process of its own."""
        return self.failure.kind in _IN_A_CHILD or self.reads_outside or self.is_from_sanitizer

    @property
    def is_from_sanitizer(self) -> bool:
        """Whether only a sanitizer sees the failure."""
        return self.sanitizer is not None and self.failure.kind in ("out_of_bounds", *_SANITIZERS)


def script(
    job: Job,
    case: Case,
    failure: Failure,
    *,
    version: str,
    sanitizer: str | None = None,
    arguments: Mapping[str, Any] = NO_ARGUMENTS,
    pytest: bool = False,
) -> str:
    """Return a script that shows a failure of a case on a job's kernel of that `version`: it exits with 1 while the bug
    is there and with 0 when it is fixed, and with 2 where it cannot run. With `pytest`, a module with one test instead.

    `sanitizer` is the tool under which it failed, if any; `arguments` are what else a kernel test's function was given.
    Raises KernelfuzzError where no script can get the kernel, or
    where the tensors are too large to be written down.
    """
    inputs = job.target.make_inputs(case, torch.device("cpu"), plain_allocator("cpu"))
    specs = dict(job.target.outputs(inputs))
    initial = {name: spec.initial if spec.initial is not None else _sentinels(spec) for name, spec in specs.items()}
    tensors = {name: value for name, value in vars(inputs).items() if isinstance(value, (torch.Tensor, list))}
    variables = {name: f"{name}_result" if name in vars(inputs) else name for name in specs}
    subject = Subject(job, version, inputs, variables, arguments)
    bug = _Bug(subject, case, failure, tensors, specs, job.target.expect(inputs, initial), sanitizer)
    got = access(subject)
    body = _body(bug, got)
    text = "".join(_pytest_module(bug, got, body) if pytest else _script(bug, got, body))
    if pytest and "sys.exit(2)" in text:
        text = re.sub(r"print\((.*)\)\n +sys\.exit\(2\)", r"pytest.skip(\1, allow_module_level=True)", text)
        text = text.replace("\nimport torch\n", "\nimport pytest\nimport torch\n", 1)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip() + "\n"


def _script(bug: _Bug, got: Access, body: str) -> Iterator[str]:
    yield f'"""{_about(bug)}\n\n{_EXITS}\n"""\n\n'
    yield _top(bug, got, body)
    if bug.in_a_child:
        yield f'{_parent(bug)}\nif "--call" not in sys.argv:\n    sys.exit(failed())\n\n'
        yield body
        return
    yield body
    yield 'print("FAILED" if failed else "passed")\nsys.exit(failed)\n'


def _pytest_module(bug: _Bug, got: Access, body: str) -> Iterator[str]:
    name = re.sub(r"\W+", "_", f"{bug.case.target}_{bug.failure.kind}_{bug.failure.output}".rstrip("_"))
    yield f'"""{_about(bug)}"""\n\n'
    yield _top(bug, got, body)
    if bug.in_a_child:
        yield f"{_parent(bug)}\ndef call():\n{textwrap.indent(body, '    ')}\n\n"
        yield f'def test_{name}():\n    assert not failed()\n\n\nif __name__ == "__main__":\n    call()\n'
        return
    yield f"def test_{name}():\n{textwrap.indent(body, '    ')}    assert not failed\n"


def _about(bug: _Bug) -> str:
    """Return what a reader must know first."""
    job, failure = bug.subject.job, bug.failure
    kernel = f"{job.kernel.package} {bug.subject.version}" if bug.subject.version else str(job.kernel)
    text = f"{kernel}: {bug.case.target}: {failure.message}"
    lines = textwrap.wrap(" ".join(text.replace("\\", "/").replace('"""', "'''").split()), 100)
    return "\n".join([*lines, "", f"Found on {job.device} by kernelfuzz."])


def _top(bug: _Bug, got: Access, body: str) -> str:
    """Return imports and functions: what stands before the body."""
    modules, parts = {"import sys", *got.imports}, []
    mentioned = body + (" nan" if bug.needs_poison else "")
    numbers = [f'{name} = float("{name}")' for name in ("nan", "inf") if re.search(rf"\b{name}\b", mentioned)]
    if numbers:
        parts.append("\n".join(numbers))
    if "unpack(" in body:
        modules |= {"import base64", "import zlib"}
        parts.append(literals.UNPACK)
    if bug.needs_pages:
        modules |= {"import ctypes", "import mmap"}
        parts.append(_BEFORE_A_PAGE)
    if bug.needs_poison:
        parts.append(_AMID_POISON)
    if bug.in_a_child:
        modules |= {"import subprocess"}
    parts += [helper for name, helper in _HELPERS.items() if f"{name}(" in body]
    parts.append(got.setup)
    return "\n\n\n".join([_imports(modules).strip(), *(part.strip() for part in parts if part.strip())]) + "\n\n\n"


_HELPERS = {"differences": _DIFFERENCES, " bits": _BITS}
"""Functions of a script by how they are called."""


def _imports(lines: set[str]) -> str:
    """Return the imports in groups: the standard library and its settings, then torch and the others."""
    own = {
        "base64",
        "ctypes",
        "importlib.abc",
        "importlib.machinery",
        "importlib.util",
        "inspect",
        "mmap",
        "os",
        "subprocess",
        "sys",
        "types",
        "zlib",
    }
    own |= {"pathlib", "unittest.mock"}
    first = sorted(line for line in lines if line.split()[1] in own and line.startswith("import"))
    first += sorted(line for line in lines if line.split()[1] in own and line.startswith("from"))
    settings = sorted(line for line in lines if line.startswith("os."))
    others = sorted(line for line in lines if line not in first and line not in settings)
    noqa = "  # noqa: E402" if settings else ""
    then = [f"{line}{noqa}" for line in ("import torch", *others)]
    groups = (first, settings, then)
    return "\n\n".join("\n".join(group) for group in groups if group) + "\n"


# The body: tensors, call, check.


def _body(bug: _Bug, got: Access) -> str:
    code = "".join(_tensors(bug, got.device))
    call = _placed(bug, got)
    kind = bug.failure.kind
    after = _wait(got.device) + f'torch.ones(1, device="{got.device}").add_(1)  # meets what the call left behind\n'
    if bug.failure.clause == "tensor_on_cpu" and (bug.in_a_child or kind == "raised"):
        refused = f"try:\n{textwrap.indent(call, '    ')}except Exception as error:\n"
        refused += '    print(f"refused: {error}")\n'
        return code + (refused + after if bug.in_a_child else _must_not_raise(refused + after))
    if bug.in_a_child:
        return code + call
    if kind == "not_raised":
        assert bug.expectation.error is not None
        return code + _must_raise(call, bug.expectation.error.text)
    if kind == "raised" and bug.failure.clause.endswith("_left_pending"):
        return code + _must_not_raise(call + after)
    code += _watched(bug)
    if kind == "raised":
        code += _must_not_raise(call) + ("if not failed:\n" + textwrap.indent(_check(bug), "    "))
    elif bug.failure.clause == "tensor_on_cpu":
        code += f"failed = False\ntry:\n{textwrap.indent(call, '    ')}except Exception as error:\n"
        code += f'    print(f"refused: {{error}}")\nelse:\n{textwrap.indent(_check(bug), "    ")}'
    else:
        code += call + "failed = False\n" + _check(bug)
    return code


def _tensors(bug: _Bug, device: str) -> Iterator[str]:
    """Return code that makes the inputs and outputs."""
    left = _left_on_cpu(bug)
    if names := SIZES.get(bug.case.target):
        yield f"{', '.join(names)} = {', '.join(str(getattr(bug.case, name)) for name in names)}\n\n"
    yield "# The inputs.\n"
    for name, value in bug.tensors.items():
        if isinstance(value, list):
            parts = []
            for index, tensor in enumerate(value):
                parts.append(f"{name}_{index}")
                yield literals.assignment(parts[-1], tensor, "cpu" if left == (name, index) else device) + "\n"
                if bug.needs_pages and tensor.is_contiguous():
                    yield f"{parts[-1]} = at_the_end_of_a_page({parts[-1]})\n"
                elif bug.needs_poison and tensor.is_contiguous():
                    yield f"{parts[-1]} = amid_poison({parts[-1]})\n"
            yield f"{name} = [{', '.join(parts)}]\n"
        else:
            stays = left == (name, None) or (bug.case.target, name) in _ON_CPU
            yield literals.assignment(name, value, "cpu" if stays else device) + "\n"
            if bug.failure.output == name and bug.failure.clause == "redzone":
                yield from _guarded(name, value, device)
            elif bug.needs_pages and value.is_contiguous():
                yield f"{name} = at_the_end_of_a_page({name})\n"
            elif bug.needs_poison and value.is_contiguous():
                yield f"{name} = amid_poison({name})\n"
    filled = any(spec.initial is None for spec in bug.specs.values())
    yield "\n# The outputs" + (", full of a value that no kernel writes.\n" if filled else ".\n")
    for output, spec in bug.specs.items():
        name = bug.subject.outputs[output]
        tensor = _laid_out(spec.initial if spec.initial is not None else _sentinels(spec), spec)
        yield literals.assignment(name, tensor, device) + "\n"
        if bug.failure.output == output and bug.failure.clause == "redzone" and tensor.is_contiguous():
            yield from _guarded(name, tensor, device)
        elif bug.needs_pages and tensor.is_contiguous():
            yield f"{name} = at_the_end_of_a_page({name})\n"
    yield "\n"


def _left_on_cpu(bug: _Bug) -> tuple[str, int | None] | None:
    """Return the input that is left on the CPU by mistake, if one is."""
    number = bug.case.placement.tensor_on_cpu
    if number is None:
        return None
    places = [
        (name, index)
        for name, value in bug.tensors.items()
        for index in (range(len(value)) if isinstance(value, list) else (None,))
        if (bug.case.target, name) not in _ON_CPU
    ]
    return places[number % len(places)]


_ON_CPU = {("fused_moe_lora", "topk_ids"), ("fused_moe_lora", "num_active_loras")}
"""Inputs that are on the CPU by contract, or for the reference alone."""


def _guarded(name: str, tensor: torch.Tensor, device: str) -> Iterator[str]:
    """Return code that puts a tensor into the middle of a larger one."""
    fill = literals.expression_of_constant(_filler(tensor.dtype), (tensor.numel() + 2 * _GUARD,), tensor.dtype)
    to = "" if device == "cpu" else f'.to("{device}")'
    yield f"around_{name} = {fill}{to}  # {_GUARD} elements before it and behind it\n"
    yield f"around_{name}[{_GUARD}:-{_GUARD}] = {name}.flatten()\n"
    yield f"{name} = around_{name}[{_GUARD}:-{_GUARD}].view({name}.shape)\n"


def _laid_out(values: torch.Tensor, spec: OutputSpec) -> torch.Tensor:
    """Return values in the layout that the output has."""
    if spec.layout.row_gap == 0 or values.ndim < 2:
        return values
    storage = torch.zeros(spec.layout.extent(spec.shape), dtype=spec.dtype)
    return storage.as_strided(spec.shape, spec.layout.strides(spec.shape)).copy_(values)


def _filler(dtype: torch.dtype) -> float:
    """Return the value that outputs are filled with."""
    return -1000.0 if dtype.is_floating_point else 77 if dtype == torch.uint8 else -1000


def _sentinels(spec: OutputSpec) -> torch.Tensor:
    return torch.full(spec.shape, _filler(spec.dtype), dtype=spec.dtype)


def _watched(bug: _Bug) -> str:
    """Return code that remembers what there was before the call."""
    lines = [f"{name}_before = {name}.clone()\n" for name in bug.subject.outputs.values()]
    if bug.failure.kind == "input_mutated" and bug.failure.output:
        name = bug.failure.output
        lines.append(f"{_input_variable(bug, name)}_before = {_input_variable(bug, name)}.clone()\n")
    return "".join(lines) + "\n"


def _input_variable(bug: _Bug, name: str) -> str:
    """Return the variable of an input that the engine calls `name`."""
    return _ENGINE_NAMES.get((bug.case.target, name), re.sub(r"\[(\d+)\]", r"_\1", name))


_ENGINE_NAMES = {
    ("bgmv", "inputs"): "x",
    ("lora_shrink_expand", "inputs"): "x",
    ("lora_shrink_expand", "token_lora_mapping"): "token_adapters",
    ("fused_moe_lora", "token_lora_mapping"): "token_adapters",
    ("moe_lora_align", "token_lora_mapping"): "token_adapters",
}
"""Inputs that the strategies allocate under another name than their field's."""


_FILL = """\
# torch.empty now gives NaN or the largest integer: what the kernel reads before it writes it shows.
torch.use_deterministic_algorithms(True, warn_only=True)
"""


def _placed(bug: _Bug, got: Access) -> str:
    """Return the call, on the stream and device that the case asks for."""
    call = got.call
    if bug.failure.kind not in ("raised", "not_raised", "input_mutated") and bug.sanitizer != "initcheck":
        call = _FILL + call
    if got.device == "cpu":
        return call
    backend = f"torch.{got.device}"
    if bug.case.placement.other_device_current:
        call = f"with {backend}.device(1):\n{textwrap.indent(call, '    ')}"
    if bug.case.placement.side_stream:
        stream = f"{backend}.synchronize()\nwith {backend}.stream({backend}.Stream()):\n"
        call = f"{stream}{textwrap.indent(call, '    ')}"
    return call + _wait(got.device)


def _wait(device: str) -> str:
    return "" if device == "cpu" else f"torch.{device}.synchronize()\n"


def _must_raise(call: str, text: str) -> str:
    return f"""\
try:
{textwrap.indent(call, "    ")}except Exception as error:
    failed = {text!r} not in str(error)
    print(f"expected an error with {text!r}, got {{type(error).__name__}}: {{error}}")
else:
    failed = True
    print("expected an error with {text!s}, got none")
"""


def _must_not_raise(call: str) -> str:
    return f"""\
failed = False
try:
{textwrap.indent(call, "    ")}except Exception as error:
    failed = True
    print(f"expected no error, got {{type(error).__name__}}: {{error}}")
"""


def _check(bug: _Bug) -> str:
    """Return code that looks at memory after the call, and sets `failed`."""
    kind, output = bug.failure.kind, bug.failure.output
    if kind == "input_mutated" and output:
        name = _input_variable(bug, output)
        return f"""\
changed = bits({name}) != bits({name}_before)
failed = bool(changed.any())
if failed:
    print("expected the input {name} to be left alone, got", {name}.flatten()[:16].tolist())
    print("                                     it was", {name}_before.flatten()[:16].tolist())
"""
    if kind == "out_of_bounds" and output:
        name = bug.subject.outputs.get(output) or _input_variable(bug, output)
        return _check_guards(bug, name)
    if bug.expectation.error is not None:
        return "pass  # an error is expected here\n"
    return _compare(bug)


def _check_guards(bug: _Bug, name: str) -> str:
    tensor = bug.tensors.get(name)
    spec = bug.specs.get(bug.failure.output)
    if spec is not None and not _laid_out(_sentinels(spec), spec).is_contiguous():
        length = spec.layout.extent(spec.shape)
        return f"""\
memory = {name}.as_strided(({length},), (1,))  # the rows and what lies between them
between = torch.ones({length}, dtype=torch.bool)
between.as_strided({name}.shape, {name}.stride()).fill_(False)
failed = not bool(memory[between].isnan().all())
if failed:
    print("expected NaN between the rows of {name}, got", memory[between][:16].tolist())
"""
    dtype = spec.dtype if spec is not None else tensor.dtype if isinstance(tensor, torch.Tensor) else torch.float32
    return f"""\
before, behind = around_{name}[:{_GUARD}], around_{name}[-{_GUARD}:]
failed = bool((torch.cat([before, behind]) != {literals.number(_filler(dtype))}).any())
if failed:
    print("expected {literals.number(_filler(dtype))} around {name}, got before it", before.tolist()[-8:])
    print("and behind it", behind.tolist()[:8])
"""


def _compare(bug: _Bug) -> str:
    """Return code that compares the outputs with the reference."""
    if all(clause.rule == "free" for each in bug.expectation.outputs.values() for clause in _present(each)):
        return "pass  # the outputs may hold anything\n"
    if bug.case.target in REFERENCES:
        reference = REFERENCES[bug.case.target](bug.subject.inputs)
    else:  # the oracle is the user's own
        reference = literal_reference(bug.expectation, bug.subject.outputs)
    code = f"# What the outputs must hold.\n{reference}\n"
    for output, expected in bug.expectation.outputs.items():
        name = bug.subject.outputs[output]
        tolerance = _tolerance(bug, output, f"{name}_written")
        comparison = f'differences("{output}", {name}, {name}_expected{tolerance})'
        if any(clause.name == "overflow" for clause in _present(expected)):
            limit = f"torch.finfo({name}.dtype).max"
            code += f"{name}_expected = {name}_expected.where({name}_expected.abs() < {limit}, {name}.double())\n"
        code += f"failed |= {comparison}\n"
    return code


def _present(expected: Any) -> list[Any]:
    return [expected.clauses[index] for index in expected.region.unique().tolist()]


def _tolerance(bug: _Bug, output: str, written: str) -> str:
    """Return the argument that allows a correct kernel its rounding, and this failure nothing."""
    expected = bug.expectation.outputs[output]
    if expected.bound is None or not bool(expected.mask("write").any()):
        return ""
    bounds = torch.where(expected.mask("write"), expected.bound, 0.0)
    largest = float(bounds.max()) * 1.001
    if largest == 0.0:
        return ""
    errors = [
        abs(element["expected"] - element["actual"])
        for element in bug.failure.elements
        if output == bug.failure.output and not isinstance(element["actual"], str)
        if not isinstance(element["expected"], str)
    ]
    if all(error > 2 * largest for error in errors):
        return f", {float(f'{largest:.2g}') * 1.1:.2g} * {written}"
    return f", {literals.expression((bounds * 1.001).float())}"


# The process that makes the call in a child.


def _parent(bug: _Bug) -> str:
    """Return a function that makes the call in a process of its own and says whether it failed."""
    command = '[sys.executable, __file__, "--call"]'
    if bug.is_from_sanitizer:
        tool = bug.sanitizer or _SANITIZERS[bug.failure.kind]
        command = f'["compute-sanitizer", "--tool", "{tool}", "--error-exitcode", "9", *{command}]'
    timeout = HANG_SECONDS if bug.failure.kind == "hang" else 10 * HANG_SECONDS
    unusable = ""
    if bug.failure.clause == UNUSABLE_AFTERWARDS:
        unusable = "    # The call itself returns; what comes after it fails.\n"
    return f'''
def failed():
    """Make the call in a process of its own; return whether that ends as it must not."""
{unusable}    try:
        status = subprocess.run({command}, timeout={timeout}).returncode
    except subprocess.TimeoutExpired:
        print("expected the call to return, got nothing in {timeout} s: FAILED")
        return True
    print(f"expected exit status 0, got {{status}}:", "FAILED" if status else "passed")
    return status != 0

'''
