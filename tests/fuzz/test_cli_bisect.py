"""`kernelfuzz bisect` as a user meets it, on tiny releases in a local folder and on tiny clones.

The `vllm-torch` kernel of `bgmv` in them is right, raises what the failure is or something else, or does not load.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from dataclasses import asdict

import pytest

from kernelfuzz.fuzz.failure_folder import SCHEMA
from kernelfuzz.fuzz.files import write_json
from kernelfuzz.fuzz.verdict import Failure
from kernelfuzz.kernels import releases
from kernelfuzz.strategies.case import to_json

OPS = "vllm/lora/ops/torch_ops/lora_ops.py"
KERNEL = """\
    import pathlib, time, torch

    count = 0

    def bgmv_shrink(x, weights, output, indices, scale):
        global count
        count += 1
        product = scale * torch.einsum("tnk,tk->tn", weights[indices].float(), x.float())
        {}
        output[:, : product.shape[1]] = product
    """
BODIES = {
    # Of one length, so that the size of a file does not tell them apart.
    "good": "if False: raise RuntimeError()",
    "bad": "if  True: raise RuntimeError()",
    "other": "raise ValueError()",
    "seldom": "if count % 4 == 3: raise RuntimeError()",
    "wrong": "product += 1000",
}
RAISED = Failure("raised", "", "RuntimeError_in_bgmv_shrink", "RuntimeError")
NAME = "bgmv.vllm-torch.raised.RuntimeError_in_bgmv_shrink"


def source(body):
    """The file with the kernel; where `body` is none of BODIES, with that in it."""
    if body == "broken":
        return "raise ImportError('this is for another torch')\n"
    return textwrap.dedent(KERNEL).format(BODIES.get(body, body))


@pytest.fixture(autouse=True)
def wheels(tmp_path, monkeypatch):
    """The only place where pip looks."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def publish(wheels):
    """Publishes releases, 0.1 and on or of the given versions, each with one of BODIES."""

    def make(*bodies, **versions):
        for version, body in [(f"0.{index}", body) for index, body in enumerate(bodies, 1)] + list(versions.items()):
            version = version.replace("v", "").replace("_", ".")
            with zipfile.ZipFile(wheels / f"vllm-{version}-cp38-abi3-manylinux_2_28_x86_64.whl", "w") as wheel:
                info = f"vllm-{version}.dist-info"
                wheel.writestr("vllm/__init__.py", "")
                wheel.writestr(OPS, source(body))
                wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
                wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: cp38-abi3-manylinux_2_28_x86_64\n")

    return make


@pytest.fixture
def failure(tmp_path, shrink_case):
    """The folder of a failure that is seen in every run."""
    folder = tmp_path / "failures" / NAME
    document = {
        "schema": SCHEMA,
        "fingerprint": NAME,
        "target": "bgmv",
        "kernel": "vllm-torch@0.4",
        "version": "0.4",
        "device": "cpu",
        **asdict(RAISED),
        "symptoms": [],
        "sanitizer": None,
        "failed_runs": 1,
        "runs": 1,
    }
    write_json(folder / "case.json", to_json(shrink_case(1)))
    write_json(folder / "failure.json", document)
    return folder


def table(outcome):
    """The rows of the printed table: version and what is said of it."""
    lines = [line for line in outcome.out.splitlines() if line.startswith("0.")]
    return {line.split()[0]: " ".join(line.split()[1:]) for line in lines}


def fetched():
    return [release.version for release in releases.installed_releases()]


def test_the_first_bad_release_is_found_and_no_more_is_fetched_than_was_run(kernelfuzz, publish, failure):
    publish(*["good"] * 4, *["bad"] * 5)
    outcome = kernelfuzz("bisect", failure, "--from", "0.1", "--to", "0.9.0")
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.splitlines()[-2:] == ["last good vllm 0.4, first bad vllm 0.5", "5 release(s) run"]
    assert f"searching for {NAME} in vllm-torch on cpu: 9 releases, 0.1, 0.2, 0.3" in outcome.out
    assert "at most 5 are run" in outcome.out
    assert table(outcome) == {"0.1": "good", "0.3": "good", "0.4": "good", "0.5": "bad", "0.9": "bad"}
    assert fetched() == list(table(outcome))


