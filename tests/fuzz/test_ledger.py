"""What a night says of failures that it has not seen."""

import dataclasses
import sys
from pathlib import Path

from kernelfuzz.fuzz import events
from kernelfuzz.fuzz.nightly.ledger import Ledger

sys.path.insert(0, str(Path(__file__).parent))
from nights import Nights


class Silent:
    """An observer that says nothing."""

    def event(self, event):
        pass

    def failure(self, found, status):
        pass

    def problem(self, text):
        pass


def next_night(nights, outcome="FIXED", elsewhere=False):
    """Run bug number 0 again and nothing else; return what it is then, and what is noted."""
    nights.start()
    bug = nights.failure(0)
    ledger = Ledger(nights.store, nights.run, 1, (), Silent())
    ledger.concerned[bug.fingerprint] = nights.jobs if elsewhere else [bug.job]
    shown = {bug.fingerprint: bug.failure} if outcome == "FAILED" else {}
    ledger.replay(events.FailureReplayed(bug.job, bug.fingerprint, bug.case, "1.0", outcome, "why", shown))
    ledger.settle(interrupted=False)
    ledger.finish("finished", 0)
    rows = nights.store.connection.execute("SELECT note FROM sightings WHERE run = ?", (nights.run,))
    return ledger.statuses[bug.fingerprint], rows.fetchone()[0]


def first_night(folder, failed_runs=10):
    nights = Nights(folder)
    nights.start()
    nights.see(0, failed_runs=failed_runs)
    nights.finish(1)
    return nights


def test_a_failure_whose_case_passes_is_fixed(tmp_path):
    status, note = next_night(first_night(tmp_path))
    assert (status, note) == ("fixed", "passes on example 1.0")


def test_a_failure_whose_case_was_not_run_on_every_kernel_is_not_fixed(tmp_path):
    status, note = next_night(first_night(tmp_path), elsewhere=True)
    assert status == "unseen"
    assert note.startswith("its case was not run on bgmv on vllm@")


def test_a_failure_whose_case_cannot_be_judged_is_not_fixed(tmp_path):
    assert next_night(first_night(tmp_path), "ERROR") == ("unseen", "why")


def test_a_failure_that_shows_now_and_then_is_fixed_after_three_quiet_nights(tmp_path):
    nights = first_night(tmp_path, failed_runs=1)
    assert [next_night(nights)[0] for _ in range(2)] == ["unseen", "unseen"]
    assert next_night(nights, "FAILED")[0] == "known"
    found = [next_night(nights) for _ in range(3)]
    assert [status for status, _ in found] == ["unseen", "unseen", "fixed"]
    assert "failed in 1 of 10 runs: night 2 of 3" in found[1][1]


def test_a_failure_of_a_kernel_that_cannot_run_here_is_not_fixed(tmp_path):
    nights = first_night(tmp_path)
    nights.start()
    bug = nights.failure(0)
    ledger = Ledger(nights.store, nights.run, 1, (), Silent())
    ledger.concerned[bug.fingerprint] = [bug.job]
    ledger.left_out[bug.fingerprint] = ["bgmv on vllm@/gone (cuda)"]
    ledger.replay(events.FailureReplayed(bug.job, bug.fingerprint, bug.case, "1.0", "FIXED", ""))
    ledger.settle(interrupted=False)
    assert ledger.statuses == {bug.fingerprint: "unseen"}


def test_a_known_failure_that_cannot_be_written_is_still_known(tmp_path):
    nights = first_night(tmp_path)
    nights.start()
    ledger = Ledger(nights.store, nights.run, 1, (), Silent())
    pages = nights.store.connection.execute("PRAGMA page_count").fetchone()[0]
    nights.store.connection.execute(f"PRAGMA max_page_count = {pages}")
    bug = dataclasses.replace(nights.failure(0), arguments={"text": "x" * 200_000})
    ledger.write(lambda: nights.store.save_statistics(nights.run, {("a", "b", "c"): {"text": "x" * 500_000}}))
    ledger.failure(bug, "1.0")
    ledger.save({})
    assert ledger.statuses == {bug.fingerprint: "known"}
    assert ledger.exit_status(interrupted=False, broken=False) == 2
