"""The workflows, and the guide that belongs to them: legal files, commands that exist, artifacts whatever happens,
enough time, few permissions."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from kernelfuzz.fuzz.budget import parse_seconds
from kernelfuzz.fuzz.cli.app import app
from kernelfuzz.fuzz.nightly.config import read_config

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "docs" / "guides" / "nightly.md"
NIGHTS = [*sorted((ROOT / "docs" / "ci").glob("*.yml")), ROOT / ".github" / "workflows" / "nightly.yml"]
WORKFLOWS = [*NIGHTS, ROOT / ".github" / "workflows" / "ci.yml"]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def read(path: Path) -> dict:
    """Return a workflow; all scalars stay text, or `on` would be a truth value."""
    return yaml.load(path.read_text(), yaml.BaseLoader)


def steps(path: Path) -> list[dict]:
    return [step for job in read(path)["jobs"].values() for step in job["steps"]]


def using(path: Path, action: str) -> list[dict]:
    return [step for step in steps(path) if step.get("uses", "").startswith(f"{action}@")]


def the_night(path: Path) -> dict:
    (step,) = [step for step in steps(path) if "kernelfuzz nightly" in step.get("run", "")]
    return step


def command_lines(shell: str) -> list[list[str]]:
    """Return the words of each line that runs kernelfuzz, from `kernelfuzz` on."""
    lines = [shlex.split(line, comments=True) for line in shell.replace("\\\n", " ").splitlines()]
    lines = [words[1:] if words[:1] in (["exec"], ["$"]) else words for words in lines]
    return [["kernelfuzz", *words[1:]] for words in lines if words and Path(words[0]).name == "kernelfuzz"]


def documented(page: str) -> list[list[str]]:
    """Return the words of each command in a page's consoles, and of those in its text that have an option."""
    consoles = re.findall(r"^```console\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`(kernelfuzz [^`]* --?[^`]*)`", page)
    return [words for shell in (*consoles, *inline) for words in command_lines(shell)]


def parse(words: list[str]) -> None:
    """Have the command line read the words, and run nothing. Raises what it raises for words that it refuses."""
    command = typer.main.get_command(app)
    rest = words[1:]
    while subcommands := getattr(command, "commands", None):
        assert rest, f"{shlex.join(words)}: a command is missing"
        assert rest[0] in subcommands, f"{shlex.join(words)}: there is no command {rest[0]!r}"
        command, rest = subcommands[rest[0]], rest[1:]
    command.make_context(words[0], rest)


SHELL = [(name(path), step["run"]) for path in WORKFLOWS for step in steps(path) if "run" in step]
COMMANDS = [(where, words) for where, shell in SHELL for words in command_lines(shell)]
COMMANDS += [(name(GUIDE), words) for words in documented(GUIDE.read_text())]


def test_workflows_fit_the_schema_of_workflows():
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    done = subprocess.run([*check, *WORKFLOWS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("where", "words"), COMMANDS, ids=[f"{where} {shlex.join(words)}" for where, words in COMMANDS]
)
def test_every_command_is_one_that_kernelfuzz_has(where, words):
    parse(words)


@pytest.mark.parametrize("path", NIGHTS, ids=name)
def test_a_night_fetches_the_newest_releases_and_runs(path):
    commands = [words[1:3] for where, words in COMMANDS if where == name(path)]
    assert commands == [["releases", "fetch"], ["nightly", "--time"]]


def test_the_guide_has_all_three_commands_of_nights():
    assert {words[1] for where, words in COMMANDS if where == name(GUIDE)} >= {"nightly", "history", "report"}


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("kernelfuzz nights --time 2h", "no command 'nights'"),
        ("kernelfuzz releases get", "no command 'get'"),
        ("kernelfuzz run --hours 2", "--hours"),
        ("kernelfuzz run --seed later", "integer"),
        ("kernelfuzz releases", "missing"),
    ],
)
def test_a_command_that_kernelfuzz_has_not_is_noticed(words, complaint):
    with pytest.raises(Exception, match=complaint):
        parse(words.split())


