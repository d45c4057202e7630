"""A user's own kernel, named `module:function`: a callable (inputs, outputs) that writes the outputs in place."""

import importlib
import importlib.util
import sys

import torch

from kernelfuzz.kernels import interpreter
from kernelfuzz.kernels.base import Kernel
from kernelfuzz.strategies.errors import KernelfuzzError


def load(name: str, device: torch.device) -> Kernel:
    """Return the function `name`, found on sys.path or in the current folder. Raises KernelfuzzError if it is not
    there."""
    module_name, _, function = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    interpret(device)
    try:
        launch = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise KernelfuzzError(f"kernel {name!r} cannot be imported: {error}") from error
    if not callable(launch):
        raise KernelfuzzError(f"kernel {name!r} is not callable: name a function (inputs, outputs)")
    return Kernel(launch, "user")


def interpret(device: torch.device) -> None:
    """Have Triton kernels run in the mended interpreter where `device` is a CPU; to be called before their modules are
    imported. Raises KernelfuzzError where Triton compiles them in this process."""
    if device.type == "cpu" and importlib.util.find_spec("triton") is not None:
        interpreter.install()
