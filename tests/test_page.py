"""The report's page: complete, calm about what is missing, and safe whatever the data says."""

import copy
import math
import random
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from pipeline import wording
from pipeline.config import JobConfig
from pipeline.report.document import environment
from pipeline.report.page import render_page, summary, typical_length
from pipeline.report.timeline import Timeline

HOSTILE = (
    "</title><script>alert(1)</script><img src=http://x.example/a onerror='x'>\"&\x00\x1b\ud800"
)


def interval(low: float, mid: float, high: float) -> dict[str, float]:
    return {"low": low, "mid": mid, "high": high}


def used(requests: int = 0, into: int = 0, cached: int = 0, out: int = 0) -> dict[str, int]:
    return {
        "requests": requests,
        "prompt_tokens": into,
        "cached_tokens": cached,
        "completion_tokens": out,
    }


def run_timeline(
    replicas: int = 8, bins: int = 240, bin_s: int = 10, killed: bool = True, until: float = 1.0
) -> dict[str, Any]:
    """Replicas of slightly different speed; with `killed` the third dies at 40% and one in its
    place starts a little later. Nothing is done after the share `until` of the bins."""
    made = random.Random(1)
    spans = [(0.01 + 0.004 * (number % 8), 1.0) for number in range(replicas)]
    marks = []
    if killed:
        spans[2] = (spans[2][0], 0.4)
        spans.append((0.47, 1.0))
        marks = [
            {"at_s": 0.4 * bins * bin_s, "what": "engine gone", "replica": "node-2:4013"},
            {"at_s": 0.41 * bins * bin_s, "what": "2 units tried again", "replica": None},
            {"at_s": 0.47 * bins * bin_s, "what": "replica started", "replica": "node-8:4073"},
        ]
    drawn = []
    for number, (begin, end) in enumerate(spans):
        is_up = [begin * bins <= at < min(end, until) * bins for at in range(bins)]
        speed = made.uniform(3.5, 4.5) * bin_s
        rows = [max(0, round(made.gauss(speed, speed / 8))) if up else 0 for up in is_up]
        drawn.append({
            "name": f"node-{number}:{4001 + 6 * number + 3 * number // 4 * 2}",
            "from_s": begin * bins * bin_s,
            "to_s": min(end, until) * bins * bin_s,
            "rows": rows,
            "prompt": [300 * each + made.randrange(200) if each else 0 for each in rows],
            "completion": [110 * each + made.randrange(90) if each else 0 for each in rows],
            "busy": [
                (0.35 if made.random() < 0.03 else made.uniform(0.9, 1.0)) if up else None
                for up in is_up
            ],
        })  # fmt: skip
    for mark in marks:
        number = {"node-2:4013": 2, "node-8:4073": 8}.get(str(mark["replica"]))
        if number is not None and number < len(drawn):
            mark["replica"] = drawn[number]["name"]
    return {"bin_s": bin_s, "replicas": drawn, "marks": marks}


def run_of(timeline: dict[str, Any], **changes: Any) -> dict[str, Any]:
    rows = sum(sum(replica["rows"]) for replica in timeline["replicas"])
    bins = max((len(replica["rows"]) for replica in timeline["replicas"]), default=0)
    run = {
        "run": "20261125T180000Z-ab12cd",
        "state": "done",
        "started": "2026-11-25T18:00:00+00:00",
        "wall_s": bins * timeline["bin_s"],
        "rows": rows,
        "exit_code": 0,
        "timeline": timeline,
    }
    return run | changes


def lengths(middle: float, spread: float) -> list[dict[str, int]]:
    """Rows by quarter-octave buckets, as of a log-normal distribution."""
    buckets = []
    for bucket in range(48):
        first, after = (math.ceil(2 ** (edge / 4)) for edge in (bucket, bucket + 1))
        rows = round(1e5 * math.exp(-(((bucket / 4 - math.log2(middle)) / spread) ** 2)))
        if rows and after > first:
            buckets.append({"from": first, "to": after - 1, "rows": rows})
    return buckets


def script(name: str, texts: int, model: int, baseline: int, half: float) -> dict[str, Any]:
    saving = 1 - model / baseline
    return {
        "script": name, "texts": texts, "characters": 250 * texts,
        "share_of_letters": texts / 250, "model": model, "baseline": baseline,
        "saving": interval(saving - half, saving, saving + half),
    }  # fmt: skip


