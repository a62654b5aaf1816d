"""Charts as inline SVG text.

Written by hand rather than with matplotlib: the colours are CSS variables of the page, so one drawing serves the light
and the dark theme, and a chart of 300 points takes 5 kB.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

SERIES_COLOURS = 8  # --c0 .. --c7 of the page's style sheet
_MOST_POINTS = 300  # per line; more cannot be told apart at this width
_WIDTH, _HEIGHT = 400, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 18, 10, 42


@dataclass(frozen=True)
class Series:
    """One line. `points` in order of x; a y that is not finite interrupts the line. `faint`: raw values behind."""

    name: str
    points: Sequence[Point]
    colour: int
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """Place of `value` between low (0) and high (1)."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    x_range: tuple[float, float] | None = None,
    logarithmic: bool = False,
    description: str = "",
) -> str:
    """An SVG with axes, their labels, grid and a legend below (where there is more than one named line).

    y_range, x_range: fixed ends of an axis; otherwise from the data, y from 0 where that loses no detail.
    logarithmic: y on a log scale; values that are not positive are left out.
    """
    shown = [_usable(line, logarithmic) for line in series]
    values = [point for line in shown for point in line.points if math.isfinite(point[1])]
    if not values:
        return '<p class="missing">No values to draw.</p>'
    first, last = min(x for x, _ in values), max(x for x, _ in values)
    x_axis = _linear_axis(*(x_range or (_start(first, last), last)), 5)
    lowest, highest = min(y for _, y in values), max(y for _, y in values)
    if logarithmic:
        y_axis = _log_axis(lowest, highest)
    elif y_range:
        y_axis = _linear_axis(*y_range, 5)
    else:
        y_axis = _linear_axis(_start(lowest, highest), highest, 5)
    body = _frame(x_axis, y_axis, x_label, y_label) + "".join(_line(line, x_axis, y_axis) for line in shown)
    label = escape(description or f"{y_label} over {x_label}", quote=True)
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{body}</svg>'
    return f"{svg}{_legend(shown)}"


def thinned(points: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """At most `most` points, each the mean of a run of neighbours; the last one stays as it is."""
    if len(points) <= most:
        return list(points)
    size = math.ceil((len(points) - 1) / (most - 1))
    runs = [points[begin : min(begin + size, len(points) - 1)] for begin in range(0, len(points) - 1, size)]
    means = [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]
    return [*means, points[-1]]


def smoothed(points: Sequence[Point], share: float = 0.05) -> list[Point]:
    """Mean over a centred window of about `share` of the points, cut off at the ends; unlike a running mean it does not
    lag behind a falling loss."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    reach = int(share * len(finite) / 2)
    sums = [0.0, *itertools.accumulate(y for _, y in finite)]
    result = []
    for place, (x, _) in enumerate(finite):
        begin, end = max(0, place - reach), min(len(finite), place + reach + 1)
        result.append((x, (sums[end] - sums[begin]) / (end - begin)))
    return result


def number(value: float) -> str:
    """A number for an axis or a table: 12000 -> 12k, 0.00012 -> 1.2e-4, 0.5 -> 0.5."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    if size < 1e-3:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:.4g}"


def _usable(line: Series, logarithmic: bool) -> Series:
    points = thinned(line.points)
    if logarithmic:
        points = [(x, y if y > 0 else math.nan) for x, y in points]
    return Series(line.name, points, line.colour, line.faint, line.dots or len(points) == 1)


def _start(low: float, high: float) -> float:
    """0 where that loses no detail."""
    return 0.0 if 0 <= low < 0.5 * high else low


def _linear_axis(low: float, high: float, wanted: int) -> _Axis:
    size = max(abs(low), abs(high))
    if high - low <= 1e-3 * size:  # flat, as far as four digits at the ticks can tell
        low, high = low - (0.1 * size or 1.0), high + (0.1 * size or 1.0)
    step = _round_step((high - low) / wanted)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(float(f"{place * step:.12g}") for place in range(first, last + 1))
    return _Axis(ticks[0], ticks[-1], ticks)


def _round_step(step: float) -> float:
    size = 10 ** math.floor(math.log10(step))
    return next(factor * size for factor in (1, 2, 2.5, 5, 10) if step <= factor * size * (1 + 1e-9))


def _log_axis(low: float, high: float) -> _Axis:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [factor * 10.0**power for power in range(first, last) for factor in factors] + [10.0**last]
    return _Axis(ticks[0], ticks[-1], tuple(ticks), logarithmic=True)


def _x(axis: _Axis, value: float) -> float:
    return _LEFT + axis.share(value) * (_WIDTH - _LEFT - _RIGHT)


def _y(axis: _Axis, value: float) -> float:
    return _HEIGHT - _BOTTOM - axis.share(value) * (_HEIGHT - _TOP - _BOTTOM)


def _frame(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str) -> str:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for tick in y_axis.ticks:
        y = f"{_y(y_axis, tick):.1f}"
        parts.append(f'<path class="grid" d="M{_LEFT} {y}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y}" dy="4" text-anchor="end">{number(tick)}</text>')
    for tick in x_axis.ticks:
        x = f"{_x(x_axis, tick):.1f}"
        parts.append(f'<path class="axis" d="M{x} {bottom}v4"/>')
        parts.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text class="label" x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    centre = (_TOP + bottom) / 2
    turn = f'transform="rotate(-90 14 {centre})"'
    parts.append(f'<text class="label" x="14" y="{centre}" text-anchor="middle" {turn}>{escape(y_label)}</text>')
    return "".join(parts)


def _line(line: Series, x_axis: _Axis, y_axis: _Axis) -> str:
    path, marks, pen_down = [], [], False
    for x, y in line.points:
        if not math.isfinite(y):
            pen_down = False
            continue
        y = min(max(y, y_axis.low), y_axis.high)
        place = f"{_x(x_axis, x):.1f} {_y(y_axis, y):.1f}"
        path.append(("L" if pen_down else "M") + place)
        pen_down = True
        if line.dots:
            title = f"<title>{escape(line.name)}: {number(x)}, {number(y)}</title>"
            cx, cy = place.split()
            marks.append(f'<circle cx="{cx}" cy="{cy}" r="3.5" style="fill:var(--c{line.colour})">{title}</circle>')
    kind = "line faint" if line.faint else "line"
    title = f"<title>{escape(line.name)}</title>"
    stroke = f'style="stroke:var(--c{line.colour})"'
    return f'<path class="{kind}" {stroke} d="{"".join(path)}">{title}</path>{"".join(marks)}'


def _legend(series: Sequence[Series]) -> str:
    named = [line for line in series if line.name and not line.faint]
    if len(named) < 2:
        return ""
    items = "".join(
        f'<li><span class="swatch" style="background:var(--c{line.colour})"></span>{escape(line.name)}</li>'
        for line in named
    )
    return f'<ul class="legend">{items}</ul>'
