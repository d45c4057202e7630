"""The lanes of a Ray cluster: each an actor on some node, placed by Ray.

An actor outlives the driver for a while, and keeps what its lane told until a driver has it. So a driver that was cut
off is followed by the next one of the same store, which finds the actors by their namespace and takes them over.
"""

import logging
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from kernelfuzz.fuzz.nightly.config import Config
from kernelfuzz.fuzz.nightly.lane import Done, LaneProcess, LaneSettings, Lost, Message
from kernelfuzz.fuzz.nightly.lanes import MOST_LOSSES, Lane
from kernelfuzz.fuzz.nightly.tasks import Running, Task
from kernelfuzz.kernels.releases import home
from kernelfuzz.strategies.errors import KernelfuzzError

LANE_CPUS = 4
"""CPUs that a lane for CPU kernels asks for, where a node has as many: one draws, on the others run workers."""

CONNECT_SECONDS = 10.0
"""How long the cluster may take to accept a connection."""

ORPHAN_SECONDS = 600.0
"""How long an actor waits for a driver."""

TAKEN_SECONDS = 10.0
"""An actor that was asked within so many seconds has a driver."""

MOST_KEPT = 5000
"""Messages that an actor keeps; its lane waits while there are as many."""

LOOK_SECONDS = 5.0
"""How often the cluster is looked at for nodes that joined it."""

_POLL_SECONDS = 1.0


class LaneActor:
    """A lane on a node, with its process, which keeps examples below the node's $KERNELFUZZ_HOME under the name of the
    store. What the process tells has a number, and is kept until it is acknowledged."""

    def __init__(self, kind: str, store: str, workers: int | None) -> None:
        self._kind = kind
        self._task: Task | None = None
        self._kept: deque[tuple[int, Message]] = deque()
        self._number = 0
        self._changed = threading.Condition()
        self._asked = time.monotonic()
        settings = LaneSettings(home() / "nights" / store, workers)
        self._process = LaneProcess(settings, dict(os.environ))
        threading.Thread(target=self._pump, daemon=True).start()

    def describe(self) -> tuple[str, Task | None, float]:
        """Return the kind, the task that is run now, and for how many seconds no driver has asked."""
        return self._kind, self._task, time.monotonic() - self._asked

    def start(self, task: Task) -> None:
        """Run a task."""
        self._task = task
        self._process.start(task)

    def stop(self) -> None:
        """Have the task end as soon as it can."""
        self._process.stop()

    def receive(self, taken: int) -> list[tuple[int, Message]]:
        """Return what was told after message number `taken`, as soon as there is something, or nothing after a second.
        What came up to that number is forgotten."""
        self._asked = time.monotonic()
        with self._changed:
            while self._kept and self._kept[0][0] <= taken:
                self._kept.popleft()
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._kept, _POLL_SECONDS)
            return list(self._kept)

    def _pump(self) -> None:
        """Take what the process tells, until it is gone or no driver has asked for long."""
        lost = False
        while True:
            if lost:  # a driver is told of it, or none comes
                time.sleep(_POLL_SECONDS)
            for message in () if lost else self._process.receive(_POLL_SECONDS):
                with self._changed:
                    self._changed.wait_for(lambda: len(self._kept) < MOST_KEPT, ORPHAN_SECONDS)
                    self._number += 1
                    if isinstance(message, Done):
                        self._task = None
                    self._kept.append((self._number, message))
                    self._changed.notify_all()
                lost = lost or isinstance(message, Lost)
            if time.monotonic() > self._asked + ORPHAN_SECONDS:
                self._process.close()
                os._exit(0)


