"""The pytest plugin, run as a user runs it: pytest in a folder with `kernel_tests.py`, in a process of its own."""

import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

import pytest

from kernelfuzz.fuzz import kernel_test, profiles
from kernelfuzz.strategies.errors import KernelfuzzError

TESTS = Path(__file__).with_name("kernel_tests.py")
TAIL = "test_mine.py::test_forgets_the_tail"


class Run(NamedTuple):
    """What pytest left: its exit status, what it printed, and its JUnit file."""

    status: int
    text: str
    junit: ElementTree.Element

    def outcome(self, name: str) -> str:
        """Return what became of the test of that name, with its brackets."""
        (case,) = [each for each in self.junit.iter("testcase") if each.get("name") == name]
        children = {each.tag for each in case} - {"properties", "system-out", "system-err"}
        return children.pop() if children else "passed"

    def properties(self, name: str) -> dict[str, str]:
        """Return the properties of a test in the JUnit file."""
        (case,) = [each for each in self.junit.iter("testcase") if each.get("name") == name]
        return {str(each.get("name")): str(each.get("value")) for each in case.iter("property")}

    def report(self, name: str) -> str:
        """Return what was printed of a test that failed."""
        _, _, rest = self.text.partition(f" {name} ___")
        report = re.split(r"^(?:____|====|- generated)", rest.partition("\n")[2], flags=re.MULTILINE)[0]
        return "\n".join(line for line in report.splitlines() if not line.startswith("[gw"))  # xdist's own


def run_pytest(folder: Path, *arguments: object, **environment: str) -> Run:
    """Run pytest in a folder."""
    junit = folder / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={junit}", *map(str, arguments)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command, cwd=folder, env={**inherited, **environment}, capture_output=True, text=True, check=False
    )
    root = ElementTree.parse(junit).getroot() if junit.exists() else ElementTree.Element("none")
    return Run(done.returncode, done.stdout + done.stderr, root)


def project(folder: Path) -> Path:
    """Make a folder with the kernel tests."""
    (folder / "test_mine.py").write_text(TESTS.read_text())
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return project(tmp_path_factory.mktemp("plugin"))


@pytest.fixture(scope="module")
def everything(folder):
    """All kernel tests, by two processes."""
    return run_pytest(folder, "-n", 2, "-rs")


@pytest.mark.parametrize(
    "name",
    [
        "test_right",
        "test_of_a_target",
        "test_of_a_target_with_fewer_cases",
        "test_method",
        "test_adds_to_what_is_there",
        "test_masks_and_integers",
        "test_layouts_and_indices",
        "test_some_cases_are_not_offered",
        "test_of_an_oracle_that_changes_its_inputs",
    ],
)
def test_right_kernels_pass(everything, name):
    assert everything.outcome(f"{name}[cpu]") == "passed"
    numbers = json.loads(everything.properties(f"{name}[cpu]")["kernelfuzz"])
    assert numbers["examples"] >= 15
    assert numbers["regimes"]


def test_fixtures_parameters_examples_and_drawn_arguments_go_together(everything):
    outcomes = [everything.outcome(f"test_with_more_arguments[cpu-{block}]") for block in (1, 3)]
    assert outcomes == ["passed", "passed"]


def test_a_kernel_that_is_not_for_this_device_is_skipped_with_the_reason(everything):
    assert everything.outcome("test_for_another_device[cuda]") == "skipped"
    assert re.search(r"SKIPPED.*test_mine.py: cuda: no cuda device here", everything.text)


def test_a_kernel_that_offers_no_case_is_skipped_with_the_reason(everything):
    assert everything.outcome("test_offers_nothing[cpu]") == "skipped"
    assert re.search(r"SKIPPED.*the kernel offers none of the cases: not written yet", everything.text)


