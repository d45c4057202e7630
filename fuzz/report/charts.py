"""Charts as inline SVG, in the page's colours. Every text in them is escaped."""

import math
from collections.abc import Iterator, Mapping, Sequence

from markupsafe import Markup, escape

from kernelfuzz.fuzz.nightly.statistics import RATIO_BINS, RATIO_EDGES
from kernelfuzz.fuzz.report.view import visible

Point = tuple[float, float]

_WIDTH, _HEIGHT = 300, 92
_LEFT, _BOTTOM, _TOP = 44, 16, 8


def _svg(width: float, height: float, label: str, parts: Iterator[str], attributes: str = "") -> Markup:
    """Return a chart that fills the width it is given."""
    return Markup(
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(visible(label))}"{attributes}>'
        f"{''.join(parts)}</svg>"
    )


def short(number: float) -> str:
    """Return a number for an axis: 950, 1.2k, 3.4M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def clock(seconds: float) -> str:
    """Return a duration in its own unit."""
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s"


def curve(points: Sequence[Point], end: float, label: str) -> Markup:
    """Return how a number that never falls grew, from the start to `end` seconds."""

    def parts() -> Iterator[str]:
        top = max((value for _, value in points), default=0.0) or 1.0
        right, floor = _WIDTH - 6, _HEIGHT - _BOTTOM

        def at(second: float, value: float) -> str:
            return f"{_LEFT + (right - _LEFT) * second / end:.1f} {floor - (floor - _TOP) * value / top:.1f}"

        yield f'<path class="axis" d="M{_LEFT} {_TOP}V{floor}H{right}"/>'
        yield f'<text class="tick" x="{_LEFT - 4}" y="{_TOP + 4}" text-anchor="end">{short(top)}</text>'
        yield f'<text class="tick" x="{_LEFT - 4}" y="{floor}" text-anchor="end">0</text>'
        yield f'<text class="tick" x="{right}" y="{_HEIGHT - 3}" text-anchor="end">{clock(end)}</text>'
        if points:
            line = "L".join(at(second, value) for second, value in points)
            first, last = points[0][0], points[-1][0]
            yield f'<path class="area" d="M{at(first, 0)}L{line}L{at(last, 0)}Z"/><path class="line" d="M{line}"/>'

    return _svg(_WIDTH, _HEIGHT, label, parts())


def histogram(counts: Sequence[int], label: str) -> Markup:
    """Return how often err/bound fell into each bin of RATIO_EDGES, counts on a logarithmic scale, with a line at 1;
    what lies above it has a colour of its own."""
    most = max(counts, default=0)
    width, height, step = 220.0, 56.0, 220.0 / len(counts)
    floor = height - 12

    def parts() -> Iterator[str]:
        for index, count in enumerate(counts):
            tall = (floor - 4) * math.log1p(count) / math.log1p(most) if most else 0.0
            lower = RATIO_EDGES[index - 1] if index else 0.0
            upper = f"{RATIO_EDGES[index]:g}" if index < len(RATIO_EDGES) else "∞"
            kind = "above" if index >= RATIO_BINS else "bar"
            if count:
                yield (
                    f'<rect class="{kind}" x="{index * step + 0.5:.1f}" y="{floor - max(tall, 1.5):.1f}"'
                    f' width="{step - 1:.1f}" height="{max(tall, 1.5):.1f}">'
                    f"<title>{lower:g} to {upper}: {count:,} cases</title></rect>"
                )
        one = RATIO_BINS * step
        yield f'<path class="axis" d="M0 {floor}H{width}"/><path class="bound" d="M{one:.1f} 0V{floor + 4}"/>'
        yield f'<text class="tick" x="0" y="{height - 1}">0</text>'
        yield f'<text class="tick" x="{one:.1f}" y="{height - 1}" text-anchor="middle">1</text>'

    return _svg(width, height, label, parts())


def parts_of(shares: Mapping[str, float], label: str) -> Markup:
    """Return a bar of the parts of a whole, each with a class of its own, in their order. It may be stretched."""
    total = sum(shares.values()) or 1.0

    def parts() -> Iterator[str]:
        x = 0.0
        for name, value in shares.items():
            wide = 600 * value / total
            said = f"{name}: {clock(value)}, {100 * value / total:.0f} %"
            yield f'<rect class="phase-{escape(name)}" x="{x:.1f}" y="0" width="{wide:.1f}" height="18">'
            yield f"<title>{escape(said)}</title></rect>"
            x += wide

    return _svg(600, 18, label, parts(), ' preserveAspectRatio="none"')


def columns(values: Sequence[tuple[str, float]], label: str) -> Markup:
    """Return a column for each named value."""
    step = min(36.0, 640.0 / max(1, len(values)))
    width, floor = max(step * len(values), 120.0) + _LEFT, 104.0
    most = max((value for _, value in values), default=0.0) or 1.0

    def parts() -> Iterator[str]:
        yield f'<text class="tick" x="{_LEFT - 4}" y="14" text-anchor="end">{short(most)}</text>'
        yield f'<path class="axis" d="M{_LEFT} 8V{floor}H{width:.0f}"/>'
        for index, (name, value) in enumerate(values):
            tall, x = (floor - 10) * value / most, _LEFT + index * step
            box = f'x="{x + 2:.1f}" y="{floor - tall:.1f}" width="{step - 4:.1f}" height="{tall:.1f}"'
            yield f'<rect class="bar" {box}><title>{escape(name)}: {value:,.0f}</title></rect>'
            if step >= 18 or index % 5 == 0:
                place = f'x="{x + step / 2:.1f}" y="{floor + 13}" text-anchor="middle"'
                yield f'<text class="tick" {place}>{escape(name)}</text>'

    return _svg(width, floor + 18, label, parts(), f' style="max-width: {width:.0f}px"')
