"""Makes stores of made-up nights: real cases of real targets, and verdicts that no kernel has earned."""

import dataclasses
from pathlib import Path

from kernelfuzz.fuzz import events
from kernelfuzz.fuzz.failure_files import FailureFiles
from kernelfuzz.fuzz.failures import fingerprint
from kernelfuzz.fuzz.generation import draw
from kernelfuzz.fuzz.job import unchecked_job
from kernelfuzz.fuzz.nightly.statistics import Statistics
from kernelfuzz.fuzz.store.store import Seen, Store
from kernelfuzz.fuzz.verdict import Failure, Verdict

JOBS = ("moe_lora_align", "example", "cpu"), ("bgmv", "vllm@0.33.0", "cpu")
SECONDS = {"inputs": 0.02, "oracle": 0.01, "kernel": 0.03, "check": 0.005}
PLAIN = "2 of 9 elements of output wrong (value)"


class Nights:
    """A store to which made-up nights are added; `texts` takes the place of what kernels and people have said."""

    def __init__(self, folder: Path, text: str = PLAIN) -> None:
        self.folder = folder
        self.text = text
        self.store = Store(folder)
        self.files = FailureFiles(folder, seed=5)
        self.run = 0
        self.jobs = [unchecked_job(*names) for names in JOBS]
        self.cases = {job.target.name: draw(job.target.cases(), 3, 40) for job in self.jobs}

    def start(self, settings=None, skipped=(), environment=None) -> None:
        """Begin a night."""
        environment = environment or {"python": "3.12.3", "torch": "2.13.0"}
        self.run = self.store.start_run(5, 600.0, environment, settings or {"targets": []}, skipped)

    def failure(self, number: int) -> events.FailureFound:
        """Return the bug of that number."""
        job = self.jobs[number % 2]
        failure = Failure(
            "wrong_value", "output", f"clause_{number}", self.text, ({"index": [0, 1], "expected": 1.0, "actual": 2.0},)
        )
        cases = self.cases[job.target.name]
        return events.FailureFound(job, fingerprint(job, failure), failure, cases[number % len(cases)], 7, shrunk=True)

    def see(self, number: int, listed: str = "", failed_runs: int = 10) -> str:
        """Write down that the night has seen a bug, in so many of ten runs of its case; return its status."""
        found = dataclasses.replace(self.failure(number), failed_runs=failed_runs, runs=10)
        self.files(events.JobStarted(found.job, "1.0"))
        self.files(found)
        assert not self.files.problem
        seen = Seen(
            found.fingerprint,
            found.job.target.name,
            str(found.job.kernel),
            "1.0",
            "cpu",
            self.files.folder(found).name,
            self.files.document(found),
        )
        return self.store.save_failure(self.run, seen, listed=listed)

    def gone(self, number: int, status: str = "fixed", note: str = "passes on example 1.0") -> None:
        """Write down that the night has not seen a bug."""
        self.store.save_gone(self.run, self.failure(number).fingerprint, status, note)

    def count(self, error: str = "", notes: tuple[str, ...] = ()) -> None:
        """Write down statistics in which every drawn case was run once."""
        entries = {}
        for job in self.jobs:
            statistics = Statistics(job)
            statistics.take(events.JobStarted(job, "1.0", notes=notes), 1.0)
            for index, case in enumerate(self.cases[job.target.name]):
                verdict = Verdict(ratio=index / 41, seconds=SECONDS)
                regimes = frozenset(job.target.regimes(case))
                statistics.take(events.CaseFinished(job, case, regimes, verdict, index, False), 2.0 + index)
            statistics.take(events.JobFinished(job, 40, error), 50.0)
            statistics.seconds = 20.0
            entries[job.target.name, str(job.kernel), "cpu"] = statistics.to_json()
        self.store.save_statistics(self.run, entries)

    def finish(self, exit_status: int = 0, state: str = "finished", problems: tuple[str, ...] = ()) -> None:
        """End the night."""
        self.store.finish_run(self.run, state, exit_status, problems)


def three_nights(folder: Path, text: str = PLAIN) -> Nights:
    """Return a store with three nights, in the last of which there is a failure of each status."""
    nights = Nights(folder, text)
    nights.start()
    for number in (1, 2, 3, 5):
        assert nights.see(number) == "new"
    nights.count()
    nights.finish(1)

    nights.start()
    nights.see(1)
    nights.see(2)
    nights.gone(3)
    nights.see(5)
    nights.count()
    nights.finish()

    skipped = [{"target": "bgmv", "kernel": text, "device": "xpu", "reason": text}]
    nights.start({"targets": [text]}, skipped, {"python": "3.13.0", "torch": text})
    assert [nights.see(number) for number in (0, 1, 3)] == ["new", "known", "returned"]
    assert nights.see(4, listed=text) == "listed"
    nights.gone(2)
    nights.gone(5, "unseen", text)
    name = nights.failure(2).fingerprint
    nights.store.save_replay(nights.run, name, "example", "cpu", "1.0", "FIXED", text)
    nights.store.save_regression(nights.run, "40131", text, "FAIL", text)
    nights.store.save_regression(nights.run, "39989", "bgmv_expand refuses", "NOT RUN", text)
    nights.count(error=text, notes=(text,))
    nights.finish(1, problems=(text,))
    return nights


def shown_failure(nights: Nights, number: int) -> Path:
    """Return the folder of a bug."""
    return nights.files.folder(nights.failure(number))
