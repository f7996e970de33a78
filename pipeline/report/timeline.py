"""A run over time: rows and tokens per second, what each replica did, and what happened to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any, NamedTuple

from markupsafe import Markup

from pipeline.report.plots import PLOT_HEIGHT, Scale, Tick, element, frame, share_of
from pipeline.wording import DAY_S, HOUR_S, MINUTE_S, count, percent, rate, span

MOST_REPLICAS = 32
"""That are drawn each for itself; of more, the slowest and the fastest."""
EXTREMES = 8
"""How many of either, and of those with events."""
HINTS = 60
"""Places of a plot that tell their figures."""
STRIP = 14
"""Height of one replica's busy strip."""
LEVELS = 6
"""Shades of a busy strip."""
STEPS_S = (
    1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800,
    *(h * HOUR_S for h in (1, 2, 3, 6, 12)), *(d * DAY_S for d in (1, 2, 5, 10, 20, 50)),
)  # fmt: skip


@dataclass(frozen=True)
class Replica:
    """What a replica did; lists have a value for each bin."""

    name: str
    from_s: float
    to_s: float
    rows: Sequence[int]
    prompt: Sequence[int]
    """Tokens."""
    completion: Sequence[int]
    """Tokens."""
    busy: Sequence[float | None]
    """Share of the bin in which the engine had work; None if that is not known."""

    @property
    def rows_per_s(self) -> float:
        """While it was up."""
        return sum(self.rows) / max(1e-9, self.to_s - self.from_s)

    @property
    def busy_share(self) -> float | None:
        known = [busy for busy in self.busy if busy is not None]
        return sum(known) / len(known) if known else None


class Group(NamedTuple):
    """Marks that stand too close together for a number each."""

    at: float
    text: str


