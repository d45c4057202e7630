"""What the tests of the engine share."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from kernelfuzz.fuzz.cli import main
from kernelfuzz.fuzz.job import Job, named_jobs
from kernelfuzz.strategies.batches import Batch, Segment
from kernelfuzz.strategies.bgmv import Case


class Outcome(NamedTuple):
    """What a command left: its exit status, stdout and stderr."""

    status: int | str | None
    out: str
    err: str


@pytest.fixture(scope="session")
def worker_environment() -> dict[str, str]:
    """The environment in which workers find `engine_kernels`."""
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


@pytest.fixture
def kernelfuzz(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    worker_environment: dict[str, str],
) -> Callable[..., Outcome]:
    """Runs `kernelfuzz …` in this process, in an empty folder and with an empty cache of releases."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERNELFUZZ_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", worker_environment["PYTHONPATH"])

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["kernelfuzz", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return Outcome(stop.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def engine_job() -> Callable[[str], Job]:
    """Returns the job of one of `engine_kernels`."""
    return lambda name: named_jobs(["bgmv"], [f"engine_kernels:{name}"], torch.device("cpu"))[0]


@pytest.fixture(scope="session")
def shrink_case() -> Callable[..., Case]:
    """Returns a shrink of one rank and so many tokens."""

    def make(rank: int, tokens: int = 1) -> Case:
        return Case(
            seed=0,
            layer="wrapper",
            op="shrink",
            batch=Batch((Segment(0, tokens),)),
            num_adapters=1,
            width=1,
            rows=rank,
            columns=rank,
            slice_offset=0,
            slice_size=0,
            dtype="float16",
            float32_input=False,
            float32_output=True,
            contents="ones",
            scale=1.0,
            accumulate=False,
            weights_4d=False,
        )

    return make
