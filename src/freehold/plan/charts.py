"""Charts as inline SVG: stacked bars, and lines with bands on linear or logarithmic axes. Torch-free.

Each chart is one `<svg>` with a title and a description for screen readers, no script and nothing from elsewhere.
Colours are CSS classes of the page (`html.py`), chosen to be told apart without colour vision; every mark has a
tooltip with its figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 24, 16, 52
COLOURS = 8
"""Classes c0 to c7 that the page defines."""


@dataclass(frozen=True)
class Series:
    """A line through `points` (x, y), or single marks. band: (x, low, high). labels: a tooltip for each point."""

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()
    labels: Sequence[str] = ()
    dashed: bool = False
    marks: bool = True


@dataclass(frozen=True)
class Mark:
    """A vertical line at x with a word, or a horizontal one at y."""

    text: str
    x: float | None = None
    y: float | None = None


@dataclass(frozen=True)
class Part:
    """One part of a bar: its colour is that of its name in every bar."""

    name: str
    value: float
    label: str = ""


@dataclass(frozen=True)
class Bar:
    """A horizontal stack. limit: where its line is drawn, the most that fits."""

    name: str
    parts: Sequence[Part]
    limit: float | None = None


class Axis:
    """Maps values to pixels. Logarithmic axes need values above 0."""

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool = False) -> None:
        if log and low <= 0:
            raise ValueError(f"a logarithmic axis cannot start at {low}")
        if not high > low:
            high = low * 2 if low > 0 else low + 1
        self.low, self.high, self.log = low, high, log
        self._start, self._end = start, end

    def at(self, value: float) -> float:
        """The pixel of a value; values outside are drawn at the edge."""
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        """Round numbers within the axis: 1, 2 and 5 times powers of ten."""
        if not self.log:
            step = _round_step((self.high - self.low) / 6)
            first = math.ceil(self.low / step)
            return [index * step for index in range(first, math.floor(self.high / step * (1 + 1e-9)) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        factors = (1, 2, 5) if len(decades) <= 4 else (1,)
        ticks = [factor * 10.0**decade for decade in decades for factor in factors]
        return [tick for tick in ticks if self.low * (1 - 1e-9) <= tick <= self.high * (1 + 1e-9)]


def lines(
    title: str,
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    marks: Sequence[Mark] = (),
    number: Callable[[float], str] | None = None,
) -> str:
    """A line chart. x, y: names of the axes. Without any points it says so."""
    show = number or compact
    points = [point for item in series for point in item.points]
    if not points:
        return _empty(title)
    bands = [end for item in series for _, low, high in item.band for end in (low, high)]
    xs = [point[0] for point in points] + [mark.x for mark in marks if mark.x is not None]
    ys = [point[1] for point in points] + bands + [mark.y for mark in marks if mark.y is not None]
    across = _axis(xs, _LEFT, WIDTH - _RIGHT, log=log_x)
    up = _axis(ys, HEIGHT - _BOTTOM, _TOP, log=log_y)
    body = [_grid(across, up, x, y, show)]
    for index, item in enumerate(series):
        body.append(_series(index % COLOURS, item, across, up))
    body += [_mark(mark, across, up, row) for row, mark in enumerate(marks)]
    names = [(index % COLOURS, item.name) for index, item in enumerate(series)]
    described = "; ".join(_described(item, show) for item in series if item.points)
    return _figure(title, described, "".join(body), HEIGHT, names)


def stacks(title: str, bars: Sequence[Bar], *, unit: str) -> str:
    """Horizontal stacked bars on one scale, in `unit`."""
    if not bars:
        return _empty(title)
    names = list(dict.fromkeys(part.name for bar in bars for part in bar.parts))
    totals = [sum(part.value for part in bar.parts) for bar in bars]
    most = max([*totals, *(bar.limit for bar in bars if bar.limit is not None)])
    left, height = 170, _TOP + 44 * len(bars) + 40
    across = Axis(0, most * 1.02, left, WIDTH - _RIGHT)
    body = []
    bottom = _TOP + 44 * len(bars)
    for tick in across.ticks():
        at = across.at(tick)
        body.append(f'<line class="grid" x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{bottom}"/>')
        body.append(f'<text class="tick" x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{compact(tick)}</text>')
    body.append(f'<text class="axis" x="{WIDTH - _RIGHT}" y="{bottom + 34}" text-anchor="end">{escape(unit)}</text>')
    for row, bar in enumerate(bars):
        top, start = _TOP + 44 * row + 8, 0.0
        body.append(f'<text class="tick" x="{left - 8}" y="{top + 19}" text-anchor="end">{escape(bar.name)}</text>')
        for part in bar.parts:
            before, after = across.at(start), across.at(start + part.value)
            colour = names.index(part.name) % COLOURS
            label = escape(part.label or f"{part.name}: {compact(part.value)} {unit}")
            body.append(
                f'<rect class="c{colour}" x="{before:.1f}" y="{top}" width="{max(after - before, 0):.1f}" height="28">'
                f"<title>{label}</title></rect>"
            )
            start += part.value
        if bar.limit is not None:
            at = across.at(bar.limit)
            body.append(f'<line class="limit" x1="{at:.1f}" y1="{top - 5}" x2="{at:.1f}" y2="{top + 33}"/>')
    described = "; ".join(
        f"{bar.name}: " + ", ".join(f"{part.name} {compact(part.value)}" for part in bar.parts) for bar in bars
    )
    legend = [(index % COLOURS, name) for index, name in enumerate(names)]
    return _figure(title, f"{described} (in {unit})", "".join(body), height, legend)


def compact(value: float) -> str:
    """A number in few characters: 0.05, 1.2, 850, 12k, 3.4M, 1.2G."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _axis(values: Sequence[float], start: float, end: float, *, log: bool) -> Axis:
    if log:
        above = [value for value in values if value > 0]
        return Axis(min(above), max(above), start, end, log=True)
    return Axis(min(0.0, *values), max(values) * 1.05, start, end)


