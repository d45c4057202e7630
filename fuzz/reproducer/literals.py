"""Tensors and other values as the Python code that makes them."""

import base64
import math
import textwrap
import zlib
from collections.abc import Iterator
from typing import Any

import torch

from kernelfuzz.strategies.errors import KernelfuzzError

MOST_ELEMENTS = 96
"""A larger tensor is not written out element by element."""

MOST_BYTES = 2**18
"""Larger ones would make a script that nobody opens."""

WIDTH = 100

UNPACK = '''
def unpack(text, shape, dtype):
    """Return the tensor whose bytes these are, compressed."""
    data = bytearray(zlib.decompress(base64.b64decode(text)))
    return torch.frombuffer(data, dtype=dtype).view(shape)
'''
"""What a script needs that calls `unpack`."""


def assignment(name: str, tensor: torch.Tensor, device: str) -> str:
    """Return code that makes a tensor of these elements, and as far apart in memory as they are.

    Raises KernelfuzzError for one that is too large to be written down.
    """
    code = f"{name} = {expression(tensor)}{_to(device)}"
    if tensor.is_contiguous() and tensor.storage_offset() == 0:
        return code
    length = int(tensor.storage_offset()) + _extent(tensor)
    room = expression_of_constant(float("nan") if tensor.is_floating_point() else -1, (length,), tensor.dtype)
    shape, strides = tuple(tensor.shape), tensor.stride()
    view = f"{room}{_to(device)}.as_strided({shape}, {strides}, {tensor.storage_offset()})"
    return f"{name} = {view}  # rows and elements are apart\n{name}.copy_({expression(tensor)})"


def _to(device: str) -> str:
    return "" if device == "cpu" else f'.to("{device}")'


def _extent(tensor: torch.Tensor) -> int:
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))


def expression(tensor: torch.Tensor) -> str:
    """Return an expression for a contiguous CPU tensor of these elements."""
    tensor = tensor.detach().cpu().contiguous()
    shape = tuple(tensor.shape)
    first = tensor.flatten()[0].item() if tensor.numel() else 0
    is_nan = isinstance(first, float) and math.isnan(first)
    if tensor.numel() and bool(tensor.isnan().all() if is_nan else (tensor == first).all()):
        return expression_of_constant(first, shape, tensor.dtype)
    if tensor.numel() == 0:
        return f"torch.empty({shape}, dtype={tensor.dtype})"
    if tensor.dtype == torch.bool:
        return f"{expression(tensor.to(torch.uint8))}.bool()"
    if tensor.numel() <= MOST_ELEMENTS:
        return f"torch.tensor({_nested(tensor.tolist())}, dtype={tensor.dtype})"
    data = tensor.view(torch.uint8).flatten().numpy().tobytes()
    if len(data) > MOST_BYTES:
        raise KernelfuzzError(f"a tensor of {len(data):,} bytes is too large to be written into a script")
    text = base64.b64encode(zlib.compress(data, 9)).decode()
    lines = "\n".join(f'    "{line}"' for line in textwrap.wrap(text, WIDTH))
    return f"unpack(\n{lines},\n    {shape}, {tensor.dtype},\n)"


def expression_of_constant(value: float, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """Return an expression for a tensor of one value."""
    if value in (0, 1) and math.copysign(1, value) > 0:
        return f"torch.{'ones' if value else 'zeros'}({shape}, dtype={dtype})"
    return f"torch.full({shape}, {number(value)}, dtype={dtype})"


def number(value: float) -> str:
    """Return a number as code; NaN and infinity are names that every script defines."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return repr(value)


def _nested(value: Any) -> str:
    """Return nested lists as code, an inner list to a line where they do not fit into one."""
    line = _flat(value)
    if len(line) <= WIDTH - 20:
        return line
    if not isinstance(value[0], list):
        return "[\n" + textwrap.fill(", ".join(map(number, value)), WIDTH, **_indented()) + ",\n]"
    return "[\n" + "".join(f"    {textwrap.indent(_nested(inner), '    ').strip()},\n" for inner in value) + "]"


def _indented() -> dict[str, Any]:
    return {"initial_indent": "    ", "subsequent_indent": "    ", "break_long_words": False}


def _flat(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_flat, value)) + "]"
    return number(value)


def namespace(value: Any) -> str:
    """Return code for a case, or what it is made of, as a SimpleNamespace of its fields and its plain properties."""
    return textwrap.fill(_namespace(value), WIDTH + 15, subsequent_indent="    ", break_long_words=False)


def _namespace(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + "".join(f"{_namespace(inner)}, " for inner in value).strip() + ")"
    if not hasattr(value, "__dataclass_fields__"):
        return repr(value)
    return "SimpleNamespace(" + ", ".join(f"{name}={_namespace(inner)}" for name, inner in _members(value)) + ")"


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    yield from ((name, inner) for name, inner in vars(value).items() if name not in ("placement", "reduced"))
    for name, member in vars(type(value)).items():
        if isinstance(member, property):
            result = getattr(value, name)
            if result is None or isinstance(result, (bool, int, float, str)):
                yield name, result