def test_the_first_fixed_release_is_found(kernelfuzz, publish, failure):
    publish("good", "bad", "bad", "other", "good", "good")
    outcome = kernelfuzz("bisect", failure, "--from", "0.2", "--to", "0.6")
    assert outcome.status == 0
    assert "last bad vllm 0.3, first fixed vllm 0.4\n" in outcome.out
    assert table(outcome)["0.4"] == "good fails otherwise: bgmv.vllm-torch.raised.ValueError_in_bgmv_shrink"


def test_two_releases_are_all_there_is_to_run(kernelfuzz, publish, failure):
    publish("good", "bad")
    outcome = kernelfuzz("bisect", failure, "--from", "0.1", "--to", "0.2")
    assert "at most 2 are run" in outcome.out
    assert outcome.out.endswith("last good vllm 0.1, first bad vllm 0.2\n2 release(s) run\n")


def test_releases_that_cannot_run_here_are_passed_over(kernelfuzz, publish, failure):
    publish("good", "good", "broken", "broken", "good", "bad", "bad")
    outcome = kernelfuzz("bisect", failure, "--from", "0.1", "--to", "0.7")
    assert outcome.status == 0
    assert outcome.out.endswith("last good vllm 0.5, first bad vllm 0.6\n4 release(s) run, 2 cannot run here\n")
    assert list(table(outcome)) == ["0.1", "0.3", "0.4", "0.5", "0.6", "0.7"]
    assert "this is for another torch" in table(outcome)["0.4"]


def test_a_change_among_releases_that_cannot_run_is_narrowed_to_them(kernelfuzz, publish, failure):
    publish("good", "good", "broken", "broken", "bad", "bad")
    outcome = kernelfuzz("bisect", failure, "--from", "0.1", "--to", "0.6")
    assert outcome.status == 0
    *_, boundary, count = outcome.out.splitlines()
    assert boundary.startswith("first bad between vllm 0.2 and 0.5, which is bad (0.3 cannot run here: bgmv on vllm-")
    assert "; 0.4 cannot run here: " in boundary
    assert boundary.count("this is for another torch") == 2
    assert count == "4 release(s) run, 2 cannot run here"


@pytest.mark.parametrize(("body", "state"), [("bad", "bad"), ("other", "good")])
def test_ends_that_come_out_alike_leave_nothing_to_search(kernelfuzz, publish, failure, body, state):
    publish(body, "good", body)
    outcome = kernelfuzz("bisect", failure, "--from", "0.1", "--to", "0.3")
    assert outcome.status == 2
    assert outcome.err == (
        f"error: vllm-torch 0.1 and 0.3 are both {state}: there is no change between them to search for\n"
    )
    assert fetched() == ["0.1", "0.3"]


def test_an_end_that_cannot_run_is_passed_over(kernelfuzz, publish, failure):
    publish("broken", "good", "bad", "broken")
    outcome = kernelfuzz("bisect", failure, "--from", "0.1", "--to", "0.4")
    assert (outcome.status, outcome.err) == (0, "")
    assert "last good vllm 0.2, first bad vllm 0.3\n2 release(s) run, 2 cannot run here\n" in outcome.out


def test_releases_none_of_which_can_run_end_the_search(kernelfuzz, publish, failure):
    publish("broken", "broken", "bad")
    outcome = kernelfuzz("bisect", failure, "--from", "0.1", "--to", "0.3")
    assert outcome.status == 2
    assert "error: fewer than two of the 3 releases can run here: " in outcome.err


def test_pre_releases_are_left_out_unless_they_are_an_end(kernelfuzz, publish, failure):
    publish(v0_1rc1="good", v0_1="good", v0_2rc1="broken", v0_2="bad", v0_3rc1="bad")
    outcome = kernelfuzz("bisect", failure, "--from", "0.1rc1", "--to", "0.3rc1")
    assert outcome.status == 0
    assert "4 releases, 0.1rc1, 0.1, 0.2, 0.3rc1\n" in outcome.out
    assert "last good vllm 0.1, first bad vllm 0.2\n" in outcome.out


