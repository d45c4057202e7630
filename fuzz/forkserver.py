"""Worker processes that start in hundredths of a second: forked from a process that has imported torch already.

The fork server has no threads and no device context. What it forks loads a kernel and makes its own context, since
neither survives a fork. Should the server have touched a GPU after all, workers for GPUs are started without it. Every
process here ends with the one that started it, however that one ends.
"""

import atexit
import ctypes
import functools
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_CHILDREN = Path(f"/proc/self/task/{os.getpid()}/children")
_MESSAGE_BYTES = 1 << 20
_END_SECONDS = 10.0
_KILL_SECONDS = 30.0
_ANSWER_SECONDS = 180.0


class WorkerProcess(Protocol):
    """A worker process as its executor sees it."""

    connection: Connection
    pid: int

    def poll(self) -> int | None:
        """Return the exit status (minus the signal's number where one ended it), or None while the process lives."""

    def kill(self) -> None:
        """End the process at once; one that has ended already is none the worse."""


def end(process: WorkerProcess, *, dying: bool = False) -> int:
    """End a process and return its exit status. One that is `dying`, since it closed its connection, is left to end by
    itself if it does so within seconds. One that even SIGKILL does not end, since a driver holds it, is left behind."""
    now = time.monotonic()
    kill_at = now + (_END_SECONDS if dying else 0.0)
    give_up_at = kill_at + _KILL_SECONDS
    while (status := process.poll()) is None and now < give_up_at:
        if now >= kill_at:
            process.kill()
        time.sleep(0.001)
        now = time.monotonic()
    process.connection.close()
    return -int(signal.SIGKILL) if status is None else status


