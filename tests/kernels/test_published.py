"""What is published is asked of the real pip, which sees wheels in a local folder, or of a fake one."""

import os
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from kernelfuzz.kernels import releases
from kernelfuzz.kernels.releases import published
from kernelfuzz.strategies.errors import KernelfuzzError


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path


def publish(folder: Path, version: str, tag: str = "cp38-abi3-manylinux_2_28_x86_64") -> None:
    with zipfile.ZipFile(folder / f"vllm-{version}-{tag}.whl", "w") as wheel:
        wheel.writestr(f"vllm-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


def test_versions_come_in_their_order_and_without_pre_releases(wheels: Path):
    for version in ("0.10.0", "0.9.1", "0.9.1.1", "0.11.0rc1", "0.8.0.post1", "0.9.2.dev3"):
        publish(wheels, version)
    assert releases.published_versions("vllm") == ["0.8.0.post1", "0.9.1", "0.9.1.1", "0.10.0"]


@pytest.mark.parametrize("tag", ["cp38-abi3-manylinux1_x86_64", "cp312-cp312-manylinux_2_31_x86_64", "py3-none-any"])
def test_wheels_of_every_python_and_linux_that_could_be_fetched_count(wheels: Path, tag: str):
    publish(wheels, "0.9.1", tag)
    assert releases.published_versions("vllm") == ["0.9.1"]


def test_a_package_that_pip_does_not_find_is_one_line(wheels: Path):
    with pytest.raises(KernelfuzzError, match=r"^cannot list the releases of vllm, pip says: No matching dist.* vllm$"):
        releases.published_versions("vllm")


@pytest.fixture
def fake_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Has pip be a script of the test's, of some version."""

    def install(version: str, script: str) -> None:
        path = tmp_path / "pip.py"
        path.write_text(f"import sys\n{script}\n")
        monkeypatch.setattr(published, "pip_command", lambda *arguments: [sys.executable, str(path), *arguments])
        monkeypatch.setattr(metadata, "version", lambda package: version)

    return install


def test_a_pip_that_prints_json_is_asked_for_it(fake_pip):
    fake_pip(
        "25.1",
        """assert sys.argv[1:] == ["index", "versions", "vllm", "--json"]
print('{"name": "vllm", "versions": ["0.10.0", "0.9.1"], "latest": "0.10.0"}')""",
    )
    assert releases.published_versions("vllm") == ["0.9.1", "0.10.0"]


def test_an_older_pip_is_not(fake_pip):
    fake_pip(
        "25.0",
        """assert sys.argv[1:] == ["index", "versions", "vllm"]
print("vllm (0.10.0)\\nAvailable versions: 0.10.0, old-name, 0.9.1\\n  LATEST: 0.10.0")""",
    )
    assert releases.published_versions("vllm") == ["0.9.1", "0.10.0"]


def test_being_offline_is_said(fake_pip):
    fake_pip(
        "25.0", """sys.exit("WARNING: Retrying (Retry(total=4, connect=None))\\nERROR: No matching distribution")"""
    )
    with pytest.raises(KernelfuzzError, match=r"^cannot list the releases of vllm: pip reaches no package index$"):
        releases.published_versions("vllm")
