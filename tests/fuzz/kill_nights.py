"""Nights to be killed: `python kill_nights.py STORE` runs one for each line of its input.

A line is `NUMBER MOST`. The night is a fork of this process, which has imported everything. It runs no kernel: its lane
finds the failures of earlier nights again, makes up so many others at most, `invented-NUMBER-0` and so on, as fast as
they can be written down, and then interrupts the night. The output is `pid ID`, `reported FINGERPRINT` once somebody
was told of a failure, `status STATUS` of a night that was not killed, and `ended`.
"""

import os
import sys
import time
from pathlib import Path

from kernelfuzz.fuzz import events
from kernelfuzz.fuzz.job import unchecked_job
from kernelfuzz.fuzz.nightly import night
from kernelfuzz.fuzz.nightly.config import Config
from kernelfuzz.fuzz.nightly.lane import Done, Emitted
from kernelfuzz.fuzz.nightly.lanes import Lane
from kernelfuzz.fuzz.nightly.night import Night
from kernelfuzz.fuzz.nightly.tasks import ReplayTask
from kernelfuzz.fuzz.store.store import Store
from kernelfuzz.fuzz.verdict import Failure, Verdict
from kernelfuzz.strategies.batches import Batch, Segment
from kernelfuzz.strategies.bgmv import Case

JOB = unchecked_job("bgmv", "engine_kernels:right", "cpu")
CASE = Case(
    seed=0,
    layer="wrapper",
    op="shrink",
    batch=Batch((Segment(0, 1),)),
    num_adapters=1,
    width=1,
    rows=1,
    columns=1,
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


class Inventor:
    """A lane in this process."""

    def __init__(self, number, most):
        self.is_done = False
        self._lane = Lane("invented", "cpu")
        self._told = self._tell(number, most)

    def open(self, kinds, records):
        pass

    def kinds(self):
        return {"cpu": 1}

    def adopted(self):
        return []

    def idle(self):
        return [self._lane] if self._lane.task is None else []

    def start(self, lane, task):
        lane.task, lane.since = task, time.monotonic()

    def wait(self, seconds):
        if self._lane.task is None:
            return []
        if isinstance(self._lane.task, ReplayTask):
            return [(self._lane, message) for message in [*map(Emitted, self._replayed()), Done()]]
        return [(self._lane, message) for message in next(self._told)]

    def _replayed(self):
        for name, trial in self._lane.task.trials:
            failures = {name: trial.saved.failures[0]}
            yield events.FailureReplayed(JOB, name, trial.saved.case, "1", "FAILED", "", failures)

    def _tell(self, number, most):
        for index in range(most):
            failure = Failure("wrong_value", "output", f"invented-{number}-{index}", "made up")
            name = f"bgmv.engine_kernels-right.wrong_value.output.{failure.clause}"
            verdict = Verdict((failure,))
            yield [Emitted(events.CaseFinished(JOB, CASE, frozenset({f"regime-{index}"}), verdict, index, False))]
            yield [Emitted(events.FailureFound(JOB, name, failure, CASE, index))]
            if index % 2:
                yield [Emitted(events.FailureFound(JOB, name, failure, CASE, index, shrunk=True))]
        self.is_done = True
        yield [Done()]

    def running(self, lane):
        return None

    def stop(self):
        pass

    def close(self):
        pass


class Reporter:
    """Says what it is told at once."""

    def event(self, event):
        pass

    def failure(self, found, status):
        say("reported", found.fingerprint)

    def problem(self, text):
        say("problem", text)


def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def wait_for_the_disk(statement):
    """As on one that is slow, so that more nights are killed while they write."""
    if statement == "COMMIT":
        time.sleep(0.005)


def run(folder, number, most):
    say("pid", os.getpid())
    lanes = Inventor(number, most)
    store = Store(folder)
    store.connection.set_trace_callback(wait_for_the_disk)
    config = Config(regressions=False)
    status = Night(config, store, [JOB], [], lanes, 600.0, number, Reporter(), lambda: lanes.is_done).run()
    store.close()
    say("status", status)


def main():
    night.SAVE_SECONDS = 0.02  # so that some are killed while they write what was counted
    for line in sys.stdin:
        number, most = map(int, line.split())
        child = os.fork()
        if child == 0:
            run(Path(sys.argv[1]), number, most)
            os._exit(0)
        os.waitpid(child, 0)
        say("ended")


if __name__ == "__main__":
    main()
