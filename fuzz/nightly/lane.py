"""A lane: a process in which one task runs at a time, so that as many can run at once as there are devices.

What a lane does, it tells by messages. It ends with the other side of its connection, and with it all that it started.
"""

import os
import pickle
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from kernelfuzz.fuzz.events import Event
from kernelfuzz.fuzz.forkserver import ignore_signals
from kernelfuzz.fuzz.nightly.records import write_record
from kernelfuzz.fuzz.nightly.tasks import Running, Surroundings, Task
from kernelfuzz.strategies.errors import KernelfuzzError

_END_SECONDS = 5.0
_MOST_MESSAGES = 500
_LAST_BYTES = 2000


@dataclass(frozen=True)
class Emitted:
    """A task has emitted an event."""

    event: Event


@dataclass(frozen=True)
class Done:
    """A task is over. `problem` is what went wrong in kernelfuzz itself, in one line, and `trace` where."""

    problem: str = ""
    trace: str = ""


@dataclass(frozen=True)
class Lost:
    """The lane is gone, for a `reason`, with all that it was doing."""

    reason: str


Message = Emitted | Running | Done | Lost


@dataclass(frozen=True)
class LaneSettings:
    """What a lane is made with.

    - folder: where the example databases are, and files for a person
    - workers: of each job; None: as many as pay
    - record: the file in which it keeps what its workers have now; None: it tells of that by messages
    """

    folder: Path
    workers: int | None = None
    record: Path | None = None


class LaneProcess:
    """The other side of a lane: starts its process, with `environment`."""

    def __init__(self, settings: LaneSettings, environment: Mapping[str, str]) -> None:
        self.connection, theirs = Pipe()
        self._output = os.memfd_create("kernelfuzz-lane")  # a pipe that nobody reads would fill
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from kernelfuzz.fuzz.nightly.lane import main; main()", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**environment, "PYTHONSAFEPATH": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._output,
            )
        self._send(settings)

    def start(self, task: Task) -> None:
        """Have it run a task after those that it has."""
        self._send(task)

    def stop(self) -> None:
        """Have it end its task as soon as it can, and begin no other one."""
        self._send(None)

    def _send(self, content: Any) -> None:
        with suppress(OSError):  # a lane that is gone is noticed when it is asked
            self.connection.send_bytes(pickle.dumps(content))

    def receive(self, seconds: float) -> list[Message]:
        """Return what it has told, after so many seconds at the latest."""
        messages: list[Message] = []
        try:
            while len(messages) < _MOST_MESSAGES and self.connection.poll(0.0 if messages else seconds):
                messages.append(pickle.loads(self.connection.recv_bytes()))
        except (EOFError, OSError):
            messages.append(Lost(self._last_words()))
        return messages

    def _last_words(self) -> str:
        """Return how it ended."""
        self.close()
        end = os.fstat(self._output).st_size
        lines = (
            os.pread(self._output, _LAST_BYTES, max(0, end - _LAST_BYTES)).decode(errors="replace").strip().splitlines()
        )
        status = self._process.returncode
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        return f"its process {how}" + (f": {lines[-1]}" if lines else "")

    def hang_up(self) -> None:
        """Have it end, and what it started, without waiting for that."""
        self.connection.close()

    def close(self, until: float | None = None) -> None:
        """End it, and wait for that, until the monotonic clock shows `until` or for some seconds; then kill it."""
        self.hang_up()
        left = _END_SECONDS if until is None else until - time.monotonic()
        try:
            self._process.wait(max(0.0, left))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main() -> None:
    """Be a lane, for the connection whose file descriptor is the first argument."""
    ignore_signals()
    lane = _Lane(Connection(int(sys.argv[1])))
    threading.Thread(target=lane.listen, daemon=True).start()
    lane.work()


class _Lane:
    """The lane's own side. The main thread works, since what makes workers must not end before them; another one
    listens."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._settings: LaneSettings = pickle.loads(connection.recv_bytes())
        self._tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
        self._stopped = threading.Event()

    def listen(self) -> None:
        """Take tasks, and the word to stop, until the other side is gone."""
        try:
            while True:
                content = pickle.loads(self._connection.recv_bytes())
                if content is None:
                    self._stopped.set()
                else:
                    self._tasks.put(content)
        except (EOFError, OSError):
            os._exit(0)

    def work(self) -> None:
        """Run one task after the other."""
        surroundings = Surroundings(
            self._settings.folder, self._settings.workers, self._emit, self._record, self._stopped.is_set
        )
        while True:
            task = self._tasks.get()
            done = Done()
            try:
                if not self._stopped.is_set():
                    task.run(surroundings)
            except KernelfuzzError as error:
                done = Done(str(error))
            except Exception as error:
                done = Done(f"{type(error).__name__}: {error}", traceback.format_exc())
            self._tell(done)

    def _emit(self, event: Event) -> None:
        self._tell(Emitted(event))

    def _record(self, running: Running) -> None:
        """Keep what the workers have now, before they have it."""
        if self._settings.record is None:
            self._tell(running)
        else:
            with suppress(OSError):  # a full disk costs no more than this record
                write_record(self._settings.record, running)

    def _tell(self, message: Message) -> None:
        try:
            self._connection.send_bytes(pickle.dumps(message))
        except OSError:
            time.sleep(_END_SECONDS)  # until `listen` notices
            os._exit(0)
