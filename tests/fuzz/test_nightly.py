"""Nights on this machine, run as a person runs them: what they remember, and what they go on after."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import pytest

from kernelfuzz.fuzz.failure_folder import read_failure
from kernelfuzz.fuzz.store import queries
from kernelfuzz.kernels import releases
from kernelfuzz.strategies.errors import KernelfuzzError

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from planted_bugs import PLANTS, plant_bug

COMMAND = "from kernelfuzz.fuzz.cli import main; main()"
SECONDS = 6
LATE_SECONDS = 30
KERNEL = """
import os
import engine_kernels

def waits_once(inputs, outputs):
    with open(os.environ["LAUNCHES"], "a") as launches:
        launches.write(f"{inputs.case}\\n")
    engine_kernels.waits_once(inputs, outputs)
"""


class Ended(NamedTuple):
    """What a night left: its exit status, its summary, and what it said."""

    status: int
    summary: dict
    said: list[str]


class Night:
    """`kernelfuzz nightly --json` in a folder, with further environment variables."""

    def __init__(self, folder, environment, seconds=60, seed=1):
        options = ("--store", "store", "--time", f"{seconds}s", "--seed", str(seed), "--json")
        self._process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "nightly", *options],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._said = []

    def hear(self, is_awaited):
        """Wait for a line."""
        for line in self._process.stderr:
            self._said.append(line)
            if is_awaited(line):
                return
        raise AssertionError("".join(self._said))

    def wait_for(self, is_true):
        """Wait until something is true, as long as the night goes on."""
        while not is_true():
            assert self._process.poll() is None, self._process.stderr.read()
            time.sleep(0.05)

    def lane(self):
        """Return the lane's process."""
        (lane,) = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(lane)

    def end(self, number=None):
        """Return what it left after a signal, or when its time is over."""
        if number is not None:
            self._process.send_signal(number)
        out, err = self._process.communicate()
        return Ended(self._process.returncode, json.loads(out or "{}"), [*self._said, *err.splitlines(keepends=True)])


class Store(NamedTuple):
    """What a store has, by the number of the run."""

    runs: dict
    statuses: dict
    replays: dict
    statistics: dict
    failures: dict


def read(folder):
    connection = queries.connect(folder / "store")
    runs = {run.id: run for run in reversed(queries.runs(connection))}
    store = Store(
        runs,
        {run: {each.fingerprint: each.status for each in queries.sightings(connection, run)} for run in runs},
        {run: [each.outcome for each in queries.replays(connection, run)] for run in runs},
        {run: {each.kernel: each.document for each in queries.statistics(connection, run)} for run in runs},
        queries.failures(connection),
    )
    connection.close()
    return store


def write_config(folder, target, *kernels, more=""):
    (folder / "kernelfuzz.toml").write_text(
        f"targets = {json.dumps([target])}\nkernels = {json.dumps(kernels)}\nregressions = false\n{more}"
    )


def check_times(store):
    """Nights end within LATE_SECONDS of their time."""
    for run in store.runs.values():
        if run.finished:
            took = datetime.fromisoformat(run.finished) - datetime.fromisoformat(run.started)
            assert took.total_seconds() <= run.budget + LATE_SECONDS


# A night takes seconds, so each test is one story and all that can be seen in it.


@pytest.fixture
def release():
    """The files of the newest pinned vLLM."""
    try:
        return releases.locate("vllm", releases.PINNED["vllm"])
    except KernelfuzzError as error:
        pytest.skip(str(error))