def report(**changes: Any) -> dict[str, Any]:
    """Of a job that is done: a million rows on eight replicas, one of which was killed."""
    example = {
        "name": "news-en-ko", "kind": "translate", "state": "done",
        "made": "2026-11-25T18:45:00+00:00", "output": "s3://corpus/news-ko",
        "identity": "0f3a77c1d2", "version": "0.1.0",
        "rows": {
            "all": 1_000_000, "done": 1_000_000, "ok": 993_120,
            "rejected": 6_413, "failed": 467, "waiting": 0,
        },
        "reasons": [
            {
                "status": "rejected", "reason": "too_long", "rows": 6_001,
                "examples": [
                    {"file": "news-0001.parquet", "row": 1717},
                    {"file": "news-0007.parquet", "row": 4},
                ],
            },
            {
                "status": "rejected", "reason": "not_target_language", "rows": 412,
                "examples": [{"file": "news-0002.parquet", "row": 31}],
            },
            {
                "status": "failed", "reason": "engine_crash", "rows": 467,
                "examples": [{"file": "news-0003.parquet", "row": 20_480}],
            },
        ],
        "tokens": {
            "requests": 1_010_233, "prompt": 301_234_567, "cached": 121_000_000,
            "completion": 112_345_678, "reasoning": 0,
            "wasted": {
                "not_ok": used(10_233, 3_100_000, 1_000_000, 2_800_000),
                "cut": used(412, 130_000, 50_000, 421_000),
                "lost": used(1_240, 372_000, 150_000, 96_000),
            },
        },
        "lengths": {"prompt": lengths(260, 1.1), "completion": lengths(105, 1.4)},
        "baseline": "o200k_base",
        "texts": [
            {
                "column": "en", "role": "input", "texts": 1_000_000, "counted": 25_000,
                "characters": 812_345_678,
                "letters": {"hangul": 0.0, "latin": 0.8, "other": 0.2},
                "model": interval(180e6, 181_234_567, 182.5e6),
                "baseline": interval(176e6, 177_345_678, 178.6e6),
                "saving": interval(-0.029, -0.0219, -0.0148),
                "scripts": [script("latin", 248, 20_440, 20_000, 0.007)],
            },
            {
                "column": "ko", "role": "output", "texts": 993_120, "counted": 24_800,
                "characters": 402_345_678,
                "letters": {"hangul": 0.71, "latin": 0.04, "other": 0.25},
                "model": interval(108e6, 109_345_678, 110.7e6),
                "baseline": interval(164e6, 165_678_901, 167.4e6),
                "saving": interval(0.331, 0.34, 0.349),
                "scripts": [
                    script("hangul", 240, 19_800, 30_000, 0.009),
                    script("latin", 9, 1_020, 1_000, 0.06),
                    script("other", 1, 95, 100, 0.14),
                ],
            },
        ],
        "money": {
            "currency": "USD", "basis": "2.50 USD per GPU-hour", "cost": 31.0,
            "per_thousand_rows": 0.031, "per_million_characters": 0.0382, "cost_to_come": None,
            "compared": [
                {
                    "name": "GPT-4o batch", "date": "2025-07", "currency": "USD", "input": 1.25,
                    "output": 5.0, "cost": 92.4, "difference": 61.4, "share": 0.6645,
                },
                {
                    "name": "GPT-4o mini batch", "date": "2025-07", "currency": "USD",
                    "input": 0.075, "output": 0.3, "cost": 5.54, "difference": -25.46,
                    "share": -4.596,
                },
            ],
        },
        "time": {
            "runs": 2, "wall_s": 5_820, "computing_s": 5_580, "gpus": 8, "gpu_s": 44_640,
            "busy_share": 0.968, "rows_per_s": 179.2, "tokens_per_s": 74_117.0, "eta_s": None,
        },
        "plan": {
            "prompt": interval(295e6, 300e6, 305e6),
            "completion": interval(92e6, 101e6, 110e6),
            "rows": 1_000_000, "seconds": [4_500, 6_600], "cost": [26.0, 36.0],
        },
        "runs": [
            run_of(
                run_timeline(8, 60, killed=False), run="20261125T170000Z-77aa01",
                state="interrupted", exit_code=130, started="2026-11-25T17:00:00+00:00",
            ),
            run_of(run_timeline()),
        ],
        "environment": [
            ["axbatch", "0.1.0"], ["vllm", "0.32.0"], ["ray", "2.60.0"], ["Python", "3.11.9"],
            ["model", "skt/A.X-3.1 at 4f0c1e2"], ["GPU", "8 x NVIDIA H100 80GB HBM3"],
        ],
        "samples": [
            {
                "file": "news-0001.parquet", "row": 17, "status": "ok",
                "texts": [
                    ["en", "The ministry said on Tuesday that exports rose by 4.2 percent."],
                    ["ko", "산업부는 화요일 수출이 4.2% 증가했다고 밝혔다."],
                ],
            },
            {
                "file": "news-0001.parquet", "row": 1717, "status": "rejected",
                "texts": [["en", "(too long)"]],
            },
        ],
    }  # fmt: skip
    return copy.deepcopy(example) | changes


