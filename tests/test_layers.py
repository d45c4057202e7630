"""Imports go down only: fuzz -> oracles, kernels -> strategies."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {
    "strategies": {"strategies"},
    "oracles": {"oracles", "strategies"},
    "kernels": {"kernels", "strategies"},
    "fuzz": {"fuzz", "oracles", "kernels", "strategies"},
}


def modules() -> list[Path]:
    return [path for layer in ALLOWED for path in sorted((ROOT / layer).rglob("*.py"))]


def imported_names(source: str) -> set[str]:
    """Return every dotted name that the source imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def broken_rules(layer: str, source: str) -> list[str]:
    """Return the imports in a module of `layer` that the layering forbids."""
    broken = []
    for name in sorted(imported_names(source)):
        parts = name.split(".")
        if (
            name.startswith(".")
            or "prototypes" in parts
            or parts[0] in ALLOWED
            or (parts[0] == "kernelfuzz" and parts[1:2] != [] and parts[1] not in ALLOWED[layer])
        ):
            broken.append(name)
    return broken


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_imports_from_its_own_layer_and_below(path: Path):
    layer = path.relative_to(ROOT).parts[0]
    assert broken_rules(layer, path.read_text()) == []


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("strategies", "import kernelfuzz.oracles.rounding"),
        ("strategies", "def f():\n    from kernelfuzz import fuzz"),
        ("oracles", "from kernelfuzz.kernels.base import Kernel"),
        ("kernels", "if True:\n    from kernelfuzz.oracles import bgmv"),
        ("kernels", "from kernelfuzz.fuzz import launch"),
        ("fuzz", "from kernels import base"),
        ("fuzz", "from . import launch"),
        ("fuzz", "from shared.prototypes import demo"),
    ],
)
def test_a_forbidden_import_is_noticed(layer: str, source: str):
    assert len(broken_rules(layer, source)) == 1


def test_every_folder_has_modules():
    assert {path.relative_to(ROOT).parts[0] for path in modules()} == set(ALLOWED)


def test_the_import_package_is_four_relative_links_and_nothing_else():
    package = ROOT / "src" / "kernelfuzz"
    entries = {entry.name: entry for entry in package.iterdir() if entry.name != "__pycache__"}
    assert {name: entry.readlink() for name, entry in entries.items()} == {
        layer: Path("..", "..", layer) for layer in ALLOWED
    }
    assert all(entry.resolve() == ROOT / name for name, entry in entries.items())
