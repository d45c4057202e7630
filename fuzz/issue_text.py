"""What a failure folder's README.md says: text that is ready to be pasted into an issue tracker."""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from kernelfuzz.fuzz import picture
from kernelfuzz.fuzz.events import FailureFound
from kernelfuzz.fuzz.readable import case_lines, element_lines

_WHAT = {
    "crash": "ends the process or leaves the device unusable",
    "hang": "does not return",
    "out_of_bounds": "reads or writes outside its tensors",
    "race": "has a data race",
    "uninitialised_read": "reads memory that nothing has written",
    "raised": "raises on a legal call",
    "not_raised": "accepts a call that it must refuse",
    "input_mutated": "writes to an input",
    "overwritten": "changes elements that it must leave alone",
    "unwritten": "leaves elements unwritten",
    "wrong_value": "computes wrong values",
}


def issue_text(found: FailureFound, document: Mapping[str, Any], why_no_script: str = "") -> str:
    """Return Markdown for a failure; `document` is the content of its failure.json. Where there is no script beside it,
    it says why."""
    return "\n".join(_lines(found, document, why_no_script)) + "\n"


def _lines(found: FailureFound, document: Mapping[str, Any], why_no_script: str) -> Iterator[str]:
    failure, job = found.failure, found.job
    yield f"# {job.kernel.package}: {job.target.name} {_WHAT[failure.kind]}"
    yield ""
    yield _sentence(failure.message)
    yield ""
    yield from _code([line.plain.strip() for line in element_lines(failure.elements)])
    if failure.output_tail.strip():
        yield "The process said last:"
        yield ""
        yield from _code(failure.output_tail.strip().splitlines()[-12:])
    for symptom in found.symptoms:
        yield f"The same case shows: {_sentence(symptom.message)}"
        yield ""
    if found.maps and picture.is_available():
        yield "![What the kernel wrote](writemap.png)"
        yield ""
    yield "## How to see it"
    yield ""
    yield from _how(document, why_no_script)
    yield ""
    yield _reliability(found)
    yield ""
    yield "## The smallest case found" if found.shrunk else "## The case as it was found; it could not be shrunk"
    yield ""
    arguments = [f"{name}={value!r}" for name, value in found.arguments.items()]
    yield from _code([line.plain.strip() for line in case_lines(found.case)] + arguments)
    yield "## Where it was found"
    yield ""
    rows = {
        "kernel": f"{job.kernel} ({document['version']})" if document["version"] else str(job.kernel),
        "device": document["device"],
        "contract clause": failure.clause,
        "fingerprint": found.fingerprint,
        "first seen": _first_seen(found, document),
        "sanitizer": document["sanitizer"] or "",
        **document["environment"],
    }
    yield "| | |"
    yield "|---|---|"
    for name, value in rows.items():
        if value:
            yield f"| {name} | {str(value).replace('|', chr(92) + '|')} |"


def _how(document: Mapping[str, Any], why_no_script: str) -> Iterator[str]:
    """Say how the failure is seen again."""
    command = "`kernelfuzz replay .` in this folder"
    if document["test"] is not None:
        name = document["test"]["id"].partition("[")[0]
        command = f"`{shlex.join(['pytest', name])} --fuzz-replay=THIS_FOLDER`"
    if why_no_script:
        yield f"{command}. There is no script: {why_no_script}."
        return
    yield "`python repro.py` needs torch and the kernel's package. It exits with 1 while the bug is there, with 0"
    yield f"when it is fixed. With kernelfuzz: {command}."


def _first_seen(found: FailureFound, document: Mapping[str, Any]) -> str:
    seed = "" if document["seed"] is None else f" with seed {document['seed']}"
    return f"{document['first_seen']}, example {found.examples:,}{seed}"


def _reliability(found: FailureFound) -> str:
    if not found.shrunk and found.runs == 1:
        return "There was no time to run the case again."
    if found.failed_runs == found.runs:
        return f"The case failed each time it was run again ({found.runs} of {found.runs})."
    if found.failed_runs:
        return f"**Unreliable:** the case failed in {found.failed_runs} of {found.runs} runs."
    return f"**Not seen again:** the case passed in {found.runs} runs of it alone."


def _sentence(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def _code(lines: list[str]) -> Iterator[str]:
    """Return the lines as a block of code; nothing for none."""
    if lines:
        yield "```text"
        yield from lines
        yield "```"
        yield ""
