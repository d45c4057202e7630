"""A user's own kernel, by `module:function`.

Loaded as if for a GPU: for a CPU, loading mends Triton's interpreter, which a process must be started for.
"""

import sys

import pytest
import torch

from kernelfuzz.kernels import user
from kernelfuzz.strategies.errors import KernelfuzzError

GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def _folder_of_modules(tmp_path, monkeypatch):
    (tmp_path / "kernel_of_a_user.py").write_text("def launch(inputs, outputs):\n    outputs['y'].fill_(inputs)\n")
    (tmp_path / "package_of_a_user").mkdir()
    (tmp_path / "package_of_a_user" / "kernels.py").write_text("class Ops:\n    launch = print\nlaunch = print\n")
    (tmp_path / "user_without_dependency.py").write_text("import no_such_dependency\n")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield
    for name in ("kernel_of_a_user", "package_of_a_user", "package_of_a_user.kernels"):
        sys.modules.pop(name, None)


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("in_folder")
def test_kernel_in_the_current_folder():
    kernel = user.load("kernel_of_a_user:launch", GPU)
    assert (kernel.version, dict(kernel.dimensions)) == ("user", {})
    outputs = {"y": torch.zeros(2)}
    kernel.launch(3.0, outputs)
    assert outputs["y"].tolist() == [3.0, 3.0]


@pytest.mark.usefixtures("in_folder")
def test_kernel_in_a_package():
    assert user.load("package_of_a_user.kernels:launch", GPU).launch is print


def test_kernel_on_the_import_path(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    assert callable(user.load("kernel_of_a_user:launch", GPU).launch)


@pytest.mark.usefixtures("in_folder")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_module:launch", "No module named 'no_such_module'"),
        ("kernel_of_a_user:no_such_function", "module 'kernel_of_a_user' has no attribute 'no_such_function'"),
        ("user_without_dependency:launch", "No module named 'no_such_dependency'"),
    ],
)
def test_kernel_that_is_not_there_is_one_line(name, reason):
    with pytest.raises(KernelfuzzError) as error:
        user.load(name, GPU)
    assert str(error.value) == f"kernel {name!r} cannot be imported: {reason}"
