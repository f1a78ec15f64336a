"""How numbers look in a report: as text (never a bare float) and as small pictures (inline SVG, no script).

Pictures place things in percent of their width, so that they stretch with the page while text, marks and lines keep their size.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from davylamp.core.nouns import Estimate

SCALES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
STEPS = {0.01: 0.0025, 0.02: 0.005, 0.05: 0.0125, 0.1: 0.025, 0.2: 0.05, 0.5: 0.125, 1.0: 0.25}
#: One shape for each series, drawn around the origin: told apart without colour.
SHAPES = (
    "M0 -4.5A4.5 4.5 0 1 1 0 4.5A4.5 4.5 0 1 1 0 -4.5Z",  # circle
    "M-4.2 -4.2H4.2V4.2H-4.2Z",  # square
    "M0 -5.6L5.6 0L0 5.6L-5.6 0Z",  # diamond
    "M0 -5.4L5.2 4H-5.2Z",  # triangle
    "M0 5.4L5.2 -4H-5.2Z",  # triangle on its tip
    "M-1.8 -5H1.8V-1.8H5V1.8H1.8V5H-1.8V1.8H-5V-1.8H-1.8Z",  # cross
)
_JOINS = re.compile("(?<=[\u00a9-\u1fff\u2190-\ud7ff\uf900-\ufefe\U00010000-\U0001fbff])[\u200c\u200d]")
_UNSEEN = re.compile(
    "(?<=[\ufe00-\ufe0f])[\ufe00-\ufe0f]|["  # one selector belongs to an emoji, a chain of them hides bytes
    "\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\u3164\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\ud800-\udfff\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


def visible(text: str) -> str:
    """The text with everything unseen made visible: controls, bidi marks, zero-width and tag characters, lone surrogates.

    Tab and line feed stay; so does a joiner behind a letter outside Latin, where scripts and emoji need it.

    >>> visible("a\\x1b[31mb\\x00c\\u202ed")
    'a⟨U+001B⟩[31mb⟨U+0000⟩c⟨U+202E⟩d'
    """
    kept = {match.start() for match in _JOINS.finditer(text)}
    return _UNSEEN.sub(
        lambda match: match[0] if match.start() in kept else f"⟨U+{ord(match[0]):04X}⟩", text.replace("\r\n", "\n")
    )


def clip(text: str, limit: int) -> tuple[str, int]:
    """The first `limit` characters and how many more there are.

    >>> clip("abcdef", 4)
    ('abcd', 2)
    """
    return text[:limit], max(0, len(text) - limit)


def digits(share: float) -> str:
    """A share in [-1, 1] as a number of percent: one decimal, more only where one would read as 0 or 100.

    >>> digits(0.04), digits(0), digits(1), digits(0.0004), digits(0.9996), digits(-0.031)
    ('4.0', '0', '100', '0.04', '99.96', '−3.1')
    """
    number = 100 * share
    if number in (0, 100, -100):
        text = f"{number:.0f}"
    else:
        texts = (f"{number:.{places}f}" for places in (1, 2, 3, 6))
        text = next((text for text in texts if abs(float(text)) not in (0.0, 100.0)), f"{number:.1e}")
    return "0" if text == "-0" else text.replace("-", "−")


def number(x: float | None, unit: str = "rate", *, bare: bool = False) -> str:
    """A number of an estimate as a person reads it. bare: without its unit, for use in brackets.

    >>> number(0.04), number(-0.031, "difference"), number(12.3456, "seconds"), number(None)
    ('4.0 %', '−3.1 pp', '12.35 seconds', 'no scored rows')
    """
    if x is None:
        return "no scored rows"
    if unit in ("rate", "difference"):
        sign = "+" if unit == "difference" and x > 0 else ""
        return sign + digits(x) + ("" if bare else " %" if unit == "rate" else " pp")
    text = (f"{x:,.0f}" if float(x).is_integer() and 1000 <= abs(x) < 1e12 else f"{x:.4g}").replace("-", "−")
    return text if bare or not unit else f"p {text}" if unit == "p" else f"{text} {unit}"


def many(count: int, noun: str) -> str:
    """A count with its noun.

    >>> many(1, "row"), many(1200, "row")
    ('1 row', '1,200 rows')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def interval(low: float | None, high: float | None, unit: str = "rate") -> str:
    """An interval in brackets; empty where there is none.

    >>> interval(0.018, 0.085), interval(None, None)
    ('[1.8, 8.5]', '')
    """
    return "" if low is None or high is None else f"[{number(low, unit, bare=True)}, {number(high, unit, bare=True)}]"


def in_words(estimate: Estimate) -> str:
    """The whole estimate in one line, for titles of pictures and for tests.

    >>> in_words(Estimate(0.04, 0.018, 0.085, 150, 2))
    '4.0 % [1.8, 8.5], n 150, 2 unscored'
    """
    ends = interval(estimate.low, estimate.high, estimate.unit)
    unscored = f", {estimate.unscored:,} unscored" if estimate.unscored else ""
    return f"{number(estimate.value, estimate.unit)}{' ' if ends else ''}{ends}, n {estimate.n:,}{unscored}"


