"""Nights that are killed: nothing that anybody was told of is lost."""

import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from kernelfuzz.fuzz.nightly.ledger import INTERRUPTED, Ledger
from kernelfuzz.fuzz.store import queries
from kernelfuzz.fuzz.store.store import Store

TIMES = 20
SCRIPT = Path(__file__).with_name("kill_nights.py")
COMMAND = "from kernelfuzz.fuzz.cli import main; main()"


class Nights:
    """The processes of kill_nights.py, and what they have reported."""

    def __init__(self, store):
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(store)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.reported = set()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self._process:
            self._process.stdin.close()

    def start(self, number, most):
        """Start a night that makes up so many failures at most, and return its process."""
        self._process.stdin.write(f"{number} {most}\n")
        self._process.stdin.flush()
        return int(self.read("pid"))

    def read(self, awaited):
        """Read until a line begins with that word, and return its rest."""
        for line in self._process.stdout:
            word, _, rest = line.strip().partition(" ")
            assert word != "problem", rest
            if word == "reported":
                self.reported.add(rest)
            if word == awaited:
                return rest
        raise AssertionError("kill_nights.py has ended")


class Unheard:
    """An observer that wants to hear of no problem."""

    def event(self, event):
        pass

    def failure(self, found, status):
        pass

    def problem(self, text):
        raise AssertionError(text)


def check(folder, reported):
    """The store opens, and each failure that was reported is in it, with a case that can be replayed."""
    store = Store(folder)
    assert store.problems == []
    assert reported <= queries.failures(store.connection).keys()
    ledger = Ledger(store, 0, 0, (), Unheard())
    for name in reported:
        saved = ledger.saved(name)
        assert saved is not None
        assert saved.failures[0].clause == name.rpartition(".")[2]
    store.close()


def test_no_reported_failure_is_lost_when_a_night_is_killed(tmp_path):
    """Twenty times on one store, at random moments after the start or a report, or just when there is one."""
    moments = random.Random(7)
    with Nights(tmp_path) as nights:
        for number in range(TIMES):
            process = nights.start(number, 10_000)
            for _ in range(number % 4):
                nights.read("reported")
            if number % 4 < 3:
                time.sleep(moments.uniform(0.0, 0.5))
            os.kill(process, signal.SIGKILL)
            nights.read("ended")
            check(tmp_path, nights.reported)
        assert len(nights.reported) > TIMES

        # A failure that only nights that were cut off have seen is new, and then known.
        for number, status, seen in ((TIMES, 1, "new"), (TIMES + 1, INTERRUPTED, "known")):
            nights.start(number, 0)
            assert nights.read("status") == str(status)
            with queries.connect(tmp_path) as connection:
                run, *_ = queries.runs(connection)
                statuses = {each.fingerprint: each.status for each in queries.sightings(connection, run.id)}
                assert statuses == dict.fromkeys(queries.failures(connection), seen)
    with queries.connect(tmp_path) as connection:
        states = [run.state for run in queries.runs(connection)]
    assert states.count("cut off") >= TIMES // 2  # others were killed before they had begun
    assert set(states) == {"cut off", "interrupted"}


def test_what_a_night_says_it_has_found_outlives_it(tmp_path, worker_environment):
    """A real one; its lane ends with it."""
    config = 'targets = ["bgmv"]\nkernels = ["engine_kernels:wrong_above_rank_8"]\nregressions = false\n'
    (tmp_path / "kernelfuzz.toml").write_text(config)
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "nightly", "--store", "store", "--time", "60s"],
        cwd=tmp_path,
        env=worker_environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        name = next(line.split()[1] for line in process.stdout if line.startswith("NEW"))
        (lane,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        its_end = os.pidfd_open(int(lane))
        process.kill()
        assert select.select([its_end], [], [], 60.0)[0]
        os.close(its_end)
    check(tmp_path / "store", {name})