class ForkServer:
    """A process that forks workers. It starts in the background, with `environment`, which no later one can change for
    what is imported then: torch and Triton."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        # Sequenced packets keep messages apart.
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_ANSWER_SECONDS)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from kernelfuzz.fuzz.forkserver import main; main()", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                # The folder that a user stands in is a worker's to search, after everything that is installed.
                env={**environment, "PYTHONSAFEPATH": "1", "OPENBLAS_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )

    def fork(self, environment: Mapping[str, str], output: int, *, gpu: bool) -> WorkerProcess | None:
        """Return a new worker in this process's current folder, whose stdout and stderr are the file `output`; None if
        it is to use a `gpu` and the server uses a GPU's driver, which does not survive a fork.

        Raises ConnectionError, with the server's last words, if it is dead.
        """
        ours, theirs = Pipe()
        request = {"environment": dict(environment), "folder": str(Path.cwd()), "gpu": gpu}
        try:
            with theirs:
                socket.send_fds(self._socket, [json.dumps(request).encode()], [theirs.fileno(), output])
                pid = self._answer()
        except OSError:
            ours.close()
            raise ConnectionError(f"the process that starts workers died: {self._last_words()}") from None
        if isinstance(pid, int):
            return _Forked(self, ours, pid)
        ours.close()
        if pid is not None:
            raise ConnectionError(f"no worker can be started: {pid}")
        return None

    def status(self, pid: int) -> int | None:
        """Return the exit status of a worker, None while it lives. Once it is returned, others may get the id."""
        try:
            self._socket.sendall(json.dumps(pid).encode())
            status = self._answer()
            assert not isinstance(status, str)
            return status
        except OSError:  # the server is dead and has taken its workers along
            return -int(signal.SIGKILL)

    def _answer(self) -> int | str | None:
        answer = self._socket.recv(_MESSAGE_BYTES)
        if not answer:
            raise ConnectionError
        content: int | str | None = json.loads(answer)
        return content

    def _last_words(self) -> str:
        assert self._process.stderr is not None
        self._process.kill()
        lines = self._process.stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {self._process.wait()}"

    def is_alive(self) -> bool:
        """Whether the server still runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the server, and with it every worker that it forked."""
        self._socket.close()
        try:
            self._process.wait(_END_SECONDS)  # it ends what is left of its workers first
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@functools.cache
def _servers() -> dict[str, ForkServer]:
    servers: dict[str, ForkServer] = {}

    def close() -> None:
        for server in servers.values():
            server.close()

    atexit.register(close)
    return servers


def fork_server(environment: Mapping[str, str]) -> ForkServer:
    """Return this process's fork server for such an environment; a new one, which takes seconds to answer, where there
    is none alive.

    The server dies with the thread that made it, as Linux has it.
    """
    servers = _servers()
    kind = environment.get("TRITON_INTERPRET", "")  # read when Triton is imported, which torch does
    if kind not in servers or not servers[kind].is_alive():
        servers[kind] = ForkServer(environment)
    return servers[kind]


class _Forked:
    """A worker that a fork server forked."""

    def __init__(self, server: ForkServer, connection: Connection, pid: int) -> None:
        self.connection = connection
        self.pid = pid
        self._server = server
        self._status: int | None = None

    def poll(self) -> int | None:
        if self._status is None:
            self._status = self._server.status(self.pid)
        return self._status

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class SpawnedProcess:
    """A worker that is started as a program of its own; if `prefix` is not empty, by that command of a tool which
    watches it."""

    def __init__(self, prefix: Sequence[str], environment: Mapping[str, str], output: int) -> None:
        self.connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [
                    *prefix,
                    sys.executable,
                    "-c",
                    "from kernelfuzz.fuzz.worker import main; main()",
                    str(theirs.fileno()),
                    *(["watched"] if prefix else []),
                ],
                pass_fds=[theirs.fileno()],
                env={**environment, "PYTHONSAFEPATH": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # so that all the tool's processes can be ended
            )
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)


def main() -> None:
    """Fork workers for the socket whose file descriptor is the first argument, until its other side is closed. End then
    what is left of them, and of what their kernels started."""
    # When the parent dies the socket's other side is closed; SIGCONT lets a stopped process see it.
    end_with_parent(signal.SIGCONT)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what outlives a worker becomes this process's child
    ignore_signals()
    requests = socket.socket(fileno=int(sys.argv[1]))
    # Everything that a worker needs but the kernel and the device. No torch operation runs here: threads and device
    # contexts do not survive a fork.
    from kernelfuzz.fuzz import worker

    worker.import_all()
    workers: set[int] = set()
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, _MESSAGE_BYTES, 2)
        if not message:
            _end_children(but=set(), seconds=2.0)
            os._exit(0)
        request = json.loads(message)
        if isinstance(request, int):
            status = _status(request)
            if status is not None:
                workers.discard(request)
                _end_children(but=workers)
            requests.sendall(json.dumps(status).encode())
            continue
        answer: int | str | None = None
        if not (request["gpu"] and _has_opened_gpu()):
            try:
                answer = os.fork()
            except OSError as error:
                answer = str(error.strerror)
        if answer == 0:
            requests.close()
            _work(worker, request, *descriptors)
        if isinstance(answer, int):
            workers.add(answer)
        for descriptor in descriptors:
            os.close(descriptor)
        requests.sendall(json.dumps(answer).encode())


def _end_children(but: set[int], seconds: float = 0.0) -> None:
    """Kill this process's children, those that it was left by dead workers among them, but for some. What that does not
    end at once is tried again for so many seconds, or else at the next call."""
    until = time.monotonic() + seconds
    while others := set(map(int, _CHILDREN.read_text().split())) - but if _CHILDREN.exists() else set():
        for pid in others:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)  # its own children are this process's then
        if time.monotonic() >= until:
            return
        time.sleep(0.001)


def _has_opened_gpu() -> bool:
    """Whether NVIDIA's driver is in use in this process. Its library alone does no harm: a torch built for CUDA may be
    linked to it."""
    links = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one that lists them is closed by now
            links.append(str(descriptor.readlink()))
    return any(link.startswith(("/dev/nvidia", "/dev/dxg")) for link in links)  # the latter under Windows


def _status(pid: int) -> int | None:
    try:
        ended, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:  # none of these
        return -int(signal.SIGKILL)
    return os.waitstatus_to_exitcode(status) if ended else None


def _work(worker: Any, request: dict[str, Any], connection: int, output: int) -> None:
    """Be a worker: the child's side of a fork, which never returns."""
    status = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        os.set_inheritable(connection, False)  # a child of the kernel's must not hide its death
        end_with_parent()
        keep_no_core_file()
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        sys.path += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        worker.run(connection)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)  # never back into the server's loop


def end_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Have Linux send this process a signal when its parent dies, or the thread of it that made this process."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it died before
        os._exit(1)


def keep_no_core_file() -> None:
    """Have this process leave no core file: a crash is a result, and a file for each would fill the disk."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def ignore_signals() -> None:
    """Ignore Ctrl-C and SIGTERM, which reach the whole process group: the campaign's process decides."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
