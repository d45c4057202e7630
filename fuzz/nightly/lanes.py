"""Where a night's tasks run: what the driver knows of lanes, and those of this machine."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Protocol

import torch

from kernelfuzz.fuzz.names import file_name
from kernelfuzz.fuzz.nightly.lane import LaneProcess, LaneSettings, Lost, Message
from kernelfuzz.fuzz.nightly.records import read_record
from kernelfuzz.fuzz.nightly.tasks import Running, Task

MOST_LOSSES = 5
"""How often in a row a lane may be lost over its first message before it is given up."""

END_SECONDS = 5.0
"""How long all lanes together are waited for when they are ended."""


@dataclass(eq=False)
class Lane:
    """A lane as the driver sees it.

    - name: for a person; kind: the device kind whose tasks it runs
    - task: what it does now; since: since when, on the monotonic clock
    """

    name: str
    kind: str
    task: Task | None = None
    since: float = field(default_factory=time.monotonic)


class Lanes(Protocol):
    """The lanes of a night."""

    def open(self, kinds: Mapping[str, int | None], records: Path) -> None:
        """Open lanes of those device kinds, each with how many are of use, None for as many as there are devices.
        `records` is a folder for files in which lanes of this machine keep what they have running."""

    def kinds(self) -> dict[str, int]:
        """Return how many lanes there are, or will be, of each device kind."""

    def adopted(self) -> list[Lane]:
        """Return the lanes that go on with a task of a night that was cut off."""

    def idle(self) -> list[Lane]:
        """Return the lanes that could start a task now."""

    def start(self, lane: Lane, task: Task) -> None:
        """Have an idle lane run a task."""

    def wait(self, seconds: float) -> list[tuple[Lane, Message]]:
        """Return what lanes have told, after so many seconds at the latest. A lane that tells Done is idle again; after
        Lost there may be another one in its place."""

    def running(self, lane: Lane) -> Running | None:
        """Return what the workers of a lane that is lost had."""

    def stop(self) -> None:
        """Have all lanes end their tasks as soon as they can."""

    def close(self) -> None:
        """End all lanes."""


class LocalLanes:
    """The lanes of this machine; `folder` is where they keep examples. The lane of an NVIDIA GPU sees that one first
    and the others behind it."""

    def __init__(self, folder: Path, workers: int | None) -> None:
        self._folder = folder
        self._workers = workers
        self._processes: dict[Lane, LaneProcess] = {}
        self._losses: dict[str, int] = {}

    def open(self, kinds: Mapping[str, int | None], records: Path) -> None:
        """Open one lane for the CPU and one for each GPU, as far as `kinds` asks for them."""
        self._records = records
        for kind, most in kinds.items():
            for index in range(_count(kind) if most is None else min(most, _count(kind))):
                self._start(Lane(kind if kind == "cpu" else f"{kind}:{index}", kind))

    def _start(self, lane: Lane) -> None:
        settings = LaneSettings(self._folder, self._workers, self._record(lane))
        self._processes[lane] = LaneProcess(settings, _environment(lane))

    def _record(self, lane: Lane) -> Path:
        return self._records / f"{file_name(lane.name)}.jsonl"

    def kinds(self) -> dict[str, int]:
        """Return how many lanes there are of each kind."""
        kinds = [lane.kind for lane in self._processes]
        return {kind: kinds.count(kind) for kind in kinds}

    def adopted(self) -> list[Lane]:
        """Return none: these lanes end with their night."""
        return []

    def idle(self) -> list[Lane]:
        """Return the lanes without a task."""
        return [lane for lane in self._processes if lane.task is None]

    def start(self, lane: Lane, task: Task) -> None:
        """Have a lane run a task."""
        lane.task, lane.since = task, time.monotonic()
        self._processes[lane].start(task)

    def wait(self, seconds: float) -> list[tuple[Lane, Message]]:
        """Return what lanes have told."""
        connections = {process.connection: lane for lane, process in self._processes.items()}
        messages = []
        for connection in wait(list(connections), seconds):
            lane = connections[connection]  # type: ignore[index]
            messages += [(lane, message) for message in self._processes[lane].receive(0.0)]
        for lane, message in messages:
            self._losses[lane.name] = self._losses.get(lane.name, 0) + 1 if isinstance(message, Lost) else 0
            if isinstance(message, Lost):
                del self._processes[lane]
                if self._losses[lane.name] < MOST_LOSSES:
                    self._start(Lane(lane.name, lane.kind))
        return messages

    def running(self, lane: Lane) -> Running | None:
        """Return what a lost lane had running."""
        return read_record(self._record(lane))

    def stop(self) -> None:
        """Have all lanes stop."""
        for process in self._processes.values():
            process.stop()

    def close(self) -> None:
        """End all lanes."""
        for process in self._processes.values():
            process.hang_up()
        until = time.monotonic() + END_SECONDS
        for process in self._processes.values():
            process.close(until)
        self._processes.clear()


def _count(kind: str) -> int:
    """Return how many lanes this machine has for a kind of device."""
    return 1 if kind == "cpu" else getattr(torch, kind).device_count()


def _environment(lane: Lane) -> dict[str, str]:
    """Return the environment of a lane's process, in which its GPU is the first one; the only one where masks have no
    order, as Intel's have none."""
    environment = dict(os.environ)
    variable = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}.get(lane.kind)
    if variable is not None:
        visible = environment.get(variable, "")
        devices = visible.split(",") if visible else [str(index) for index in range(_count(lane.kind))]
        own = int(lane.name.partition(":")[2])
        environment[variable] = devices[own]
        if lane.kind == "cuda":
            environment[variable] = ",".join([*devices[own:], *devices[:own]])
    return environment
