"""A night as JUnit XML: what fails a night is a failure there, and nothing else is."""

import xml.etree.ElementTree as ET
from collections.abc import Iterator

from kernelfuzz.fuzz.report.view import FAILING, FailureView, View, visible
from kernelfuzz.fuzz.store.queries import JobStatistics


def junit(view: View) -> str:
    """Return the document: a suite for each job with a test case for the job and one for each of its failures, those
    that are known or listed as skipped; a suite for stored failures that were not seen, one for historical bugs."""
    root = ET.Element("testsuites", name="kernelfuzz nightly")
    shown: set[str] = set()
    for job in view.jobs:
        name = f"{job.target} on {job.kernel} ({job.device})"
        cases = [_job(name, job)]
        for each in view.failures:
            where = each.failure.target, each.sighting.kernel, each.sighting.device
            if where == (job.target, job.kernel, job.device):
                shown.add(each.failure.fingerprint)
                cases.append(_failure(name, each))
        _suite(root, name, cases, job.document["seconds"])
    rest = [_failure("stored failures", each) for each in view.failures if each.failure.fingerprint not in shown]
    _suite(root, "stored failures", rest)
    _suite(root, "historical bugs", list(_regressions(view)))
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _suite(root: ET.Element, name: str, cases: list[ET.Element], seconds: float = 0.0) -> None:
    if not cases:
        return
    suite = ET.SubElement(root, "testsuite", name=visible(name), tests=str(len(cases)), time=f"{seconds:.3f}")
    for tag, attribute in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        suite.set(attribute, str(sum(case.find(tag) is not None for case in cases)))
    suite.extend(cases)


def _case(suite: str, name: str) -> ET.Element:
    return ET.Element("testcase", classname=visible(suite), name=visible(name))


def _job(name: str, job: JobStatistics) -> ET.Element:
    case = _case(name, "every example was judged")
    problems = [job.document["error"], *job.document["errors"]]
    if any(problems):
        ET.SubElement(case, "error", message=visible(next(filter(None, problems))))
    return case


def _failure(suite: str, each: FailureView) -> ET.Element:
    case = _case(suite, each.failure.fingerprint)
    status = each.sighting.status
    if status in FAILING:
        failure = ET.SubElement(case, "failure", type=visible(str(each.document.get("kind", ""))))
        failure.set("message", visible(f"{status}: {each.message}"))
        failure.text = visible("\n".join([each.message, *each.elements, "smallest case:", *each.case]))
    elif status != "fixed":
        reason = each.sighting.note or each.message
        ET.SubElement(case, "skipped", message=visible(f"{status}: {reason}"))
    return case


def _regressions(view: View) -> Iterator[ET.Element]:
    for each in view.regressions:
        case = _case("historical bugs", f"{each.pull_request} {each.title}")
        if each.outcome == "FAIL":
            ET.SubElement(case, "failure", message=visible(each.problem))
        elif each.outcome != "PASS":
            ET.SubElement(case, "skipped", message=visible(each.problem))
        yield case
