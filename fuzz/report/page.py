"""The page of a night: one HTML file that needs no network."""

import base64
import functools
import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from kernelfuzz.fuzz.report import charts
from kernelfuzz.fuzz.report.coverage import JobCoverage, job_coverage
from kernelfuzz.fuzz.report.view import FAILING, STATUSES, FailureView, View, visible
from kernelfuzz.fuzz.store.queries import JobStatistics, Run
from kernelfuzz.fuzz.store.store import Status

MOST_BYTES = 2_900_000
"""Of a page. Pictures get what the rest leaves; later ones are left out."""

MOST_TEXT = 12_000
"""Characters of a text in a page."""

MOST_TEXTS = 900_000
"""Characters of all failures' scripts and texts for issues; where there are more, each gets an equal part."""

MOST_CARDS = 100
"""Failures that are shown in full."""

MOST_COLUMNS = 14
"""Runs over which failures are followed."""

MOST_MAPS = 12
"""Jobs whose pairs of values are shown."""

MOST_NAMED = 72
"""Untried pairs that a cell names, over the number of jobs."""

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
    def ratios(self) -> dict[str, list[int]]:
        """The histograms of err/bound, that of all cases first."""
        found = self.job.document["ratios"]
        return {name: found[name] for name in sorted(found, key=lambda name: (name != "all", name))}

    @property
    def phases(self) -> dict[str, float]:
        """Seconds by phase, the known ones first."""
        spent = self.job.document["spent"]
        return {name: spent[name] for name in (*PHASES, *sorted(spent.keys() - set(PHASES))) if name in spent}

    def growth(self, column: int) -> list[tuple[float, float]]:
        """Return a column of the growth over time: 1 for cases, 2 for regimes, 3 for the worst err/bound."""
        return [(point[0], point[column]) for point in self.job.document["growth"]]


def page(view: View) -> str:
    """Return the page. Where everything would be too much, texts are cut and pictures are left out, and it says so."""
    shown = view.failures[:MOST_CARDS]
    texts = sum(min(MOST_TEXT, len(text)) for each in shown for text in (each.script, each.text))
    most_text = MOST_TEXT if texts <= MOST_TEXTS else MOST_TEXTS // (2 * len(shown))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kernelfuzz.fuzz", "report"),
        autoescape=True,
        finalize=lambda value: _shown(value, most_text),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data"] = _data
    folder = resources.files("kernelfuzz.fuzz") / "report"
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    ends = [point[0] for job in view.jobs for point in job.document["growth"]]
    render = functools.partial(
        environment.get_template("page.html").render,
        view=view,
        shown=shown,
        jobs=_jobs(view),
        end=max([1.0, *ends]),
        broken=sum(bool(job.document["error"] or job.document["errors"]) for job in view.jobs),
        timelines=_timelines(view),
        shares=_shares,
        charts=charts,
        statuses=STATUSES,
        failing=FAILING,
        duration=_duration,
        command=lambda each: shlex.join(["kernelfuzz", "replay", str(each.folder)]),
        most_text=most_text,
        most_maps=MOST_MAPS,
        most_columns=MOST_COLUMNS,
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {_digest(script)}",
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )
    without = render(pictures=())
    pictures = _pictures(shown, MOST_BYTES - len(without.encode()))
    return render(pictures=pictures) if pictures else without


def _jobs(view: View) -> list[JobView]:
    found = Counter((each.failure.target, each.sighting.kernel, each.sighting.device) for each in view.failures)
    most_named = max(2, MOST_NAMED // max(1, len(view.jobs)))
    return [
        JobView(
            number,
            job,
            found[job.target, job.kernel, job.device],
            job_coverage(job.document["coverage"], most_named),
        )
        for number, job in enumerate(view.jobs)
    ]


def _shown(value: Any, most: int) -> Any:
    """Return a text as the page shows it: what can be seen of it, at `most` so many characters."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    more = f"\n… {len(value) - most:,} characters more" if len(value) > most else ""
    return visible(value[:most]) + more


def _timelines(view: View) -> dict[str, Mapping[int, Status]]:
    """Return the timelines to show: of this run's failures, and of those that the last runs before it saw."""
    recent = {night.run.id for night in view.nights[:MOST_COLUMNS]}
    names = [each.failure.fingerprint for each in view.failures]
    names += [name for name, timeline in view.timelines.items() if recent & timeline.keys()]
    return {name: view.timelines[name] for name in list(dict.fromkeys(names))[: 2 * MOST_CARDS]}


def _shares(phases: Mapping[str, float]) -> str:
    """Return the parts of a whole in words."""
    total = sum(phases.values()) or 1.0
    return ", ".join(f"{name} {100 * seconds / total:.0f} %" for name, seconds in phases.items())


def _digest(script: str) -> str:
    """Return what a content security policy calls a script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _data(content: Any) -> Markup:
    """Return JSON for a script element, in which nothing can end that."""
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=True)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _pictures(failures: list[FailureView], room: int) -> set[str]:
    """Return the failures whose pictures fit into so many bytes, the first before the others."""
    chosen = set()
    for each in failures:
        if each.picture and len(each.picture) <= room:
            chosen.add(each.failure.fingerprint)
            room -= len(each.picture) + 200  # its element
    return chosen


def _duration(run: Run) -> str:
    """Return how long a run took, as far as that is known."""
    if not run.finished:
        return ""
    seconds = datetime.fromisoformat(run.finished) - datetime.fromisoformat(run.started)
    return charts.clock(seconds.total_seconds())
