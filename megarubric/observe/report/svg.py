"""Charts as inline SVG text: lines, stacked areas, bars. Colours come from the page's style sheet (s0 to s7)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from megarubric.observe.report.source import Series

POINTS = 240  # of a drawn line; more are averaged
DOTS = 12  # a line of so few points also shows them
LEAST_BAR_RANGE = 0.2  # so that bars of next to nothing look it
LEFT, RIGHT, TOP, BOTTOM = 44.0, 8.0, 8.0, 20.0


@dataclass(frozen=True)
class Line:
    """A named series; `band` also shades the range of what was averaged into a point."""

    label: str
    series: Series
    band: bool = True


@dataclass(frozen=True)
class Frame:
    """Maps data to the picture: x and y ranges, width and height in pixels of the view box."""

    x: tuple[float, float]
    y: tuple[float, float]
    width: float
    height: float

    def px(self, x: float) -> float:
        share = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1.0)
        return LEFT + share * (self.width - LEFT - RIGHT)

    def py(self, y: float) -> float:
        share = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1.0)
        return self.height - BOTTOM - share * (self.height - TOP - BOTTOM)

    def points(self, xs: np.ndarray, ys: np.ndarray) -> str:
        return " ".join(f"{self.px(float(x)):.1f},{self.py(float(y)):.1f}" for x, y in zip(xs, ys))


def thin(s: Series, most: int = POINTS) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """At most `most` points: mean steps, mean values, least and greatest values of equal runs of points."""
    n = len(s.steps)
    if n <= most:
        return s.steps, s.values, s.values, s.values
    cuts = np.linspace(0, n, most + 1).astype(int)[:-1]
    sizes = np.diff(np.append(cuts, n))
    return (
        np.add.reduceat(s.steps, cuts) / sizes,
        np.add.reduceat(s.values, cuts) / sizes,
        np.minimum.reduceat(s.values, cuts),
        np.maximum.reduceat(s.values, cuts),
    )


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers within [low, high], about `count`."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    raw = span / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, first + 4 * count) if k * step <= high + 1e-9 * step]


def number(x: float) -> str:
    """Short, for an axis or a table."""
    if x == 0 or not math.isfinite(x):
        return "0" if x == 0 else "–"
    if abs(x) >= 1e5 or abs(x) < 1e-3:
        mantissa, _, power = f"{x:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(power)}"
    return f"{x:.4g}"


def lines(
    title: str,
    drawn: Sequence[Line],
    *,
    y: tuple[float | None, float | None] = (None, None),
    width: float = 360,
    height: float = 170,
) -> Markup:
    """Line chart; `y` fixes an end of the vertical axis. Series without points are left out."""
    drawn = [d for d in drawn if len(d.series.steps)]
    if not drawn:
        return Markup("")
    thinned = [thin(d.series) for d in drawn]
    low = min(float(t[2].min()) for t in thinned)
    high = max(float(t[3].max()) for t in thinned)
    frame = Frame(_x_range(drawn), _padded(low, high, y), width, height)
    body = []
    for i, (d, (xs, means, least, most)) in enumerate(zip(drawn, thinned)):
        if d.band and len(xs) < len(d.series.steps):
            around = frame.points(np.append(xs, xs[::-1]), np.append(most, least[::-1]))
            body.append(Markup('<polygon class="band s{}" points="{}"/>').format(i % 8, around))
        if len(xs) > 1:
            body.append(Markup('<polyline class="line s{}" points="{}"/>').format(i % 8, frame.points(xs, means)))
        for x, value in zip(xs, means) if len(xs) <= DOTS else ():
            body.append(
                Markup('<circle class="dot s{}" r="2.5" cx="{}" cy="{}"/>').format(
                    i % 8, f"{frame.px(float(x)):.1f}", f"{frame.py(float(value)):.1f}"
                )
            )
    said = "; ".join(f"{d.label} {number(float(d.series.values[-1]))}" for d in drawn)
    return _figure(f"{title}. Last: {said}", frame, body)


def stacked(title: str, drawn: Sequence[Line], *, width: float = 360, height: float = 170) -> Markup:
    """Stacked areas over the steps that all series have."""
    drawn = [d for d in drawn if len(d.series.steps)]
    if not drawn:
        return Markup("")
    steps = drawn[0].series.steps
    for d in drawn[1:]:
        steps = np.intersect1d(steps, d.series.steps)
    if len(steps) < 2:
        return Markup("")
    tops, below = [], np.zeros(1)
    for d in drawn:
        values = d.series.values[np.isin(d.series.steps, steps)]
        xs, means, _, _ = thin(Series(steps, values))
        below = below + means
        tops.append(below)
    frame = Frame((float(steps[0]), float(steps[-1])), (0.0, float(tops[-1].max()) * 1.05 or 1.0), width, height)
    body, under = [], np.zeros(len(xs))
    for i, top in enumerate(tops):
        around = frame.points(np.append(xs, xs[::-1]), np.append(top, under[::-1]))
        body.append(Markup('<polygon class="area s{}" points="{}"/>').format(i % 8, around))
        under = top
    said = "; ".join(f"{d.label} {number(float(d.series.values.mean()))}" for d in drawn)
    return _figure(f"{title}. Mean: {said}", frame, body)


def bars(title: str, parts: Sequence[tuple[str, float]], *, width: float = 520) -> Markup:
    """Horizontal bars from a common zero, one a part, with names left and values right."""
    if not parts:
        return Markup("")
    row, names, room = 17.0, 190.0, 60.0
    low = min(0.0, min(v for _, v in parts))
    high = max(LEAST_BAR_RANGE, max(v for _, v in parts))
    scale = (width - names - room) / ((high - low) or 1.0)
    zero = names - low * scale
    height = row * len(parts) + 4
    body = [Markup('<line class="axis" x1="{0}" x2="{0}" y1="0" y2="{1}"/>').format(f"{zero:.1f}", f"{height:.0f}")]
    for i, (name, value) in enumerate(parts):
        y = 2 + i * row
        short = name if len(name) <= 30 else name[:29] + "…"
        body.append(
            Markup(
                '<text class="name" x="{}" y="{}">{}</text><rect class="{}" x="{}" y="{}" width="{}" height="{}"/>'
                '<text class="value" x="{}" y="{}">{}</text>'
            ).format(
                f"{names - 8:.0f}",
                f"{y + 12:.1f}",
                xml_text(short),
                "bar" if value >= 0 else "bar less",
                f"{min(zero, zero + value * scale):.1f}",
                f"{y + 3:.1f}",
                f"{abs(value) * scale:.1f}",
                f"{row - 6:.0f}",
                f"{width - room + 6:.0f}",
                f"{y + 12:.1f}",
                f"{value:+.3f}",
            )
        )
    return _svg(title, width, height, body)


def xml_text(text: str) -> str:
    """Without the characters that XML cannot hold."""
    return "".join(c if c in "\t\n" or (c.isprintable() and not 0xD800 <= ord(c) <= 0xDFFF) else "�" for c in text)


def _x_range(drawn: Sequence[Line]) -> tuple[float, float]:
    return min(float(d.series.steps[0]) for d in drawn), max(float(d.series.steps[-1]) for d in drawn)


def _padded(low: float, high: float, fixed: tuple[float | None, float | None]) -> tuple[float, float]:
    if low == high == 0:
        return 0.0, 1.0
    room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return (low - room if fixed[0] is None else fixed[0]), (high + room if fixed[1] is None else fixed[1])


def _figure(title: str, frame: Frame, body: Sequence[Markup]) -> Markup:
    grid = []
    for t in ticks(*frame.y):
        y = f"{frame.py(t):.1f}"
        grid.append(
            Markup(
                '<line class="grid" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/><text class="ty" x="{3}" y="{4}">{5}</text>'
            ).format(LEFT, frame.width - RIGHT, y, LEFT - 5, f"{frame.py(t) + 3.5:.1f}", number(t))
        )
    for t in ticks(*frame.x):
        if t == round(t):
            grid.append(
                Markup('<text class="tx" x="{}" y="{}">{}</text>').format(
                    f"{frame.px(t):.1f}", f"{frame.height - 5:.0f}", f"{t:.0f}"
                )
            )
    return _svg(title, frame.width, frame.height, [*grid, *body])


def _svg(title: str, width: float, height: float, body: Sequence[Markup]) -> Markup:
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" role="img"><title>{}</title>{}</svg>'
    ).format(f"{width:.0f}", f"{height:.0f}", xml_text(title), Markup("").join(body))


def legend(labels: Sequence[str]) -> Markup:
    """The names beside their colours; nothing for a single line."""
    if len(labels) < 2:
        return Markup("")
    items = [Markup('<span class="key"><i class="k{}"></i>{}</span>').format(i % 8, t) for i, t in enumerate(labels)]
    return Markup('<p class="legend">{}</p>').format(Markup(" ").join(items))
