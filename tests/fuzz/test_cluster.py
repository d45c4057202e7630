"""Nights on a real Ray cluster of several nodes on this machine, which lose nodes, lanes and drivers."""

import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from kernelfuzz.fuzz.failure_folder import read_failure
from kernelfuzz.fuzz.nightly.cluster import RayLanes
from kernelfuzz.fuzz.nightly.config import Config
from kernelfuzz.fuzz.store import queries
from kernelfuzz.strategies.errors import KernelfuzzError

pytest.importorskip("ray", reason="needs the package ray: pip install 'kernelfuzz[ray]'")
from ray.cluster_utils import Cluster

COMMAND = "from kernelfuzz.fuzz.cli import main; main()"
MEMORY = 80_000_000
"""Of a node's object store, in bytes; nothing is put there."""


class Nodes:
    """A cluster with a head that runs nothing, and nodes of one CPU each, by their numbers."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        self._monkeypatch = monkeypatch
        head = {"num_cpus": 0, "object_store_memory": MEMORY, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = self._cluster.address
        self._nodes = {}

    def add(self):
        """Add a node and return its number."""
        number = len(self._nodes)
        self._monkeypatch.setenv("CLUSTER_NODE", str(number))  # which all that runs there inherits
        self._nodes[number] = self._cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
        return number

    def kill(self, number):
        """Have a node go away at once."""
        self._cluster.remove_node(self._nodes[number], allow_graceful=False)

    def launches(self, kernel):
        """Return where each case was launched, as pairs of a node's number and a case."""
        path = self.folder / kernel
        lines = path.read_text().splitlines() if path.exists() else []
        return [(int(node), case) for node, _, case in (line.partition(" ") for line in lines)]

    def shutdown(self):
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory, worker_environment):
    """A cluster of two nodes; tests leave two there."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = tmp_path_factory.mktemp("cluster")
        monkeypatch.setenv("PYTHONPATH", worker_environment["PYTHONPATH"])
        monkeypatch.setenv("KERNELFUZZ_HOME", str(folder / "home"))
        monkeypatch.setenv("CLUSTER_KERNELS", str(folder))
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        handler = signal.getsignal(signal.SIGTERM)
        nodes = Nodes(folder, monkeypatch)
        try:
            nodes.add()
            nodes.add()
            yield nodes
        finally:
            nodes.shutdown()
            signal.signal(signal.SIGTERM, handler)  # which Ray has replaced


class Night:
    """`kernelfuzz nightly --ray` on one of `cluster_kernels`, with a store in a folder."""

    def __init__(self, folder, address, kernel):
        config = f'targets = ["bgmv"]\nkernels = ["cluster_kernels:{kernel}"]\nregressions = false\n'
        (folder / "kernelfuzz.toml").write_text(config)
        command = [sys.executable, "-c", COMMAND, "nightly", "--ray", address, "--store", "store", "--time", "180s"]
        self._process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.said = []

    def hear(self, is_awaited):
        """Wait for a line."""
        for line in self._process.stdout:
            self.said.append(line)
            if is_awaited(line):
                return
        raise AssertionError("".join(self.said))

    def wait_for(self, is_true):
        """Wait until something is true, as long as the night goes on, and return it."""
        while not (truth := is_true()):
            assert self._process.poll() is None, self._process.stdout.read()
            time.sleep(0.05)
        return truth

    def end(self, number):
        """Send a signal, and return the exit status."""
        self._process.send_signal(number)
        return self.rest()

    def rest(self):
        """Return the exit status once it has ended."""
        out, _ = self._process.communicate()
        self.said += out.splitlines(keepends=True)
        return self._process.returncode


def is_new(name):
    return lambda line: line.startswith("NEW") and name in line


def rank(case):
    """Return the rank of a case as launches note it."""
    size = "rows" if "op='shrink'" in case else "width"
    return int(case.partition(f" {size}=")[2].partition(",")[0])


def read(folder):
    """Return the last run of a store, what failures are in it, and their folders."""
    connection = queries.connect(folder / "store")
    run, *_ = queries.runs(connection)
    statuses = {each.fingerprint: each.status for each in queries.sightings(connection, run.id)}
    folders = [folder / "store" / "failures" / each.folder for each in queries.failures(connection).values()]
    connection.close()
    return run, statuses, folders


def test_a_night_goes_on_when_a_node_is_lost_and_with_one_that_joins(nodes, tmp_path):
    """Both nodes find the same bug, one of them goes away with a case that is running, and that is run elsewhere."""
    kernel = "wrong_and_waits"
    bug = f"bgmv.cluster_kernels-{kernel}.wrong_value.output.product"
    night = Night(tmp_path, nodes.address, kernel)
    night.hear(is_new(bug))
    night.wait_for(lambda: len({node for node, case in nodes.launches(kernel) if rank(case) > 8}) == 2)

    (nodes.folder / "wait").touch()
    night.wait_for((nodes.folder / "waiting").exists)
    node, _, case = (nodes.folder / "waiting").read_text().strip().partition(" ")
    nodes.kill(int(node))
    night.hear(lambda line: "was lost" in line)
    joined = nodes.add()
    night.wait_for(lambda: len({node for node, each in nodes.launches(kernel) if each == case}) == 2)
    night.wait_for(lambda: joined in {node for node, _ in nodes.launches(kernel)})
    assert night.end(signal.SIGTERM) == 1, night.said

    run, statuses, folders = read(tmp_path)
    assert (run.state, run.exit_status) == ("interrupted", 1)
    assert statuses == {bug: "new"}
    assert [(each / "repro.py").exists() for each in folders] == [True]
    lost, again = run.problems
    assert "was lost" in lost
    assert "run again" in again


def test_a_case_that_takes_two_lanes_along_is_reported(nodes, tmp_path):
    bug = "bgmv.cluster_kernels-kills_its_lane.crash.lane_lost"
    night = Night(tmp_path, nodes.address, "kills_its_lane")
    night.hear(is_new(bug))
    assert night.end(signal.SIGINT) == 1, night.said

    run, statuses, folders = read(tmp_path)
    assert (run.state, run.exit_status) == ("interrupted", 1)
    assert statuses == {bug: "new"}
    (folder,) = folders
    assert read_failure(folder).failures[0].clause == "lane_lost"
    deadly = (nodes.folder / "deadly").read_text()
    assert [case for _, case in nodes.launches("kills_its_lane")].count(deadly) == 2


def test_a_driver_takes_over_what_one_that_was_killed_has_left(nodes, tmp_path):
    """What its lanes found while there was no driver is reported by the next one, which begins only once it is certain
    that the first one is gone."""
    kernel = "wrong_for_a_while"
    first = Night(tmp_path, nodes.address, kernel)
    first.wait_for(lambda: len({node for node, _ in nodes.launches(kernel)}) == 2)
    first.end(signal.SIGKILL)
    wrong = nodes.folder / "wrong"
    wrong.touch()

    early = Night(tmp_path, nodes.address, kernel)
    assert early.rest() == 2
    (line,) = early.said
    assert "if it was cut off" in line

    while not (nodes.folder / "was_wrong").exists():
        time.sleep(0.05)
    wrong.unlink()
    status = 2
    while status == 2:
        second = Night(tmp_path, nodes.address, kernel)
        with suppress(AssertionError):  # still too early
            second.hear(is_new("wrong_value"))
        status = second.end(signal.SIGTERM)
    assert status == 1, second.said
    run, statuses, _ = read(tmp_path)
    assert statuses == {f"bgmv.cluster_kernels-{kernel}.wrong_value.output.product": "new"}
    assert [problem for problem in run.problems if "goes on with what a night that was cut off has begun" in problem]


def test_an_address_without_a_cluster_is_refused(tmp_path):
    night = Night(tmp_path, "127.0.0.1:1", "wrong_and_waits")
    assert night.rest() == 2
    (line,) = night.said
    assert "no Ray cluster" in line
    assert "127.0.0.1:1" in line


def test_the_package_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(KernelfuzzError, match=r"pip install 'kernelfuzz\[ray\]'"):
        RayLanes("auto", "store", Config())
