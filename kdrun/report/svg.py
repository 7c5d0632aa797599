"""Charts as inline SVG without script: colours are CSS variables of the page, so that one drawing is right in light and in dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from kdrun.report.parts import Chart, Point, Series

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 44
DASHES = ("", "7 3", "2 3", "9 3 2 3")  # beside colours: for prints and for eyes that see few of them
COLOURS = 8
ROW, NAME_WIDTH = 19, 130  # of bars
Scale = Callable[[float], float]


def draw(chart: Chart) -> str:
    """One <svg>. Points tell their numbers where a pointer rests on them."""
    body = {"lines": _lines, "scatter": _scatter, "bars": _bars, "reliability": _reliability}[chart.kind](chart)
    height = _bar_height(chart) if chart.kind == "bars" else HEIGHT
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(chart.title)}">{body}</svg>'


def colour(number: int) -> str:
    return f"var(--s{number % COLOURS + 1})"


def dash(number: int) -> str:
    """Colours that come round again, and neighbours, are told apart by their dashes too."""
    return DASHES[(number // COLOURS + number) % len(DASHES)]


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / wanted
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _frame(chart: Chart, xs: Sequence[float], ys: Sequence[float], log_x: bool = False) -> tuple[Scale, Scale, str]:
    """Scales and the drawn axes."""
    (x_low, x_high), (y_low, y_high) = _range(xs, log_x), _range(ys)
    to = (lambda v: math.log10(v)) if log_x else (lambda v: v)
    sx = lambda v: LEFT + (to(v) - to(x_low)) / (to(x_high) - to(x_low)) * (WIDTH - LEFT - RIGHT)  # noqa: E731
    sy = lambda v: HEIGHT - BOTTOM - (v - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)  # noqa: E731
    parts = []
    for value in ticks(y_low, y_high):
        y = sy(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(value)}</text>')
    for value in [v for v in _powers(x_low, x_high) if x_low <= v <= x_high] if log_x else ticks(x_low, x_high, 6):
        parts.append(f'<text x="{sx(value):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{_short(value)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(chart.x)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text transform="translate(13 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(chart.y)}</text>')
    return sx, sy, "".join(parts)


def _range(values: Sequence[float], log: bool = False) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return low / 1.3, high * 1.3
    pad = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    return low - (pad if low < 0 or low > pad else low), high + pad


def _powers(low: float, high: float) -> list[float]:
    return [m * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in (1, 2, 5)]


def _short(value: float) -> str:
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.3g}"
    return f"{value:,.10g}" if abs(value) >= 1000 else f"{value:.4g}"


def _ends(points: Sequence[Point]) -> list[float]:
    return [v for p in points for v in (p.y, p.low, p.high) if v is not None and math.isfinite(v)]


def _lines(chart: Chart) -> str:
    points = [p for s in chart.series for p in s.points]
    ys = _fair([p.y for p in points], _ends(points))
    sx, sy, frame = _frame(chart, [p.x for p in points], ys)
    parts = [frame]
    inside = lambda v: min(max(sy(v), TOP - 4), HEIGHT - BOTTOM + 4)  # noqa: E731
    for s in chart.series:
        band = [p for p in s.points if p.low is not None and p.high is not None]
        if len(band) > 1:
            upper = [f"{sx(p.x):.1f},{inside(p.high or 0.0):.1f}" for p in band]
            lower = [f"{sx(p.x):.1f},{inside(p.low or 0.0):.1f}" for p in reversed(band)]
            parts.append(f'<polygon points="{" ".join(upper + lower)}" fill="{colour(s.colour)}" opacity="0.16"/>')
    for s in chart.series:
        path = " ".join(f"{sx(p.x):.1f},{inside(p.y):.1f}" for p in s.points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour(s.colour)}" stroke-width="2" stroke-dasharray="{dash(s.colour)}"/>'
        )
        size = 3.4 if len(s.points) <= 30 else 1.6
        parts += [_dot(sx(p.x), inside(p.y), size, s, f"{chart.x} {p.x:.4g}: {_told(p)}") for p in s.points]
    return "".join(parts)


def _fair(means: Sequence[float], ends: Sequence[float]) -> list[float]:
    """The range of the means, and of intervals as far as they leave the means something to see: two seeds can span a hundred points."""
    low, high = min(means), max(means)
    room = 0.6 * (high - low) or 0.05 * abs(high) or 1.0
    return [max(min(ends), low - room), min(max(ends), high + room)]


def _scatter(chart: Chart) -> str:
    points = [(s, p) for s in chart.series for p in s.points]
    ys = _fair([p.y for _, p in points], _ends([p for _, p in points]))
    sx, sy, frame = _frame(chart, _wide([p.x for _, p in points], chart.log_x), ys, chart.log_x)
    parts, taken = [frame], [-99.0]
    inside = lambda v: min(max(sy(v), TOP), HEIGHT - BOTTOM)  # noqa: E731
    for s, p in sorted(points, key=lambda sp: sy(sp[1].y)):
        x, y = sx(p.x), sy(p.y)
        if p.low is not None and p.high is not None:
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{inside(p.high):.1f}" y2="{inside(p.low):.1f}" stroke="{colour(s.colour)}"/>'
            )
        parts.append(_dot(x, y, 5, s, f"{p.label}: {_short(p.x)} s, {_told(p)}"))
        if len(points) <= 12:
            at = max(y + 4, taken[-1] + 13)  # no name on another
            taken.append(at)
            left = x > (LEFT + WIDTH) / 2
            where = f'x="{x - 9 if left else x + 9:.1f}" y="{at:.1f}" text-anchor="{"end" if left else "start"}"'
            parts.append(f'<text class="name" {where}>{escape(_cut(p.label, 34))}</text>')
    return "".join(parts)


def _wide(xs: Sequence[float], log: bool) -> list[float]:
    """Room for names beside points that took equally long."""
    if log:
        return list(xs)
    return [*xs, 0.0, max(xs) * 1.15]


def _reliability(chart: Chart) -> str:
    sx, sy, frame = _frame(chart, [0.0, 100.0], [0.0, 100.0])
    most = max(p.weight for s in chart.series for p in s.points)
    parts = [frame, f'<line class="axis" stroke-dasharray="5 4" x1="{sx(0):.1f}" y1="{sy(0):.1f}" x2="{sx(100):.1f}" y2="{sy(100):.1f}"/>']
    for s in chart.series:
        path = " ".join(f"{sx(p.x):.1f},{sy(p.y):.1f}" for p in s.points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour(s.colour)}" stroke-width="1.6" stroke-dasharray="{dash(s.colour)}"/>'
        )
        for p in s.points:
            told = f"confidence {p.x:.1f} %, right {p.y:.1f} %, {p.label}"
            parts.append(_dot(sx(p.x), sy(p.y), 2 + 5 * math.sqrt(p.weight / most), s, told))
    return "".join(parts)


def _bar_height(chart: Chart) -> int:
    return TOP + BOTTOM + ROW * sum(len(s.points) for s in chart.series)


def _bars(chart: Chart) -> str:
    """One row for each point: its name, a bar from 0, its interval."""
    points = [(s, p) for s in chart.series for p in s.points]
    ends = _fair([0.0, *(p.y for _, p in points)], [0.0, *_ends([p for _, p in points])])
    low, high = min(ends), max(ends)
    pad = 0.04 * (high - low) or 1.0
    low, high, bottom = low - pad, high + pad, _bar_height(chart) - BOTTOM
    sx = lambda v: NAME_WIDTH + (v - low) / (high - low) * (WIDTH - NAME_WIDTH - RIGHT)  # noqa: E731
    parts = []
    for value in ticks(low, high):
        parts.append(f'<line class="grid" x1="{sx(value):.1f}" x2="{sx(value):.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{sx(value):.1f}" y="{bottom + 17}" text-anchor="middle">{_short(value)}</text>')
    for i, (s, p) in enumerate(points):
        y, inside = TOP + ROW * i, lambda v: min(max(sx(v), NAME_WIDTH), WIDTH - RIGHT)
        start, end = sorted((sx(0.0), sx(p.y)))
        parts.append(f'<text x="{NAME_WIDTH - 8}" y="{y + 13}" text-anchor="end">{escape(_cut(p.label, 19))}</text>')
        shape = f'<rect x="{start:.1f}" y="{y + 3}" width="{max(end - start, 0.5):.1f}" height="{ROW - 6}" fill="{colour(s.colour)}"'
        parts.append(f"{shape}><title>{escape(p.label)}: {_told(p)}</title></rect>")
        if p.low is not None and p.high is not None:
            middle = y + ROW / 2
            parts.append(f'<line class="whisker" x1="{inside(p.low):.1f}" x2="{inside(p.high):.1f}" y1="{middle}" y2="{middle}"/>')
    parts.append(f'<line class="axis" x1="{sx(0.0):.1f}" x2="{sx(0.0):.1f}" y1="{TOP}" y2="{bottom}"/>')
    parts.append(f'<text x="{(NAME_WIDTH + WIDTH) / 2:.0f}" y="{bottom + 36}" text-anchor="middle">{escape(chart.x)}</text>')
    return "".join(parts)


def _dot(x: float, y: float, radius: float, series: Series, told: str) -> str:
    shape = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{colour(series.colour)}">'
    return f"{shape}<title>{escape(series.name)}, {escape(told)}</title></circle>"


def _told(point: Point) -> str:
    interval = "" if point.low is None or point.high is None else f" (95 % interval {point.low:.4g} to {point.high:.4g})"
    return f"{point.y:.4g}{interval}"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
