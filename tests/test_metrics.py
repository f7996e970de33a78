"""What workers tell Prometheus, and that infra/grafana.json draws all of it and nothing else."""

from __future__ import annotations

import json
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipeline.metrics
from pipeline.accounting import Usage
from pipeline.meter import NOT_READ, Reading
from pipeline.metrics import Metrics
from pipeline.records import Counts
from tests.runs import Job, Run

DASHBOARD = Path(__file__).resolve().parent.parent / "infra/grafana.json"
LABELS = {"job_name": "news", "lane": "native"}
NAME = re.compile(r"ray_axbatch_\w+")
SELECTION = re.compile(r"(ray_axbatch_\w+)\{([^}]*)\}")
GROUPED = re.compile(r"\bby \(([^)]*)\)")


class Recorder:
    """In the place of ray.util.metrics' three classes, as strict as they are."""

    made: list[Recorder]
    """All since the test began."""
    series: tuple[str, ...] = ("",)
    """What Prometheus adds to the name."""

    def __init__(self, name: str, _description: str, *more: Any) -> None:
        *_, self.keys = more
        self.name = f"ray_{name}"
        self.values: Counter[str] = Counter()
        """By the label that is not every series', or by "" ."""
        self._default_tags: dict[str, str] = {}
        self.made.append(self)

    def set_default_tags(self, tags: dict[str, str]) -> None:
        self._default_tags = tags

    def inc(self, value: float, tags: Mapping[str, str] | None = None) -> None:
        assert value > 0, "Ray refuses to count less than something"
        self.values[self._tag(tags)] += value

    def set(self, value: float, tags: Mapping[str, str] | None = None) -> None:
        self.values[self._tag(tags)] = value

    def _tag(self, tags: Mapping[str, str] | None) -> str:
        given = {**self._default_tags, **(tags or {})}
        assert given.keys() == set(self.keys), "Ray wants a value for every tag key"
        assert given.items() >= LABELS.items()
        return "".join(given[key] for key in given.keys() - LABELS.keys())


class HistogramRecorder(Recorder):
    series = ("_bucket", "_sum", "_count")

    def observe(self, value: float, tags: Mapping[str, str] | None = None) -> None:
        self.values[self._tag(tags)] += 1


def record(max_num_seqs: int = 4) -> tuple[Metrics, dict[str, Recorder]]:
    """A worker's metrics, and by name what they are made of."""
    Recorder.made = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("Counter", "Gauge"):
            patch.setattr(pipeline.metrics, name, Recorder)
        patch.setattr(pipeline.metrics, "Histogram", HistogramRecorder)
        metrics = Metrics(LABELS["job_name"], LABELS["lane"], max_num_seqs)
    return metrics, {each.name: each for each in Recorder.made}


def series_of(recorders: Mapping[str, Recorder]) -> dict[str, set[str]]:
    """The names that Prometheus sees, with their labels; those that Ray adds are not ours."""
    return {
        name + end: {*recorder.keys, *(["le"] if end == "_bucket" else [])}
        for name, recorder in recorders.items()
        for end in recorder.series
    }


def dashboard_queries() -> Iterator[str]:
    """Of its panels, and of the lists to choose from."""
    dashboard = json.loads(DASHBOARD.read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]


def test_dashboard_draws_every_metric_and_no_other() -> None:
    _, recorders = record()
    drawn = {name for query in dashboard_queries() for name in NAME.findall(query)}
    assert drawn <= series_of(recorders).keys()
    for name, recorder in recorders.items():
        assert drawn & {name + end for end in recorder.series}, f"{name} is not drawn"


def test_dashboard_asks_only_for_labels_that_the_metric_has() -> None:
    labels = series_of(record()[1])
    for query in dashboard_queries():
        for name, selection in SELECTION.findall(query):
            assert set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", selection)) <= labels[name], query
        for name in NAME.findall(query):
            for group in GROUPED.findall(query):
                assert set(re.split(r",\s*", group)) <= labels[name], query


def test_dashboard_can_be_imported_and_reads_well() -> None:
    text = DASHBOARD.read_text()
    dashboard = json.loads(text)
    known = {variable["name"] for variable in dashboard["templating"]["list"]} | {"__range"}
    assert set(re.findall(r"\$\{?(\w+)", text)) <= known | {"__all"}
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["title"] and panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}
    taken = Counter(cell for panel in panels for cell in cells(**panel["gridPos"]))
    assert max(taken.values()) == 1, "two panels lie on each other"


def cells(x: int, y: int, w: int, h: int) -> Iterator[tuple[int, int]]:
    assert x + w <= 24, "Grafana's grid has 24 columns"
    return ((column, row) for column in range(x, x + w) for row in range(y, y + h))


