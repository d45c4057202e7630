"""Where a kernel test is defined, so that a worker process can import it."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from kernelfuzz.strategies.errors import KernelfuzzError


@dataclass(frozen=True)
class TestSource:
    """A function in a file.

    - file: absolute; module: the name under which the file is imported
    - name: of the function, with its class where it has one
    """

    __test__ = False  # pytest takes it for a class of tests

    file: str
    module: str
    name: str

    @classmethod
    def of(cls, function: Callable[..., Any]) -> "TestSource":
        """Return where a function is defined."""
        file = str(Path(function.__code__.co_filename).resolve())
        return cls(file, function.__module__, function.__qualname__)

    def require_importable(self) -> None:
        """Raise KernelfuzzError unless a worker can import the function."""
        if "<locals>" in self.name:
            raise KernelfuzzError(
                f"{self.name}: a worker process cannot import a function that is defined in another one: "
                "move it to the top of its file, or add --fuzz-isolate=no"
            )
        if not Path(self.file).is_file():
            raise KernelfuzzError(f"{self.name}: a worker process cannot import {self.file}: add --fuzz-isolate=no")

    def message(self) -> dict[str, Any]:
        """Return the source for a worker, with this process's search path."""
        return {**asdict(self), "path": sys.path}

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> "TestSource":
        """Return the source that `message` wrote, and take over the search path."""
        sys.path[:] = message["path"]
        return cls(message["file"], message["module"], message["name"])

    def find(self) -> Any:
        """Import the file and return the function, or what has become of it there.

        Raises KernelfuzzError if it is not there, or whatever the file raises.
        """
        found: Any = self._module()
        for part in self.name.split("."):
            found = getattr(found, part, None)
            if found is None:
                raise KernelfuzzError(f"{self.file} has no {self.name}")
        return found

    def owner(self) -> Any:
        """Return an instance of the class that the function is a method of; None for a plain function."""
        path, _, _ = self.name.rpartition(".")
        if not path:
            return None
        found: Any = self._module()
        for part in path.split("."):
            found = getattr(found, part)
        return found()

    def _module(self) -> ModuleType:
        loaded = sys.modules.get(self.module)
        if loaded is not None and self._is(loaded):
            return loaded
        name = self.module if self.module != "__main__" else "kernelfuzz_main"
        if name in sys.modules and self._is(sys.modules[name]):
            return sys.modules[name]
        if "." in name:  # a package's, whose other modules it may import
            try:
                module = importlib.import_module(name)
            except ModuleNotFoundError:
                pass
            else:
                if self._is(module):
                    return module
        spec = importlib.util.spec_from_file_location(name, self.file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    def _is(self, module: ModuleType) -> bool:
        file = getattr(module, "__file__", None)
        return file is not None and str(Path(file).resolve()) == self.file
