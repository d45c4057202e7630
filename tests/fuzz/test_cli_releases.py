"""``kernelfuzz releases`` as a user meets it: what it prints where, and its exit status. The network is not touched."""

import json
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from kernelfuzz.fuzz.cli import main


class Outcome(NamedTuple):
    status: int | str | None
    out: str
    err: str


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs ``kernelfuzz releases …`` with a cache of its own and a pip that finds vllm 0.20.2 and 0.33.0 only."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("KERNELFUZZ_HOME", str(tmp_path / "home"))
    for version in ("0.20.2", "0.33.0"):
        info = f"vllm-{version}.dist-info"
        with zipfile.ZipFile(tmp_path / f"vllm-{version}-cp38-abi3-manylinux_2_28_x86_64.whl", "w") as wheel:
            wheel.writestr("vllm/__init__.py", "")
            wheel.writestr("vllm/lora/ops.py", "x" * 2000)
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: cp38-abi3-manylinux_2_28_x86_64\n")

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["kernelfuzz", "releases", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        return Outcome(stop.value.code, *capsys.readouterr())

    return run


def test_fetch_list_and_remove(cli: Cli, tmp_path: Path):
    path = tmp_path / "home" / "releases" / "vllm"
    fetched = cli("fetch", "vllm==0.33.0", "vllm==0.20.2")
    assert (fetched.status, fetched.err) == (0, "")
    assert [line.split(",")[0] for line in fetched.out.splitlines()] == ["vllm 0.33.0: fetched", "vllm 0.20.2: fetched"]
    assert str(path / "0.33.0") in fetched.out

    rows = json.loads(cli("list", "--json").out)
    assert [(row["package"], row["version"], row["path"]) for row in rows] == [
        ("vllm", "0.20.2", str(path / "0.20.2")),
        ("vllm", "0.33.0", str(path / "0.33.0")),
    ]
    assert all(row["size"] > 2000 for row in rows)
    header, *table = [line.split() for line in cli("list").out.splitlines()]
    assert header == ["package", "version", "size", "path"]
    assert [(row[0], row[1], row[3], row[4]) for row in table] == [
        ("vllm", "0.20.2", "kB", str(path / "0.20.2")),
        ("vllm", "0.33.0", "kB", str(path / "0.33.0")),
    ]

    assert cli("remove", "vllm==0.20.2") == (0, "vllm 0.20.2: removed\n", "")
    assert [row["version"] for row in json.loads(cli("list", "--json").out)] == ["0.33.0"]


def test_an_empty_cache_says_what_to_do(cli: Cli):
    assert cli("list") == (0, "no releases fetched yet: run 'kernelfuzz releases fetch --pinned'\n", "")
    assert cli("list", "--json") == (0, "[]\n", "")


def test_fetching_twice_says_so(cli: Cli):
    assert cli("fetch", "vllm==0.33.0").status == 0
    again = cli("fetch", "vllm==0.33.0")
    assert again.status == 0
    assert again.out.startswith("vllm 0.33.0: already fetched, ")


def test_fetch_gets_what_it_can_and_reports_every_failure(cli: Cli):
    outcome = cli("fetch", "vllm==0.21.0", "vllm>=0.3", "vllm==0.33.0", "numpy==2.0")
    assert outcome.status == 2
    assert outcome.out.startswith("vllm 0.33.0: fetched, ")
    errors = outcome.err.splitlines()
    assert len(errors) == 3
    assert errors[0].startswith("error: there is no vllm==0.21.0")
    assert errors[1].startswith("error: 'vllm>=0.3' names no release: write NAME==VERSION")
    assert errors[2].startswith("error: no target is in the package 'numpy'")


def test_pinned_fetches_the_newest_of_each_package(cli: Cli):
    outcome = cli("fetch", "--pinned")
    assert outcome.status == 2
    assert outcome.out.startswith("vllm 0.33.0: fetched, ")
    assert outcome.err.startswith("error: cannot fetch vllm-xpu-kernels==0.1.16.2: ")


def test_fetch_of_nothing_is_an_error(cli: Cli):
    assert cli("fetch") == (2, "", "error: no release named: give NAME==VERSION, or --pinned for the newest\n")


def test_remove_of_an_unknown_release_names_what_there_is(cli: Cli):
    assert cli("fetch", "vllm==0.33.0").status == 0
    message = "error: vllm==0.19.1 is not in the cache, which holds vllm==0.33.0\n"
    assert cli("remove", "vllm==0.19.1") == (2, "", message)


def test_a_home_that_is_a_file_is_one_line(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KERNELFUZZ_HOME", str(tmp_path / "file"))
    outcome = cli("fetch", "vllm==0.33.0")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith(f"error: cannot keep releases in {tmp_path / 'file'} (Not a directory): ")
    assert outcome.err.count("\n") == 1