def test_without_an_index_the_cache_is_searched(kernelfuzz, publish, failure, wheels):
    publish("good", "good", "good", "bad", "bad")
    assert kernelfuzz("releases", "fetch", *(f"vllm=={version}" for version in ("0.1", "0.2", "0.5"))).status == 0
    for path in wheels.iterdir():
        path.unlink()
    outcome = kernelfuzz("bisect", failure, "--from", "0.1", "--to", "0.5")
    assert outcome.status == 0
    note = "cannot list the releases of vllm, pip says: No matching distribution found for vllm"
    assert outcome.out.startswith(f"{note}; searching the releases in the cache\n")
    assert "last good vllm 0.2, first bad vllm 0.5\n" in outcome.out


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        ("0.1", "0.77", "error: there is no vllm==0.77 for this pip to get; the nearest are 0.2, 0.3\n"),
        ("0.0.7", "0.3", "error: there is no vllm==0.0.7 for this pip to get; the nearest are 0.1, 0.2\n"),
        ("0.3", "0.1", "error: --from 0.3 is not older than --to 0.1\n"),
        ("0.1.0", "0.1", "error: --from 0.1.0 is not older than --to 0.1\n"),
        ("first", "0.1", "error: 'first' is neither a version, such as 0.33.0, nor a folder\n"),
    ],
)
def test_an_end_that_is_none_is_one_line_before_anything_is_run(kernelfuzz, publish, failure, first, last, message):
    publish("good", "bad", "bad")
    outcome = kernelfuzz("bisect", failure, "--from", first, "--to", last)
    assert (outcome.status, outcome.err) == (2, message)
    assert fetched() == []


def test_an_end_that_is_not_cached_is_one_line_without_an_index(kernelfuzz, failure):
    outcome = kernelfuzz("bisect", failure, "--from", "0.1", "--to", "0.2")
    assert outcome.status == 2
    assert outcome.err.startswith("error: cannot fetch vllm==0.1: pip finds no release of vllm; ")


def test_what_an_earlier_call_ran_is_not_run_again(kernelfuzz, publish, failure):
    publish("good", "broken", "good", "bad", "bad")
    search = ("bisect", failure, "--from", "0.1", "--to", "0.5")
    first = kernelfuzz(*search)
    assert first.out.endswith("4 release(s) run\n")
    kept = json.loads((failure / "bisect.json").read_text())
    assert kept["schema"] == 1
    assert {each["version"]: each["state"] for each in kept["results"]} == table(first)

    second = kernelfuzz(*search)
    assert second.out.endswith("0 release(s) run, 4 taken from an earlier call\n")
    assert table(second) == {version: f"{said} from an earlier call" for version, said in table(first).items()}
    again = kernelfuzz(*search, "--again")
    assert table(again) == table(first)
    assert json.loads((failure / "bisect.json").read_text())["results"] == kept["results"]


def test_a_release_that_could_not_run_is_tried_again(kernelfuzz, publish, failure):
    publish("good", "broken", "bad")
    search = ("bisect", failure, "--from", "0.1", "--to", "0.3")
    assert "0.2 cannot run here" in kernelfuzz(*search).out
    releases.remove("vllm", "0.2")
    publish("good", "bad", "bad")
    second = kernelfuzz(*search)
    assert second.out.endswith("first bad vllm 0.2\n1 release(s) run, 2 taken from an earlier call\n")


def test_outcomes_of_another_case_do_not_count(kernelfuzz, publish, failure, shrink_case):
    publish("good", "bad")
    search = ("bisect", failure, "--from", "0.1", "--to", "0.2")
    kernelfuzz(*search)
    write_json(failure / "case.json", to_json(shrink_case(2)))
    assert kernelfuzz(*search).out.endswith("2 release(s) run\n")
    write_json(failure / "case.json", to_json(shrink_case(1)))
    assert kernelfuzz(*search).out.endswith("0 release(s) run, 2 taken from an earlier call\n")


def test_a_file_of_outcomes_that_is_none_is_one_line(kernelfuzz, publish, failure):
    publish("good", "bad")
    write_json(failure / "bisect.json", {"schema": 99})
    outcome = kernelfuzz("bisect", failure, "--from", "0.1", "--to", "0.2")
    assert outcome.status == 2
    assert outcome.err == f"error: {failure / 'bisect.json'} does not hold results of schema 1: delete it\n"


