"""How figures are written for a reader: counts, shares, spans of time, money, moments.

None is what is not known, and is written as a dash.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime

UNKNOWN = "–"

MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86400


def count(value: float | None) -> str:
    """1234567 is 1,234,567."""
    return UNKNOWN if value is None else f"{value:,.0f}"


def short(value: float) -> str:
    """For axes: 1500 is 1.5k, 2000000 is 2M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def counted(number: int, thing: str) -> str:
    """1 text, 2 texts."""
    return f"{count(number)} {thing}" + ("s" if number != 1 else "")


def rate(value: float | None) -> str:
    """Three significant digits, more before the point."""
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(share: float | None) -> str:
    """0.341 is 34.1%. What is not all, or not nothing, is never written as if it were."""
    if share is None:
        return UNKNOWN
    if 0 < share < 0.001:
        return "under 0.1%"
    if 0.999 < share < 1:
        return "over 99.9%"
    text = f"{100 * share:.1f}".removesuffix(".0").replace("-", "−")
    return "0%" if text == "−0" else f"{text}%"


def span(seconds: float | None) -> str:
    """The two largest units: 4000 is 1 h 07 min."""
    if seconds is None:
        return UNKNOWN
    if seconds < 10:
        return f"{seconds:.1f} s".replace(".0 ", " ")
    whole = round(seconds)
    if whole < MINUTE_S:
        return f"{whole} s"
    if whole < HOUR_S:
        minutes, rest = divmod(whole, MINUTE_S)
        return f"{minutes} min {rest:02} s" if rest else f"{minutes} min"
    if whole < DAY_S:
        hours, rest = divmod(round(whole / MINUTE_S), 60)
        return f"{hours} h {rest:02} min" if rest else f"{hours} h"
    days, rest = divmod(round(whole / HOUR_S), 24)
    return f"{days} d {rest} h" if rest else f"{days} d"


def about(seconds: float) -> str:
    """A span that is a guess: in whole minutes, if it has any."""
    return span(seconds if seconds < MINUTE_S else MINUTE_S * round(seconds / MINUTE_S))


def hours(seconds: float) -> str:
    """44640 is 12.4, with more places where there is little."""
    value = seconds / HOUR_S
    return f"{value:,.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def money(value: float | None, currency: str) -> str:
    """Two places; below one unit two significant digits, if these are more."""
    if value is None:
        return UNKNOWN
    size = abs(value)
    if size >= 100_000:
        places = 0
    elif 0 < size < 0.1:
        places = min(8, 1 - math.floor(math.log10(size)))
    else:
        places = 2
    return f"{value:,.{places}f} {currency}".replace("-", "−", 1)


def moment(written: str | None) -> str:
    """An ISO 8601 time, in UTC and to the minute; what is none stays as it is."""
    if written is None:
        return UNKNOWN
    try:
        time = datetime.fromisoformat(written)
    except ValueError:
        return written
    if time.tzinfo is None:
        return f"{time:%Y-%m-%d %H:%M}"
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def estimate(value: float) -> str:
    """A count that is not exact: no more digits than it is worth."""
    return short(value) if abs(value) >= 10_000 else count(value)


def between(interval: Mapping[str, float]) -> str:
    """A count and its 90% interval, as accounting.Interval has them; exact if both ends meet."""
    low, mid, high = interval["low"], interval["mid"], interval["high"]
    if low == high:
        return count(mid)
    return f"{estimate(mid)} ({estimate(low)} to {estimate(high)})"


def percent_between(interval: Mapping[str, float]) -> str:
    """The same of a share."""
    low, mid, high = (percent(interval[key]) for key in ("low", "mid", "high"))
    return mid if low == high else f"{mid} ({low} to {high})"