def shown(estimate: Estimate) -> str:
    """What the interval's bad end shows, in plain words; empty where there is no interval.

    >>> shown(Estimate(0.0, 0.0, 0.037, 100)), shown(Estimate(0.9, 0.83, 0.95, 100, higher_is_better=True))
    ('shown to be at most 3.7 %', 'shown to be at least 83.0 %')
    """
    if estimate.low is None or estimate.high is None:
        return ""
    end = number(estimate.low if estimate.higher_is_better else estimate.high, estimate.unit)
    return f"shown to be at {'least' if estimate.higher_is_better else 'most'} {end}"


def uncorrected(estimate: Estimate) -> str:
    """Why an estimate could not be corrected for its judge's error, where its method says so; else empty.

    >>> uncorrected(Estimate(0.1, 0.0, 0.2, 9, method="wilson; not corrected: it does not fit"))
    'it does not fit'
    """
    return estimate.method.partition("; not corrected: ")[2]


def p_value(p: float | None) -> str:
    """A p value with as many digits as mean something.

    >>> p_value(0.0312), p_value(1e-9), p_value(None)
    ('0.031', '< 0.001', '–')
    """
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.2f}" if p >= 0.1 else f"{p:.3f}"


@dataclass(frozen=True, slots=True)
class Axis:
    """One scale for all lanes of a table. zero: where a difference has its line of no change."""

    low: float
    high: float
    ticks: tuple[float, ...]
    unit: str = "rate"

    def at(self, x: float) -> float:
        """Place of x in percent of the width, kept inside by a margin of 2 for the marks.

        >>> Axis(0, 0.5, ()).at(0.25)
        50.0
        """
        share = (min(max(x, self.low), self.high) - self.low) / (self.high - self.low)
        return round(2 + 96 * share, 2)

    def label(self, x: float) -> str:
        if self.unit in ("rate", "difference"):
            sign = "+" if self.unit == "difference" and x > 0 else ""
            return f"{sign}{100 * x:g}".replace("-", "−") + (" %" if self.unit == "rate" else " pp")
        return f"{x:g}".replace("-", "−")


def axis_for(estimates: Iterable[Estimate], limits: Sequence[float] = ()) -> Axis:
    """A scale on which all of them fit: rates from 0 to 1, 2, 5, 10, 20, 50 or 100 %, differences evenly about zero.

    >>> axis_for([Estimate(0.04, 0.018, 0.085, 150)]).high
    0.1
    """
    ends, unit = [*limits], "rate"
    for estimate in estimates:
        unit = estimate.unit
        worst = estimate.worst if estimate.unscored else None  # as it is drawn
        parts = (estimate.value, estimate.low, estimate.high, *(worst or ()), *(estimate.corrected or ()))
        ends += [x for x in parts if x is not None and math.isfinite(x)]
    if unit in ("rate", "difference") and all(-1 <= x <= 1 for x in ends):
        size = max((abs(x) for x in ends), default=1.0)
        top = next(scale for scale in SCALES if scale >= size - 1e-12)
        if unit == "rate" and min(ends, default=0) >= 0:
            return Axis(0.0, top, tuple(i * STEPS[top] for i in range(round(top / STEPS[top]) + 1)), unit)
        return Axis(-top, top, (-top, -top / 2, 0.0, top / 2, top), unit)
    marks = round_ticks(min(ends, default=0.0), max(ends, default=1.0))
    return Axis(marks[0], marks[-1], marks, unit)