def test_a_failure_that_does_not_show_in_every_run_is_looked_for_ten_times(kernelfuzz, publish, failure):
    publish("good", "seldom", "seldom")
    document = json.loads((failure / "failure.json").read_text())
    write_json(failure / "failure.json", {**document, "failed_runs": 3, "runs": 10})
    outcome = kernelfuzz("bisect", failure, "--from", "0.1", "--to", "0.3")
    assert table(outcome) == {"0.1": "good run 10 times", "0.2": "bad run 3 times", "0.3": "bad run 3 times"}


def test_of_a_case_file_any_failure_counts(kernelfuzz, publish, failure):
    publish("good", "good", "wrong", "other")
    case = failure / "case.json"
    outcome = kernelfuzz("bisect", case, "--from", "0.1", "--to", "0.4", "--package", "vllm-torch")
    assert outcome.status == 0
    assert f"searching for any failure of {case} in vllm-torch on c" in outcome.out
    assert "last good vllm 0.2, first bad vllm 0.3\n" in outcome.out
    assert (failure / "case.bisect.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["failure", "--from", "0.1"],
            "give --from and --to, two releases; or --git, --good and --bad, a clone's comm",
        ),
        (["failure", "--from", "0.1", "--to", "0.2", "--git", "."], "give --from and --to, two releases; or --git"),
        (
            ["failure", "--from", "0.1", "--to", "0.2", "--package", "example"],
            "example has no releases with a kernel for",
        ),
        (["failure", "--from", "0.1", "--to", "0.2", "--device", "tpu"], "unknown device 'tpu'"),
        (
            ["case", "--from", "0.1", "--to", "0.2"],
            "the case names no kernel: give --package vllm-xpu-kernels or vllm or",
        ),
        (["nothing", "--from", "0.1", "--to", "0.2"], "cannot read nothing: No such file or directory"),
    ],
)
def test_bad_arguments_are_one_line(kernelfuzz, failure, arguments, message):
    paths = {"failure": failure, "case": failure / "case.json"}
    outcome = kernelfuzz("bisect", paths.get(arguments[0], arguments[0]), *arguments[1:])
    assert outcome.status == 2
    assert outcome.err.startswith(f"error: {message}")
    assert outcome.err.count("\n") == 1


def hangs_once(marker):
    """A body that says that it runs and does not end, but for the second time is good."""
    path = repr(str(marker))
    return f"if not pathlib.Path({path}).exists(): pathlib.Path({path}).touch(); time.sleep(600)"


def interrupted(arguments, marker, number, environment):
    """Run `kernelfuzz ...`, send it the signal when `marker` is there, and return its exit status and stdout."""
    command = [sys.executable, "-c", "from kernelfuzz.fuzz.cli import main; main()", *map(str, arguments)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        while not marker.exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        out, _ = process.communicate()
        return process.returncode, out


def test_an_interrupted_search_is_taken_up_where_it_was(kernelfuzz, publish, failure, tmp_path):
    marker = tmp_path / "runs"
    publish("good", "good", hangs_once(marker), "bad", "bad")
    search = ("bisect", failure, "--from", "0.1", "--to", "0.5")
    status, out = interrupted(search, marker, signal.SIGINT, os.environ)
    assert status == 130
    assert out.endswith("interrupted: the same command goes on from here\n")
    outcome = kernelfuzz(*search)
    assert outcome.status == 0
    assert outcome.out.endswith(
        "last good vllm 0.3, first bad vllm 0.4\n2 release(s) run, 2 taken from an earlier call\n"
    )
    assert table(outcome) == {
        "0.1": "good from an earlier call",
        "0.3": "good",
        "0.4": "bad",
        "0.5": "bad from an earlier call",
    }


class Clone:
    """A clone of a tiny vllm, with a hook that must not run and a change that is not committed."""

    def __init__(self, path):
        self.path = path
        path.mkdir()
        self.git("init", "--quiet", "--initial-branch=main")
        hook = path / ".git" / "hooks" / "post-checkout"
        hook.write_text(f"#!/bin/sh\ntouch {path / 'hook-ran'}\n")
        hook.chmod(0o755)

    def git(self, *arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "core.hooksPath=/dev/null"]
        command = ["git", "-C", self.path, *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, *bodies):
        """Commit each of the bodies; return the hashes."""
        return [self._commit(index, body) for index, body in enumerate(bodies)]

    def _commit(self, index, body):
        ops = self.path / OPS
        ops.parent.mkdir(parents=True, exist_ok=True)
        ops.write_text(source(body))
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", f"{index}: {body}")
        return self.git("rev-parse", "HEAD")

    def state(self):
        """What a user has there, which must not change."""
        files = {
            path: path.read_bytes() for path in self.path.rglob("*") if path.is_file() and ".git" not in path.parts
        }
        lists = [self.git(*arguments.split()) for arguments in ("status", "for-each-ref", "worktree list", "reflog")]
        notes = sorted(path.name for path in (self.path / ".git").iterdir())
        return files, lists, notes


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path / "clone")


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder


