"""Where a failure came in or went away: runs its case on versions of a kernel and searches for the change between two.

A version is a release here, and a commit in `bisect_commits`.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
from packaging.version import Version

from kernelfuzz.fuzz import sanitizer
from kernelfuzz.fuzz.campaign import Isolation
from kernelfuzz.fuzz.executor import Executor, Request, WorkerLostError
from kernelfuzz.fuzz.failure_folder import SavedFailure
from kernelfuzz.fuzz.failures import fingerprints
from kernelfuzz.fuzz.files import read_json, write_json
from kernelfuzz.fuzz.job import Job, named_jobs
from kernelfuzz.fuzz.verdict import Failure
from kernelfuzz.kernels import registry, releases
from kernelfuzz.kernels.registry import DEVICE_KINDS, IMPLEMENTATIONS, Implementation
from kernelfuzz.strategies.case import to_json
from kernelfuzz.strategies.errors import KernelfuzzError

SCHEMA = 1
"""Schema number of bisect.json. A reader refuses files with another number."""

MOST_RUNS = 10
"""How often a failure that does not show in every run is looked for in a version."""

State = Literal["good", "bad", "cannot run"]


@dataclass(frozen=True)
class Outcome:
    """What became of the case on one version.

    - state: bad if it showed the failure, good if it did not
    - note: how it failed otherwise, or why it cannot run here
    - runs: how often it was run
    - earlier: whether an earlier call ran it
    """

    state: State
    note: str = ""
    runs: int = 1
    earlier: bool = False


@dataclass(frozen=True)
class Boundary:
    """Where the outcome changes: `before` and `after` are the nearest releases on its two sides, `skipped` those
    between them, none of which can run here."""

    before: str
    after: str
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class ReleaseRange:
    """The releases to search.

    - versions: the oldest first
    - unlisted: the ends that are not known to exist: they may be pre-releases or yanked
    - problem: why pip cannot list what is published, so that `versions` are those in the cache; or empty
    """

    versions: tuple[str, ...]
    unlisted: tuple[str, ...]
    problem: str


class Trials:
    """Runs a failure's case on versions of one kernel on one device, in a worker process, on each version once at most.

    Outcomes are kept in a file for the next call: `bisect.json` in the failure's folder, or `<name>.bisect.json` beside
    a case file. They are told apart by failure, case, kernel, version, device and sanitizer; that a version cannot run
    is not kept.

    - outcomes: of every version that was asked for
    """

    def __init__(
        self,
        saved: SavedFailure,
        package: str,
        device: torch.device,
        get: Callable[[str], str],
        running: Callable[[str], AbstractContextManager[object]],
        *,
        again: bool = False,
    ) -> None:
        """Take up what an earlier call kept, unless everything is to be run `again`.

        - package: the kernel's name before the @
        - get: makes a version's code available and returns what stands for it behind the @
        - running: given a version, a context that shows that it runs

        Raises KernelfuzzError for a file that does not hold outcomes, and if a sanitizer is needed and not installed.
        """
        self.outcomes: dict[str, Outcome] = {}
        self._saved = saved
        self._package = package
        self._device = device
        self._get = get
        self._running = running
        self._tool = cast(sanitizer.Tool | None, saved.sanitizer) if device.type == "cuda" else None
        if self._tool is not None:
            sanitizer.find()
        folder = saved.path.is_dir()
        self._file = saved.path / "bisect.json" if folder else saved.path.with_suffix(".bisect.json")
        self._identity = {
            "fingerprint": saved.fingerprint,
            "case": hashlib.sha256(json.dumps(to_json(saved.case), sort_keys=True).encode()).hexdigest(),
            "package": package,
            "device": str(device),
            "sanitizer": self._tool,
        }
        ours = [each for each in self._read() if self._identity.items() <= each.items()]
        self._kept = {} if again else {each["version"]: _outcome(each) for each in ours}

    def __call__(self, version: str) -> Outcome:
        """Return the outcome of a version."""
        outcome = self.outcomes.get(version) or self._kept.get(version)
        if outcome is None:
            try:
                outcome = self._run(version)
            except KernelfuzzError as error:
                outcome = Outcome("cannot run", str(error))
            else:
                self._keep(version, outcome)
        self.outcomes[version] = outcome
        return outcome

    def require(self, version: str) -> Outcome:
        """Return the outcome of a version that the search cannot do without. Raises KernelfuzzError if it cannot run
        here."""
        outcome = self(version)
        if outcome.state == "cannot run":
            raise KernelfuzzError(f"the search needs {self._package} {version}, which cannot run here: {outcome.note}")
        return outcome

    def require_change(self, first: str, last: str) -> None:
        """Run the two ends of a search. Raises KernelfuzzError if one cannot run here or both come out alike."""
        outcomes = [self.require(version) for version in (first, last)]
        if outcomes[0].state == outcomes[1].state:
            both = f"{self._package} {first} and {last} are both {outcomes[0].state}"
            raise KernelfuzzError(f"{both}: there is no change between them to search for")

    def _run(self, version: str) -> Outcome:
        """Run the case. Raises KernelfuzzError where it cannot be judged."""
        name = f"{self._package}@{self._get(version)}"
        with self._running(version):
            (job,) = named_jobs([self._saved.case.target], [name], self._device)
            executor = Isolation(workers=1, tool=self._tool).executor(job)
            try:
                executor.loaded()
                return self._judge(job, executor)
            finally:
                executor.close()

    def _judge(self, job: Job, executor: Executor) -> Outcome:
        others: dict[str, Failure] = {}
        runs = 1 if self._saved.is_reliable else MOST_RUNS
        for count in range(1, runs + 1):
            try:
                verdict = executor.run(Request.alone(self._saved.case))
            except WorkerLostError as lost:  # the verdict is what was asked for
                verdict = lost.verdict
            if verdict.error:
                raise KernelfuzzError(f"the case cannot be judged: {verdict.error}")
            if verdict.rejected:
                raise KernelfuzzError(f"the kernel does not offer this case: {verdict.rejected}")
            if self._saved.shown_by(verdict):
                return Outcome("bad", runs=count)
            others.update(fingerprints(job, verdict))
        return Outcome("good", f"fails otherwise: {', '.join(others)}" if others else "", runs)

    def _read(self) -> list[dict[str, Any]]:
        """Return every outcome in the file, other failures' too."""
        if not self._file.exists():
            return []
        document = read_json(self._file)
        if document.get("schema") != SCHEMA or not isinstance(document.get("results"), list):
            raise KernelfuzzError(f"{self._file} does not hold results of schema {SCHEMA}: delete it")
        results: list[dict[str, Any]] = document["results"]
        return results

    def _keep(self, version: str, outcome: Outcome) -> None:
        mine = {**self._identity, "version": version}
        others = [each for each in self._read() if not mine.items() <= each.items()]
        kept = {name: value for name, value in asdict(outcome).items() if name != "earlier"}
        write_json(self._file, {"schema": SCHEMA, "results": [*others, {**mine, **kept}]})