def test_growing_readings_add_up_to_the_last_one() -> None:
    metrics, recorders = record(max_num_seqs=4)
    metrics.committed(
        Counts(Counter(ok=7, rejected=1)), 0.5, Reading(Usage(8, 80, 0, 40), 1.5, 2.0), 9
    )
    metrics.committed(Counts(Counter(ok=8)), 3.5, Reading(Usage(16, 170, 64, 90), 3.5, 5.0), 3)
    assert {name: dict(recorder.values) for name, recorder in recorders.items()} == {
        "ray_axbatch_rows_total": {"ok": 15, "rejected": 1},
        "ray_axbatch_tokens_total": {"prompt": 170, "cached": 64, "completion": 90},
        "ray_axbatch_engine_busy_seconds_total": {"": 3.5},
        "ray_axbatch_engine_up_seconds_total": {"": 5.0},
        "ray_axbatch_queue_depth": {"": 0},
        "ray_axbatch_unit_seconds": {"": 2},
    }


STEPS = st.tuples(*[st.integers(0, 50)] * 4, st.integers(1, 50))
"""What an engine does between two readings: three kinds of tokens, seconds busy, seconds up."""


@given(st.lists(STEPS, min_size=1, max_size=6), st.randoms())
def test_readings_add_up_to_the_newest_in_whatever_order_units_are_committed(
    steps: list[tuple[int, ...]], random: Any
) -> None:
    readings = [NOT_READ]
    for prompt, cached, completion, busy, up in steps:
        last = readings[-1]
        usage = last.usage + Usage(1, prompt, cached, completion)
        readings.append(Reading(usage, last.busy_s + busy, last.up_s + up))
    newest = readings[-1]
    told = readings[1:]
    random.shuffle(told)

    metrics, recorders = record()
    for reading in told:
        metrics.committed(Counts(Counter(ok=1)), 1.0, reading, readings.index(reading) + 4)

    def counted(name: str) -> Counter[str]:
        return recorders[f"ray_axbatch_{name}"].values

    assert counted("rows_total") == Counter(ok=len(steps)), "a unit's rows count, early or late"
    assert counted("unit_seconds") == Counter({"": len(steps)})
    assert counted("tokens_total") == Counter(
        prompt=newest.usage.prompt_tokens,
        cached=newest.usage.cached_tokens,
        completion=newest.usage.completion_tokens,
    )
    assert counted("engine_busy_seconds_total") == Counter({"": newest.busy_s})
    assert counted("engine_up_seconds_total") == Counter({"": newest.up_s})
    assert counted("queue_depth") == Counter({"": len(steps)}), "the newest reading's"


@pytest.mark.ray
def test_rays_endpoint_serves_what_the_dashboard_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    wanted = series_of(record()[1])
    served: list[Series] = []

    def serves_all() -> bool:
        served[:] = scrape(run)
        rows = {s.labels["status"]: s.value for s in served if s.name == "ray_axbatch_rows_total"}
        return rows == {"ok": 45, "rejected": 3} and {s.name for s in served} >= wanted.keys()

    run = job_that_stays_at_its_last_row(tmp_path, ok=45, rejected=3).start("run")
    try:
        run.wait_until(serves_all)
    finally:
        run.signal(signal.SIGTERM)
        run.wait()
    assert {series.name for series in served} == wanted.keys()
    for series in served:
        assert series.labels.keys() >= wanted[series.name]
        assert (series.labels["job_name"], series.labels["lane"]) == ("test", "native")


def job_that_stays_at_its_last_row(folder: Path, ok: int, rejected: int) -> Job:
    """All rows but that one are committed at once."""
    job = Job(
        folder,
        model={
            "id": "echo",
            "backend": "echo",
            "engine": {"seconds_per_completion_token": 0.1, "max_num_seqs": 8},
        },
        cluster={"grace_s": 0.1},
        input={"path": str(folder / "in"), "rows_per_unit": 8},
        sampling={"max_tokens": 10_000},
    )
    texts = ["word"] * ok + [None] * rejected
    assert len(texts) % 8 == 0, "the last row is to be a unit of its own"
    job.write_input("a.parquet", pa.table({"en": [*texts, "word " * 5_000]}))
    return job


class Series(NamedTuple):
    """One line of Prometheus' text format: `name{label="value",...} value`."""

    name: str
    labels: dict[str, str]
    value: float

    @classmethod
    def from_line(cls, line: str) -> Series:
        name, _, rest = line.partition("{")
        labels, _, value = rest.rpartition("} ")
        return cls(name, dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value))


def scrape(run: Run) -> list[Series]:
    """Ours that the run's machine serves now; none while Ray has no port yet, or does not answer
    there."""
    sessions = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray"
    files = [*sessions.glob(f"session_*_{run.family()[0].pid}/metrics_export_port_*")]
    port = files[0].read_text() if files else ""
    if not port.isdigit():
        return []
    try:
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
            lines = page.read().decode().splitlines()
    except (OSError, HTTPException):
        return []
    return [Series.from_line(line) for line in lines if line.startswith("ray_axbatch_")]
