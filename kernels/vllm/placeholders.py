"""Placeholders for the parts of vLLM that its host code imports and, in what is tested, never calls.

A module of vLLM's MoE and quantisation layers imports half of vLLM and dozens of packages. Here only the modules whose
code is tested are imported from the release's files; every other one is a placeholder, whose attributes are
placeholders too. They may be imported, inherited from and named in annotations. To call or ask one is an error of
kernelfuzz's, which says what is missing.
"""

import functools
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kernelfuzz.kernels.vllm.stand_in import StandInLacksError


class _Importing:
    """Whether modules are being imported: decorators are called then, and helpers for what modules define."""

    depth = 0


class _PlaceholderType(type):
    """The type of placeholders: classes, so that others can inherit from them."""

    def __getattr__(cls, name: str) -> Any:
        return _placeholder_of(f"{cls.__module__}.{cls.__qualname__}", name)

    def __call__(cls, *arguments: Any, **options: Any) -> Any:
        if not cls._is_asked():
            return super().__call__(*arguments, **options)
        return _placeholder(cls.__module__, f"{cls.__qualname__}()")

    def __iter__(cls) -> Iterator[Any]:
        cls._is_asked()
        return iter(())

    def __getitem__(cls, item: Any) -> Any:
        cls._is_asked()
        return cls

    def __bool__(cls) -> bool:
        cls._is_asked()
        return True

    def __instancecheck__(cls, instance: Any) -> bool:
        cls._is_asked()
        return super().__instancecheck__(instance)

    def _is_asked(cls) -> bool:
        """Whether a placeholder is used, and not a class of the release's that inherits from one. Raises
        StandInLacksError unless modules are being imported: there is no right answer."""
        is_placeholder: bool = vars(cls).get("is_placeholder", False)
        if is_placeholder and not _Importing.depth:
            raise StandInLacksError(f"{cls.__module__}.{cls.__qualname__}")
        return is_placeholder


class _Base:
    """What placeholders inherit, and with them the release's own classes."""

    def __init__(self, moe: Any = None, *arguments: Any, **options: Any) -> None:
        """Take whatever the real class takes. That of the MoE methods keeps its configuration."""
        del arguments, options
        self.moe = moe

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or any(name in vars(each) for each in type(self).__mro__):
            return object.__getattribute__(self, name)  # a property failed, and says so once more
        raise StandInLacksError(f"what {type(self).__qualname__} inherits as {name}")


@functools.cache
def _placeholder(module: str, name: str) -> type:
    """Return the placeholder of that name, always the same one."""
    return _PlaceholderType(name, (_Base,), {"__module__": module, "is_placeholder": True})


def _placeholder_of(module: str, name: str) -> type:
    """Return the placeholder for an attribute that a module lacks."""
    if name.startswith("__"):
        raise AttributeError(name)
    return _placeholder(module, name)


class _PlaceholderModule(types.ModuleType):
    """Stands for a module, or for a function of that name that is imported from a package."""

    def __getattr__(self, name: str) -> type:
        return _placeholder_of(self.__name__, name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        package, _, name = self.__name__.rpartition(".")
        return _placeholder(package, name)(*arguments, **options)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a placeholder for each module of vLLM but the `real` ones, and for `packages` that are not installed."""

    def __init__(self, root: Path, real: Sequence[str], packages: Sequence[str]) -> None:
        self._root = root
        self._real = tuple(real)
        self._packages = frozenset(packages)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        del path, target
        package = name.partition(".")[0]
        is_real = any(name == each or name.startswith(f"{each}.") for each in self._real)
        if (package == "vllm" and not is_real) or package in self._packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _PlaceholderModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        # A real module may lie below a placeholder.
        module.__path__ = [str(self._root.joinpath(*module.__name__.split(".")))]


def install(root: Path, real: Sequence[str], packages: Sequence[str]) -> None:
    """Have every module of vLLM be a placeholder but those in `real`, by their full names, and what lies below them;
    and `packages` too, by their names. `root` holds the release's `vllm/`. What is imported already stays; stand-ins
    among it get placeholders for what they lack."""
    finder = _Finder(root, real, packages)
    for name, module in sys.modules.items():
        if name.startswith("vllm.") and getattr(module, "__file__", None) is None:
            vars(module).setdefault("__getattr__", functools.partial(_placeholder_of, name))
            if not hasattr(module, "__path__"):
                finder.exec_module(module)
    sys.meta_path.insert(0, finder)


@contextmanager
def importing() -> Iterator[None]:
    """Let placeholders be called meanwhile."""
    _Importing.depth += 1
    try:
        yield
    finally:
        _Importing.depth -= 1
