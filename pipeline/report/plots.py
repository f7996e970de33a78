"""Plots as inline SVG: bars, histograms, intervals, and the frame with axes that others draw in.

Widths are shares of the element's own width and heights are pixels, so that a plot is as wide as
its place while letters and lines keep their size, on a screen and on a phone. Colours are classes;
the page's style sheet says which. Names of ticks stand outside the element, in its margin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from pipeline.wording import count, percent, short

BAR_HEIGHT = 18
AXIS_HEIGHT = 20
PLOT_HEIGHT = 150

NOTHING = Markup("")


def element(name: str, *content: str, **attributes: object) -> Markup:
    """An element, all of whose content and attributes are escaped, but Markup. `class_` is class,
    `stroke_width` is stroke-width; None is left out."""
    written = NOTHING.join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), value)
        for key, value in attributes.items()
        if value is not None
    )
    return Markup("<{0}{1}>{2}</{0}>").format(name, written, NOTHING.join(content))


def share_of(part: float, whole: float) -> str:
    """As a coordinate."""
    return f"{100 * part / whole:.2f}".rstrip("0").rstrip(".") + "%" if whole else "0%"


class Tick(NamedTuple):
    """A labelled place on an axis; `at` is 0 at its begin and 1 at its end."""

    at: float
    text: str


@dataclass(frozen=True)
class Scale:
    """A linear axis."""

    low: float
    high: float
    write: Callable[[float], str] = short

    @classmethod
    def over(
        cls, values: Iterable[float], write: Callable[[float], str] = short, room: float = 0.04
    ) -> Scale:
        """From 0, and from what is below 0, to a little beyond the largest."""
        known = [0.0, *values]
        low, high = min(known), max(known)
        spare = room * ((high - low) or 1.0)
        return cls(low - spare if low < 0 else 0.0, high + spare, write)

    @classmethod
    def around(cls, values: Iterable[float], write: Callable[[float], str] = short) -> Scale:
        """As wide as the values are apart, for what is no length from 0."""
        known = list(values)
        spare = 0.1 * ((max(known) - min(known)) or 1.0)
        return cls(min(known) - spare, max(known) + spare, write)

    def at(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)

    def x(self, value: float) -> str:
        return share_of(min(1.0, max(0.0, self.at(value))), 1)

    def ticks(self, most: int = 5) -> list[Tick]:
        """At round values."""
        step = _round_step((self.high - self.low) / most)
        first = math.ceil(self.low / step)
        last = math.floor(self.high / step)
        return [Tick(self.at(n * step), self.write(n * step)) for n in range(first, last + 1)]


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is at least this."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * 0.999)


def frame(
    label: str,
    body: Iterable[str],
    x_ticks: Sequence[Tick],
    y_ticks: Sequence[Tick] = (),
    height: float = PLOT_HEIGHT,
) -> Markup:
    """A plot's area with its axes. Every second tick of x is of class `extra`: a phone hides it."""
    parts: list[str] = [element("title", label)]
    for tick in y_ticks:
        y = f"{height * (1 - tick.at):.1f}"
        parts.append(element("line", class_="grid", x1="0", x2="100%", y1=y, y2=y))
        parts.append(element("text", tick.text, class_="y", x="-7", y=y, dy="0.32em"))
    parts.extend(body)
    parts.append(element("line", class_="axis", x1="0", x2="100%", y1=height, y2=height))
    parts.extend(_x_labels(x_ticks, height))
    return element(
        "svg", *parts, class_="plot", role="img", aria_label=label, height=f"{height + AXIS_HEIGHT}"
    )


def _x_labels(ticks: Sequence[Tick], top: float) -> Iterable[Markup]:
    for number, tick in enumerate(ticks):
        x, kind = share_of(tick.at, 1), " extra" if number % 2 else ""
        yield element("line", class_="axis", x1=x, x2=x, y1=top, y2=top + 4)
        yield element("text", tick.text, class_=f"x{kind}", x=x, y=top + 16)


def stacked_bar(parts: Sequence[tuple[str, float, str]], label: str) -> Markup:
    """Shares of a whole, side by side, as boxes: these give each part that is there a width that
    is seen. Each part: name, size, class."""
    whole = sum(max(0.0, size) for _, size, _ in parts)
    boxes = [
        element(
            "span",
            class_=kind,
            style=f"flex-grow:{size:.10g}",
            title=f"{name}: {count(size)} ({percent(size / whole)})",
        )
        for name, size, kind in parts
        if size > 0
    ]
    return element("div", *boxes, class_="stack", role="img", aria_label=label)


def bar(scale: Scale, value: float, title: str, kind: str) -> Markup:
    """A horizontal bar from 0 to the value."""
    return _row(scale, title, [_bar(scale, value, kind)])


