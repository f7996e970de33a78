"""From a sample to all rows: sums with the interval in which they lie nine times in ten."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipeline.accounting import Z90, Interval
from pipeline.forecast.sketch import SketchedRow

NOTHING = Interval(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Scale:
    """From the sample to all rows."""

    rows: Sequence[SketchedRow]
    of: int
    share: float
    """Of all rows, in the sample."""

    @property
    def factor(self) -> float:
        return self.of / max(1, len(self.rows))

    def total(self, value: Callable[[SketchedRow], float]) -> Interval:
        """Of all rows: the mean of those in the sample, times their number. Its variance is that
        between neighbouring places: rows beside each other are alike, and what files differ in
        is no matter, as each has its share of the places (Wolter, Introduction to Variance
        Estimation, ch. 8: systematic samples, successive differences)."""
        rows, values = Counter[int](), Counter[int]()
        total = 0.0
        for row in self.rows:
            rows[row.place] += 1
            values[row.place] += value(row)  # type: ignore[assignment]
            total += value(row)
        mean = total / max(1, len(self.rows))
        pairs = [(rows[place], values[place]) for place in rows]
        deviation = deviation_between(pairs, mean) * math.sqrt(max(0.0, 1 - self.share))
        return Interval.around(mean * self.of, self.factor * deviation)

    def share_of(self, is_so: Callable[[SketchedRow], bool]) -> float:
        return sum(map(is_so, self.rows)) / max(1, len(self.rows))

    def count(self, is_so: Callable[[SketchedRow], bool]) -> int:
        """Rows; one at least where any is so."""
        return math.ceil(self.share_of(is_so) * self.of - 1e-6)


def deviation(pairs: Sequence[tuple[float, float]], ratio: float) -> float:
    """Standard deviation of the sum of a sample's values: pairs of a member's size and value, whose
    sums have this ratio."""
    free = len(pairs) - 1
    if free < 1:
        return 0.0
    rest = sum((value - ratio * size) ** 2 for size, value in pairs)
    return math.sqrt(rest * (free + 1) / free) * _student(free)


def deviation_between(pairs: Sequence[tuple[float, float]], ratio: float) -> float:
    """The same from what each differs in from the one before it."""
    free = len(pairs) - 1
    if free < 1:
        return 0.0
    rests = [value - ratio * size for size, value in pairs]
    rest = sum((after - before) ** 2 for before, after in pairwise(rests)) / 2
    # Differences that share a member are not independent: two for three, about.
    return math.sqrt(rest * (free + 1) / free) * _student(2 * free / 3)


def _student(free: float) -> float:
    """By how much Student's 90% are wider than Z90, with so many degrees of freedom (the first
    term of Cornish and Fisher's expansion)."""
    return 1 + (Z90**2 + 1) / (4 * free)


def product(one: Interval, other: Interval) -> Interval:
    """Of two estimates that err independently."""
    if not one.mid or not other.mid:
        return NOTHING
    mid = one.mid * other.mid
    down, up = (math.hypot(one[end] / one.mid - 1, other[end] / other.mid - 1) for end in (0, 2))
    return Interval(max(0.0, mid * (1 - down)), mid, mid * (1 + up))
