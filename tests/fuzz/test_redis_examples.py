"""Examples that machines share, in a real Redis server."""

import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest

from kernelfuzz.fuzz import events
from kernelfuzz.fuzz.nightly.redis_examples import redis_examples
from kernelfuzz.fuzz.nightly.tasks import FuzzTask, Surroundings

redis = pytest.importorskip("redis", reason="needs the package redis: pip install 'kernelfuzz[redis]'")


class Server:
    """A Redis server of the test's own, which keeps nothing on disk."""

    def __init__(self, folder):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"redis://127.0.0.1:{self.port}/0"
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        with redis.Redis.from_url(self.address) as client:
            while not self._answers(client):
                assert self._process.poll() is None, "the Redis server has ended"
                time.sleep(0.02)

    def _answers(self, client):
        try:
            return client.ping()
        except redis.ConnectionError:
            return False

    def keys(self):
        with redis.Redis.from_url(self.address, decode_responses=True) as client:
            return list(client.scan_iter())

    def stop(self):
        self._process.kill()
        self._process.wait()


@pytest.fixture
def server(tmp_path):
    if shutil.which("redis-server") is None:
        pytest.skip("needs the program redis-server: apt-get install redis-server")
    server = Server(tmp_path)
    yield server
    server.stop()


@pytest.fixture
def search(tmp_path, monkeypatch, engine_job, worker_environment):
    """Runs a slice of a job as a lane of the machine of that name does, until it has shrunk something or
    `is_enough(events)`; returns what was emitted."""
    monkeypatch.setenv("PYTHONPATH", worker_environment["PYTHONPATH"])

    def run(machine, name, address, *, seed=0, watch=lambda event: None, is_enough=lambda emitted: False):
        emitted = []

        def emit(event):
            emitted.append(event)
            watch(event)

        def is_stopped():
            return is_enough(emitted) or any(isinstance(each, events.FailureFound) and each.shrunk for each in emitted)

        surroundings = Surroundings(tmp_path / machine, 1, emit, lambda running: None, is_stopped)
        FuzzTask(engine_job(name), seed, 0, 60.0, 60.0, examples=address).run(surroundings)
        return emitted

    return run


def cases(emitted):
    return [event for event in emitted if isinstance(event, events.CaseFinished)]


def shrunk(emitted):
    return [event.fingerprint for event in emitted if isinstance(event, events.FailureFound) and event.shrunk]


def test_what_one_machine_finds_another_tries_first(server, search):
    found = shrunk(search("one", "wrong_above_rank_8", server.address))
    other = search("another", "wrong_above_rank_8", server.address, seed=1)
    assert shrunk(other) == found != []
    assert cases(other)[0].verdict.failures


def test_machines_that_share_nothing_begin_anew(search):
    """What the test above sees comes from the server."""
    search("one", "wrong_above_rank_8", "")
    other = search("another", "wrong_above_rank_8", "", seed=1, is_enough=cases)
    assert not cases(other)[0].verdict.failures


def test_each_target_and_kernel_has_its_own_examples(server, engine_job):
    mine, other = (redis_examples(server.address, engine_job(name)) for name in ("two_bugs", "right"))
    mine.save(b"key", b"example")
    assert list(redis_examples(server.address, engine_job("two_bugs")).fetch(b"key")) == [b"example"]
    assert list(other.fetch(b"key")) == []
    assert server.keys() == ["kernelfuzz.bgmv.engine_kernels-two_bugs:key"]


def test_a_search_goes_on_without_its_server(server, search):
    """Stopped after the first case; the failure is found and shrunk all the same."""
    stopped = []

    def stop(event):
        if isinstance(event, events.CaseFinished) and not stopped:
            server.stop()
            stopped.append(event)

    emitted = search("one", "wrong_above_rank_8", server.address, watch=stop)
    assert shrunk(emitted)
    assert [event.error for event in emitted if isinstance(event, events.JobFinished)] == [""]


def test_a_search_that_begins_without_its_server_runs(server, search):
    """As a slice does that comes after the server went away."""
    server.stop()
    emitted = search("one", "wrong_above_rank_8", server.address)
    assert shrunk(emitted)


def test_a_server_that_falls_silent_has_no_examples(monkeypatch, engine_job):
    """It accepts the connection and never answers."""
    monkeypatch.setattr("kernelfuzz.fuzz.nightly.redis_examples.ANSWER_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        database = redis_examples(f"redis://127.0.0.1:{silent.getsockname()[1]}/0", engine_job("right"))
        fetched = []
        reader = threading.Thread(target=lambda: fetched.append(list(database.fetch(b"key"))), daemon=True)
        reader.start()
        reader.join(30)
    assert fetched == [[]]


@pytest.fixture
def night(kernelfuzz, tmp_path):
    """Runs a night with examples at that address."""

    def run(address):
        (tmp_path / "kernelfuzz.toml").write_text(f'kernels = ["engine_kernels:right"]\nexamples = "{address}"\n')
        return kernelfuzz("nightly", "--store", "store", "--time", "10s")

    return run


def test_a_night_without_its_server_does_not_begin(night, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        done = night(f"redis://somebody:secret@127.0.0.1:{port}/0")
    assert done.status == 2
    (line,) = done.err.splitlines()
    assert f"127.0.0.1:{port}" in line
    assert "secret" not in line
    assert not (tmp_path / "store").exists()


def test_an_address_that_is_none_is_refused(night):
    done = night("http://127.0.0.1/")
    assert done.status == 2
    (line,) = done.err.splitlines()
    assert "http://127.0.0.1/" in line


def test_the_package_is_named_where_it_is_missing(night, monkeypatch):
    monkeypatch.setitem(sys.modules, "redis", None)
    done = night("redis://127.0.0.1:6379/0")
    assert done.status == 2
    (line,) = done.err.splitlines()
    assert "pip install 'kernelfuzz[redis]'" in line
