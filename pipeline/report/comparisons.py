"""Bars that compare: tokens with a baseline's, costs with others', what came with the plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from pipeline import wording
from pipeline.report import plots
from pipeline.report.plots import Scale
from pipeline.wording import count, money, percent, span


class Line(NamedTuple):
    """One of several bars beneath each other: what it is, the bar, its figures."""

    label: str
    bar: Markup
    figures: str
    note: str = ""


class Lines(NamedTuple):
    """Bars on one axis."""

    lines: list[Line]
    axis: Markup | str = ""


def token_lines(text: Mapping[str, Any], baseline: str | None) -> Lines:
    """The tokens of a text column, by the model's and by the baseline's tokenizer."""
    named = [("this model", text["model"], "model"), (baseline, text["baseline"], "baseline")]
    known = [(str(name), interval, kind) for name, interval, kind in named if interval]
    scale = Scale.over(interval["high"] for _, interval, _ in known)
    lines = []
    for name, interval, kind in known:
        figures = wording.between(interval)
        title = f"{text['column']}, {name}: {count(interval['mid'])} tokens"
        bar = plots.interval_bar(scale, interval, title, kind)
        lines.append(Line(name, bar, f"{figures} tokens"))
    return Lines(lines, plots.axis_row(scale) if lines else "")


def saving_lines(text: Mapping[str, Any], scale: Scale) -> Lines:
    """Tokens that a text column needs not, of all its texts and of those of each script."""
    known = [("all texts", text["saving"], "")] if text["saving"] else []
    known += [
        (_mostly(each["script"]), each["saving"], _sampled(each))
        for each in text["scripts"]
        if each["saving"]
    ]
    lines = []
    for name, saving, note in known:
        figures = wording.percent_between(saving)
        title = f"{text['column']}, {name}: {figures} of the tokens saved"
        lines.append(Line(name, plots.interval_bar(scale, saving, title, "model"), figures, note))
    return Lines(lines, plots.axis_row(scale) if lines else "")


def _mostly(script: str) -> str:
    return "mostly other scripts" if script == "other" else f"mostly {script.title()}"


def _sampled(script: Mapping[str, Any]) -> str:
    return (
        f"{wording.counted(script['texts'], 'text')}, {percent(script['share_of_letters'])} of the "
        f"letters; {count(script['model'])} against {count(script['baseline'])} tokens"
    )


def saving_scale(texts: Iterable[Mapping[str, Any]]) -> Scale:
    """One for all columns, so that they can be compared."""
    savings = [each["saving"] for text in texts for each in (text, *text["scripts"])]
    ends = [saving[end] for saving in savings if saving for end in ("low", "high")]
    return Scale.over(ends, percent)


def saved_money(text: Mapping[str, Any], price: Mapping[str, Any] | None) -> str:
    """What the tokens that a column needs not would cost at the first price list; empty if none is
    known."""
    if not (price and price["compared"] and text["model"] and text["baseline"]):
        return ""
    prices = price["compared"][0]
    saved = text["baseline"]["mid"] - text["model"]["mid"]
    per_million = prices[text["role"]]
    if per_million is None:
        return ""
    worth = money(abs(saved) * per_million / 1e6, prices["currency"])
    tokens = f"{wording.estimate(abs(saved))} {'fewer' if saved >= 0 else 'more'} tokens"
    return f"{tokens}, which are {worth} at {prices['name']}'s price"


def cost_lines(price: Mapping[str, Any]) -> Lines:
    """The job's cost beside what others would take, as far as the currency is the same."""
    same = [each for each in price["compared"] or [] if each["currency"] == price["currency"]]
    known = [("this job", price["cost"], "model")]
    known += [(each["name"], each["cost"], "baseline") for each in same]
    costs = [(name, cost, kind) for name, cost, kind in known if cost is not None]
    scale = Scale.over(cost for _, cost, _ in costs)
    lines = []
    for name, cost, kind in costs:
        figures = money(cost, price["currency"])
        lines.append(Line(name, plots.bar(scale, cost, f"{name}: {figures}", kind), figures))
    return Lines(lines if len(lines) > 1 else [], plots.axis_row(scale))


class Planned(NamedTuple):
    """A figure of the plan (an interval, or its two ends), and what came of it so far."""

    label: str
    plan: Mapping[str, float] | Sequence[float] | None
    actual: float | None
    kind: str = "count"
    """Or span, or the currency."""

    @property
    def ends(self) -> tuple[float, float]:
        if isinstance(self.plan, Mapping):
            return self.plan["low"], self.plan["high"]
        low, high = self.plan or (0, 0)
        return low, high

    @property
    def middle(self) -> float:
        return self.plan["mid"] if isinstance(self.plan, Mapping) else sum(self.ends) / 2

    @property
    def promise(self) -> str:
        return " to ".join(dict.fromkeys(self.write(end, is_exact=False) for end in self.ends))

    def projected(self, done: float) -> float | None:
        """What as many rows as were planned come to, if these take what those did that are done:
        a share of them or, where the input has grown since, more than 1."""
        return self.actual / done if self.actual is not None and done > 0 else None

    def came(self, done: float) -> str:
        if self.actual is None:
            return "not known"
        text, whole = self.write(self.actual), self.projected(done)
        if done == 1 or whole is None:
            return text
        figure = self.write(whole, is_exact=False)
        if done > 1:
            return f"{text} in all, {figure} for as many rows as were planned"
        return f"{text} so far, {figure} at this rate"

    def verdict(self, done: float) -> str:
        (low, high), whole = self.ends, self.projected(done)
        if whole is None:
            return ""
        if whole > high:
            return f"; {percent(whole / high - 1)} above"
        if whole < low:
            return f"; {percent(1 - whole / low)} below"
        return "; inside" if done >= 1 else "; on course"

    def write(self, value: float, is_exact: bool = True) -> str:
        if self.kind == "span":
            return span(value)
        if self.kind == "count":
            return count(value) if is_exact else wording.estimate(value)
        return money(value, self.kind)


def plan_lines(figures: Iterable[Sequence[Any]], done: float) -> Lines:
    """What was planned, and what came, both relative to the middle of the plan. `figures` are the
    fields of Planned; `done` is how many rows are done for each that was planned: unless it is 1
    the actual figures are brought to as many as were planned."""
    planned = [each for each in (Planned(*fields) for fields in figures) if each.ends[1] > 0]
    dots = [each.projected(done) for each in planned]
    places = [
        value / each.middle
        for each, dot in zip(planned, dots, strict=True)
        for value in (*each.ends, dot)
        if value is not None
    ]
    if not places:
        return Lines([])
    scale = Scale.around(places, percent)
    lines = []
    for each, dot in zip(planned, dots, strict=True):
        low, high = (end / each.middle for end in each.ends)
        title = f"{each.label}: planned {each.promise}, actual {each.came(done)}"
        at = None if dot is None else dot / each.middle
        bar = plots.span_and_dot(scale, low, high, at, title, is_final=done >= 1)
        note = f"planned {each.promise}{each.verdict(done)}"
        lines.append(Line(each.label, bar, each.came(done), note))
    return Lines(lines, plots.axis_row(scale))
