"""The drawing behind `figures.py`: scales, line charts, scatter charts and colour ramps as inline SVG that stretches with the page.

Across, everything is placed in percent; up, in pixels. Lines that cross the plot lie in a box of 1000 units that is stretched without
its strokes, so that text, marks and line widths keep their size on a phone and on paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from davylamp.report import plots

HEIGHT, TOP = 240, 8  # of the plotted area, in pixels
MARKS = 40  # a line of more points has marks at some of them only
LABELS = 60  # points that may bear a label
SERIES = len(plots.SHAPES)

#: From pale to dark on a light page, from dark to pale on a dark one: more always stands out more.
LIGHT, DARK = (
    ("#f0f5fa", "#a3c8e8", "#4a8fca", "#175a9c", "#0a2c55"),
    ("#1a232d", "#1f4a75", "#2f78b8", "#84bbec", "#e2f0ff"),
)
#: About zero: orange below, blue above. Told apart in every common form of colour blindness.
LIGHT_TWO = ("#7a3600", "#d78a45", "#f5f4f2", "#5c9bd3", "#0c3f78")
DARK_TWO = ("#ffd2a6", "#b9611c", "#1d242c", "#2f78b8", "#d3e8ff")


@dataclass(frozen=True, slots=True)
class Scale:
    """One axis: its ends, its ticks, and how a number on it reads."""

    low: float
    high: float
    ticks: tuple[float, ...]
    unit: str = ""
    log: bool = False

    def share(self, x: float) -> float:
        """Where x lies between the ends, 0 to 1.

        >>> Scale(1, 100, (), log=True).share(10)
        0.5
        """
        if self.log:
            return (math.log10(x) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (x - self.low) / (self.high - self.low)

    def at(self, x: float) -> float:
        """Percent of the width, with a margin of 2 for the marks."""
        return round(2 + 96 * self.share(x), 2)

    def up(self, y: float) -> float:
        """Pixels from the top."""
        return round(TOP + (HEIGHT - 2 * TOP) * (1 - self.share(y)), 1)

    def label(self, x: float) -> str:
        if self.unit in ("rate", "difference"):
            return plots.Axis(self.low, self.high, (), self.unit).label(float(f"{x:.10g}"))
        size = abs(x)
        text = f"{x:,.10g}" if size < 1e6 else f"{x:.6g}"
        if size >= 1e6 or (0 < size < 1e-4):
            number, _, power = f"{x:e}".partition("e")
            number = f"{float(number):g}"
            text = ("" if number == "1" else f"{number}×") + f"10{str(int(power)).translate(_RAISED)}"
        return text.replace("-", "−")

    def text(self, x: float | None) -> str:
        return "–" if x is None else plots.number(x, self.unit)


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def scale(values: Sequence[float], unit: str = "", *, log: bool = False) -> Scale:
    """A scale with round ends that holds all values.

    >>> scale([3, 97]).ticks
    (0.0, 25.0, 50.0, 75.0, 100.0)
    >>> scale([2, 900], log=True).ticks
    (1.0, 10.0, 100.0, 1000.0)
    """
    low, high = (min(values), max(values)) if values else (1.0, 10.0) if log else (0.0, 1.0)
    if not log:
        ticks = plots.round_ticks(low, high)
        return Scale(ticks[0], ticks[-1], ticks, unit)
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    every = max(1, math.ceil((last - first) / 6))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    marks = [
        f * 10.0**power for power in range(first, last + 1, every) for f in factors if f * 10.0**power <= 10.0**last
    ]
    return Scale(10.0**first, 10.0**last, tuple(float(f"{mark:.6g}") for mark in marks), unit, True)


Numbers = tuple[float, float | None, float | None, float | None]


@dataclass(frozen=True, slots=True)
class Line:
    """points: (x, y, low, high), in order of x; y None is a gap."""

    name: str
    points: Sequence[Numbers]


@dataclass(frozen=True, slots=True)
class Point:
    x: float
    y: float
    label: str = ""
    x_low: float | None = None
    x_high: float | None = None
    y_low: float | None = None
    y_high: float | None = None
    marked: bool = False


def curves(lines: Sequence[Line], across: Scale, up: Scale, x_label: str, y_label: str) -> Markup:
    """Lines with bands; each series has its colour, its dashes and its mark."""
    boxed, marks = [], []
    for index, line in enumerate(lines):
        kind = f"s{index % SERIES} d{index // SERIES % 4}"
        for run in _runs(line.points, 2):
            there = [f"{10 * across.at(p[0]):g} {up.up(p[2] or 0.0)}" for p in run]
            back = [f"{10 * across.at(p[0]):g} {up.up(p[3] or 0.0)}" for p in reversed(run)]
            boxed.append(f'<path class="band {kind}" d="M{"L".join(there + back)}Z"/>')
        for run in _runs(line.points, 1):
            there = [f"{10 * across.at(p[0]):g} {up.up(p[1] or 0.0)}" for p in run]
            boxed.append(f'<path class="line {kind}" d="M{"L".join(there)}"/>')
        seen = [p for p in line.points if p[1] is not None]
        every = 1 if len(seen) <= MARKS else math.ceil(len(seen) / 12)
        for place, (x, y, *_) in enumerate(seen):
            if place % every == 0 or place == len(seen) - 1:
                marks.append(_mark(across.at(x), up.up(y or 0.0), index, "mark"))
    lines_box = f'<svg width="100%" height="{HEIGHT}" viewBox="0 0 1000 {HEIGHT}" preserveAspectRatio="none">{"".join(boxed)}</svg>'
    return _frame(across, up, x_label, y_label, lines_box + "".join(marks))


def scatter(points: Sequence[Point], across: Scale, up: Scale, x_label: str, y_label: str) -> Markup:
    """Points with whiskers; a marked one is a filled diamond, the others are open circles. Labels keep out of each other's way."""
    whiskers, marks, labels = [], [], []
    taken = [_box(point, across, up, "", 0) for point in points[:LABELS]]
    for point in sorted(points, key=lambda point: point.marked):
        x, y = across.at(point.x), up.up(point.y)
        if point.x_low is not None and point.x_high is not None:
            ends = across.at(point.x_low), across.at(point.x_high)
            whiskers.append(f'<line class="whisker thin" x1="{ends[0]}%" x2="{ends[1]}%" y1="{y}" y2="{y}"/>')
        if point.y_low is not None and point.y_high is not None:
            ends = up.up(point.y_low), up.up(point.y_high)
            whiskers.append(f'<line class="whisker thin" x1="{x}%" x2="{x}%" y1="{ends[0]}" y2="{ends[1]}"/>')
        marks.append(_mark(x, y, 2 if point.marked else 0, "mark" if point.marked else "mark open", series=0))
    for point in sorted(points, key=lambda point: not point.marked)[:LABELS]:
        if not point.label:
            continue
        words = plots.visible(plots.clip(point.label, 40)[0])
        for side in range(4):
            box = _box(point, across, up, words, side + 1)
            if box[0] >= -20 and box[2] <= 720 and not any(_overlap(box, other) for other in taken):
                break
        else:
            if not point.marked:  # its name stands in the table
                continue
            side = 0 if across.share(point.x) < 0.6 else 1
            box = _box(point, across, up, words, side + 1)
        taken.append(box)
        shift, lift, anchor = ((8, -8, "start"), (-8, -8, "end"), (8, 17, "start"), (-8, 17, "end"))[side]
        labels.append(
            f'<svg x="{across.at(point.x)}%" y="{up.up(point.y)}" overflow="visible"><text class="name{" marked" if point.marked else ""}" '
            f'x="{shift}" y="{lift}" text-anchor="{anchor}">{escape(words)}</text></svg>'
        )
    return _frame(across, up, x_label, y_label, "".join(whiskers + marks + labels))


