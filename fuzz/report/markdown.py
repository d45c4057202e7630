"""A night as a short text in Markdown, as a CI service shows it on a job's page."""

from collections.abc import Iterator, Sequence

from kernelfuzz.fuzz.report.view import View

MOST_BYTES = 900_000
"""GitHub shows no summary of more than a megabyte."""

MOST_FAILURES = 100
MOST_TEXT = 300

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;"}
"""An @ would call a user of that name."""


def summary(view: View) -> str:
    """Return the text: the verdict, the failures, the jobs, the historical bugs that were not told apart."""
    run = view.run
    lines = [
        f"## kernelfuzz, run {run.id}: {view.verdict}",
        "",
        f"{_text(run.state)}, seed {run.seed}, {sum(job.document['cases'] for job in view.jobs):,} cases",
        "",
        *_failures(view),
        *_jobs(view),
        *(f"- historical bug {_text(each.pull_request)}: {_text(each.problem)}" for each in view.lost_regressions),
        *(f"- problem: {_text(problem)}" for problem in run.problems),
    ]
    text = "\n".join(lines).rstrip() + "\n"
    return text.encode()[:MOST_BYTES].decode(errors="ignore")


def _failures(view: View) -> Iterator[str]:
    if not view.failures:
        return
    rows = [
        (
            each.sighting.status,
            _code(each.failure.fingerprint),
            _text(f"{each.sighting.kernel} {each.sighting.device}"),
            _text(each.message if not each.sighting.note else f"{each.message} ({each.sighting.note})"),
        )
        for each in view.failures[:MOST_FAILURES]
    ]
    yield from _table(("", "failure", "where", "what"), rows)
    if len(view.failures) > MOST_FAILURES:
        yield f"… and {len(view.failures) - MOST_FAILURES} more"
        yield ""


def _jobs(view: View) -> Iterator[str]:
    rows = []
    for job in view.jobs:
        found = job.document
        ratio = f"{found['worst_ratio']:.3f}" if found["worst_ratio"] else ""
        name = _text(f"{job.target} on {job.kernel} ({job.device})")
        rows.append((name, f"{found['examples']:,}", f"{found['cases']:,}", ratio, _text(found["error"])))
    yield from _table(("job", "examples", "cases", "worst err/bound", ""), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def _plain(text: str) -> str:
    """Return a text in one line, without control characters and not endless."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= MOST_TEXT else f"{line[:MOST_TEXT]}…"


def _text(text: str) -> str:
    """Return a text in which nothing is Markdown or HTML."""
    return "".join(_ENTITIES.get(c, f"\\{c}" if c in "\\`*_{}[]()#+!|~" else c) for c in _plain(text))


def _code(text: str) -> str:
    """Return a text as code, in a table."""
    return "`" + _plain(text).replace("`", "'").replace("|", "\\|") + "`"
