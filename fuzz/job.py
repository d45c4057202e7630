"""A job: one target on one kernel on one device, the unit that a campaign is made of."""

from dataclasses import dataclass
from typing import Any

import torch

from kernelfuzz.fuzz.targets import TARGETS, Target, get_target
from kernelfuzz.fuzz.testing.source import TestSource
from kernelfuzz.kernels import registry
from kernelfuzz.kernels.base import KernelName
from kernelfuzz.kernels.registry import DEVICE_KINDS, IMPLEMENTATIONS, Implementation
from kernelfuzz.strategies.errors import KernelfuzzError


@dataclass(frozen=True)
class Job:
    """One target on one kernel on one device. Where a kernel `test` brings the target, and the kernel unless another
    one takes its place, workers import it."""

    target: Target
    kernel: KernelName
    device: torch.device
    implementation: Implementation
    test: TestSource | None = None

    def __str__(self) -> str:
        return f"{self.target.name} on {self.kernel} ({self.device})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Have another process look up what this one has looked up; a kernel test stays where it is."""
        return unchecked_job, (self.target.name, str(self.kernel), str(self.device))

    @property
    def compiles(self) -> bool:
        """Whether Triton compiles a kernel for each class of cases, which takes a second."""
        return self.implementation.triton and self.device.type != "cpu"

    @property
    def seeds(self) -> int:
        """How many content seeds a drawn structure is run with: so many that drawing does not hold up the kernel.

        The numbers for GPUs come from a sketch on an H100, where a structure was drawn in 2 ms and 32 cases of
        moe_lora_align took 3 ms; they have not been measured with this code.
        """
        if self.device.type != "cpu":
            return 32 if self.target.stackable else 8
        return 1 if self.implementation.triton else 4  # interpreted kernels are slower than drawing


@dataclass(frozen=True)
class Skipped:
    """A kernel that cannot run here, and why, in one line."""

    target: str
    kernel: KernelName
    device: str
    reason: str


def all_kernels() -> list[Job | Skipped]:
    """Return every target × known kernel × device kind, as a job where it can run here."""
    found: list[Job | Skipped] = []
    for implementation in IMPLEMENTATIONS:
        for kind in DEVICE_KINDS:
            found.append(_job(implementation, implementation.default_name(), torch.device(kind)))
    return found


def default_jobs(targets: list[str], device: torch.device | None) -> tuple[list[Job], list[Skipped]]:
    """Return the released kernels of `targets` (all if empty) that can run here, each on its best device, and the
    rest."""
    jobs: list[Job] = []
    skipped: list[Skipped] = []
    for implementation in IMPLEMENTATIONS:
        # Examples prove the harness; they are run when they are asked for.
        if not implementation.releases or implementation.target not in (targets or TARGETS):
            continue
        job = _on_best_device(implementation, implementation.default_name(), device)
        if isinstance(job, Job):
            jobs.append(job)
        else:
            skipped.append(job)
    return jobs, skipped


def named_jobs(targets: list[str], names: list[str], device: torch.device | None) -> list[Job]:
    """Return a job for each of `targets` (all if empty) and kernel of `names`.

    Raises KernelfuzzError for a kernel that implements none of the targets, or that cannot run here.
    """
    jobs, skipped = offered_jobs(targets, names, device)
    for each in skipped:
        raise KernelfuzzError(f"{each.kernel} cannot run {each.target} on {each.device}: {each.reason}")
    return jobs


def offered_jobs(targets: list[str], names: list[str], device: torch.device | None) -> tuple[list[Job], list[Skipped]]:
    """Return a job for each of `targets` (all if empty) and kernel of `names`, and those that cannot run here.

    Raises KernelfuzzError for a kernel that implements none of the targets.
    """
    jobs: list[Job] = []
    skipped: list[Skipped] = []
    for text in dict.fromkeys(names):
        name = KernelName.parse(text)
        offered = [registry.find(target, name) for target in dict.fromkeys(targets or TARGETS)]
        implementations = [implementation for implementation in offered if implementation is not None]
        if ":" in name.package and not targets:
            raise KernelfuzzError(f"kernel {text!r}: name the target it implements, one of {', '.join(TARGETS)}")
        if not implementations:
            raise _unknown_kernel(text, targets)
        for implementation in implementations:
            job = _on_best_device(implementation, name, device)
            if isinstance(job, Skipped):
                skipped.append(job)
            else:
                jobs.append(job)
    for target in targets:
        if all(each.target.name != target for each in jobs) and all(each.target != target for each in skipped):
            raise KernelfuzzError(f"none of the kernels implements {target}: {', '.join(names)}")
    return jobs, skipped


def unchecked_job(target: str, kernel: str, device: str) -> Job:
    """Return the job of that name, whether or not it can run here.

    Raises KernelfuzzError if the kernel does not implement the target, or not for such a device.
    """
    name = KernelName.parse(kernel)
    implementation = registry.find(target, name)
    if implementation is None:
        raise _unknown_kernel(kernel, [target])
    try:
        where = torch.device(device)
    except RuntimeError:
        raise KernelfuzzError(f"unknown device {device!r}: expected cpu, cuda, cuda:1, xpu, ...") from None
    if where.type not in implementation.devices:
        raise KernelfuzzError(f"{name} is not written for {where.type}: expected {', '.join(implementation.devices)}")
    return _unchecked(implementation, name, where)


def _unknown_kernel(text: str, targets: list[str]) -> KernelfuzzError:
    known = sorted({each.package for each in IMPLEMENTATIONS if each.target in (targets or TARGETS)})
    return KernelfuzzError(
        f"no kernel {text!r} for this target: expected one of {', '.join(known)}, with @VERSION or @PATH"
    )


def _on_best_device(implementation: Implementation, name: KernelName, device: torch.device | None) -> Job | Skipped:
    """Return a job on `device`, or on the first device kind that can run the kernel; else why the last one cannot."""
    written_for = [torch.device(kind) for kind in DEVICE_KINDS if kind in implementation.devices]
    devices = written_for if device is None else [device]
    for candidate in devices:
        job = _job(implementation, name, candidate)
        if isinstance(job, Job):
            break
    return job


def _job(implementation: Implementation, name: KernelName, device: torch.device) -> Job | Skipped:
    job = _unchecked(implementation, name, device)
    reason = implementation.unavailable(job.kernel, device)
    return job if reason is None else Skipped(implementation.target, job.kernel, str(device), reason)


def _unchecked(implementation: Implementation, name: KernelName, device: torch.device) -> Job:
    if implementation.releases and name.version is None:
        name = implementation.default_name()
    return Job(get_target(implementation.target), name, device, implementation)