def _outcome(result: dict[str, Any]) -> Outcome:
    return Outcome(result["state"], result["note"], result["runs"], earlier=True)


def implementation_of(saved: SavedFailure, package: str | None) -> Implementation:
    """Return the released kernel to search in: `package`, the name before the @, or else the one that failed.

    Raises KernelfuzzError if that has no releases, or neither names one and there is a choice.
    """
    offered = [each for each in IMPLEMENTATIONS if each.target == saved.case.target and each.releases]
    name = package or saved.kernel.partition("@")[0]
    chosen = [each for each in offered if name in ("", each.package)]
    if len(chosen) != 1:
        what = f"{name} has no releases with a kernel for {saved.case.target}" if name else "the case names no kernel"
        raise KernelfuzzError(f"{what}: give --package {' or '.join(each.package for each in offered)}")
    return chosen[0]


def device_of(saved: SavedFailure, implementation: Implementation, name: str | None) -> torch.device:
    """Return the device to run on: that of this name, or else the one where the case failed, or else the best one.

    Raises KernelfuzzError if it is not here, or is a CPU that lacks what the kernel needs there.
    """
    kinds = [torch.device(kind) for kind in DEVICE_KINDS if kind in implementation.devices]
    if name or saved.device:
        device = registry.parse_device(name or saved.device)
    else:
        device = next((each for each in kinds if registry.missing_device(each) is None), kinds[-1])
    reason = registry.missing_device(device) or (implementation.cpu_runtime() if device.type == "cpu" else None)
    if reason is not None:
        raise KernelfuzzError(f"{implementation.package} cannot run on {device}: {reason}")
    return device


def releases_between(package: str, first: str, last: str) -> ReleaseRange:
    """Return the releases of `package` from `first` to `last`, both included.

    Raises KernelfuzzError unless `first` is older than `last`.
    """
    ends = [releases.parse_requirement(f"{package}=={version}")[1] for version in (first, last)]
    lowest, highest = map(Version, ends)
    if lowest >= highest:
        raise KernelfuzzError(f"--from {first} is not older than --to {last}")
    problem = ""
    try:
        listed = releases.published_versions(package)
    except KernelfuzzError as error:
        problem = str(error)
        cached = [Version(release.version) for release in releases.installed_releases() if release.package == package]
        listed = [version.public for version in cached]
    by_order = {Version(text): text for text in (*ends, *listed)}  # 0.33 is 0.33.0
    chosen = [by_order[version] for version in sorted(by_order) if lowest <= version <= highest]
    return ReleaseRange(tuple(chosen), tuple(version for version in chosen if version not in listed), problem)


def bisect_releases(versions: Sequence[str], trials: Trials) -> Boundary:
    """Search `versions`, the oldest first, for where the outcome changes.

    A release that cannot run here is passed over for the nearest to it, the ends too. Raises KernelfuzzError if none
    can, or the first and the last that can come out alike.
    """
    low = _first_that_runs(versions, range(len(versions)), trials)
    high = _first_that_runs(versions, range(len(versions) - 1, low, -1), trials)
    trials.require_change(versions[low], versions[high])
    state = trials.outcomes[versions[low]].state
    skipped: set[int] = set()
    while untested := [index for index in range(low + 1, high) if index not in skipped]:
        middle = min(untested, key=lambda index: abs(2 * index - (low + high)))
        outcome = trials(versions[middle])
        if outcome.state == "cannot run":
            skipped.add(middle)
        elif outcome.state == state:
            low = middle
        else:
            high = middle
    return Boundary(versions[low], versions[high], tuple(versions[low + 1 : high]))


def _first_that_runs(versions: Sequence[str], order: Sequence[int], trials: Trials) -> int:
    """Return the first in this order of the versions' numbers that can run here. Raises KernelfuzzError if none can."""
    for index in order:
        if trials(versions[index]).state != "cannot run":
            return index
    reason = next(outcome.note for outcome in trials.outcomes.values() if outcome.state == "cannot run")
    raise KernelfuzzError(f"fewer than two of the {len(versions)} releases can run here: {reason}")