def bare_report() -> dict[str, Any]:
    """Nothing is known yet."""
    return report(
        state="running",
        rows={"all": 0, "done": 0, "ok": 0, "rejected": 0, "failed": 0, "waiting": 0},
        reasons=[],
        tokens={
            "requests": 0, "prompt": 0, "cached": 0, "completion": 0, "reasoning": 0,
            "wasted": {"not_ok": used(), "cut": used(), "lost": None},
        },
        lengths={"prompt": [], "completion": []},
        baseline=None, texts=[], money=None, plan=None, runs=[], environment=[], samples=[],
        time={
            "runs": 1, "wall_s": 0, "computing_s": 0, "gpus": 0, "gpu_s": None,
            "busy_share": None, "rows_per_s": 0, "tokens_per_s": 0, "eta_s": None,
        },
    )  # fmt: skip


def running_report() -> dict[str, Any]:
    """Half way, on one replica, without prices or a baseline."""
    example = report(
        state="running",
        rows={"all": 40_000, "done": 17_212, "ok": 17_200, "rejected": 12, "failed": 0,
              "waiting": 96},
        baseline=None, money=None,
        runs=[run_of(run_timeline(1, 90, killed=False), state="running", exit_code=None)],
    )  # fmt: skip
    example["time"] |= {"gpu_s": None, "busy_share": None, "eta_s": 1_310, "runs": 1}
    example["reasons"] = example["reasons"][:1]
    example["plan"] |= {"rows": 40_000, "cost": None, "seconds": None}
    example["tokens"]["prompt"], example["tokens"]["completion"] = 130_000_000, 40_000_000
    example["tokens"]["cached"] = 0
    for text in example["texts"]:
        text |= {"baseline": None, "saving": None, "scripts": []}
    return example


def crowded_report() -> dict[str, Any]:
    """More replicas than can be drawn one by one."""
    return report(runs=[run_of(run_timeline(64, 240))])


def hostile_report() -> dict[str, Any]:
    """Every string that comes from outside says something else."""

    def spoil(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: spoil(each, name) for name, each in value.items()}
        if isinstance(value, list):
            return [spoil(each, key) for each in value]
        return HOSTILE if isinstance(value, str) and key != "role" else value

    spoilt = spoil(report())
    assert isinstance(spoilt, dict)
    return spoilt


REPORTS = {
    "done": report,
    "running": running_report,
    "bare": bare_report,
    "crowded": crowded_report,
    "hostile": hostile_report,
}
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


def test_typical_length() -> None:
    buckets = [{"from": 1, "to": 1, "rows": 50}, {"from": 64, "to": 76, "rows": 50}]
    assert (typical_length(buckets, 0.5), typical_length(buckets, 0.95)) == ("1", "76")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (wording.percent(0.341), "34.1%"),
        (wording.percent(0.99999), "over 99.9%"),
        (wording.percent(0.00001), "under 0.1%"),
        (wording.percent(-0.25), "−25%"),
        (wording.percent(1), "100%"),
        (wording.percent(-0.0001), "0%"),
        (wording.span(3.25), "3.2 s"),
        (wording.span(59.7), "1 min"),
        (wording.span(4000), "1 h 07 min"),
        (wording.span(90_000), "1 d 1 h"),
        (wording.about(1_310), "22 min"),
        (wording.money(0.0031, "USD"), "0.0031 USD"),
        (wording.money(92.4, "USD"), "92.40 USD"),
        (wording.money(1_234_567, "KRW"), "1,234,567 KRW"),
        (wording.money(None, "USD"), "–"),
        (wording.rate(0.3333), "0.333"),
        (wording.rate(74_117.0), "74,117"),
        (wording.short(1500), "1.5k"),
        (wording.moment("2026-11-25T18:00:00+09:00"), "2026-11-25 09:00 UTC"),
        (wording.moment("soon"), "soon"),
        (wording.moment(None), "–"),
    ],
)
def test_wording(written: str, expected: str) -> None:
    assert written == expected
