"""The search over the commits of a clone: git's own bisection, in a temporary worktree."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from kernelfuzz.fuzz.bisect import Trials
from kernelfuzz.strategies.errors import KernelfuzzError

_OLD, _NEW = "before", "after"
"""What git calls the two sides: good and bad would be wrong where a mended bug is looked for."""

_ONLY_SKIPPED_LEFT = 2
"""The exit status of a `git bisect` that has no commit left to choose."""

_OF_ANOTHER_CLONE = ("GIT_DIR", "GIT_COMMON_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
"""What git tells its hooks and aliases, and what would have git work on their clone whatever folder it is run in."""


@dataclass(frozen=True)
class Change:
    """Where the outcome changes: `commits` are those that may have made the change, the newest first; one unless some
    of them cannot run here. `into` is what the outcome changes into, good or bad."""

    commits: tuple[str, ...]
    into: str


class Worktree:
    """A worktree of a clone, whose checkout, hooks and bisection are left alone. Commits are named by their hashes."""

    def __init__(self, clone: Path, folder: Path) -> None:
        self._clone = clone
        self._folder = folder

    def check_out(self, commit: str) -> str:
        """Have the worktree hold a commit and nothing else; return its path. Raises KernelfuzzError if git cannot."""
        self.git("checkout", "--quiet", "--force", "--detach", commit)
        # Bytecode of the commit before would be taken for that of a file with the same size and second.
        self.git("clean", "--quiet", "-ffdx")
        return str(self._folder)

    def resolve(self, revision: str) -> str:
        """Return the hash of a commit. Raises KernelfuzzError if there is none of that name."""
        try:
            return _git(self._clone, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
        except KernelfuzzError:
            raise KernelfuzzError(f"{self._clone} has no commit {revision!r}") from None

    def subject(self, commit: str) -> str:
        """Return the first line of a commit's message."""
        return self.git("log", "-1", "--format=%s", commit)

    def merge_base(self, one: str, other: str) -> str:
        """Return where the histories of two commits part. Raises KernelfuzzError if they share none."""
        try:
            return self.git("merge-base", one, other)
        except KernelfuzzError:
            raise KernelfuzzError(f"{one} and {other} share no history in {self._clone}") from None

    def git(self, *arguments: str, allowed: tuple[int, ...] = (0,)) -> str:
        """Run git in the worktree and return what it prints. Raises KernelfuzzError, with git's reason, for an exit
        status that is not `allowed`."""
        return _git(self._folder, *arguments, allowed=allowed)


@contextmanager
def worktree(clone: Path) -> Iterator[Worktree]:
    """Give a temporary worktree of a clone, which is removed afterwards with all that git has noted of it.

    Raises KernelfuzzError if `clone` is no clone or git is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="kernelfuzz-bisect-") as temporary:
        folder = Path(temporary) / Path(temporary).name  # git keeps notes under the last part of the name
        try:
            _git(clone, "worktree", "add", "--quiet", "--detach", "--no-checkout", str(folder))
            yield Worktree(clone, folder)
        finally:
            with suppress(KernelfuzzError):  # git did not get as far as adding it
                _git(clone, "worktree", "remove", "--force", str(folder))


def bisect_commits(tree: Worktree, good: str, bad: str, trials: Trials) -> Change:
    """Search the commits between `good` and `bad`, hashes of which either may be the older one, for the change.

    Where neither descends from the other, it is looked for between where they part and the one that differs from there.
    Raises KernelfuzzError if one of these cannot run here, the two are not what they are called, or they share no
    history.
    """
    base = tree.merge_base(good, bad)
    trials.require_change(good, bad)
    if trials.outcomes[good].state == "bad":
        raise KernelfuzzError(f"--good {good} shows the failure and --bad {bad} does not: exchange them")
    old_state = trials.require(base).state
    new, new_state = (bad, "bad") if old_state == "good" else (good, "good")
    terms = {old_state: _OLD, new_state: _NEW, "cannot run": "skip"}
    tree.git("bisect", "start", "--no-checkout", f"--term-old={_OLD}", f"--term-new={_NEW}", new, base)
    while True:
        left = tree.git("rev-list", f"refs/bisect/{_NEW}", "--not", f"--glob=refs/bisect/{_OLD}-*").split()
        if all(_cannot_run(trials, commit) for commit in left[1:]):
            return Change(tuple(left), new_state)
        commit = tree.git("rev-parse", "BISECT_HEAD")
        tree.git("bisect", terms[trials(commit).state], commit, allowed=(0, _ONLY_SKIPPED_LEFT))


def _cannot_run(trials: Trials, commit: str) -> bool:
    return commit in trials.outcomes and trials.outcomes[commit].state == "cannot run"


def _git(folder: Path, *arguments: str, allowed: tuple[int, ...] = (0,)) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in _OF_ANOTHER_CLONE}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "-c", f"core.hooksPath={os.devnull}", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
        )
    except FileNotFoundError as error:
        raise KernelfuzzError("--git needs git, which is not installed") from error
    if done.returncode not in allowed:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise KernelfuzzError(f"git {arguments[0]} in {folder}: {reason.removeprefix('fatal: ')}")
    return done.stdout.strip()