class RayLanes:
    """The lanes of the cluster at `address`: one for each GPU, and one for every LANE_CPUS other CPUs, once they are
    opened. Nodes that join the cluster later get theirs too.

    `store` names the store that the actors work for: they live in a namespace of that name.

    Raises KernelfuzzError where Ray is missing or there is no such cluster.
    """

    def __init__(self, address: str, store: str, config: Config) -> None:
        try:
            import ray
        except ImportError:
            raise KernelfuzzError("--ray needs the package ray: pip install 'kernelfuzz[ray]'") from None
        self._ray: Any = ray
        self._store = store
        self._workers = config.workers
        self._kinds: Mapping[str, int | None] = {}
        namespace = f"kernelfuzz-{store}"
        handler = signal.getsignal(signal.SIGTERM)
        try:
            _knock(address)
            if not ray.is_initialized():
                ray.init(address, namespace=namespace, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise KernelfuzzError(f"--ray {address!r}: no Ray cluster answers there: {reason}") from error
        signal.signal(signal.SIGTERM, handler)  # Ray's own would end the process without a report
        self._actors: dict[Lane, Any] = {}
        self._asked: dict[Any, Lane] = {}
        self._taken: dict[Lane, int] = {}
        self._ready: set[Lane] = set()
        self._running: dict[Lane, Running] = {}
        self._losses: dict[str, int] = {}
        self._looked = 0.0
        self._stopping = False
        self._take_over(namespace)

    def open(self, kinds: Mapping[str, int | None], records: Path) -> None:
        """Ask Ray for lanes of those device kinds. They tell of what they have running, and need no files."""
        del records
        self._kinds = kinds
        self._look()

    def kinds(self) -> dict[str, int]:
        """Return how many lanes the cluster has room for, by kind."""
        return {kind: count for kind, count in self._room().items() if count}

    def _room(self) -> dict[str, int]:
        """Return how many lanes of each kind the nodes that are alive have room for."""
        room: dict[str, int] = {}
        for node in self._ray.nodes():
            resources = node["Resources"] if node["Alive"] else {}
            gpus = int(resources.get("GPU", 0))
            if gpus:
                named = [name.partition(":")[2] for name in resources if name.startswith("accelerator_type:")]
                kind = "xpu" if any(name.startswith("Intel-GPU") for name in named) else "cuda"
                room[kind] = room.get(kind, 0) + gpus
            cpus = int(resources.get("CPU", 0)) - gpus
            room["cpu"] = room.get("cpu", 0) + (max(1, cpus // LANE_CPUS) if cpus > 0 else 0)
        return room

    def _cpus(self) -> int:
        """Return how many CPUs a lane for CPU kernels asks for: what the smallest node can give."""
        counts = [int(node["Resources"].get("CPU", 0)) for node in self._ray.nodes() if node["Alive"]]
        return min([LANE_CPUS, *(count for count in counts if count)])

    def _look(self) -> None:
        """Ask Ray for the lanes that there is room for and that are not there yet."""
        self._looked = time.monotonic()
        room = self._room()
        for kind, most in self._kinds.items():
            wanted = room.get(kind, 0) if most is None else min(most, room.get(kind, 0))
            there = sum(lane.kind == kind for lane in self._actors)
            for _ in range(wanted - there if self._losses.get(kind, 0) < MOST_LOSSES else 0):
                self._open(kind)

    def _open(self, kind: str) -> None:
        cpus = self._cpus() if kind == "cpu" else 1
        workers = self._workers or (max(1, cpus - 1) if kind == "cpu" else None)
        name = f"{kind}-{uuid4().hex[:6]}"
        actor = (
            self._ray.remote(LaneActor)
            .options(
                name=name,
                lifetime="detached",
                num_cpus=cpus,
                num_gpus=0 if kind == "cpu" else 1,
                max_concurrency=4,
                scheduling_strategy="SPREAD",
            )
            .remote(kind, self._store, workers)
        )
        self._add(Lane(name, kind), actor)

    def _add(self, lane: Lane, actor: Any) -> None:
        self._actors[lane] = actor
        self._taken[lane] = 0
        self._ask(lane)

    def _ask(self, lane: Lane) -> None:
        self._asked[self._actors[lane].receive.remote(self._taken[lane])] = lane

    def _take_over(self, namespace: str) -> None:
        """Take over the actors that an earlier driver of the same store has left. Raises KernelfuzzError where it is
        still there."""
        for each in self._ray.util.list_named_actors(all_namespaces=True):
            if each["namespace"] != namespace:
                continue
            with suppress(ValueError, self._ray.exceptions.RayError):  # it is just ending
                actor = self._ray.get_actor(each["name"], namespace)
                kind, task, silent = self._ray.get(actor.describe.remote(), timeout=30)
                if silent < TAKEN_SECONDS:
                    raise KernelfuzzError(
                        f"--ray: a night with this store asked its lanes {silent:.0f} s ago: wait for its end, or "
                        f"{TAKEN_SECONDS:.0f} s if it was cut off"
                    )
                self._add(Lane(each["name"], kind, task), actor)

    def adopted(self) -> list[Lane]:
        """Return the lanes that were taken over with a task that goes on."""
        return [lane for lane in self._actors if lane.task is not None]

    def idle(self) -> list[Lane]:
        """Return the lanes that have answered and have no task."""
        return [lane for lane in self._actors if lane in self._ready and lane.task is None]

    def start(self, lane: Lane, task: Task) -> None:
        """Have a lane run a task."""
        lane.task, lane.since = task, time.monotonic()
        self._actors[lane].start.remote(task)

    def wait(self, seconds: float) -> list[tuple[Lane, Message]]:
        """Return what lanes have told."""
        if time.monotonic() >= self._looked + LOOK_SECONDS and not self._stopping:
            self._look()
        if not self._asked:
            time.sleep(seconds)
            return []
        answered, _ = self._ray.wait(list(self._asked), num_returns=max(1, len(self._asked)), timeout=0)
        if not answered:
            answered, _ = self._ray.wait(list(self._asked), timeout=seconds)
        messages: list[tuple[Lane, Message]] = []
        for answer in answered:
            lane = self._asked.pop(answer)
            try:
                told: Sequence[tuple[int, Message]] = self._ray.get(answer)
            except self._ray.exceptions.ActorUnavailableError:  # for a while: it will be asked again
                told = []
                time.sleep(seconds)
            except self._ray.exceptions.RayError as error:
                reason = str(error).strip().partition("\n")[0]
                told = [(0, Lost(reason))]
            else:
                self._ready.add(lane)
            messages += self._taken_from(lane, told)
        return messages

    def _taken_from(self, lane: Lane, told: Sequence[tuple[int, Message]]) -> list[tuple[Lane, Message]]:
        messages = []
        for number, message in told:
            self._taken[lane] = number
            if isinstance(message, Running):
                self._running[lane] = message
            elif isinstance(message, Lost):
                self._losses[lane.kind] = self._losses.get(lane.kind, 0) + 1
                with suppress(Exception):
                    self._ray.kill(self._actors[lane])
                del self._actors[lane]
            else:
                self._losses[lane.kind] = 0
            messages.append((lane, message))
        if lane in self._actors:
            self._ask(lane)
        return messages

    def running(self, lane: Lane) -> Running | None:
        """Return what the workers of a lane that is lost had."""
        return self._running.get(lane)

    def stop(self) -> None:
        """Have all lanes stop."""
        self._stopping = True
        for actor in self._actors.values():
            actor.stop.remote()

    def close(self) -> None:
        """End all lanes, and leave the cluster."""
        for actor in self._actors.values():
            with suppress(Exception):
                self._ray.kill(actor)
        self._actors.clear()
        self._ray.shutdown()


def _knock(address: str) -> None:
    """Raise OSError unless somebody listens at `address`, if it is HOST:PORT: Ray would wait for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