def test_commands_are_found_in_shell_and_text():
    shell = "pip install kernelfuzz\nexec .venv/bin/kernelfuzz run \\\n  --time 1m\n"
    assert command_lines(shell) == [["kernelfuzz", "run", "--time", "1m"]]
    page = "`kernelfuzz run` or `kernelfuzz run --seed 1`\n```console\n$ kernelfuzz list\nkernelfuzz 1.0\n```\n"
    assert ["kernelfuzz", "list"] in documented(page)
    assert ["kernelfuzz", "run", "--seed", "1"] in documented(page)


def test_the_guides_configuration_is_one(tmp_path):
    blocks = re.findall(r'^```toml title="kernelfuzz.toml"\n(.*?)^```$', GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    (tmp_path / "kernelfuzz.toml").write_text(blocks[0])
    (tmp_path / "known_failures.toml").write_text("")
    assert read_config(tmp_path / "kernelfuzz.toml").devices == ("cuda", "cpu")


@pytest.mark.parametrize("path", NIGHTS, ids=name)
def test_artifacts_are_kept_whatever_the_night_ends_with(path):
    (upload,) = using(path, "actions/upload-artifact")
    assert upload["if"] == "always()"
    assert "${{ env.STORE }}" in upload["with"]["path"].splitlines()
    assert int(upload["with"]["retention-days"]) > 0
    assert steps(path).index(upload) > steps(path).index(the_night(path))


@pytest.mark.parametrize("path", [path for path in NIGHTS if using(path, "actions/cache/save")], ids=name)
def test_the_next_night_finds_the_store_also_after_a_failed_one(path):
    (restore,) = using(path, "actions/cache/restore")
    (save,) = using(path, "actions/cache/save")
    assert save["if"].startswith("always()")
    for key in ("key", "path"):
        assert save["with"][key] == restore["with"][key]
    assert restore["with"]["key"].startswith(restore["with"]["restore-keys"])
    assert "${{ github.run_id }}" in restore["with"]["key"]
    assert {"${{ env.STORE }}", "${{ env.KERNELFUZZ_HOME }}"} == set(save["with"]["path"].splitlines())
    order = [steps(path).index(step) for step in (restore, the_night(path), save)]
    assert order == sorted(order)


@pytest.mark.parametrize("path", NIGHTS, ids=name)
def test_on_a_machine_made_anew_the_store_goes_through_the_cache(path):
    (job,) = read(path)["jobs"].values()
    assert ("self-hosted" in job["runs-on"]) is not bool(using(path, "actions/cache/save"))


@pytest.mark.parametrize("path", NIGHTS, ids=name)
def test_the_longest_night_fits_into_its_step_and_its_job(path):
    night = the_night(path)
    (job,) = read(path)["jobs"].values()
    times = read(path)["on"]["workflow_dispatch"]["inputs"]["time"]
    assert times["default"] in times["options"]
    assert night["env"]["TIME"] == f"${{{{ inputs.time || '{times['default']}' }}}}"
    longest = max(parse_seconds("time", time) for time in times["options"]) / 60
    assert longest + 10 <= int(night["timeout-minutes"]) <= int(job["timeout-minutes"]) - 30


@pytest.mark.parametrize("path", NIGHTS, ids=name)
def test_a_night_gets_the_runners_signals_itself(path):
    assert the_night(path)["run"].startswith("exec ")


@pytest.mark.parametrize("path", NIGHTS, ids=name)
def test_nights_run_on_a_schedule_and_never_two_at_a_time(path):
    workflow = read(path)
    assert len(workflow["on"]["schedule"]) == 1
    assert workflow["concurrency"]["cancel-in-progress"] == "false"
    others = [read(other)["concurrency"]["group"] for other in WORKFLOWS if other != path]
    assert workflow["concurrency"]["group"] not in others


@pytest.mark.parametrize("path", WORKFLOWS, ids=name)
def test_workflows_may_read_the_repository_and_nothing_else(path):
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert all("permissions" not in job for job in workflow["jobs"].values())


def test_ci_runs_what_the_repository_calls_ci():
    assert [step["run"] for step in steps(ROOT / ".github" / "workflows" / "ci.yml") if "run" in step] == [".ci/run"]


def test_there_is_a_workflow_for_each_kind_of_runner():
    assert {path.stem for path in NIGHTS if path.parent.name == "ci"} == {"nvidia", "xpu", "cpu"}