def round_ticks(low: float, high: float, count: int = 4) -> tuple[float, ...]:
    """Evenly spaced round numbers, about `count` steps, from at or below low to at or above high.

    >>> round_ticks(0.13, 0.92)
    (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """
    size = max(abs(low), abs(high))
    if high - low <= 1e-9 * size or size < 1e-300:  # one number, as far as a picture goes
        high = low + (size if size >= 1e-300 else 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return tuple(float(f"{i * step:.12g}") for i in range(first, last + 1))


def _upright(kind: str, at: float, top: float, bottom: float) -> str:
    return f'<line class="{kind}" x1="{at}%" x2="{at}%" y1="{top}" y2="{bottom}"/>'


def _line(kind: str, axis: Axis, low: float, high: float, y: float, cap: float = 0) -> str:
    left, right = axis.at(low), axis.at(high)
    ends = "".join(_upright(kind, x, y - cap, y + cap) for x in (left, right) if cap)
    return f'<line class="{kind}" x1="{left}%" x2="{right}%" y1="{y}" y2="{y}"/>{ends}'


def _mark(kind: str, axis: Axis, x: float, y: float, series: int) -> str:
    shape = SHAPES[series % len(SHAPES)]
    return f'<svg x="{axis.at(x)}%" y="{y}" overflow="visible"><path class="{kind}" d="{shape}"/></svg>'


def lane_svg(
    estimate: Estimate, axis: Axis, *, series: int = 0, limits: Sequence[float] = (), label: str = ""
) -> Markup:
    """One estimate on the axis: mark and 95 % whisker, below them the worst-case range, thin, and the corrected rate, hollow."""
    height = 42 if estimate.corrected else 26
    parts = [
        _upright("zero" if tick == 0 and axis.low < 0 else "grid", axis.at(tick), 0, height) for tick in axis.ticks
    ]
    parts += [_upright("limit", axis.at(x), 0, height) for x in limits]
    if estimate.unscored and estimate.worst:
        parts.append(_line("worst", axis, *estimate.worst, 21, 3))
    if estimate.value is not None:
        if estimate.low is not None and estimate.high is not None:
            parts.append(_line("whisker", axis, estimate.low, estimate.high, 12))
        parts.append(_mark("mark", axis, estimate.value, 12, series))
    if estimate.corrected:
        value, low, high = estimate.corrected
        parts += [_line("whisker thin", axis, low, high, 31), _mark("mark hollow", axis, value, 31, series)]
    method = f" ({estimate.method})" if estimate.method else ""
    words = escape(visible((f"{label}: " if label else "") + in_words(estimate) + method))
    return Markup(
        f'<svg class="lane s{series % len(SHAPES)}" role="img" width="100%" height="{height}"><title>{words}</title>{"".join(parts)}</svg>'
    )


def axis_svg(axis: Axis) -> Markup:
    """The scale itself, once above the lanes."""
    parts = []
    for index, tick in enumerate(axis.ticks):
        anchor = "start" if index == 0 else "end" if index == len(axis.ticks) - 1 else "middle"
        x = 0 if index == 0 else 100 if index == len(axis.ticks) - 1 else axis.at(tick)
        odd = ' class="odd"' if index % 2 and len(axis.ticks) % 2 else ""  # left out where the scale is narrow
        parts.append(f'<text{odd} x="{x}%" y="12" text-anchor="{anchor}">{escape(axis.label(tick))}</text>')
        parts.append(_upright("tick", axis.at(tick), 17, 22))
    words = escape(f"Scale from {axis.label(axis.low)} to {axis.label(axis.high)}")
    return Markup(
        f'<span class="scale"><svg class="axis" role="img" width="100%" height="22"><title>{words}</title>'
        f'<line class="tick" x1="2%" x2="98%" y1="21.5" y2="21.5"/>{"".join(parts)}</svg></span>'
    )


def key_svg(kind: str, series: int = 0) -> Markup:
    """A sign for the legend. kind: mark | whisker | worst | corrected | limit."""
    axis = Axis(0, 1, ())
    inside = {
        "mark": lambda: _mark("mark", axis, 0.5, 8, series),
        "whisker": lambda: _line("whisker", axis, 0.05, 0.95, 8) + _mark("mark", axis, 0.5, 8, series),
        "worst": lambda: _line("worst", axis, 0.05, 0.95, 8, 4),
        "corrected": lambda: _line("whisker thin", axis, 0.05, 0.95, 8) + _mark("mark hollow", axis, 0.5, 8, series),
        "limit": lambda: _upright("limit", 50, 0, 16),
    }[kind]()
    width = 16 if kind == "mark" else 36
    return Markup(
        f'<svg class="key s{series % len(SHAPES)}" width="{width}" height="16" viewBox="0 0 {width} 16" aria-hidden="true" '
        f'focusable="false">{inside}</svg>'
    )


STATES = {  # drawn, so that a state is told by its shape and not by its colour alone
    "pass": '<circle cx="8" cy="8" r="7"/><path d="M4.8 8.3l2.2 2.2 4.2-4.7"/>',
    "fail": '<path class="body" d="M5.1 1h5.8L15 5.1v5.8L10.9 15H5.1L1 10.9V5.1Z"/><path d="M5.4 5.4l5.2 5.2M10.6 5.4l-5.2 5.2"/>',
    "unsure": '<path class="body" d="M8 1.2 15.2 14.4H.8Z"/><path d="M8 5.8v4.2M8 12v.6"/>',
    "even": '<circle class="open" cx="8" cy="8" r="6.2"/><path class="open" d="M5 8h6"/>',
}


def state_svg(state: str) -> Markup:
    """A sign for pass (disc), fail (octagon), unsure (triangle) or even (ring). The word stands beside it."""
    return Markup(
        f'<svg class="sign {state}" width="16" height="16" viewBox="0 0 16 16" aria-hidden="true" focusable="false">{STATES[state]}</svg>'
    )


def pretty(value: object) -> str:
    """JSON for a person: sorted, indented, text as it is.

    >>> print(pretty({"b": 1, "a": "é"}))
    {
      "a": "é",
      "b": 1
    }
    """
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, default=str)
