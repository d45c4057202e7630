"""Which devices kernel tests run on, and how many of them at once."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kernelfuzz.fuzz.names import file_name
from kernelfuzz.kernels.registry import DEVICE_KINDS, missing_device, spelled_device
from kernelfuzz.kernels.releases import home

ALL = "all"
"""What `--kernel-device` takes for every device that is there."""

SLOTS = 2
"""How many processes may launch on one GPU at a time: it runs one of them, but is idle while that one makes tensors."""

_LOOK_SECONDS = 0.005


def default_device(kinds: tuple[str, ...]) -> str:
    """Return the best kind of device out of `kinds` that is here; the first of them if none is."""
    here = [kind for kind in DEVICE_KINDS if kind in kinds and missing_device(torch.device(kind)) is None]
    return (here or [kind for kind in DEVICE_KINDS if kind in kinds])[0]


def expanded(names: list[str]) -> list[str]:
    """Return devices as a user names them, each once, with `ALL` replaced by what is here.

    Raises KernelfuzzError for a name that is none.
    """
    found: dict[str, None] = {}
    for name in names:
        if name != ALL:
            spelled_device(name)
            found[name] = None
            continue
        for kind in DEVICE_KINDS:
            if missing_device(torch.device(kind)) is None:
                count = 1 if kind == "cpu" else int(getattr(torch, kind).device_count())
                found.update(dict.fromkeys([kind] if count == 1 else [f"{kind}:{i}" for i in range(count)]))
    return list(found)


def why_not(name: str, kinds: tuple[str, ...]) -> str | None:
    """Return why a test for `kinds` of devices cannot run on the device of that name, or None."""
    device = spelled_device(name)
    if device.type not in kinds:
        return f"the kernel is not for {device.type}, but for {', '.join(kinds)}"
    return missing_device(device)


def device_of_worker(name: str, worker: int) -> torch.device:
    """Return the device of that name; where it names only a kind, that of the pytest process number `worker`, so that
    processes share all devices of the kind."""
    device = spelled_device(name)
    if device.type == "cpu" or device.index is not None:
        return device
    return torch.device(device.type, worker % int(getattr(torch, device.type).device_count()))


@contextmanager
def slot(device: torch.device) -> Iterator[None]:
    """Wait until fewer than `SLOTS` processes of this user launch on a GPU, and count as one of them. A slot is given
    back when its process dies, however that happens. CPUs need none."""
    if device.type == "cpu":
        yield
        return
    folder = home() / "devices"
    folder.mkdir(parents=True, exist_ok=True)
    name = file_name(f"{device.type}-{device.index or 0}")
    files = [os.open(folder / f"{name}.{number}", os.O_RDWR | os.O_CREAT, 0o600) for number in range(SLOTS)]
    try:
        while not any(map(_is_taken, files)):
            time.sleep(_LOOK_SECONDS)
        yield
    finally:
        for file in files:
            os.close(file)


def _is_taken(file: int) -> bool:
    """Lock a slot's file unless another process has; return whether that was done."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
