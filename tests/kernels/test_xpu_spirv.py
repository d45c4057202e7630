"""Finding SPIR-V kernels in a shared library, and reading their mangled names."""

import struct

import pytest

from kernelfuzz.kernels.xpu.spirv import Instantiation, entry_points, parse

HALF = "sycl::_V1::detail::half_impl::half"
BFLOAT16 = "sycl::_V1::ext::oneapi::bfloat16"
CAPABILITY, ENTRY_POINT, FUNCTION, RETURN, FUNCTION_END = 17, 15, 54, 253, 56


def instruction(opcode, *words, text=""):
    encoded = text.encode() + b"\0" * (4 - len(text.encode()) % 4) if text else b""
    body = struct.pack(f"<{len(words)}I", *words) + encoded
    return struct.pack("<I", (1 + len(body) // 4) << 16 | opcode) + body


def module(*symbols, version=4):
    header = struct.pack("<5I", 0x07230203, version << 8 | 0x10000, 0, 100, 0)
    entries = b"".join(instruction(ENTRY_POINT, 6, 10 + i, text=symbol) for i, symbol in enumerate(symbols))
    functions = b"".join(
        instruction(FUNCTION, 1, 10 + i, 0, 2) + instruction(RETURN) + instruction(FUNCTION_END)
        for i in range(len(symbols))
    )
    return header + instruction(CAPABILITY, 6) + entries + functions


@pytest.mark.parametrize(
    ("symbol", "expected"),
    [
        ("_ZTSN3fuz3moe5alignIiEE", Instantiation("fuz::moe::align", ("int",))),
        ("_ZTSN3fuz3moe5alignIlLi256EEE", Instantiation("fuz::moe::align", ("long", 256))),
        ("_ZTSN3fuz3moe5alignIhLin7ELb1EEE", Instantiation("fuz::moe::align", ("unsigned char", -7, 1))),
        (
            "_ZTSN3fuz4lora6shrinkIN4sycl3_V16detail9half_impl4halfES6_S6_Lj4EEE",
            Instantiation("fuz::lora::shrink", (HALF, HALF, HALF, 4)),
        ),
        (
            "_ZTSN3fuz4lora6shrinkIN4sycl3_V13ext6oneapi8bfloat16ENS3_6detail9half_impl4halfES9_Lj8EEE",
            Instantiation("fuz::lora::shrink", (BFLOAT16, HALF, HALF, 8)),
        ),
        (
            "_ZTSN3fuz4lora6shrinkIfN4sycl3_V13ext6oneapi8bfloat16ES6_Lj1EEE",
            Instantiation("fuz::lora::shrink", ("float", BFLOAT16, BFLOAT16, 1)),
        ),
        ("_ZTSN3fuz3outIN3abc2inIfEES3_EE", Instantiation("fuz::out", ("abc::in<float>", "abc::in<float>"))),
        ("_ZTS5plain", Instantiation("plain")),
        ("_ZTSN3fuz5plainE", Instantiation("fuz::plain")),
    ],
)
def test_mangled_names(symbol, expected):
    assert parse(symbol) == expected


@pytest.mark.parametrize(
    "symbol",
    [
        "",
        "main",
        "_ZTS",
        "_ZTSNE",
        "_ZTSN3fuz",
        "_ZTSN3fuz5alignIiEEx",
        "_ZTSN3fuz5alignIS9_EE",
        "_ZTSZN3fuz3runEvEUlvE_",
        "_ZTSN3fuz5alignIPfEE",
        "_ZTSN3fuz99shortE",
    ],
)
def test_names_that_are_not_understood(symbol):
    assert parse(symbol) is None


def test_an_instantiation_reads_as_cpp():
    assert str(parse("_ZTSN3fuz3moe5alignIlLi256EEE")) == "fuz::moe::align<long, 256>"


def test_modules_are_found_between_other_data(tmp_path):
    first = module("_ZTSN3fuz1aIiEE", "_ZTSN3fuz1aIlEE", "_ZTSN3fuz5otherE")
    second = module("_ZTSN3fuz1bIfEE", version=6)
    unwanted = module("_ZTSN3fuz5otherIiEE")
    library = tmp_path / "lib.so"
    # What follows a module may look like instructions: only a module's own functions belong to it.
    library.write_bytes(b"\x7fELF\x01" + first + instruction(RETURN) + b"xyz" + unwanted + second + b"\0" * 16)

    found = entry_points(library, ["fuz::a", "fuz::b"])

    assert {str(kernel): point.symbol for kernel, point in found.items()} == {
        "fuz::a<int>": "_ZTSN3fuz1aIiEE",
        "fuz::a<long>": "_ZTSN3fuz1aIlEE",
        "fuz::b<float>": "_ZTSN3fuz1bIfEE",
    }
    assert found[Instantiation("fuz::a", ("int",))].module == first
    assert found[Instantiation("fuz::b", ("float",))].module == second


@pytest.mark.parametrize(
    "content",
    [b"", b"not a library", struct.pack("<5I", 0x07230203, 0x10400, 0, 1, 0), module("_ZTSN3fuz1aIiEE")[:30]],
    ids=["empty", "text", "header only", "cut off"],
)
def test_a_library_without_whole_modules(tmp_path, content):
    library = tmp_path / "lib.so"
    library.write_bytes(content)
    assert entry_points(library, ["fuz::a"]) == {}


def test_a_library_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match="absent"):
        entry_points(tmp_path / "absent.so", ["fuz::a"])
