"""What a night is to run: a file kernelfuzz.toml, each key of which may be left out.

targets = ["moe_lora_align", "bgmv"]            # default: every target
kernels = ["vllm", "vllm@~/src/vllm"]           # default: the newest releases
devices = ["cuda", "cpu"]                       # default: for each kernel the best there is
regressions = true                              # look for the historical bugs first
known-failures = "known_failures.toml"          # relative to this file
examples = "redis://host:6379/0"                # an example database that machines share
workers = 2                                     # worker processes of each job; default: as many as pay
"""

import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kernelfuzz.fuzz.job import Job, Skipped, default_jobs, offered_jobs, unchecked_job
from kernelfuzz.fuzz.known_failures import KnownFailure, read_known_failures
from kernelfuzz.fuzz.targets import TARGETS, get_target
from kernelfuzz.kernels.base import KernelName
from kernelfuzz.kernels.registry import DEVICE_KINDS, IMPLEMENTATIONS, find, spelled_device
from kernelfuzz.strategies.errors import KernelfuzzError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_LISTS = ("targets", "kernels", "devices")
_KEYS = (*_LISTS, "regressions", "known-failures", "examples", "workers")


@dataclass(frozen=True)
class Config:
    """What a night is to run.

    - targets, kernels, devices: as one writes them on the command line; empty for the defaults
    - regressions: whether the historical bugs are looked for
    - known: failures that fail no night
    - examples: the address of a shared example database, or empty
    - workers: of each job; None: as many as pay
    """

    targets: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    regressions: bool = True
    known: tuple[KnownFailure, ...] = field(default=(), repr=False)
    examples: str = ""
    workers: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the settings for the store; of an address only what names no user and password."""
        return {
            "targets": list(self.targets),
            "kernels": list(self.kernels),
            "devices": list(self.devices),
            "regressions": self.regressions,
            "known_failures": len(self.known),
            "examples": self.examples.rpartition("@")[2],
            "workers": self.workers,
        }


def read_config(path: Path) -> Config:
    """Read the file. Raises KernelfuzzError, in one line, for one that is none."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise KernelfuzzError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise KernelfuzzError(f"{path} is not TOML: {str(error).splitlines()[0]}") from error
    for key, value in document.items():
        if key not in _KEYS:
            raise KernelfuzzError(f"{path}: unknown key {key!r}: expected {', '.join(_KEYS)}")
        if not _fits(key, value):
            raise KernelfuzzError(f"{path}: {key} is {value!r}: expected {_EXPECTED.get(key, 'text')}")
    for name in document.get("targets", ()):
        get_target(name)
    for name in document.get("devices", ()):
        if spelled_device(name).index is not None:
            raise KernelfuzzError(f"{path}: devices: {name!r}: name a kind, like cuda; a night uses all of them")
    known = document.get("known-failures")
    return Config(
        **{key: tuple(dict.fromkeys(document.get(key, ()))) for key in _LISTS},
        regressions=document.get("regressions", True),
        known=() if known is None else read_known_failures(path.parent / Path(known).expanduser()),
        examples=document.get("examples", ""),
        workers=document.get("workers"),
    )


_EXPECTED = {
    **dict.fromkeys(_LISTS, "a list of texts"),
    "regressions": "true or false",
    "workers": "a number of at least 1",
}


def _fits(key: str, value: Any) -> bool:
    if key in _LISTS:
        return isinstance(value, list) and all(isinstance(each, str) for each in value)
    if key == "regressions":
        return isinstance(value, bool)
    if key == "workers":
        return type(value) is int and value >= 1
    return isinstance(value, str) and bool(value)


def local_jobs(config: Config) -> tuple[list[Job], list[Skipped]]:
    """Return what is to run on this machine, and what of it cannot. Raises KernelfuzzError for a kernel that is not
    known, or where nothing can run."""
    jobs: dict[str, Job] = {}
    skipped: dict[str, Skipped] = {}
    targets, kernels = list(config.targets), list(config.kernels)
    devices: list[torch.device | None] = [torch.device(name) for name in config.devices]
    for device in devices or [None]:
        if kernels:
            can, cannot = offered_jobs(targets, kernels, device)
        else:
            can, cannot = default_jobs(targets, device)
        jobs.update({str(job): job for job in can})
        skipped.update({f"{each.target} {each.kernel} {each.device}": each for each in cannot})
    if not jobs:
        reasons = "; ".join(dict.fromkeys(each.reason for each in skipped.values()))
        raise KernelfuzzError(
            f"nothing can run here: {reasons}; 'kernelfuzz releases fetch --pinned' fetches the newest"
        )
    return list(jobs.values()), list(skipped.values())


def cluster_jobs(config: Config, kinds: Collection[str]) -> list[Job]:
    """Return what is to run on a cluster with those device kinds, each kernel on the best of them or on all that the
    configuration names. Whether its nodes have the kernels will be seen there.

    Raises KernelfuzzError for a kernel that is not known, or where nothing can run.
    """
    wanted = [torch.device(name).type for name in config.devices]
    jobs = {}
    for target in config.targets or TARGETS:
        released = [each.package for each in IMPLEMENTATIONS if each.target == target and each.releases]
        for name in config.kernels or released:
            implementation = find(target, KernelName.parse(name))
            if implementation is None:
                continue
            offered = [kind for kind in DEVICE_KINDS if kind in implementation.devices and kind in kinds]
            for kind in [kind for kind in offered if kind in wanted] if wanted else offered[:1]:
                job = unchecked_job(target, name, kind)
                jobs[str(job)] = job
    if not jobs:
        have = ", ".join(kinds) or "no lanes"
        raise KernelfuzzError(f"nothing that is configured can run on the cluster, which has {have}")
    return list(jobs.values())
