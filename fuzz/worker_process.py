"""The campaign's side of a worker: its process, its connection, and what it prints."""

import fcntl
import json
import os
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from kernelfuzz.fuzz import sanitizer
from kernelfuzz.fuzz.executor import LoadedKernel, job_message, worker_environment
from kernelfuzz.fuzz.forkserver import SpawnedProcess, WorkerProcess, end, fork_server
from kernelfuzz.fuzz.job import Job
from kernelfuzz.fuzz.verdict import Failure, printable
from kernelfuzz.strategies.errors import KernelfuzzError

LOAD_SECONDS = 180.0
"""How long a worker may take to load its kernel."""

REPORT_SECONDS = 0.05
"""How long after a verdict the sanitizer's reports on its launch are waited for."""

LOOK_SECONDS = 0.5
"""How often a silent worker is looked after, whether it is still there."""

_LAST_WORDS_BYTES = 2000
_OUTPUT_BYTES = 1 << 22


class Worker:
    """A worker process, its connection, and what it and its kernel print."""

    def __init__(self, job: Job, tool: sanitizer.Tool | None) -> None:
        self._job = job
        # In memory, so that a chatty kernel can neither fill a pipe and stall nor a disk.
        self._output = os.memfd_create("kernelfuzz-worker")
        fcntl.fcntl(self._output, fcntl.F_SETFL, os.O_APPEND)
        self._log: sanitizer.Log | None = None
        self._looked = time.monotonic()
        self._is_garbled = False
        self._kernel: LoadedKernel | None = None
        environment = worker_environment(job)
        if tool is not None:
            self._folder = tempfile.TemporaryDirectory(prefix="kernelfuzz-")
            log = Path(self._folder.name) / "log"
            self._log = sanitizer.Log(log)
            watched = {**environment, **sanitizer.environment()}
            self.process: WorkerProcess = SpawnedProcess(sanitizer.command(tool, log), watched, self._output)
        else:
            self.process = self._fork(environment) or SpawnedProcess([], environment, self._output)
        self.send(json.dumps(job_message(job, tool)).encode())

    def _fork(self, environment: dict[str, str]) -> WorkerProcess | None:
        kind = self._job.device.type
        if kind == "xpu":  # whose driver comes with torch
            return None
        try:
            return fork_server(environment).fork(environment, self._output, gpu=kind != "cpu")
        except ConnectionError as error:
            os.close(self._output)
            raise KernelfuzzError(f"{self._job}: {error}") from error

    def send(self, message: bytes) -> None:
        """Send a message. A worker that is dead already is noticed when it is asked for the answer."""
        if os.fstat(self._output).st_size > _OUTPUT_BYTES:
            os.ftruncate(self._output, 0)
        with suppress(ConnectionError):
            self.process.connection.send_bytes(message)

    def receive(self, seconds: float) -> dict[str, Any]:
        """Return the next answer. Raises TimeoutError after so many seconds, EOFError or ConnectionError if the worker
        died."""
        until = time.monotonic() + seconds
        while not self.process.connection.poll(min(LOOK_SECONDS, max(0.0, until - time.monotonic()))):
            # A child that the kernel forked keeps the connection open after the worker's death.
            if time.monotonic() >= self._looked + LOOK_SECONDS:
                self._looked = time.monotonic()
                if self.process.poll() is not None:
                    raise EOFError
            if time.monotonic() >= until:
                raise TimeoutError
        try:
            answer: dict[str, Any] = json.loads(self.process.connection.recv_bytes())
        except (EOFError, ConnectionError):
            raise
        except (OSError, ValueError):  # half a message, or what native code wrote over it
            self._is_garbled = True
            self.process.kill()
            raise EOFError from None
        return answer

    def is_loaded(self) -> bool:
        """Whether `loaded` returns at once."""
        return self._kernel is not None or self.process.connection.poll(0)

    def loaded(self) -> LoadedKernel:
        """Wait until the kernel is loaded. Raises KernelfuzzError if it cannot be, with the worker's reason."""
        if self._kernel is None:
            try:
                answer = self.receive(LOAD_SECONDS)
            except (EOFError, ConnectionError):
                reason = f"while it loaded the kernel {self.death().message}"
                if self._log is not None:
                    with suppress(FileNotFoundError):  # it did not come that far
                        reason = sanitizer.unusable(self._log.path.read_text(errors="replace")) or reason
                raise KernelfuzzError(f"{self._job}: {reason}") from None
            except TimeoutError:
                raise KernelfuzzError(f"{self._job}: the kernel was not loaded within {LOAD_SECONDS:g} s") from None
            if "error" in answer:
                raise KernelfuzzError(f"{self._job}: {answer['error']}")
            self._kernel = LoadedKernel(answer["version"], answer["dimensions"], tuple(answer["notes"]))
        return self._kernel

    def death(self) -> Failure:
        """Return how the worker ended, as a failure: a signal's name or the exit status, and its last line."""
        status = end(self.process, dying=True)
        if self._is_garbled:
            return Failure("crash", "", "garbled_answer", "the worker's connection to kernelfuzz was written over")
        cause = f"exit_status_{status}"
        if status < 0:
            cause = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal_{-status}"
        size = os.fstat(self._output).st_size
        words = os.pread(self._output, _LAST_WORDS_BYTES, max(0, size - _LAST_WORDS_BYTES)).decode(errors="replace")
        last = [printable(line) for line in words.strip().splitlines()[-1:]]
        return Failure("crash", "", cause, "the worker died: " + ": ".join([cause, *last]), output_tail=words)

    def reports(self) -> list[Failure]:
        """Return what the sanitizer reported since the last call. Its front end, another process, may lag behind."""
        if self._log is None:
            return []
        time.sleep(REPORT_SECONDS)
        return sanitizer.failures(self._log.new_reports())

    def kill(self) -> None:
        """Begin to end the worker."""
        self.process.kill()

    def has_ended(self) -> bool:
        """Whether the worker is gone; closes it then."""
        if self.process.poll() is None:
            return False
        self.close()
        return True

    def close(self) -> None:
        """End the worker; closing it again does nothing."""
        if self._output < 0:
            return
        end(self.process)
        os.close(self._output)
        self._output = -1
        if self._log is not None:
            self._folder.cleanup()