def _frame(across: Scale, up: Scale, x_label: str, y_label: str, inside: str) -> Markup:
    """Axes, ticks and labels round the plotted area. What stands left has a width of its own, the rest stretches."""
    ups = [(up.up(tick), escape(up.label(tick))) for tick in up.ticks]
    acrosses = [(across.at(tick), escape(across.label(tick))) for tick in across.ticks]
    width = 14 + 7 * max((len(text) for _, text in ups), default=1)
    left = "".join(f'<text x="{width - 8}" y="{y + 4}" text-anchor="end">{text}</text>' for y, text in ups)
    grid = "".join(f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/>' for y, _ in ups)
    ticks = "".join(
        f'<line class="tick" x1="{x}%" x2="{x}%" y1="{HEIGHT}" y2="{HEIGHT + 5}"/>'
        f'<text x="{x}%" y="{HEIGHT + 20}" text-anchor="middle">{text}</text>'
        for x, text in acrosses
    )
    return Markup(
        f'<span class="y-label">{escape(plots.visible(y_label))}</span><span class="plot">'
        f'<svg class="up" width="{width}" height="{HEIGHT + 26}">{left}</svg>'
        f'<svg class="area" width="100%" height="{HEIGHT + 26}">{grid}<line class="tick" x1="0" x2="100%" y1="{HEIGHT}" y2="{HEIGHT}"/>'
        f'{ticks}{inside}</svg></span><span class="x-label">{escape(plots.visible(x_label))}</span>'
    )


def _runs(points: Iterable[Numbers], column: int) -> list[list[Numbers]]:
    """Stretches of points without a gap in that column."""
    out: list[list[Numbers]] = [[]]
    for point in points:
        if point[column] is None:
            out.append([])
        else:
            out[-1].append(point)
    return [run for run in out if run]


def _mark(x: float, y: float, shape: int, kind: str, series: int | None = None) -> str:
    colour = (shape if series is None else series) % SERIES
    path = plots.SHAPES[shape % SERIES]
    return f'<svg x="{x}%" y="{y}" overflow="visible"><path class="{kind} s{colour}" d="{path}"/></svg>'


def _box(point: Point, across: Scale, up: Scale, words: str, side: int) -> tuple[float, float, float, float]:
    """The place that a mark (side 0) or its label takes on a plot 700 pixels wide. Labels stand aslant, where no whisker runs."""
    x, y, wide = 7 * across.at(point.x), up.up(point.y), 6.6 * len(words)
    return {
        0: (x - 6, y - 6, x + 6, y + 6),
        1: (x + 8, y - 19, x + 8 + wide, y - 5),
        2: (x - 8 - wide, y - 19, x - 8, y - 5),
        3: (x + 8, y + 6, x + 8 + wide, y + 20),
        4: (x - 8 - wide, y + 6, x - 8, y + 20),
    }[side]


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def line_key(index: int) -> Markup:
    """A sign for the legend of curves."""
    kind = f"s{index % SERIES} d{index // SERIES % 4}"
    return Markup(
        f'<svg class="key" width="36" height="16" viewBox="0 0 36 16" aria-hidden="true" focusable="false">'
        f'<path class="line {kind}" d="M1 8H35"/><svg x="18" y="8" overflow="visible"><path class="mark s{index % SERIES}" '
        f'd="{plots.SHAPES[index % SERIES]}"/></svg></svg>'
    )


# Colour


class Shades:
    """The colours of a heatmap: from zero (or the least value, where all lie close together) to the greatest, or evenly about zero."""

    def __init__(self, values: Sequence[float], unit: str = ""):
        low, high = min(values, default=0.0), max(values, default=1.0)
        self.unit, self.two = unit, low < 0
        self.whole = all(float(x).is_integer() for x in values)  # levels and counts are shown without decimals
        if self.two:
            high = max(abs(low), abs(high))
            low = -high
        elif low < high / 2:
            low = 0.0
        self.low, self.high = low, high if high > low else low + 1.0

    def share(self, x: float) -> float:
        return min(1.0, max(0.0, (x - self.low) / (self.high - self.low)))

    def style(self, x: float) -> str:
        """Colours for a light and a dark page, each with the ink that reads best on it."""
        pair = [_blend(ramp, self.share(x)) for ramp in ((LIGHT_TWO, DARK_TWO) if self.two else (LIGHT, DARK))]
        return "--l:{};--li:{};--d:{};--di:{}".format(*(part for colour in pair for part in (colour, ink(colour))))


def _blend(ramp: Sequence[str], share: float) -> str:
    place = share * (len(ramp) - 1)
    index = min(int(place), len(ramp) - 2)
    pairs = zip(_parts(ramp[index]), _parts(ramp[index + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (place - index)):02x}" for a, b in pairs)


def _parts(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, 0 to 1 (WCAG 2.2).

    >>> luminance("#ffffff")
    1.0
    """
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (p / 255 for p in _parts(colour))]
    return round(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2], 6)


def contrast(one: str, two: str) -> float:
    """Contrast of two colours, 1 to 21 (WCAG 2.2); text needs 4.5.

    >>> contrast("#000000", "#ffffff")
    21.0
    """
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


def ink(colour: str) -> str:
    """Black or white, whichever reads better; one of them always has a contrast above 4.5."""
    return max(("#000000", "#ffffff"), key=lambda candidate: contrast(colour, candidate))


def cell(x: float | None, shades: Shades, unit: str) -> dict[str, str]:
    """A cell of a heatmap: its colours and its number, which is short where it stands and whole for a reader of the source."""
    if x is None:
        return {"style": "", "text": "no value", "short": ""}
    if unit in ("rate", "difference"):
        short = plots.number(x, unit, bare=True)
    else:  # as many decimals in every cell as give the greatest two or three digits
        greatest = max(abs(shades.low), abs(shades.high)) or 1.0
        decimals = 0 if shades.whole else min(6, max(0, 1 - math.floor(math.log10(greatest))))
        short = f"{x:,.{decimals}f}".replace("-", "−")
    return {"style": shades.style(x), "text": plots.number(x, unit), "short": short}


def scale_svg(shades: Shades, steps: int = 24) -> Markup:
    """The ramp of a heatmap with the numbers at its ends, and at zero where it has two sides."""
    wide = 100 / steps
    values = [shades.low + (shades.high - shades.low) * (i + 0.5) / steps for i in range(steps)]
    boxes = "".join(
        f'<rect class="shade" style="{shades.style(x)}" x="{i * wide:.2f}%" y="0" width="{wide + 0.05:.2f}%" height="10"/>'
        for i, x in enumerate(values)
    )
    ends = [(0, "start", shades.low), (100, "end", shades.high)] + ([(50, "middle", 0.0)] if shades.two else [])
    texts = "".join(
        f'<text x="{x}%" y="26" text-anchor="{anchor}">{escape(plots.number(value, shades.unit))}</text>'
        for x, anchor, value in ends
    )
    return Markup(
        f'<svg class="ramp" width="100%" height="30" aria-hidden="true" focusable="false">{boxes}{texts}</svg>'
    )
