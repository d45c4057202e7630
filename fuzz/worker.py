"""The worker process: loads one kernel, then answers cases with verdicts until its connection closes.

Messages are JSON in both directions. The first one in names the job; the first one out says that the kernel is loaded,
or why not. stdout and stderr belong to the code under test.
"""

import json
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

import torch

from kernelfuzz.fuzz.launch import judge
from kernelfuzz.fuzz.targets import get_target
from kernelfuzz.kernels import registry
from kernelfuzz.kernels.base import KernelName
from kernelfuzz.strategies.case import from_json
from kernelfuzz.strategies.errors import KernelfuzzError


def main() -> None:
    """Serve the connection whose file descriptor is the first argument."""
    # Ctrl-C reaches the whole process group; the parent decides, and closes the connection.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(Connection(int(sys.argv[1])))


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
    _send(connection, {"version": kernel.version, "dimensions": dict(kernel.dimensions)})
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        case = from_json(target.case_type, json.loads(message))
        _send(connection, judge(target, kernel, case, device).to_json())


def _send(connection: Connection, message: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(message).encode())
