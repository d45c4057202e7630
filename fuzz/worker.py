"""The worker process: loads one kernel, then answers cases with verdicts until its connection closes.

Messages are JSON in both directions. The first one in names the job; the first one out says that the kernel is loaded,
or why not. stdout and stderr belong to the code under test.
"""

import json
import os
import select
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

import torch

from kernelfuzz.fuzz.launch import filled_scratch, judge
from kernelfuzz.fuzz.targets import get_target
from kernelfuzz.kernels import registry
from kernelfuzz.kernels.base import KernelName
from kernelfuzz.strategies.case import from_json
from kernelfuzz.strategies.errors import KernelfuzzError


def main() -> None:
    """Serve the connection whose file descriptor is the first argument."""
    # These reach the whole process group; the parent decides, and closes the connection.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    descriptor = int(sys.argv[1])
    threading.Thread(target=_end_with_the_other_side, args=(descriptor,), daemon=True).start()
    serve(Connection(descriptor))


def _end_with_the_other_side(descriptor: int) -> None:
    """End this process as soon as the other side of the connection is gone, even while a kernel hangs."""
    other_side = select.poll()
    other_side.register(descriptor, 0)  # asks for nothing but the hang-up, which is always reported
    other_side.poll()
    os._exit(1)


def serve(connection: Connection) -> None:
    """Load the kernel that the first message names and answer cases until the other side closes the connection."""
    request = json.loads(connection.recv_bytes())
    device = torch.device(request["device"])
    target = get_target(request["target"])
    name = KernelName.parse(request["kernel"])
    if device.type == "cpu":
        torch.set_num_threads(1)  # the tensors are small, and the parent draws on the other core
    try:
        implementation = registry.find(target.name, name)
        if implementation is None:
            raise KernelfuzzError(f"{name} does not implement {target.name}")
        kernel = implementation.load(name, device)
    except Exception as error:
        text = str(error) if isinstance(error, KernelfuzzError) else f"{type(error).__name__}: {error}"
        _send(connection, {"error": text.splitlines()[0] if text else repr(error)})
        return
    with filled_scratch():
        pass  # the first use imports half of torch, which is no case's fault
    _send(connection, {"version": kernel.version, "dimensions": dict(kernel.dimensions)})
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        try:
            case = from_json(target.case_type, json.loads(message))
            verdict = judge(target, kernel, case, device)
        except Exception as error:  # what a kernel raises is in the verdict, so this is ours or the case file's
            _send(connection, {"error": f"the case cannot be judged: {type(error).__name__}: {error}".splitlines()[0]})
            continue
        usable = _usable(device)
        _send(connection, {"verdict": verdict.to_json(), "usable": usable})
        if not usable:
            return


def _usable(device: torch.device) -> bool:
    """Whether the device still works: an illegal access leaves a context in which every later call fails."""
    try:
        return bool((torch.ones(1, device=device) + 1 == 2).all())
    except RuntimeError:
        return False


def _send(connection: Connection, message: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(message).encode())