def test_a_bug_is_new_then_known_then_fixed_and_then_it_has_returned(release, tmp_path, worker_environment):
    """Five nights on a copy of a release: as released; with a bug, until it is shrunk; with the bug; as released; with
    the bug, until it is seen."""
    (plant,) = [plant for plant in PLANTS if plant.name == "given_output_is_ignored"]
    tree = plant_bug(plant, release, tmp_path)
    planted, released = (tree / plant.file).read_text(), (release / plant.file).read_text()
    write_config(tmp_path, plant.target, f"vllm@{tree}")

    def night(text, seconds, seed):
        (tree / plant.file).write_text(text)
        return Night(tmp_path, worker_environment, seconds, seed)

    nights = [night(released, SECONDS, 1).end()]
    found = night(planted, 120, 2)
    found.hear(lambda line: line.startswith("NEW") and "shrinking" not in line)
    nights.append(found.end(signal.SIGTERM))
    nights.append(night(planted, SECONDS, 3).end())
    nights.append(night(released, SECONDS, 4).end())
    back = night(planted, 120, 5)
    back.hear(lambda line: line.startswith("RETURNED"))
    nights.append(back.end(signal.SIGINT))
    ended, store = dict(enumerate(nights, start=1)), read(tmp_path)

    bug = "moe_permute.vllm.wrong_value.permuted.given_output_is_used"
    said = {1: {}, 2: {bug: "new"}, 3: {bug: "known"}, 4: {bug: "fixed"}, 5: {bug: "returned"}}
    assert {run: each.summary["failures"] for run, each in ended.items()} == said
    assert store.statuses == said
    assert store.replays == {1: [], 2: [], 3: ["FAILED"], 4: ["FIXED"], 5: []}

    assert {run: each.status for run, each in ended.items()} == {1: 0, 2: 1, 3: 0, 4: 0, 5: 1}
    for run, each in ended.items():
        kept = store.runs[run]
        assert each.summary["run"] == run
        assert each.summary["exit_status"] == kept.exit_status == each.status
        assert each.summary["interrupted"] is (run in (2, 5))
        assert kept.state == ("interrupted" if run in (2, 5) else "finished")
        assert each.summary["problems"] == kept.problems == []
    check_times(store)

    failure = store.failures[bug]
    assert (failure.first_run, failure.last_run, failure.fixed_run) == (2, 5, None)
    folder = tmp_path / "store" / "failures" / failure.folder
    assert read_failure(folder).failures[0].clause == "given_output_is_used"
    assert {"README.md", "repro.py"} <= {path.name for path in folder.iterdir()}

    for run in (1, 2):
        (counted,) = store.statistics[run].values()
        assert [counted["cases"]] == list(ended[run].summary["cases"].values())
        assert counted["cases"] > 0
        assert counted["growth"][-1][1] == counted["cases"]
        assert (bug in counted["hits"]) is (run == 2)


def test_what_was_running_when_a_lane_or_a_night_was_killed_is_run_again(tmp_path, worker_environment):
    """Nights on a kernel that waits for ever in its first launch. The first one's lane is killed then; so is the second
    night; the third follows it. The first and the third are interrupted once the case was run again."""
    (tmp_path / "kernels_of_losses.py").write_text(KERNEL)
    write_config(tmp_path, "bgmv", "kernels_of_losses:waits_once")
    mark, launches = tmp_path / "mark", tmp_path / "launches"
    environment = {
        **worker_environment,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), worker_environment["PYTHONPATH"]]),
        "ENGINE_KERNELS_MARK": str(mark),
        "LAUNCHES": str(launches),
    }

    def is_run_again():
        lost, *others = launches.read_text().splitlines()
        return lost in others

    first = Night(tmp_path, environment)
    first.wait_for(mark.exists)
    os.kill(first.lane(), signal.SIGKILL)
    first.wait_for(is_run_again)
    ended = {1: first.end(signal.SIGINT)}

    # What the first night did not come to would be the second one's first launch.
    shutil.rmtree(tmp_path / "store" / "runs")
    mark.unlink()
    launches.unlink()
    second = Night(tmp_path, environment)
    second.wait_for(mark.exists)
    ended[2] = second.end(signal.SIGKILL)

    third = Night(tmp_path, environment)
    third.wait_for(is_run_again)
    ended[3] = third.end(signal.SIGTERM)
    store = read(tmp_path)

    assert {run: kept.state for run, kept in store.runs.items()} == {1: "interrupted", 2: "cut off", 3: "interrupted"}
    assert {run: kept.exit_status for run, kept in store.runs.items()} == {1: 130, 2: None, 3: 130}
    for run in (1, 3):
        assert ended[run].status == 130
        assert ended[run].summary["failures"] == {}
        assert ended[run].summary["problems"] == store.runs[run].problems
    lost, again = store.runs[1].problems
    assert lost == "lane cpu was lost: its process was ended by signal 9"
    assert "run again" in again
    assert store.runs[3].problems
    assert all("run 2 ended are run again" in problem for problem in store.runs[3].problems)
    check_times(store)


def test_a_kernel_that_is_not_there_stops_no_other_one_and_what_is_listed_is_no_news(tmp_path, worker_environment):
    fingerprint = "bgmv.engine_kernels-wrong_above_rank_8.wrong_value.output.product"
    (tmp_path / "known.toml").write_text(f'[[failure]]\nfingerprint = "{fingerprint}"\nreason = "it is wrong"\n')
    kernels = "engine_kernels:nonesuch", "engine_kernels:wrong_above_rank_8"
    write_config(tmp_path, "bgmv", *kernels, more='known-failures = "known.toml"\n')
    ended, store = Night(tmp_path, worker_environment, 8).end(), read(tmp_path)

    assert ended.status == store.runs[1].exit_status == 2
    missing, there = (store.statistics[1][name] for name in kernels)
    assert "nonesuch" in missing["error"]
    assert missing["cases"] == 0
    assert there["error"] == ""
    assert there["cases"] > 0
    assert ended.summary["failures"] == store.statuses[1] == {fingerprint: "listed"}
    check_times(store)
