"""The worker: loads one kernel, then answers requests with verdicts until its connection closes.

Messages are JSON in both directions. The first one in names the job; the first one out says that the kernel is loaded,
or why not. stdout and stderr belong to the code under test.
"""

import base64
import json
import os
import pickle
import select
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from kernelfuzz.fuzz.buffers import Memory
from kernelfuzz.fuzz.forkserver import end_with_parent, ignore_signals, keep_no_core_file
from kernelfuzz.fuzz.launch import Conditions, filled_scratch, judge, judge_alone, unusable
from kernelfuzz.fuzz.targets import Target, get_target
from kernelfuzz.fuzz.testing.decorator import KernelTest
from kernelfuzz.fuzz.testing.source import TestSource
from kernelfuzz.fuzz.verdict import UNUSABLE_AFTERWARDS, Failure, Verdict
from kernelfuzz.kernels import registry
from kernelfuzz.kernels.base import Kernel, KernelName
from kernelfuzz.kernels.user import interpret
from kernelfuzz.strategies.case import from_json
from kernelfuzz.strategies.errors import KernelfuzzError


def main() -> None:
    """Be a worker for the connection whose file descriptor is the first argument: a program of its own.

    With the second argument "watched" a tool started it, from whichever thread: its end says nothing, and the
    connection's does.
    """
    if sys.argv[2:] != ["watched"]:
        end_with_parent()
    keep_no_core_file()
    ignore_signals()
    os.set_inheritable(int(sys.argv[1]), False)
    run(int(sys.argv[1]))


def run(descriptor: int) -> None:
    """Be a worker for the connection with this file descriptor."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # the last words before a crash count
    threading.Thread(target=_end_with_the_other_side, args=(descriptor,), daemon=True).start()
    serve(Connection(descriptor))


def _end_with_the_other_side(descriptor: int) -> None:
    """End this process as soon as the other side of the connection is gone, even while a kernel hangs."""
    other_side = select.poll()
    other_side.register(descriptor, 0)  # asks for nothing but the hang-up, which is always reported
    other_side.poll()
    os._exit(1)


def load(request: dict[str, Any], test: KernelTest | None = None) -> tuple[Target, Kernel, Conditions]:
    """Load the kernel that a job's first message names, and return with it what its cases are run under. A kernel test
    that the message names is imported, unless this process has it: `test`.

    Raises KernelfuzzError, in one line, if it cannot be loaded.
    """
    device = torch.device(request["device"])
    if device.type != "cpu":
        device = torch.device(device.type, device.index or 0)  # whichever device is current
    try:
        target, kernel, guards = _load(request, device, test)
    except Exception as error:
        text = str(error) if isinstance(error, KernelfuzzError) else f"{type(error).__name__}: {error}"
        raise KernelfuzzError(text.splitlines()[0] if text else repr(error)) from error
    import_all()
    memory: Memory = "guarded" if guards and device.type == "cpu" else "shared"
    # A sanitizer knows where allocations end; and scratch that was filled would never count as uninitialised.
    tool = request["sanitizer"]
    return target, kernel, Conditions(device, memory if tool is None else "exact", fills_scratch=tool != "initcheck")


def _load(request: dict[str, Any], device: torch.device, test: KernelTest | None) -> tuple[Target, Kernel, bool]:
    """Return a job's target, its kernel, and whether memory behind tensors is to be guarded: what may be native code.

    Both may come from the file of a kernel test.
    """
    name = KernelName.parse(request["kernel"])
    if request["test"] is not None:
        interpret(device)
        test = test or KernelTest.load(TestSource.from_message(request["test"]))
        if name.package == test.source.name:
            return test.target, test.kernel(), True
    target = get_target(request["target"]) if test is None else test.target
    implementation = registry.find(target.name, name)
    if implementation is None:
        raise KernelfuzzError(f"{name} does not implement {target.name}")
    return target, implementation.load(name, device), implementation.guard_pages


def import_all() -> None:
    """Import what torch imports when it is first used: half of it, which is no case's fault. Starts no thread."""
    with filled_scratch():
        pass


def serve(connection: Connection) -> None:
    """Load the kernel that the first message names and answer requests until the other side closes the connection."""
    request = json.loads(connection.recv_bytes())
    if torch.device(request["device"]).type == "cpu":
        torch.set_num_threads(1)  # the tensors are small, and the campaign draws on the other core
    try:
        target, kernel, conditions = load(request)
    except KernelfuzzError as error:
        _send(connection, {"error": str(error)})
        return
    about = {"version": kernel.version, "dimensions": dict(kernel.dimensions), "notes": kernel.notes}
    _send(connection, about)
    while True:
        try:
            message = json.loads(connection.recv_bytes())
        except EOFError:
            return
        verdict = answer(target, kernel, message, conditions)
        broken = unusable(conditions.device)
        if broken is not None and not verdict.failures:
            failure = Failure("crash", "", UNUSABLE_AFTERWARDS, f"the device is unusable: {broken}")
            verdict = replace(verdict, failures=(failure,), error="")
        usable = not any(failure.kind == "crash" for failure in verdict.failures)
        _send(connection, {"verdict": verdict.to_json(), "usable": usable})
        if not usable:
            return


def answer(target: Target, kernel: Kernel, message: dict[str, Any], conditions: Conditions) -> Verdict:
    """Return the verdict on a request. What goes wrong outside the kernel's launch is the harness's own error."""
    try:
        case = from_json(target.case_type, message["case"])
        if message.get("arguments"):
            kernel = with_arguments(kernel, pickle.loads(base64.b64decode(message["arguments"])))
        if message["rehearsal"]:
            judge_alone(target, None, case, conditions)
            return Verdict()
        if message["maps"]:
            return judge_alone(target, kernel, replace(case, seed=message["seeds"][0]), conditions, maps=True)
        return judge(target, kernel, case, message["seeds"], conditions)
    except KernelfuzzError as error:
        return Verdict(error=(str(error) or repr(error)).splitlines()[0], own_error=True)
    except Exception as error:  # what a kernel raises is in the verdict
        return Verdict(error=f"{type(error).__name__}: {error}".splitlines()[0])


def with_arguments(kernel: Kernel, arguments: Mapping[str, Any]) -> Kernel:
    """Return a kernel whose launch is given further arguments by name."""
    return replace(kernel, launch=partial(kernel.launch, **arguments)) if arguments else kernel


def _send(connection: Connection, message: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(message).encode())
