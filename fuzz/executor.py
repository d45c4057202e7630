"""The executor: runs cases in a worker process of their own, which may die."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from kernelfuzz.fuzz.job import Job
from kernelfuzz.fuzz.verdict import Failure, Verdict
from kernelfuzz.strategies.case import Case, to_json
from kernelfuzz.strategies.errors import KernelfuzzError

CASE_SECONDS = 120.0
"""A worker that is silent for longer hangs. Far above the slowest case, the first one of a kernel that is still
built."""

_STDERR_TAIL = 2000


@dataclass(frozen=True)
class LoadedKernel:
    """What a worker says of its kernel: its version, and what narrows the target's strategy."""

    version: str
    dimensions: Mapping[str, Any]


class Executor:
    """Runs the cases of one job in a worker process; use it as a context manager.

    The process starts at once and loads its kernel in the background; `loaded` waits for it. A worker that dies or
    hangs fails its case, and the next case gets a new one.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        # Open until the worker is gone; a file, so that a chatty kernel cannot fill a pipe and stall.
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self._start()

    def __enter__(self) -> "Executor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        ours, theirs = Pipe()
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        if self._job.device.type == "cpu" and self._job.implementation.triton:
            environment["TRITON_INTERPRET"] = "1"
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from kernelfuzz.fuzz.worker import main; main()", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
        )
        theirs.close()
        self._connection: Connection = ours
        self._is_loaded = False
        request = {"target": self._job.target.name, "kernel": str(self._job.kernel), "device": str(self._job.device)}
        with suppress(ConnectionError):  # it died already, which `loaded` will say
            self._connection.send_bytes(json.dumps(request).encode())

    def loaded(self) -> LoadedKernel:
        """Wait until the kernel is loaded. Raises KernelfuzzError if it cannot be, with the worker's reason."""
        try:
            answer = self._receive()
        except (EOFError, ConnectionError):
            raise KernelfuzzError(f"{self._job}: the worker died while it loaded the kernel: {self._death()}") from None
        except TimeoutError:
            raise KernelfuzzError(f"{self._job}: the kernel was not loaded within {CASE_SECONDS:g} s") from None
        if "error" in answer:
            raise KernelfuzzError(f"{self._job}: {answer['error']}")
        self._is_loaded = True
        return LoadedKernel(answer["version"], answer["dimensions"])

    def run(self, case: Case) -> Verdict:
        """Run one case. A worker that dies or hangs is a failure of kind crash or hang.

        Raises KernelfuzzError for a case that the harness itself cannot judge.
        """
        if not self._is_loaded:
            self._start()
            self.loaded()
        try:
            self._connection.send_bytes(json.dumps(to_json(case)).encode())
            answer = self._receive()
            if "error" in answer:
                raise KernelfuzzError(f"{self._job}: {answer['error']}")
            if not answer["usable"]:
                self._stop()
            return Verdict.from_json(answer["verdict"])
        except (EOFError, ConnectionError):
            failure = Failure("crash", "", self._cause(), f"the worker died: {self._death()}")
        except TimeoutError:
            failure = Failure("hang", "", "no_answer", f"no answer within {CASE_SECONDS:g} s")
        self._stop()
        return Verdict((failure,))

    def close(self) -> None:
        """End the worker."""
        self._stop()
        self._output.close()

    def _receive(self) -> dict[str, Any]:
        if not self._connection.poll(CASE_SECONDS):
            raise TimeoutError
        answer: dict[str, Any] = json.loads(self._connection.recv_bytes())
        return answer

    def _stop(self) -> None:
        self._is_loaded = False
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def _cause(self) -> str:
        """Return the signal or status that the worker ended with."""
        code = self._process.wait()
        if code >= 0:
            return f"exit_status_{code}"
        return signal.Signals(-code).name if -code in set(signal.Signals) else f"signal_{-code}"

    def _death(self) -> str:
        """Return how the worker ended and the last line that it wrote."""
        cause = self._cause()
        size = self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, size - _STDERR_TAIL))
        lines = self._output.read().decode(errors="replace").strip().splitlines()
        return f"{cause}: {lines[-1]}" if lines else cause
