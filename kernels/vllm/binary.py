"""Operators in the compiled libraries of a vLLM tree, loaded without importing vLLM; where one cannot be used, one line
says why."""

import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from packaging.requirements import Requirement

from kernelfuzz.strategies.errors import KernelfuzzError

_UNSUPPORTED = (
    ("no kernel image is available", "use a build of it for this GPU"),
    ("invalid device function", "use a build of it for this GPU"),
    ("device kernel image is invalid", "use a build of it for this GPU"),
    ("PTX", "update NVIDIA's driver"),
    ("driver version is insufficient", "update NVIDIA's driver"),
)
"""What the CUDA runtime says (cudaGetErrorString) where code was not built for the GPU or its driver; what helps."""


def load_operator(root: Path | None, namespace: str, name: str) -> str:
    """Register `torch.ops.<namespace>.<name>` from vLLM's extension of the namespace's name; return the library's file
    name.

    The library is that of the vLLM under `root`, a folder that holds `vllm/`, or of the installed one where it is None:
    the file that `import vllm.<extension>` would load, without the rest of vLLM. Raises KernelfuzzError if there is
    none, if it does not load, or if it lacks the operator.
    """
    library = _find(_package_folder(root), namespace)
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise KernelfuzzError(_why_not_loaded(library, str(error.__cause__ or error))) from error
    if not hasattr(getattr(torch.ops, namespace), name):
        raise KernelfuzzError(f"{library.name} has no operator {name}: use a vLLM that has it, built for CUDA")
    return library.name


def probe(library: str, device: torch.device, call: Callable[[], None]) -> None:
    """Raise KernelfuzzError if `call`, of an operator in `library`, shows that it was not built for this GPU or driver.

    Any other failure of the call is no incompatibility, and nothing is said of it.
    """
    with _built_for(device, f"torch {torch.__version__}"):
        _launch_of_torch(device)
    with _built_for(device, library):
        call()
        _launch_of_torch(device)


def _package_folder(root: Path | None) -> Path:
    if root is not None:
        return root / "vllm"
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations)))


def _find(folder: Path, extension: str) -> Path:
    # 0.24 built its extensions on torch's stable ABI and renamed them.
    for name in (f"{extension}_stable_libtorch.abi3.so", f"{extension}.abi3.so"):
        if (folder / name).is_file():
            return (folder / name).resolve()
    raise KernelfuzzError(
        f"{folder} holds no compiled {extension}: build the checkout ('pip install --editable .') or name a release"
    )


def _why_not_loaded(library: Path, loader_says: str) -> str:
    reason = loader_says.partition("\n")[0].removeprefix(f"{library}: ").removesuffix(": No such file or directory")
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    where = f"torch {torch.__version__} ({cuda})"
    return f"{library.name} does not load in {where}: {reason}; {_remedy(reason, library.parent)}"


def _remedy(reason: str, package: Path) -> str:
    if match := re.search(r"libcudart\.so\.(\d+)", reason):
        return f"install a torch built for CUDA {match[1]}"
    if re.search(r"lib(cuda|torch_cuda|c10_cuda)\.so", reason):
        return "it needs NVIDIA's driver and a torch built with CUDA"
    if "undefined symbol" in reason:
        return f"install {_required_torch(package)}, which it was built for"
    return "fetch it again, or build it on this machine"


def _required_torch(package: Path) -> str:
    """The release's own requirement, such as torch==2.11.0; a checkout has no metadata to say it."""
    for distribution in importlib.metadata.distributions(name="vllm", path=[str(package.parent)]):
        for requirement in distribution.requires or ():
            if Requirement(requirement).name == "torch":
                return requirement
    return "the torch that this vLLM requires"


@contextmanager
def _built_for(device: torch.device, code: str) -> Iterator[None]:
    """Raise KernelfuzzError if the device says that `code` was not built for it; end quietly on any other of its
    errors."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].removeprefix("CUDA error: ")
        for words, remedy in _UNSUPPORTED:
            if words in reason:
                gpu = torch.cuda.get_device_name(device)
                capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
                raise KernelfuzzError(
                    f"{code} does not run on {gpu} (compute capability {capability}): {reason}; {remedy}"
                ) from error


def _launch_of_torch(device: torch.device) -> None:
    """Launch a kernel of torch's and wait: torch then reports what an earlier launch left pending."""
    torch.ones(1, device=device).item()