def test_the_first_bad_commit_is_found_and_the_clone_left_as_it_was(kernelfuzz, failure, clone, temporary):
    commits = clone.commit(*["good"] * 5, *["bad"] * 5)
    clone.git("bisect", "start", "HEAD", "HEAD~2")
    (clone.path / OPS).write_text("not committed")
    before = clone.state()
    outcome = kernelfuzz("bisect", failure, "--git", clone.path, "--good", commits[0], "--bad", "main")
    assert (outcome.status, outcome.err) == (0, "")
    assert f"\nfirst bad commit: {commits[5]} 5: bad\n" in outcome.out
    assert f"{commits[4][:12]} 4: good" in outcome.out
    assert 4 <= int(outcome.out.splitlines()[-1].split()[0]) <= 6
    assert clone.state() == before
    assert list(temporary.glob("kernelfuzz*")) == []


def test_two_commits_are_all_there_is_to_run(kernelfuzz, failure, clone):
    commits = clone.commit("good", "bad")
    outcome = kernelfuzz("bisect", failure, "--git", clone.path, "--good", commits[0], "--bad", commits[1])
    assert outcome.out.endswith(f"\nfirst bad commit: {commits[1]} 1: bad\n2 commit(s) run\n")


def test_no_commit_is_run_twice(kernelfuzz, failure, clone, tmp_path):
    runs = tmp_path / "runs"
    count = f"with open({str(runs)!r}, 'a') as file: file.write('.')"
    commits = clone.commit(count, count, "bad", "bad")
    outcome = kernelfuzz("bisect", failure, "--git", clone.path, "--good", commits[0], "--bad", commits[3])
    assert f"\nfirst bad commit: {commits[2]} 2: bad\n" in outcome.out
    assert runs.read_text() == ".."


def test_the_first_fixed_commit_is_found(kernelfuzz, failure, clone):
    commits = clone.commit("bad", "bad", "bad", "bad", "other", "good", "good")
    outcome = kernelfuzz("bisect", failure, "--git", clone.path, "--good", "main", "--bad", commits[0])
    assert outcome.status == 0
    assert f"\nfirst fixed commit: {commits[4]} 4: other\n" in outcome.out
    assert "fails otherwise: bgmv.vllm-torch.raised.ValueError_in_bgmv_shrink" in outcome.out


def test_commits_that_cannot_run_here_are_skipped(kernelfuzz, failure, clone):
    commits = clone.commit("good", "broken", "good", "broken", "broken", "good", "bad", "broken", "bad")
    outcome = kernelfuzz("bisect", failure, "--git", clone.path, "--good", commits[0], "--bad", "HEAD")
    assert f"\nfirst bad commit: {commits[6]} 6: bad\n" in outcome.out


def test_a_change_among_commits_that_cannot_run_is_one_of_them(kernelfuzz, failure, clone):
    commits = clone.commit("good", "good", "broken", "broken", "bad", "bad")
    outcome = kernelfuzz("bisect", failure, "--git", clone.path, "--good", commits[0], "--bad", "HEAD")
    assert outcome.status == 0
    lines = outcome.out.splitlines()
    assert lines[-5:-1] == [
        "first bad commit: one of these, of which only the first can run here",
        f"{commits[4]} 4: bad",
        f"{commits[3]} 3: broken",
        f"{commits[2]} 2: broken",
    ]
    assert lines[-1].endswith(", 2 cannot run here")


