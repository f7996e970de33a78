"""The page's bars and timeline draw all rows at their rates, of many replicas the telling ones."""

import re

from pipeline.report.page import render_page
from pipeline.report.timeline import Timeline
from tests.reporting.reports import report, run_of, run_timeline, running_report


def test_all_rows_are_in_the_bar() -> None:
    page = render_page(running_report())
    bar = page.partition('aria-label="Rows by status"')[2].partition("</div>")[0]
    sizes = [float(size) for size in re.findall(r"flex-grow:([\d.]+)", bar)]
    assert sum(sizes) == 40_000
    assert "not yet done: 22,692 (56.7%)" in bar


def test_bands_are_stacked_up_to_the_total() -> None:
    timeline = {
        "bin_s": 10,
        "replicas": [
            {"name": name, "from_s": 0, "to_s": 20, "rows": rows, "prompt": [1, 1],
             "completion": [1, 1], "busy": [None, None]}
            for name, rows in (("a", [10, 20]), ("b", [30, 20]))
        ],
        "marks": [],
    }  # fmt: skip
    plot = Timeline(run_of(timeline)).rows_plot()
    tops = [
        [int(y) for y in re.findall(r"V(\d+)h", path)] for path in re.findall(r'd="(.*?)"', plot)
    ]
    whole, lower = tops
    high = 4 * 1.08  # the axis ends a little above 4 rows/s
    assert whole == [round(1000 * (1 - 4 / high))]
    assert lower == [round(1000 * (1 - rate / high)) for rate in (1, 2)]
    assert "0 s to 10 s: 4 rows/s" in plot


def test_a_last_bin_that_is_not_over_has_the_rate_of_what_it_is() -> None:
    timeline = run_timeline(1, 10, killed=False)
    timeline["replicas"][0]["rows"] = [40] * 9 + [20]
    plot = Timeline(run_of(timeline, wall_s=95)).rows_plot()
    assert "1 min 30 s to 1 min 40 s: 4 rows/s" in plot


def test_strips_without_busy_shares_tell_who_was_up() -> None:
    timeline = run_timeline()
    for replica in timeline["replicas"]:
        replica["busy"] = [None] * 240
    page = render_page(report(runs=[run_of(timeline)]))
    assert "Replicas at work" in page
    assert page.count('class="up"') == 9


def test_marks_close_together_share_a_number() -> None:
    page = render_page(report())
    assert re.findall(r'<text class="mark"[^>]*>([^<]*)<', page)[:2] == ["1–2", "3"]


def test_of_many_replicas_only_the_extremes_are_drawn() -> None:
    timeline = Timeline(run_of(run_timeline(64, 240, killed=False)))
    speeds = [replica.rows_per_s for _, replica in timeline.shown]
    assert len(speeds) == 16
    assert speeds == sorted(speeds)
    assert (speeds[0], speeds[-1]) == (
        min(replica.rows_per_s for replica in timeline.replicas),
        max(replica.rows_per_s for replica in timeline.replicas),
    )


def test_of_many_replicas_those_with_events_are_drawn() -> None:
    timeline = Timeline(run_of(run_timeline(64, 240)))
    marked = {mark["replica"] for mark in timeline.marks if mark["replica"]}
    assert marked <= {replica.name for _, replica in timeline.shown}
