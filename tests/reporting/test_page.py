"""The report's page: complete, calm about what is missing, and safe whatever the data says."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from pipeline.config import JobConfig
from pipeline.report.document import environment
from pipeline.report.page import render_page, summary, typical_length
from tests.reporting.reports import (
    REPORTS,
    bare_report,
    crowded_report,
    hostile_report,
    report,
    run_of,
    run_timeline,
    running_report,
)

every_report = pytest.mark.parametrize("make", REPORTS.values(), ids=REPORTS.keys())


def svgs(page: str) -> Iterator[ElementTree.Element]:
    """Outermost ones. They are parsed as XML, so each is well-formed."""
    depth, begin = 0, 0
    for tag in re.finditer(r"<(/?)svg\b", page):
        if not tag.group(1):
            begin = begin if depth else tag.start()
            depth += 1
        else:
            depth -= 1
            if not depth:
                yield ElementTree.fromstring(page[begin : tag.end() + 1])  # noqa: S314


class Tags(HTMLParser):
    """All elements of a page, and whether they are closed in order."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def sections(page: str) -> list[str]:
    return re.findall(r'<section id="(\w+)">', page)


@every_report
def test_page_is_well_formed(make: Any) -> None:
    page = render_page(make())
    assert page.startswith("<!doctype html>")
    assert not Tags(page).open
    for svg in svgs(page):
        assert svg.findall("title") or svg.get("aria-hidden")
    page.encode("utf-8")


@every_report
def test_page_needs_no_network_and_runs_no_script(make: Any) -> None:
    page = render_page(make())
    for tag, attributes in Tags(page).tags:
        assert tag not in ("script", "iframe", "object", "embed", "img", "form", "base")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                assert value in ("data:,",) or (value or "").startswith("#")
    style = page.partition("<style>")[2].partition("</style>")[0]
    assert "@import" not in page
    assert "url(" not in style
    assert "://" not in style


def test_every_link_leads_to_a_section() -> None:
    page = render_page(report())
    assert re.findall(r'href="#(\w+)"', page) == sections(page)


def test_hostile_strings_are_only_text() -> None:
    page = render_page(hostile_report())
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]", page)


def test_sections_in_order() -> None:
    assert sections(render_page(report())) == [
        "time", "lengths", "texts", "money", "tokens", "reasons", "plan", "runs", "environment",
        "samples",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ({"reasons": []}, {"reasons"}),
        ({"lengths": {"prompt": [], "completion": []}}, {"lengths"}),
        ({"texts": []}, {"texts"}),
        ({"money": None}, {"money"}),
        ({"plan": None}, {"plan"}),
        ({"runs": []}, {"time", "runs"}),
        ({"runs": [run_of(run_timeline(0, 0, killed=False))]}, {"time"}),
        ({"environment": []}, {"environment"}),
        ({"samples": []}, {"samples"}),
    ],
)
def test_a_section_without_data_is_not_there(changes: dict[str, Any], gone: set[str]) -> None:
    complete = sections(render_page(report()))
    assert set(complete) - set(sections(render_page(report(**changes)))) == gone


def test_page_of_nothing() -> None:
    page = render_page(bare_report())
    assert not sections(page)
    assert "0 of 0 rows done (0%), 0 ok." in page


@pytest.mark.parametrize(
    "path",
    [
        ("tokens", "wasted", "lost"),
        *(("time", key) for key in ("gpu_s", "busy_share", "eta_s")),
        *(("texts", 0, key) for key in ("model", "baseline", "saving")),
        *(("money", key) for key in ("basis", "cost", "cost_to_come", "compared")),
        *(("money", "compared", 0, key) for key in ("date", "difference", "share")),
        *(("plan", key) for key in ("seconds", "cost")),
        ("runs", 0, "timeline"),
        ("runs", 0, "started"),
        ("runs", 0, "exit_code"),
        ("runs", 0, "timeline", "replicas", 0, "to_s"),
        ("runs", 0, "timeline", "marks"),
    ],
    ids=str,
)
def test_nulls_are_left_out(path: tuple[Any, ...]) -> None:
    example = report()
    *parents, last = path
    place: Any = example
    for key in parents:
        place = place[key]
    place[last] = None
    page = render_page(example)
    assert "None" not in page
    assert not Tags(page).open


