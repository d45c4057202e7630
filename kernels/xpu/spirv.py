"""Find the SPIR-V kernels inside a shared library that a SYCL compiler made.

Such a library carries, beside machine code for the devices it was built for, whole SPIR-V modules in its data. A
module has no length field: it is found by its magic number and followed instruction by instruction (the SPIR-V
specification, sections 2.3 "Physical Layout" and 2.4 "Logical Layout"). Its entry points are named by the mangled type
of the kernel's function object (the Itanium C++ ABI, section 5.1).
"""

import mmap
import re
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

# The magic number, version 1.x, of a module as a little-endian compiler writes it.
_HEADER = re.compile(rb"\x03\x02\x23\x07\x00[\x00-\x0f]\x01\x00", re.DOTALL)
_HEADER_WORDS = 5
_ENTRY_POINT, _FUNCTION, _FUNCTION_END = 15, 54, 56
_LINE, _NO_LINE = 8, 317


@dataclass(frozen=True)
class Instantiation:
    """A kernel's C++ class: its qualified name without template arguments, and those, types as their qualified names.

    >>> parse("_ZTSN4vllm3moe5alignIlLi256EEE")
    Instantiation(name='vllm::moe::align', arguments=('long', 256))
    """

    name: str
    arguments: tuple[str | int, ...] = ()

    def __str__(self) -> str:
        """The name as C++ writes it."""
        return f"{self.name}<{', '.join(map(str, self.arguments))}>" if self.arguments else self.name


@dataclass(frozen=True)
class EntryPoint:
    """Where a kernel is: its symbol, and the SPIR-V module that holds it."""

    symbol: str
    module: bytes = field(repr=False)


def entry_points(library: Path, names: Collection[str]) -> dict[Instantiation, EntryPoint]:
    """Every instantiation in a shared library of the kernels named, such as ``"vllm::lora::bgmv_shrink_kernel"``.

    Raises OSError if the file cannot be read.
    """
    wanted = set(names)
    found: dict[Instantiation, EntryPoint] = {}
    if library.stat().st_size == 0:  # which cannot be mapped
        return found
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for header in _HEADER.finditer(data):
            start = header.start()
            kernels = {symbol: parse(symbol) for symbol in _symbols(data, start)}
            chosen = {kernel: symbol for symbol, kernel in kernels.items() if kernel and kernel.name in wanted}
            if chosen:
                module = bytes(data[start : _module_end(data, start)])
                found.update({kernel: EntryPoint(symbol, module) for kernel, symbol in chosen.items()})
    return found


def _instructions(data: mmap.mmap, start: int) -> Iterator[tuple[int, int, int]]:
    """Opcode, first byte and byte after the last of every instruction of the module at `start`, and of what follows."""
    position = start + 4 * _HEADER_WORDS
    while position + 4 <= len(data):
        (word,) = struct.unpack_from("<I", data, position)
        end = position + 4 * (word >> 16)
        if end == position or end > len(data):
            return
        yield word & 0xFFFF, position, end
        position = end


def _symbols(data: mmap.mmap, start: int) -> Iterator[str]:
    """The names of a module's entry points, which all come before its first function."""
    for opcode, position, end in _instructions(data, start):
        if opcode == _FUNCTION:
            return
        if opcode == _ENTRY_POINT:
            yield data[position + 12 : end].split(b"\0", 1)[0].decode("utf-8", "replace")


def _module_end(data: mmap.mmap, start: int) -> int:
    """The byte after a module's last function: nothing but another function, or its line number, can follow one."""
    last, inside = start, False
    for opcode, _, end in _instructions(data, start):
        if inside:
            if opcode == _FUNCTION_END:
                last, inside = end, False
        elif opcode == _FUNCTION:
            inside = True
        elif last != start and opcode not in (_LINE, _NO_LINE):
            break
    return last


_BUILTIN_TYPES = {
    "a": "signed char", "b": "bool", "c": "char", "d": "double", "f": "float", "h": "unsigned char", "i": "int",
    "j": "unsigned int", "l": "long", "m": "unsigned long", "s": "short", "t": "unsigned short",
}  # fmt: skip


def parse(symbol: str) -> Instantiation | None:
    """Read a mangled ``typeinfo name for`` symbol; None for what is not the name of a class made of plain parts.

    Understood are nested and plain names, substitutions, and template arguments that are types or integers.
    """
    if not symbol.startswith("_ZTS"):
        return None
    mangled = _Mangled(symbol.removeprefix("_ZTS"))
    try:
        kernel = mangled.type()
    except ValueError:
        return None
    return None if mangled.rest else kernel


class _Mangled:
    """A cursor in a mangled name, with the substitutions that were met so far."""

    def __init__(self, text: str) -> None:
        self.rest = text
        self._seen: list[Instantiation] = []

    def type(self) -> Instantiation:
        """Take a type; `ValueError` where the grammar is one that is not understood."""
        if builtin := _BUILTIN_TYPES.get(self.rest[:1]):
            self.rest = self.rest[1:]
            return Instantiation(builtin)
        if not self._skip("N"):
            return self._seen[self._substitution()] if self.rest.startswith("S") else self._component(None)
        scope: Instantiation | None = None
        while not self._skip("E"):
            if scope is None and self.rest.startswith("S"):
                scope = self._seen[self._substitution()]
            else:
                scope = self._component(scope)
        if scope is None:
            raise ValueError("an empty name")
        return scope

    def _component(self, scope: Instantiation | None) -> Instantiation:
        """Take one name in a scope, or the template arguments of what the scope names, and remember the result."""
        if scope is not None and self._skip("I"):
            arguments: list[str | int] = []
            while not self._skip("E"):
                arguments.append(self._literal() if self.rest.startswith("L") else str(self.type()))
            result = Instantiation(scope.name, tuple(arguments))
        else:
            length = self._match(r"([1-9]\d*)")
            name, self.rest = self.rest[: int(length)], self.rest[int(length) :]
            result = Instantiation(f"{scope}::{name}" if scope else name)
        self._seen.append(result)
        return result

    def _literal(self) -> int:
        return int(self._match(r"L[abchijlmst](n?\d+)E").replace("n", "-"))

    def _substitution(self) -> int:
        """The index that ``S_`` (0), ``S0_`` (1), ``S1_`` (2), … stands for."""
        digits = self._match(r"S([0-9A-Z]*)_")
        index = int(digits, 36) + 1 if digits else 0
        if index >= len(self._seen):
            raise ValueError("a substitution before what it stands for")
        return index

    def _skip(self, letter: str) -> bool:
        found = self.rest.startswith(letter)
        self.rest = self.rest.removeprefix(letter)
        return found

    def _match(self, pattern: str) -> str:
        match = re.match(pattern, self.rest)
        if match is None:
            raise ValueError(f"not understood: {self.rest!r}")
        self.rest = self.rest[match.end() :]
        return match[1]