def interval_bar(scale: Scale, interval: Mapping[str, float], title: str, kind: str) -> Markup:
    """A bar to the estimate, and over it the line of its interval."""
    low, mid, high = interval["low"], interval["mid"], interval["high"]
    drawn = [_bar(scale, mid, kind)]
    if low < high:
        drawn += _whisker(scale, low, high)
    return _row(scale, title, drawn)


def span_and_dot(
    scale: Scale, low: float, high: float, dot: float | None, title: str, is_final: bool
) -> Markup:
    """A box from low to high and a dot; a hollow one is not the last word."""
    x, width = scale.x(low), share_of(scale.at(high) - scale.at(low), 1)
    y, height, middle = BAR_HEIGHT / 2 - 5, 10, BAR_HEIGHT / 2
    drawn = [element("rect", class_="planned", x=x, width=width, y=y, height=height, rx=2)]
    if dot is not None:
        kind = "dot" if is_final else "dot hollow"
        drawn.append(element("circle", class_=kind, cx=scale.x(dot), cy=middle, r=5))
    return _row(scale, title, drawn)


def axis_row(scale: Scale) -> Markup:
    """What stands beneath bars of this scale."""
    return element(
        "svg", *_x_labels(scale.ticks(), 0), class_="row", aria_hidden="true", height=AXIS_HEIGHT
    )


def _row(scale: Scale, title: str, drawn: Sequence[str]) -> Markup:
    lines = [
        element("line", class_="axis" if tick.at == scale.at(0) else "grid", x1=x, x2=x, y2="100%")
        for tick in scale.ticks()
        for x in [share_of(tick.at, 1)]
    ]
    content = [element("title", title), *lines, *drawn]
    return element("svg", *content, class_="row", role="img", aria_label=title, height=BAR_HEIGHT)


def _bar(scale: Scale, value: float, kind: str) -> Markup:
    begin, end = sorted((scale.at(0), scale.at(value)))
    return element(
        "rect", class_=kind, x=share_of(begin, 1), width=share_of(end - begin, 1), y=3, height=12
    )


def _whisker(scale: Scale, low: float, high: float) -> list[Markup]:
    left, right, middle = scale.x(low), scale.x(high), BAR_HEIGHT / 2
    ends = [(left, right, middle, middle), (left, left, 5, 13), (right, right, 5, 13)]
    return [
        element("line", class_="whisker", x1=x1, x2=x2, y1=y1, y2=y2) for x1, x2, y1, y2 in ends
    ]


def histogram(buckets: Sequence[Mapping[str, Any]], label: str, kind: str) -> Markup:
    """Rows by length, on a logarithmic axis; each bucket reaches from its `from` to its `to`. A
    bucket of length 0 stands to the left of the axis' begin."""
    starts = [bucket["from"] for bucket in buckets if bucket["from"] > 0]
    ends = [bucket["to"] + 1 for bucket in buckets if bucket["from"] > 0]
    has_zero = any(bucket["from"] <= 0 for bucket in buckets)
    low = math.log2(min(starts, default=1)) - (0.75 if has_zero else 0.1)
    high = max(math.log2(max(ends, default=2)) + 0.1, low + 1)
    rows = Scale.over(bucket["rows"] for bucket in buckets)

    def at(length: float) -> float:
        return (math.log2(length) - low) / (high - low)

    drawn = []
    for bucket in buckets:
        first, last = bucket["from"], bucket["to"]
        begin, end = (at(first), at(last + 1)) if first > 0 else (0.0, 0.5 / (high - low))
        height = PLOT_HEIGHT * rows.at(bucket["rows"])
        lengths = count(first) if first == last else f"{count(first)} to {count(last)}"
        title = element("title", f"{lengths} tokens: {count(bucket['rows'])} rows")
        drawn.append(
            element(
                "rect", title, class_=kind, x=share_of(begin, 1), width=share_of(end - begin, 1),
                y=f"{PLOT_HEIGHT - height:.1f}", height=f"{height:.1f}",
            )
        )  # fmt: skip
    ticks = [Tick(at(length), short(length)) for length in _powers(2**low, 2**high)]
    if has_zero:
        ticks = [Tick(0.25 / (high - low), "0"), *(tick for tick in ticks if tick.at > 0.12)]
    return frame(label, drawn, ticks, rows.ticks(4))


def _powers(low: float, high: float) -> list[float]:
    """Round lengths between two: powers of ten, with what is between if these are few."""
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        found = [
            factor * 10.0**power
            for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
            for factor in factors
            if low <= factor * 10.0**power <= high and factor * 10.0**power >= 1
        ]
        if len(found) >= 4:
            break
    return found
