"""Failures that someone knows of: read from a file, reported, and no reason to fail a run."""

import dataclasses
import json

import pytest

from kernelfuzz.fuzz.events import FailureFound
from kernelfuzz.fuzz.known_failures import KnownFailure, read_known_failures
from kernelfuzz.fuzz.verdict import Failure
from kernelfuzz.strategies.errors import KernelfuzzError

WRONG = Failure("wrong_value", "output", "product", "wrong")
PREFIX = "bgmv.engine_kernels-"
WRONG_NAME = f"{PREFIX}wrong_above_rank_8.wrong_value.output.product"
ENTRY = f"""
[[failure]]
fingerprint = "{WRONG_NAME}"
reason = "ranks above 8 are not supported yet"
link = "https://example.org/issues/1"
"""


@pytest.fixture
def read(tmp_path):
    def make(text):
        path = tmp_path / "known.toml"
        path.write_text(text)
        return read_known_failures(path)

    return make


def test_file_is_read(read):
    until = '[[failure]]\nfingerprint = "a"\nreason = "b"\nuntil-version = "0.34.0"\n'
    first, second = read(ENTRY + until)
    assert first == KnownFailure(WRONG_NAME, "ranks above 8 are not supported yet", "https://example.org/issues/1")
    assert second == KnownFailure("a", "b", until_version="0.34.0")
    assert str(second) == "b; until 0.34.0"
    assert read("") == ()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[[failure]", "is not TOML: "),
        ("[[failures]]\n", "failures: expected .*failure.* entries and nothing else"),
        ("failure = 3\n", "failure: expected .*failure.* entries and nothing else"),
        ("failure = [3]\n", "entry 1 is no table"),
        ('[[failure]]\nreason = "b"\n', "entry 1 has no fingerprint"),
        ('[[failure]]\nfingerprint = "a"\n', "entry 1 has no reason"),
        ('[[failure]]\nfingerprint = "a"\nreason = "b"\nuntil = "1"\n', "entry 1: unknown key 'until': expected fing"),
        ('[[failure]]\nfingerprint = "a"\nreason = 3\n', "entry 1: reason is 3: expected text"),
        (
            '[[failure]]\nfingerprint = "a"\nreason = "b"\nuntil-version = "soon"\n',
            "until-version 'soon' is no version",
        ),
        (ENTRY + ENTRY, "is listed twice"),
    ],
)
def test_file_that_is_none_is_refused_in_one_line(read, text, problem):
    with pytest.raises(KernelfuzzError, match=problem) as refusal:
        read(text)
    assert "known.toml" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(KernelfuzzError, match=r"cannot read .*nowhere\.toml: No such file"):
        read_known_failures(tmp_path / "nowhere.toml")


def test_failure_counts_again_from_a_version_on(engine_job, shrink_case):
    found = FailureFound(engine_job("right"), "a", WRONG, shrink_case(9), 1)
    known = KnownFailure("a", "b", until_version="0.34.0")
    assert all(known.excuses(found, version) for version in ("0.33.0", "0.33.9.post1", "user"))
    assert not any(known.excuses(found, version) for version in ("0.34.0", "0.35.1"))
    assert KnownFailure("a", "b").excuses(found, "99")


def test_another_bug_does_not_hide_behind_a_known_symptom(engine_job, shrink_case):
    found = FailureFound(engine_job("right"), "crash", WRONG, shrink_case(9), 1, symptoms=(WRONG,))
    assert not KnownFailure(found.withdrawn[0], "b").excuses(found, "1")
    assert KnownFailure("crash", "b").excuses(dataclasses.replace(found), "1")


def run(kernelfuzz, kernel, *options):
    return kernelfuzz("run", "bgmv", "--kernel", f"engine_kernels:{kernel}", "--seed", 3, "--examples", 200, *options)


def test_known_failure_is_reported_and_does_not_fail_the_run(kernelfuzz, tmp_path):
    (tmp_path / "known_failures.toml").write_text(ENTRY)
    done = run(kernelfuzz, "wrong_above_rank_8")
    assert done.status == 0
    assert WRONG_NAME in done.out
    assert "known: ranks above 8 are not supported yet; https://example.org/issues/1" in done.out
    assert "no failure and 1 known in 200 examples" in done.out
    summary = json.loads((tmp_path / "kernelfuzz-out" / "summary.json").read_text())
    assert (summary["known_failures"], summary["fixed_failures"]) == ([WRONG_NAME], [])


def test_unknown_failure_fails_the_run_beside_a_known_one(kernelfuzz, tmp_path):
    (tmp_path / "mine.toml").write_text(ENTRY.replace("wrong_above_rank_8", "two_bugs"))
    done = run(kernelfuzz, "two_bugs", "--known-failures", "mine.toml")
    assert done.status == 1
    assert "1 failure(s) and 1 known in 200 examples" in done.out


def test_known_failure_that_is_gone_is_reported_as_fixed(kernelfuzz, tmp_path):
    gone = ENTRY.replace("wrong_above_rank_8", "right")
    (tmp_path / "known_failures.toml").write_text(gone + ENTRY)
    done = run(kernelfuzz, "right")
    assert done.status == 0
    (line,) = [line for line in done.out.splitlines() if line.startswith("fixed")]
    assert f"{PREFIX}right.wrong_value.output.product: not seen in 200 examples (ranks above 8" in line


def test_known_failures_are_read_before_anything_is_run(kernelfuzz, tmp_path):
    (tmp_path / "known_failures.toml").write_text("[[failure]]\n")
    done = run(kernelfuzz, "right")
    assert done.status == 2
    assert done.err == "error: known_failures.toml: entry 1 has no fingerprint\n"
    assert not (tmp_path / "kernelfuzz-out").exists()
