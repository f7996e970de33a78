"""The report of a job as one HTML page, which needs nothing else: no network, no script.

`render_page` takes what report.json holds. What is null or empty there is left out of the page.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline import wording
from pipeline.report import comparisons, plots
from pipeline.report.timeline import Timeline
from pipeline.wording import count, money, percent, span

MOST_TIMELINES = 4
"""Runs whose course is drawn: the last ones."""

NOT_IN_XML = re.compile(r"[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that neither XML nor UTF-8 can hold: most control characters, lone surrogates."""


def render_page(report: Mapping[str, Any]) -> str:
    """The page. The same report gives the same page."""
    page = _ENVIRONMENT.get_template("page.html.jinja").render(
        report, summary=summary(report), saving=overall_saving(report["texts"])
    )
    return NOT_IN_XML.sub("\ufffd", page)


def summary(report: Mapping[str, Any]) -> str:
    """The job in one sentence."""
    rows, time, price = report["rows"], report["time"], report["money"]
    is_done = report["state"] == "done" and rows["done"] == rows["all"]
    facts = [f"{count(rows['all'])} rows"]
    if not is_done:
        share = percent(rows["done"] / rows["all"]) if rows["all"] else "0%"
        facts = [f"{count(rows['done'])} of {count(rows['all'])} rows done ({share})"]
    facts.append(f"{count(rows['ok'])} ok")
    if time["gpu_s"] is not None:
        facts.append(f"{wording.hours(time['gpu_s'])} GPU-hours")
    elif time["wall_s"]:
        facts.append(span(time["wall_s"]))
    if price and price["cost"] is not None:
        facts.append(money(price["cost"], price["currency"]))
    sentence = ", ".join(facts)
    if price and price["compared"]:
        other = price["compared"][0]
        sentence += f"; the same by {other['name']}: {money(other['cost'], other['currency'])}"
    if not is_done and time["eta_s"] is not None:
        sentence += f"; about {wording.about(time['eta_s'])} to go"
    return f"{sentence}."


def overall_saving(texts: Iterable[Mapping[str, Any]]) -> float | None:
    """Share of the baseline's tokens that the model needed not, over all texts; None if nothing
    was counted by both."""
    both = [text for text in texts if text["model"] and text["baseline"]]
    model = sum(text["model"]["mid"] for text in both)
    baseline = sum(text["baseline"]["mid"] for text in both)
    return 1 - model / baseline if baseline else None


def status_parts(rows: Mapping[str, int]) -> list[tuple[str, float, str]]:
    """For the bar of rows: name, size, class."""
    names = ("ok", "rejected", "failed", "waiting")
    parts: list[tuple[str, float, str]] = [(name, rows[name], name) for name in names]
    rest = rows["all"] - sum(rows[name] for name in names)
    return [*parts, ("not yet done", max(0, rest), "rest")]


def typical_length(buckets: Sequence[Mapping[str, Any]], share: float) -> str:
    """The longest that this share of the rows has, to a bucket's exactness."""
    wanted, before = share * sum(bucket["rows"] for bucket in buckets), 0
    for bucket in buckets:
        before += bucket["rows"]
        if before >= wanted:
            return count(bucket["to"])
    return wording.UNKNOWN


def timelines(runs: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Timeline]]:
    """The last runs that have a course to draw, the last one first."""
    known = [(run, timeline) for run in reversed(runs) if (timeline := Timeline(run))]
    return known[:MOST_TIMELINES]


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        name: getattr(wording, name)
        for name in ("count", "rate", "percent", "span", "about", "hours", "moment", "money")
    }
    environment.globals |= {
        "stacked_bar": plots.stacked_bar,
        "histogram": plots.histogram,
        "typical_length": typical_length,
        "status_parts": status_parts,
        "token_lines": comparisons.token_lines,
        "saving_lines": comparisons.saving_lines,
        "saving_scale": comparisons.saving_scale,
        "saved_money": comparisons.saved_money,
        "cost_lines": comparisons.cost_lines,
        "plan_lines": comparisons.plan_lines,
        "timelines": timelines,
    }
    return environment


_ENVIRONMENT = _environment()
