"""A night as annotations of a GitHub workflow."""

from kernelfuzz.fuzz.report.view import FAILING, View, visible

MOST_ANNOTATIONS = 10
"""GitHub shows no more of each kind for a step."""


def annotations(view: View) -> list[str]:
    """Return the lines to print: errors for what fails the night, warnings for jobs that could not do their work,
    notices for what is fixed."""
    errors = [
        _annotation("error", f"{each.sighting.status}: {each.failure.fingerprint}", each.message)
        for each in view.of(*FAILING)
    ]
    errors += [
        _annotation("error", f"historical bug {each.pull_request}", each.problem) for each in view.lost_regressions
    ]
    warnings = [
        _annotation("warning", f"{job.target} on {job.kernel} ({job.device})", job.document["error"])
        for job in view.jobs
        if job.document["error"]
    ]
    notices = [
        _annotation("notice", f"fixed: {each.failure.fingerprint}", each.sighting.note) for each in view.of("fixed")
    ]
    return [line for lines in (errors, warnings, notices) for line in lines[:MOST_ANNOTATIONS]]


def _annotation(kind: str, title: str, message: str) -> str:
    return f"::{kind} title={_property(title)}::{_data(message)}"


def _data(text: str) -> str:
    return visible(text).replace("%", "%25").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
