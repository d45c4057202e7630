"""The page of a night: one HTML file that needs no network."""

import base64
import hashlib
import json
import shlex
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from kernelfuzz.fuzz.report import charts
from kernelfuzz.fuzz.report.coverage import JobCoverage, job_coverage
from kernelfuzz.fuzz.report.view import FAILING, STATUSES, FailureView, View
from kernelfuzz.fuzz.store.queries import JobStatistics, Run

MOST_PICTURE_BYTES = 1_500_000
"""Of pictures in a page, as they stand in it; later ones are left out."""

MOST_TEXT = 12_000
"""Characters of a text or a script in a page."""

PHASES = ("inputs", "oracle", "kernel", "check", "compiling")
"""Where time goes, in the order of the bars."""


@dataclass(frozen=True)
class JobView:
    """A job as the page shows it; `number` tells it from the others."""

    number: int
    job: JobStatistics
    failures: int
    coverage: JobCoverage

    @property
    def name(self) -> str:
        """Target, kernel and device."""
        return f"{self.job.target} on {self.job.kernel} ({self.job.device})"

    @property
    def rate(self) -> float:
        """Cases for each second of a lane."""
        seconds = self.job.document["seconds"]
        return float(self.job.document["cases"] / seconds) if seconds else 0.0

    @property
    def phases(self) -> dict[str, float]:
        """Seconds by phase, the known ones first."""
        spent = self.job.document["spent"]
        return {name: spent[name] for name in (*PHASES, *sorted(spent.keys() - set(PHASES))) if name in spent}

    def growth(self, column: int) -> list[tuple[float, float]]:
        """Return a column of the growth over time: 1 for cases, 2 for regimes, 3 for the worst err/bound."""
        return [(point[0], point[column]) for point in self.job.document["growth"]]


def page(view: View) -> str:
    """Return the page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kernelfuzz.fuzz", "report"),
        autoescape=True,
        finalize=_visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data"] = _data
    folder = resources.files("kernelfuzz.fuzz") / "report"
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    jobs = [
        JobView(
            number,
            job,
            sum((each.sighting.kernel, each.failure.target) == (job.kernel, job.target) for each in view.failures),
            job_coverage(job.document["coverage"]),
        )
        for number, job in enumerate(view.jobs)
    ]
    ends = [point[0] for job in view.jobs for point in job.document["growth"]]
    return environment.get_template("page.html").render(
        view=view,
        jobs=jobs,
        end=max([1.0, *ends]),
        charts=charts,
        statuses=STATUSES,
        failing=FAILING,
        pictures=_pictures(view.failures),
        duration=_duration,
        command=lambda each: shlex.join(["kernelfuzz", "replay", str(each.folder)]),
        cut=_cut,
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {_digest(script)}",
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _visible(value: Any) -> Any:
    """Return a text without characters that cannot be seen, or that turn the text around them: what kernels say may
    hold any."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in value)


def _digest(script: str) -> str:
    """Return what a content security policy calls a script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _data(content: Any) -> Markup:
    """Return JSON for a script element, in which nothing can end that."""
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=True)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _pictures(failures: list[FailureView]) -> set[str]:
    """Return the failures whose pictures fit into a page."""
    chosen, size = set(), 0
    for each in failures:
        size += len(each.picture)
        if each.picture and size <= MOST_PICTURE_BYTES:
            chosen.add(each.failure.fingerprint)
    return chosen


def _cut(text: str) -> str:
    """Return a text as long as a page bears it."""
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}\n… {len(text) - MOST_TEXT:,} characters more"


def _duration(run: Run) -> str:
    """Return how long a run took, as far as that is known."""
    if not run.finished:
        return ""
    seconds = datetime.fromisoformat(run.finished) - datetime.fromisoformat(run.started)
    return charts.clock(seconds.total_seconds())