def test_page_is_the_same_each_time() -> None:
    assert render_page(report()) == render_page(report())


def test_page_is_small() -> None:
    example = report(runs=[run_of(run_timeline(8, 240, killed=False))])
    assert len(render_page(example).encode()) < 200_000
    assert len(render_page(crowded_report()).encode()) < 300_000


def test_summary_of_a_job_that_is_done() -> None:
    assert summary(report()) == (
        "1,000,000 rows, 993,120 ok, 12.4 GPU-hours, 31.00 USD; "
        "the same by GPT-4o batch: 92.40 USD."
    )


def test_summary_of_a_job_that_runs() -> None:
    assert summary(running_report()) == (
        "17,212 of 40,000 rows done (43%), 17,200 ok, 1 h 37 min; about 22 min to go."
    )


@pytest.mark.parametrize(
    "text",
    [
        "6,413", "467", "121,000,000", "372,000",                    # rows and tokens
        "181.2M (180M to 182.5M) tokens",           # texts
        "34% (33.1% to 34.9%)", "−2.2% (−2.9% to −1.5%)",
        "31.00 USD", "0.031 USD", "61.40 USD (66.5%)", "−25.46 USD",  # money
        "56.33M fewer tokens, which are 281.67 USD at GPT-4o batch&#39;s price", "mostly Hangul",
        "112,345,678", "planned 92M to 110M; 2.1% above",
        "planned 26.00 USD to 36.00 USD; inside", "96.8%", "2 runs",
        "news-0003.parquet</bdi> row 20,480",
        "20261125T170000Z-77aa01", "2026-11-25 17:00 UTC", ">130<",
        "engine gone", "8 x NVIDIA H100 80GB HBM3", "산업부는", "2026-11-25 18:45 UTC",
    ],
)  # fmt: skip
def test_page_says(text: str) -> None:
    assert text in render_page(report())


def test_plan_of_a_running_job_is_projected() -> None:
    page = render_page(running_report())
    assert "130,000,000 so far, 302.1M at this rate" in page
    assert "projected from the 43% of the rows" in page


def test_plan_is_compared_row_for_row_where_the_input_has_grown_since() -> None:
    example = report()
    example["rows"] |= {"all": 2_000_000, "done": 2_000_000, "ok": 1_993_120}
    example["tokens"] |= {"prompt": 602_469_134, "completion": 224_691_356}
    page = render_page(example)
    assert "602,469,134 in all, 301.2M for as many rows as were planned" in page
    assert "planned 295M to 305M; inside" in page
    assert "planned 92M to 110M; 2.1% above" in page
    assert "scaled to as many rows: 2,000,000 are done" in page
    assert "scaled to as many rows" not in render_page(report())


@pytest.mark.parametrize(("workers", "shown"), [(3, "3"), (11, "8")])
def test_environment_tells_replicas_that_were_there(workers: int, shown: str) -> None:
    job = JobConfig.model_validate({
        "name": "x", "task": {"kind": "translate"}, "input": {"path": "in"},
        "output": {"path": "out", "column": "ko"}, "model": {"id": "m"},
        "cluster": {"accelerator": "H100"},
    })  # fmt: skip
    run = {"workers": workers, "replicas": 8, "gpus_per_replica": 2}
    assert dict(environment(job, [run]))["replicas"] == f"{shown}, each with 2 GPU(s), H100"


def test_typical_length() -> None:
    buckets = [{"from": 1, "to": 1, "rows": 50}, {"from": 64, "to": 76, "rows": 50}]
    assert (typical_length(buckets, 0.5), typical_length(buckets, 0.95)) == ("1", "76")