@pytest.mark.parametrize(
    ("base", "found"), [("good", "first bad commit: {bad}"), ("bad", "first fixed commit: {good}")]
)
def test_branches_are_searched_from_where_they_part(kernelfuzz, failure, clone, base, found):
    clone.commit(base)
    changes = {}
    for branch in ("good", "bad"):
        clone.git("checkout", "--quiet", "-b", branch, "main")
        changes[branch] = clone.commit(base, branch, branch)[1]
    outcome = kernelfuzz("bisect", failure, "--git", clone.path, "--good", "good", "--bad", "bad")
    assert outcome.status == 0
    assert f"\n{found.format(**changes)} 1: " in outcome.out


def test_commits_are_not_run_again_either(kernelfuzz, failure, clone):
    commits = clone.commit("good", "good", "bad", "bad")
    search = ("bisect", failure, "--git", clone.path, "--good", commits[0], "--bad", commits[-1])
    first, second = kernelfuzz(*search), kernelfuzz(*search)
    assert first.out.endswith("4 commit(s) run\n")
    assert second.out.endswith("0 commit(s) run, 4 taken from an earlier call\n")
    assert f"first bad commit: {commits[2]}" in second.out


def test_a_merged_branch_is_searched_too(kernelfuzz, failure, clone):
    start = clone.commit("good")[0]
    clone.git("checkout", "--quiet", "-b", "branch")
    culprit = clone.commit("good", "bad", "bad")[1]
    clone.git("checkout", "--quiet", "main")
    (clone.path / "README").write_text("a vllm")
    clone.commit("good")
    clone.git("merge", "--quiet", "branch")
    outcome = kernelfuzz("bisect", failure, "--git", clone.path, "--good", start, "--bad", "HEAD")
    assert f"\nfirst bad commit: {culprit} 1: bad\n" in outcome.out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_worktree_of_an_interrupted_search_is_taken_away(failure, clone, temporary, number, tmp_path):
    marker = tmp_path / "runs"
    commits = clone.commit("good", "bad", hangs_once(marker), "bad")
    before = clone.state()
    search = ("bisect", failure, "--git", clone.path, "--good", commits[0], "--bad", commits[2])
    status, out = interrupted(search, marker, number, {**os.environ, "KERNELFUZZ_HOME": str(tmp_path / "home")})
    assert status == 130
    assert out.endswith("interrupted: the same command goes on from here\n")
    assert clone.state() == before
    assert list(temporary.glob("kernelfuzz*")) == []


def test_a_search_that_a_hook_of_git_starts_is_in_the_clone_that_was_named(
    kernelfuzz, failure, clone, tmp_path, monkeypatch
):
    commits = clone.commit("good", "bad", "bad")
    other = Clone(tmp_path / "other")
    other.commit("good")
    before = other.state()
    monkeypatch.setenv("GIT_DIR", str(other.path / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other.path / ".git" / "index"))
    outcome = kernelfuzz("bisect", failure, "--git", clone.path, "--good", commits[0], "--bad", commits[2])
    monkeypatch.delenv("GIT_DIR")
    monkeypatch.delenv("GIT_INDEX_FILE")
    assert f"\nfirst bad commit: {commits[1]} 1: bad\n" in outcome.out
    assert other.state() == before


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ("HEAD", "nothing", "{clone} has no commit 'nothing'"),
        ("HEAD", "HEAD~2", "--good {2} shows the failure and --bad {0} does not: exchange them"),
        ("HEAD", "HEAD~1", "vllm-torch {2} and {1} are both bad: there is no change between them to search for"),
        ("HEAD~2", "unrelated", "{0} and {3} share no history in {clone}"),
    ],
)
def test_bad_commits_are_one_line(kernelfuzz, failure, clone, good, bad, message):
    commits = clone.commit("good", "bad", "bad")
    clone.git("checkout", "--quiet", "--orphan", "unrelated")
    commits += clone.commit("bad")
    clone.git("checkout", "--quiet", "main")
    outcome = kernelfuzz("bisect", failure, "--git", clone.path, "--good", good, "--bad", bad)
    assert (outcome.status, outcome.err) == (2, f"error: {message.format(*commits, clone=clone.path)}\n")


def test_a_folder_that_is_no_clone_is_one_line(kernelfuzz, failure, tmp_path):
    outcome = kernelfuzz("bisect", failure, "--git", tmp_path, "--good", "a", "--bad", "b")
    assert outcome.status == 2
    assert outcome.err.startswith(f"error: git worktree in {tmp_path}: not a git repository")
