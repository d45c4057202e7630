"""Bugs planted in a copy of a released file, run by path: each is found and shrunk."""

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from kernelfuzz.fuzz import events, reproducer
from kernelfuzz.fuzz.campaign import Budget, run_campaign
from kernelfuzz.fuzz.job import named_jobs
from kernelfuzz.kernels import releases
from kernelfuzz.strategies.errors import KernelfuzzError

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import corpus
from planted_bugs import PLANTS, Plant, plant_bug


class StopAtFirstShrunk:
    """Ends the campaign as Ctrl-C does, once a failure has been shrunk."""

    def __init__(self) -> None:
        self.found: events.FailureFound | None = None

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, events.FailureFound) and event.shrunk:
            self.found = event
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def release() -> Path:
    """The files of the newest pinned vLLM."""
    try:
        return releases.locate("vllm", releases.PINNED["vllm"])
    except KernelfuzzError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_planted_bug_is_found_and_shrunk(plant: Plant, release: Path, tmp_path: Path) -> None:
    tree = plant_bug(plant, release, tmp_path)
    jobs = named_jobs([plant.target], [f"vllm@{tree}"], None)
    stop = StopAtFirstShrunk()
    run_campaign(jobs, [], Budget(examples=plant.examples), 7, tmp_path, events.Bus([stop]))

    assert stop.found is not None, f"not found in {plant.examples:,} examples"
    print(stop.found.examples, stop.found.failure.kind, stop.found.failure.clause, stop.found.case)
    assert stop.found.failure.kind in plant.kinds
    assert stop.found.failure.clause.startswith(plant.clause)
    assert stop.found.case.size <= plant.largest
    if plant.target in ("bgmv", "fp8_layout") or plant.name in ("missing_routed_weight", "lost_last_slice_offset"):
        check_script(stop.found, {tree: 1, release: 0}, tmp_path / "repro.py")


def check_script(found: events.FailureFound, statuses: dict[Path, int], script: Path) -> None:
    """The failure's script fails on the planted tree and passes on the release."""
    for tree, status in statuses.items():
        (job,) = named_jobs([found.job.target.name], [f"{found.job.kernel.package}@{tree}"], None)
        script.write_text(reproducer.script(job, found.case, found.failure, version="planted"))
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_fingerprints_tell_bugs_apart(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three seeds for each bug in host code; `make corpus` runs twenty."""
    found = corpus.measure(corpus.WITHIN_MINUTES, range(3), 60)
    with capsys.disabled():
        Console(width=140).print("", found.table(), sep="\n")
    assert sum(map(bool, found.fingerprints.values())) >= 12
    assert found.fingerprints_per_bug <= 1.25
    assert found.bugs_per_fingerprint <= 1.25