@pytest.mark.parametrize(
    ("name", "fingerprint", "lines"),
    [
        (
            "test_forgets_the_tail",
            "unwritten.output.value",
            [
                r"1 of 9 elements of output never written",
                r"\[0, 8\] expected 1.0",
                r"x=float16\[1, 9\] ones",
                r"times=1",
            ],
        ),
        ("test_rounds_too_early", "wrong_value.output.value", [r"\(err/bound \d+", r"x=float32\[1, 1\]"]),
        ("test_writes_to_its_input", "input_mutated.x.inputs_are_not_written", [r"x=float16\[2, 1\] ones"]),
        ("test_ends_its_process", "crash.SIGSEGV", [r"the worker died: SIGSEGV", r"x=float16\[3, 1\] ones"]),
        ("test_fails_by_itself", "raised.AssertionError_in_", ["never mind"]),
        (
            "test_puts_another_tensor_in_place",
            "raised.AttributeError_in_test_puts_another_tensor_in_place",
            [r"an output is written in place: outputs.output.copy_"],
        ),
        ("test_has_two_bugs", "raised.ValueError_in_test_has_two_bugs", [r"two rows", r"x=float16\[2, 1\] ones"]),
        ("test_has_two_bugs", "raised.IndexError_in_test_has_two_bugs", [r"three rows", r"x=float16\[3, 1\] ones"]),
    ],
)
def test_a_failure_is_small_and_says_where_its_files_are(everything, folder, name, fingerprint, lines):
    assert everything.outcome(f"{name}[cpu]") == "failure"
    report = everything.report(f"{name}[cpu]")
    for line in (f"own.{name}.{fingerprint}", *lines):
        assert re.search(line, report), report
    failures = folder / "kernelfuzz-out" / f"test_mine.py-{name}-cpu" / "failures"
    (saved,) = failures.glob(f"own.{name}.{fingerprint}*")
    assert f"reproducer:   {saved.relative_to(folder)}/repro.py" in report
    assert {"failure.json", "case.json", "README.md", "repro.py"} <= {each.name for each in saved.iterdir()}
    assert (f"writemap:     {saved.relative_to(folder)}/writemap.png" in report) == ("crash" not in fingerprint)
    assert f"--fuzz-replay={saved.relative_to(folder)}" in report
    assert len(report.splitlines()) < 25, "pages of it"
    assert "Traceback" not in report
    assert "hypothesis" not in report.lower()


def test_a_junit_file_names_fingerprint_and_files(everything):
    properties = everything.properties("test_forgets_the_tail[cpu]")
    assert properties["fingerprint"] == "own.test_forgets_the_tail.unwritten.output.value"
    assert properties["reproducer"].endswith("/repro.py")
    assert properties["writemap"].endswith("/writemap.png")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("test_has_no_bound", ".*the oracle's output has no bound: compute it with"),
        ("test_has_a_wrong_oracle", r"fails raised AttributeError: .*missing.* \(test_mine.py:\d+\)"),
        ("test_with_what_cannot_be_sent", "lock: cannot be sent to a worker process .*add --fuzz-isolate=no"),
    ],
)
def test_what_is_no_fault_of_the_kernel_is_one_line(everything, name, text):
    assert everything.outcome(f"{name}[cpu]") == "failure"
    (line,) = everything.report(f"{name}[cpu]").strip().splitlines()
    assert re.match(f"error: .*{text}", line)


def test_the_summary_says_how_much_was_tried(everything):
    section = everything.text.partition("= kernel tests =")[2]
    assert re.search(r"examples +cases +err/bound +regimes reached", section)
    assert re.search(r"test_mine.py::test_right\[cpu\] +\d+ +\d+ +[01]\.\d{3} +\w+", section)
    assert re.search(r"test_mine.py::TestOfAClass::test_method\[cpu\] +\d+", section)


