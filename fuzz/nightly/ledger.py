"""What a night writes down: failures and what they are, replays, historical bugs, statistics, problems.

Everything is in the store before anybody is told of it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from kernelfuzz.fuzz import events
from kernelfuzz.fuzz.failure_files import FailureFiles
from kernelfuzz.fuzz.failure_folder import SavedFailure, read_failure
from kernelfuzz.fuzz.failures import fingerprint
from kernelfuzz.fuzz.files import write_json
from kernelfuzz.fuzz.job import Job
from kernelfuzz.fuzz.known_failures import KnownFailure
from kernelfuzz.fuzz.store import queries
from kernelfuzz.fuzz.store.store import Seen, Status, Store
from kernelfuzz.strategies.errors import KernelfuzzError

UNRELIABLE_NIGHTS = 3
"""How many nights in a row must not see a failure that shows now and then, for it to be fixed: otherwise it would be
fixed in one night and back in the next."""

INTERRUPTED = 130
"""What a shell reports of a command that Ctrl-C ended: 128 + SIGINT."""


class Observer(Protocol):
    """Who is told of a night as it goes on."""

    def event(self, event: events.Event) -> None:
        """Something has happened in a lane."""

    def failure(self, found: events.FailureFound, status: Status) -> None:
        """A failure was seen, or its smallest case."""

    def problem(self, text: str) -> None:
        """Something went wrong in the night itself."""


class Ledger:
    """What the run number `run` of a store has seen.

    - known: failures that are listed as known
    - statuses: what each failure is in this run; found: those that were seen, by their fingerprints
    - regressions: the historical bugs, by their pull requests; problems: lines on the night itself
    - concerned: the jobs on which each open failure is to be run again; left_out: those of its kernel and device that
      cannot run here
    """

    def __init__(self, store: Store, run: int, seed: int, known: Sequence[KnownFailure], observer: Observer) -> None:
        self.run = run
        self.statuses: dict[str, Status] = {}
        self.found: dict[str, events.FailureFound] = {}
        self.regressions: dict[str, events.RegressionFinished] = {}
        self.problems = list(store.problems)
        self.open = {each.fingerprint: each for each in queries.open_failures(store.connection)}
        self._store = store
        self._files = FailureFiles(store.folder, seed)
        self._known = known
        self._observer = observer
        self.concerned: dict[str, list[Job]] = {}
        self.left_out: dict[str, list[str]] = {}
        self._replays: dict[str, list[events.FailureReplayed]] = {}
        self._withdrawn: dict[str, str] = {}
        self._unsaved: list[Callable[[], object]] = []
        self._is_counted = True

    def saved(self, name: str) -> SavedFailure | None:
        """Return an open failure from its folder, which is written again from the store where it is gone or damaged;
        None, and a problem, where that is impossible."""
        failure = self.open[name]
        path = self._store.folder / "failures" / failure.folder
        try:
            try:
                return read_failure(path)
            except KernelfuzzError:
                document = dict(failure.document)
                write_json(path / "case.json", document.pop("case"))
                write_json(path / "failure.json", document)
                return read_failure(path)
        except KernelfuzzError as error:
            self.problem(str(error))
            return None

    def event(self, event: events.Event) -> None:
        """Take an event that is no failure, replay or historical bug."""
        if isinstance(event, (events.JobStarted, events.CaseFinished)):
            self._files(event)
        self._observer.event(event)

    def failure(self, found: events.FailureFound, version: str) -> None:
        """Write down a failure of a kernel of that version: its folder, then the store. Lanes that run the same job may
        find the same one: the smallest case stays."""
        before = self.found.get(found.fingerprint)
        is_smaller = before is None or (found.shrunk and found.case.size < before.case.size)
        if before is not None and before.job is found.job and before.shrunk and not is_smaller:
            return
        for name in found.withdrawn:
            self.found.pop(name, None)
            self.statuses.pop(name, None)
            self._withdrawn[name] = found.fingerprint
        self._files(found)
        document = self._files.document(found)
        self._save_failure(found, version, self._files.folder(found).name, document, found.withdrawn)

    def _save_failure(
        self,
        found: events.FailureFound,
        version: str,
        folder: str,
        document: Mapping[str, Any],
        withdrawn: Sequence[str] = (),
    ) -> None:
        job, name = found.job, found.fingerprint
        seen = Seen(name, job.target.name, str(job.kernel), version, str(job.device), folder, document)
        excuse = next((each for each in self._known if each.excuses(found, version)), None)

        def save() -> None:
            self.statuses[name] = self._store.save_failure(
                self.run, seen, listed="" if excuse is None else str(excuse), withdrawn=withdrawn
            )

        self.write(save)
        self.found[name] = found
        unwritten: Status = "listed" if excuse else "known" if name in self.open else "new"
        self._observer.failure(found, self.statuses.setdefault(name, unwritten))

    def replay(self, replayed: events.FailureReplayed) -> list[events.FailureFound]:
        """Write down what became of an open failure. Return it if it still fails; where its case shows something else,
        that."""
        job, name = replayed.job, replayed.fingerprint
        self._replays.setdefault(name, []).append(replayed)
        where = str(job.kernel), str(job.device), replayed.version
        self.write(lambda: self._store.save_replay(self.run, name, *where, replayed.outcome, replayed.reason))
        self._observer.event(replayed)
        saved = self.saved(name) if replayed.outcome == "FAILED" else None
        if saved is None:
            return []
        stored, (failure, *symptoms) = self.open[name], saved.failures
        if {fingerprint(job, each) for each in saved.failures} & replayed.failures.keys():
            is_shrunk = bool(stored.document.get("shrunk"))
            bug = events.FailureFound(job, name, failure, saved.case, 0, is_shrunk, tuple(symptoms))
            self._save_failure(bug, replayed.version, stored.folder, stored.document)
            return [bug]
        others = {other: each for other, each in replayed.failures.items() if other not in self.found}
        found = [events.FailureFound(job, other, each, replayed.case, 0) for other, each in others.items()]
        for each in found:
            self.failure(each, replayed.version)
        return found

    def was_replayed(self, name: str, job: Job) -> bool:
        """Whether it is known what an open failure does on a job's kernel."""
        return any(each.job == job for each in self._replays.get(name, []))

    def regression(self, finished: events.RegressionFinished) -> None:
        """Write down what became of a historical bug."""
        number = finished.pull_request
        self.regressions[number] = finished
        rest = finished.title, finished.outcome, finished.problem
        self.write(lambda: self._store.save_regression(self.run, number, *rest))
        self._observer.event(finished)

    def problem(self, text: str) -> None:
        """Take what went wrong in the night itself, once."""
        if text not in self.problems:
            self.problems.append(text)
            self._observer.problem(text)

    def write(self, action: Callable[[], object]) -> None:
        """Do something that writes. What cannot be written now is tried again later."""
        try:
            action()
        except KernelfuzzError as error:
            self._unsaved.append(action)
            self.problem(str(error))

    def save(self, entries: Mapping[tuple[str, str, str], Mapping[str, Any]]) -> None:
        """Write down what was counted, by (target, kernel, device), and what could not be written before."""
        unsaved, self._unsaved = self._unsaved, []
        for action in unsaved:
            self.write(action)
        try:
            self._store.save_statistics(self.run, entries)
            self._is_counted = True
        except KernelfuzzError as error:  # the next time they are written as a whole
            self._is_counted = False
            self.problem(str(error))

    def settle(self, *, interrupted: bool) -> None:
        """Finish the failures' folders, and say what became of open failures that were not seen."""
        self._files(events.CampaignFinished(interrupted))
        if self._files.problem:
            self.problem(self._files.problem)
        for name in self.open.keys() - self.statuses.keys():
            self._settle(name)

    def _settle(self, name: str) -> None:
        """Say that an open failure is fixed, if its case passes on all kernels that it concerns, or that nobody knows,
        and why. One that did not show in every run must pass in several nights in a row."""
        replays = self._replays.get(name, [])
        wrong = [each for each in replays if each.outcome != "FIXED"]
        missing = [str(job) for job in self.concerned.get(name, []) if not self.was_replayed(name, job)]
        missing += self.left_out.get(name, [])
        document = self.open[name].document
        is_unreliable = document.get("failed_runs", 1) < document.get("runs", 1)
        nights = 1 + queries.quiet_runs(self._store.connection, name, self.run)
        status: Literal["fixed", "unseen"] = "unseen"
        if name in self._withdrawn:
            note = f"it shows together with {self._withdrawn[name]}, and is taken for that"
        elif wrong:
            note = wrong[0].reason
        elif missing:
            note = f"its case was not run on {', '.join(missing)}"
        elif not replays:
            note = "its case was not run: none of the kernels is its own"
        elif is_unreliable and nights < UNRELIABLE_NIGHTS:
            rate = f"{document['failed_runs']} of {document['runs']} runs"
            note = f"its case passes, but failed in {rate}: night {nights} of {UNRELIABLE_NIGHTS} that do not see it"
        else:
            status, note = "fixed", "; ".join(f"passes on {each.job.kernel} {each.version}" for each in replays)
        self.statuses[name] = status
        self.write(lambda: self._store.save_gone(self.run, name, status, note))

    def exit_status(self, *, interrupted: bool, broken: bool) -> int:
        """Return the exit status that the night has earned: 1 for failures that are new or have come back, and for
        historical bugs that are not told apart, unless the last night that looked for them said so; otherwise 130 if it
        was `interrupted`, 2 if something is `broken` or could not be written, or 0."""
        earlier = queries.last_regressions(self._store.connection, self.run)
        lost = [name for name, each in self.regressions.items() if each.outcome == "FAIL" != earlier.get(name)]
        if lost or any(status in ("new", "returned") for status in self.statuses.values()):
            return 1
        if interrupted:
            return INTERRUPTED
        return 2 if broken or self._unsaved or not self._is_counted else 0

    def finish(self, state: str, exit_status: int) -> int:
        """End the run in the store. Return the exit status, which is 2 instead of 0 if that cannot be written."""
        self.write(lambda: self._store.finish_run(self.run, state, exit_status, self.problems))
        return exit_status or (2 if self._unsaved else 0)
