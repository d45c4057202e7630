"""What was running when a lane or a whole night was cut off: files that outlive the processes, though not the machine,
since flushing them would take longer than most cases."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kernelfuzz.fuzz.executor import Request
from kernelfuzz.fuzz.job import unchecked_job
from kernelfuzz.fuzz.nightly.tasks import Running
from kernelfuzz.strategies.case import from_json
from kernelfuzz.strategies.errors import KernelfuzzError


def write_record(path: Path, running: Running) -> None:
    """Write what a job's workers have now, all at once. Raises OSError."""
    job = running.job
    head = {
        "target": job.target.name,
        "kernel": str(job.kernel),
        "device": str(job.device),
        "retried": running.retried,
    }
    new = path.with_suffix(".new")
    new.write_bytes(b"\n".join([json.dumps(head).encode(), *(request.message for request in running.requests)]))
    new.replace(path)


def read_record(path: Path) -> Running | None:
    """Return what a file says; None for one that says nothing of use: it is not there, cut off, or of a kernel that is
    not known any more."""
    with suppress(OSError, ValueError, KeyError, TypeError, KernelfuzzError):
        head, *lines = path.read_text(errors="replace").splitlines()
        values = json.loads(head)
        job = unchecked_job(values["target"], values["kernel"], values["device"])
        requests = []
        for line in lines:
            document = json.loads(line)
            case = from_json(job.target.case_type, document["case"])
            requests.append(Request(case, tuple(map(int, document["seeds"]))))
        return Running(job, tuple(requests), bool(values["retried"]))
    return None


@contextmanager
def alone(store: Path) -> Iterator[None]:
    """Look at the runs of a store, and begin one, while no other process does. Raises KernelfuzzError where the store's
    folder cannot be written."""
    folder = store / "runs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise KernelfuzzError(f"{folder}: {error.strerror}; name a --store that can be written") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


class RunFolder:
    """The folder of a run below `store`/runs, for the files of its lanes; `identity` is the store's. The process of the
    run holds it, and Linux lets go of it when that process is gone."""

    def __init__(self, store: Path, identity: str, number: int) -> None:
        self.path = store / "runs" / f"{identity}-{number}"
        self._lock: int | None = None

    def hold(self) -> None:
        """Make the folder and hold it. Raises KernelfuzzError if that is impossible."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise KernelfuzzError(f"{self.path}: {error.strerror}; name a --store that can be written") from error

    def is_left(self) -> bool:
        """Whether the process of the run is gone."""
        try:
            lock = os.open(self.path, os.O_RDONLY)
        except OSError:
            return True
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False
        finally:
            os.close(lock)
        return True

    def records(self) -> list[Running]:
        """Return what its lanes have running."""
        found = [read_record(path) for path in sorted(self.path.glob("*.jsonl"))]
        return [running for running in found if running is not None and running.requests]

    def keep(self, running: Running, number: int) -> Path:
        """Write down what is to be run again, until it is its turn, and return the file."""
        path = self.path / f"again-{number}.jsonl"
        with suppress(OSError):  # a full disk costs no more than this record
            write_record(path, running)
        return path

    def take_left(self) -> list[tuple[int, Running]]:
        """Return what runs have left whose processes are gone, by their numbers, and take their folders away."""
        left = []
        for path in sorted(self.path.parent.iterdir()):
            identity, _, number = path.name.rpartition("-")
            if path != self.path and number.isdigit():
                other = RunFolder(self.path.parent.parent, identity, int(number))
                if other.is_left():
                    left += [(int(number), running) for running in other.records()]
                    shutil.rmtree(path, ignore_errors=True)
        return left

    def release(self) -> None:
        """Let go of the folder, and take it away unless lanes were killed over what they had running."""
        if not self.records():
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