def test_a_reproducer_fails_and_says_what_was_expected(everything, folder):
    (script,) = (folder / "kernelfuzz-out").glob("*forgets_the_tail*/failures/*/repro.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "output[0, 8]: expected 1.0, got -1000.0" in done.stdout


@pytest.fixture(scope="module")
def mended(everything, folder, tmp_path_factory):
    """A folder in which the tail is not forgotten any more; the failures are those that were found before."""
    del everything
    again = tmp_path_factory.mktemp("mended")
    text = TESTS.read_text()
    assert "columns if columns < 8 else columns - columns % 8" in text
    (again / "test_mine.py").write_text(text.replace("columns if columns < 8 else columns - columns % 8", "columns"))
    (again / "saved").symlink_to(folder / "kernelfuzz-out")
    return again


@pytest.fixture(scope="module")
def replayed(mended, tmp_path_factory):
    """The saved failures, run again where one is mended, with a folder that cannot be read among them."""
    saved = tmp_path_factory.mktemp("broken")
    (saved / "broken").mkdir()
    (saved / "broken" / "failure.json").write_text('{"schema": 99}')
    shutil.copytree(mended / "saved", saved / "saved")
    return run_pytest(mended, "--fuzz-replay", saved, "-n", 2)


def test_saved_cases_are_tests_of_their_own(replayed):
    tail = "test_forgets_the_tail[own.test_forgets_the_tail.unwritten.output.value]"
    early = "test_rounds_too_early[own.test_rounds_too_early.wrong_value.output.value]"
    assert (replayed.outcome(tail), replayed.outcome(early)) == ("passed", "failure")
    assert "the saved case on cpu:" in replayed.report(early)
    assert not [each for each in replayed.junit.iter("testcase") if "test_right" in str(each.get("name"))]


def test_a_saved_case_that_cannot_be_read_fails_in_one_line(replayed):
    assert re.search(r"error: .*failure.json has schema 99, this kernelfuzz reads schema \d", replayed.text)


def test_a_replay_leaves_no_new_files(replayed, mended):
    assert replayed.status == 1
    assert not (mended / "kernelfuzz-out").exists()


def test_what_was_replayed_is_not_said_to_be_missing(replayed):
    assert "was not collected" not in replayed.text


def test_what_cannot_be_saved_is_said(folder):
    (folder / "a_file").touch()
    run = run_pytest(folder, "--fuzz-out", "a_file", "-k", "rounds_too_early")
    report = run.report("test_rounds_too_early[cpu]")
    assert "error: cannot write a_file" in report
    assert "--fuzz-replay" not in report


def test_what_was_not_replayed_is_named(mended):
    run = run_pytest(mended, "test_mine.py::test_right", "--fuzz-replay", "saved")
    assert run.status == 5
    assert re.search(r"forgets_the_tail.*test_mine.py::test_forgets_the_tail was not collected", run.text)


def test_kernelfuzz_replay_names_the_command(everything, folder, kernelfuzz):
    (saved,) = (folder / "kernelfuzz-out").glob("*forgets_the_tail*/failures/*")
    outcome = kernelfuzz("replay", saved)
    assert outcome.status == 2
    assert f"pytest {TAIL} --fuzz-replay={saved}" in outcome.out.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--kernel-device", "tpu"], "unknown device 'tpu'"),
        (["--kernel", "a b"], "malformed kernel name 'a b'"),
        (["--fuzz-time", "soon"], "--fuzz-time 'soon': expected a positive time"),
        (["--fuzz-examples", "0"], "--fuzz-examples '0': expected a number of 1 or more"),
        (["--fuzz-isolate", "perhaps"], "--fuzz-isolate 'perhaps': expected yes or no"),
        (["--fuzz-isolate", "no", "--kernel-device", "cuda"], "add --kernel-device cpu"),
        (["--fuzz-replay", "nowhere"], "--fuzz-replay nowhere: no such folder"),
        (["--kernel", "nosuch"], "--kernel nosuch: expected one of example, "),
    ],
)
def test_an_option_that_makes_no_sense_is_one_line(folder, arguments, text):
    run = run_pytest(folder, *arguments)
    assert run.status == 4
    (line,) = [line for line in run.text.splitlines() if line]
    assert line.startswith("ERROR: ")
    assert text in line


def test_options_can_stand_in_the_ini_file(folder):
    (folder / "other.ini").write_text("[pytest]\nkernel_device = cpu cuda\nfuzz_examples = 5\nfuzz_isolate = no\n")
    refused = run_pytest(folder, "-c", "other.ini", "--rootdir", folder, "test_mine.py::test_right")
    assert "add --kernel-device cpu" in refused.text
    (folder / "other.ini").write_text("[pytest]\nkernel_device = cpu cuda\nfuzz_examples = 5\n")
    run = run_pytest(folder, "-c", "other.ini", "--rootdir", folder, "test_mine.py::test_right")
    assert (run.outcome("test_right[cpu]"), run.outcome("test_right[cuda]")) == ("passed", "skipped")
    assert json.loads(run.properties("test_right[cpu]")["kernelfuzz"])["examples"] == 5