def _grid(across: Axis, up: Axis, x: str, y: str, show: Callable[[float], str]) -> str:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    parts = []
    for tick in across.ticks():
        at = across.at(tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{show(tick)}</text>')
    for tick in up.ticks():
        at = up.at(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{show(tick)}</text>')
    middle = (_TOP + bottom) / 2
    parts.append(f'<text class="axis" x="{right}" y="{HEIGHT - 12}" text-anchor="end">{escape(x)}</text>')
    turn = f"rotate(-90 14 {middle:.0f})"
    parts.append(
        f'<text class="axis" x="14" y="{middle:.0f}" text-anchor="middle" transform="{turn}">{escape(y)}</text>'
    )
    return "".join(parts)


def _series(colour: int, item: Series, across: Axis, up: Axis) -> str:
    parts = []
    if item.band:
        edge = [f"{across.at(x):.1f},{up.at(high):.1f}" for x, _, high in item.band]
        edge += [f"{across.at(x):.1f},{up.at(low):.1f}" for x, low, _ in reversed(item.band)]
        parts.append(f'<polygon class="band c{colour}" points="{" ".join(edge)}"/>')
    path = " ".join(f"{across.at(x):.1f},{up.at(y):.1f}" for x, y in item.points)
    dashes = ' stroke-dasharray="6 4"' if item.dashed else ""
    parts.append(
        f'<polyline class="line l{colour}" points="{path}"{dashes}><title>{escape(item.name)}</title></polyline>'
    )
    if item.marks:
        for index, (x, y) in enumerate(item.points):
            label = item.labels[index] if index < len(item.labels) else f"{item.name}: {compact(x)}, {compact(y)}"
            parts.append(
                f'<circle class="c{colour}" cx="{across.at(x):.1f}" cy="{up.at(y):.1f}" r="4">'
                f"<title>{escape(label)}</title></circle>"
            )
    return "".join(parts)


def _mark(mark: Mark, across: Axis, up: Axis, row: int) -> str:
    """row: words of vertical marks stand below one another, so that near ones can be read."""
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    if mark.x is not None:
        at = across.at(mark.x)
        anchor, shift = ("end", -5) if at > (WIDTH + _LEFT) / 2 else ("start", 5)
        return (
            f'<line class="limit" x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{bottom}"/>'
            f'<text class="note" x="{at + shift:.1f}" y="{_TOP + 12 + 15 * row}" text-anchor="{anchor}">'
            f"{escape(mark.text)}</text>"
        )
    if mark.y is None:
        raise ValueError("a mark needs an x or a y")
    at = up.at(mark.y)
    return (
        f'<line class="limit" x1="{_LEFT}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}"/>'
        f'<text class="note" x="{right - 4}" y="{at - 5:.1f}" text-anchor="end">{escape(mark.text)}</text>'
    )


def _described(item: Series, show: Callable[[float], str]) -> str:
    first, last = item.points[0], item.points[-1]
    return f"{item.name} from {show(first[1])} at {show(first[0])} to {show(last[1])} at {show(last[0])}"


def _figure(title: str, description: str, body: str, height: int, names: Sequence[tuple[int, str]]) -> str:
    legend = "".join(f'<span><i class="c{colour}"></i>{escape(name)}</span>' for colour, name in names)
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img"><title>{escape(title)}</title>'
        f'<desc>{escape(description)}</desc>{body}</svg><div class="legend">{legend}</div></figure>'
    )


def _empty(title: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption><p>Nothing to draw.</p></figure>"


def _round_step(step: float) -> float:
    size = 10.0 ** math.floor(math.log10(step))
    return next(factor * size for factor in (1, 2, 5, 10) if factor * size >= step * (1 - 1e-9))