class Timeline:
    """Of one run. `seconds` is all that the axis shows."""

    def __init__(self, run: Mapping[str, Any]) -> None:
        data = run["timeline"] or {"bin_s": 1, "replicas": [], "marks": []}
        self.bin_s: float = data["bin_s"]
        self.bins = max((len(each["rows"]) for each in data["replicas"]), default=0)
        self.seconds = self.bins * self.bin_s
        self.marks: list[Mapping[str, Any]] = sorted(
            data["marks"] or [], key=lambda mark: float(mark["at_s"])
        )
        names = [each.name for each in fields(Replica)]
        self.replicas = [
            Replica(**{name: each[name] for name in names} | {"to_s": self._end(each)})
            for each in data["replicas"]
        ]
        # The last bin is as long as the run was in it; a moment is too little for a rate.
        begun = (run["wall_s"] or self.seconds) - (self.bins - 1) * self.bin_s
        self._last_bin_s = min(self.bin_s, max(self.bin_s / 4, begun))

    def _end(self, replica: Mapping[str, Any]) -> float:
        """One that is still up has none."""
        return self.seconds if replica["to_s"] is None else float(replica["to_s"])

    def __bool__(self) -> bool:
        return bool(self.bins)

    @property
    def shown(self) -> list[tuple[int, Replica]]:
        """The replicas that are drawn one by one, with their numbers: in their order, or where
        they are too many, the slowest, those that events happened to, and the fastest."""
        numbered = list(enumerate(self.replicas, 1))
        if len(numbered) <= MOST_REPLICAS:
            return numbered
        numbered.sort(key=lambda each: each[1].rows_per_s)
        marked = {mark["replica"] for mark in self.marks}
        between = [each for each in numbered[EXTREMES:-EXTREMES] if each[1].name in marked]
        return numbered[:EXTREMES] + between[:EXTREMES] + numbered[-EXTREMES:]

    @property
    def is_crowded(self) -> bool:
        return len(self.replicas) > MOST_REPLICAS

    @property
    def knows_busy(self) -> bool:
        return any(replica.busy_share is not None for replica in self.replicas)

    def rows_plot(self) -> Markup:
        """Rows per second: a band for each replica, or one for all."""
        if self.is_crowded:
            series = [self._total(replica.rows for replica in self.replicas)]
        else:
            series = [self._per_second(replica.rows) for replica in self.replicas]
        kinds = ["band other" if number % 2 else "band" for number in range(len(series))]
        return self._stacked("Rows per second", list(zip(kinds, series, strict=True)), "rows/s")

    def extremes_plot(self) -> Markup:
        """Rows per second of the slowest and the fastest replica, and of the mean of all."""
        by_speed = sorted(self.replicas, key=lambda replica: replica.rows_per_s)
        total = self._total(replica.rows for replica in self.replicas)
        lines = {
            "mean": [value / len(self.replicas) for value in total],
            "slowest": self._per_second(by_speed[0].rows),
            "fastest": self._per_second(by_speed[-1].rows),
        }
        scale = Scale.over(value for line in lines.values() for value in line)
        drawn = [
            element("path", class_=f"line {kind}", d=_steps(line, scale, closed=False))
            for kind, line in lines.items()
        ]
        label = "Rows per second of one replica: the slowest, the mean, the fastest"
        return self._plot(label, drawn, scale, self._hints(lines, "rows/s"))

    def tokens_plot(self) -> Markup:
        """Tokens per second, in and out, of all replicas."""
        out = self._total(replica.completion for replica in self.replicas)
        into = self._total(replica.prompt for replica in self.replicas)
        return self._stacked("Tokens per second", [("out", out), ("in", into)], "tokens/s")

    def busy_plot(self) -> Markup:
        """A strip for each replica, the darker the busier; a cross where it was lost."""
        height = STRIP * len(self.shown)
        strips = [self._strip(place, *each) for place, each in enumerate(self.shown)]
        area = element(
            "svg", *strips, width="100%", height=height, preserveAspectRatio="none",
            viewBox=f"0 0 {self.bins} {height}",
        )  # fmt: skip
        places = {replica.name: (place, replica) for place, (_, replica) in enumerate(self.shown)}
        events = [
            self._event(mark, *places[mark["replica"]])
            for mark in self.marks
            if mark["replica"] in places
        ]
        numbers = [
            Tick(1 - (place + 0.5) / len(self.shown), str(number))
            for place, (number, _) in enumerate(self.shown)
        ]
        label = "How busy each replica's engine was"
        return frame(label, [area, *events], self._time_ticks(), numbers, height)

    def _event(self, mark: Mapping[str, Any], place: int, replica: Replica) -> Markup:
        """A cross where the replica ends with it, else a ring."""
        title = element("title", f"{span(mark['at_s'])}: {mark['what']}")
        x, y = self._x(mark["at_s"]), STRIP * place + STRIP / 2
        if mark["at_s"] >= replica.to_s - self.bin_s:
            return element("text", "×", title, class_="cross", x=x, y=y, dy="0.33em")
        return element("circle", title, class_="event", cx=x, cy=y, r=4)

    def _strip(self, place: int, number: int, replica: Replica) -> Markup:
        """Runs of bins of one shade are one box; those of a shade are one path."""
        boxes: dict[int, list[str]] = {}
        at = 0
        for level, run in groupby(_level(busy) for busy in replica.busy):
            wide = len(list(run))
            if level is not None:
                boxes.setdefault(level, []).append(f"M{at} {STRIP * place + 1}h{wide}v12h-{wide}z")
            at += wide
        busy = f", {percent(replica.busy_share)} busy" if replica.busy_share is not None else ""
        title = (
            f"{number}: {replica.name}: {span(replica.from_s)} to {span(replica.to_s)}, "
            f"{count(sum(replica.rows))} rows, {rate(replica.rows_per_s)} rows/s{busy}"
        )
        begin, end = replica.from_s / self.bin_s, replica.to_s / self.bin_s
        up = element(
            "rect", class_="up", x=f"{begin:.2f}", width=f"{max(0.0, end - begin):.2f}",
            y=STRIP * place + 1, height=STRIP - 2,
        )  # fmt: skip
        paths = [
            element("path", class_=f"busy{level}", d="".join(boxes[level]))
            for level in sorted(boxes)
        ]
        return element("g", element("title", title), up, *paths)

    def _stacked(self, label: str, series: Sequence[tuple[str, list[float]]], unit: str) -> Markup:
        """Bands, the first at the bottom."""
        sums: list[list[float]] = []
        for _, values in series:
            below = sums[-1] if sums else [0.0] * self.bins
            sums.append([one + two for one, two in zip(below, values, strict=True)])
        scale = Scale.over(sums[-1], room=0.08)
        # Each band is painted down to the axis, and the next lower one over it.
        drawn = [
            element("path", class_=kind, d=_steps(top, scale, closed=True))
            for (kind, _), top in zip(reversed(series), reversed(sums), strict=True)
        ]
        named = {kind: values for kind, values in series if "band" not in kind}
        figures = named if len(named) > 1 else {"": sums[-1]}
        return self._plot(label, drawn, scale, self._hints(figures, unit))

    def _plot(self, label: str, drawn: Sequence[str], scale: Scale, hints: Iterable[str]) -> Markup:
        area = element(
            "svg", *drawn, width="100%", height=PLOT_HEIGHT, preserveAspectRatio="none",
            viewBox=f"0 0 {self.bins} 1000",
        )  # fmt: skip
        return frame(label, [area, *self._mark_lines(), *hints], self._time_ticks(), scale.ticks(4))

    def _hints(self, series: Mapping[str, Sequence[float]], unit: str) -> Iterable[Markup]:
        """Boxes that cannot be seen; a pointer that rests on one is told what is there."""
        step = -(-self.bins // HINTS)
        for begin in range(0, self.bins, step):
            end = min(self.bins, begin + step)
            means = (
                f"{name} {rate(sum(values[begin:end]) / (end - begin))} {unit}".strip()
                for name, values in series.items()
            )
            when = f"{span(begin * self.bin_s)} to {span(end * self.bin_s)}"
            yield element(
                "rect", element("title", f"{when}: {', '.join(means)}"), class_="hint",
                x=share_of(begin, self.bins), width=share_of(end - begin, self.bins),
                height=PLOT_HEIGHT,
            )  # fmt: skip

    def _mark_lines(self) -> Iterable[Markup]:
        for group in self._groups():
            x = share_of(group.at, 1)
            yield element("line", class_="mark", x1=x, x2=x, y1=0, y2=PLOT_HEIGHT)
            yield element("text", group.text, class_="mark", x=x, y=-4)

    def _groups(self) -> list[Group]:
        """Marks by where they stand, written as in the list beneath: 2, or 3–5."""
        groups: list[list[int]] = []
        for number, mark in enumerate(self.marks):
            first = self.marks[groups[-1][0]]["at_s"] if groups else None
            if first is not None and mark["at_s"] - first < 0.03 * self.seconds:
                groups[-1].append(number)
            else:
                groups.append([number])
        return [
            Group(
                min(1.0, max(0.0, self.marks[group[0]]["at_s"] / self.seconds)),
                f"{group[0] + 1}–{group[-1] + 1}" if len(group) > 1 else f"{group[0] + 1}",
            )
            for group in groups
        ]

    def _total(self, series: Iterable[Sequence[int]]) -> list[float]:
        sums = [0] * self.bins
        for values in series:
            for at, value in enumerate(values):
                sums[at] += value
        return self._per_second(sums)

    def _per_second(self, values: Sequence[int]) -> list[float]:
        rates = [value / self.bin_s for value in values] + [0.0] * (self.bins - len(values))
        rates[-1] *= self.bin_s / self._last_bin_s
        return rates

    def _x(self, seconds: float) -> str:
        return share_of(min(self.seconds, max(0.0, seconds)), self.seconds)

    def _time_ticks(self) -> list[Tick]:
        step = next((s for s in STEPS_S if self.seconds / s <= 8), STEPS_S[-1])
        places = range(0, int(self.seconds) + 1, step)
        return [Tick(at / self.seconds, _time(at, step, self.seconds)) for at in places]


def _time(seconds: int, step: int, whole: float) -> str:
    """On an axis: as short as the step allows."""
    if not seconds:
        return "0"
    for unit, name in ((DAY_S, "d"), (HOUR_S, "h")):
        if step % unit == 0:
            return f"{seconds // unit} {name}"
    if whole >= HOUR_S:
        return f"{seconds // HOUR_S}:{seconds % HOUR_S // MINUTE_S:02} h"
    return f"{seconds // MINUTE_S} min" if step % MINUTE_S == 0 else span(seconds)


def _level(busy: float | None) -> int | None:
    return None if busy is None else min(LEVELS - 1, max(0, int(busy * LEVELS)))


def _steps(values: Sequence[float], scale: Scale, closed: bool) -> str:
    """A path with a step for each bin, one wide, in an area that is 1000 high."""
    heights = [(y, len(list(run))) for y, run in groupby(_down(scale, value) for value in values)]
    path = "".join(f"V{y}h{wide}" for y, wide in heights)
    return f"M0 1000{path}V1000z" if closed else f"M0 {heights[0][0]}{path}"


def _down(scale: Scale, value: float) -> int:
    return round(1000 * (1 - scale.at(value)))