def test_without_workers_anything_can_be_an_argument(folder):
    run = run_pytest(folder, "--fuzz-isolate", "no", "-k", "cannot_be_sent or test_method")
    assert run.outcome("test_with_what_cannot_be_sent[cpu]") == "passed"
    assert run.outcome("test_method[cpu]") == "passed"


def test_another_kernel_takes_the_place_of_the_tests_own(folder):
    (folder / "others.py").write_text("def wrong(inputs, outputs):\n    outputs.output.fill_(1)\n")
    options = ("--kernel", "others:wrong", "--fuzz-examples", 10, "-k", "test_right or test_of_a_target[cpu]")
    run = run_pytest(folder, *options, PYTHONPATH=str(folder))
    assert run.outcome("test_right[cpu]") == "failure"
    assert "own.others-wrong.wrong_value.output.value" in run.report("test_right[cpu]")
    swapped = run_pytest(folder, "--kernel", "example", "-rs", "-k", "test_right or test_of_a_target_with")
    assert swapped.outcome("test_right[cpu]") == "skipped"
    assert "example does not implement own" in swapped.text
    assert swapped.outcome("test_of_a_target_with_fewer_cases[cpu]") == "passed"


def test_time_is_a_budget_for_each_test(folder):
    run = run_pytest(folder, "--fuzz-time", "2s", "-k", "test_right")
    numbers = json.loads(run.properties("test_right[cpu]")["kernelfuzz"])
    assert numbers["examples"] > 25, "what its settings say"


@pytest.mark.parametrize("distribution", ["loadscope", "worksteal"])
def test_every_distribution_of_tests_works(folder, distribution):
    run = run_pytest(folder, "-n", 2, "--dist", distribution, "--fuzz-examples", 3, "-k", "test_right or test_masks")
    assert run.status == 0, run.text
    assert run.text.count("[cpu]") >= 2


def test_verbose_output_has_all_there_is(folder):
    run = run_pytest(folder, "-vv", "-k", "forgets_the_tail")
    report = run.report("test_forgets_the_tail[cpu]")
    assert '{"schema": 1, "target": "own"' in report


def test_a_profile_is_named_by_option_or_environment(tmp_path):
    (tmp_path / "test_mine.py").write_text(re.sub(r"^ *@FEW\n", "", TESTS.read_text(), flags=re.MULTILINE))
    run = run_pytest(tmp_path, "-k", "test_right", HYPOTHESIS_PROFILE="kernelfuzz-dev")
    assert json.loads(run.properties("test_right[cpu]")["kernelfuzz"])["examples"] == 30
    run = run_pytest(tmp_path, "-k", "test_right", "--hypothesis-profile", "kernelfuzz-ci")
    assert 150 < json.loads(run.properties("test_right[cpu]")["kernelfuzz"])["examples"] <= 200
    assert set(profiles.PROFILES) == {"kernelfuzz-dev", "kernelfuzz-ci", "kernelfuzz-nightly"}


def test_a_session_without_kernel_tests_does_not_import_torch(tmp_path):
    (tmp_path / "test_other.py").write_text(
        "import sys\n\ndef test_other():\n    assert 'kernelfuzz.fuzz.pytest_plugin' in sys.modules\n"
        "    assert 'torch' not in sys.modules\n"
    )
    assert run_pytest(tmp_path).status == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "kernel_test needs a target, or cases and an oracle"),
        ({"target": "nothing"}, "unknown target 'nothing'"),
        ({"target": "bgmv", "oracle": print}, "bgmv has its own oracle"),
        ({"cases": print, "oracle": print}, "cases must be a strategy"),
        ({"target": "bgmv", "devices": ("tpu",)}, "unknown device 'tpu'"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments, text):
    with pytest.raises(KernelfuzzError, match=text):
        kernel_test(**arguments)


def test_a_function_that_takes_no_outputs_is_refused():
    def function(inputs):
        raise AssertionError(inputs)

    with pytest.raises(KernelfuzzError, match="has no argument 'outputs'"):
        kernel_test(target="bgmv")(function)
