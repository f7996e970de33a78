"""The report while a run goes on: each committed row is in it once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pipeline.cluster
import pipeline.report.reporter
from pipeline.errors import Interrupted
from pipeline.plan import Plan
from pipeline.records import Receipt
from pipeline.report.reporter import make_report
from tests.faults.without_ray import receipts_here
from tests.reporting.conftest import Job, captured, in_one_thread

LONG = " ".join(["long"] * 400)
TWO_LANES = {
    "task": {"overflow": "reject"},
    "model": {"engine": {"max_model_len": 400}, "context": "auto"},
}
"""Of a job whose long rows wait for the second lane."""


@pytest.mark.parametrize(
    ("lanes", "stopped"),
    [*(("one", after) for after in (0, 2, 5, 8)), *(("two", after) for after in (0, 2, 5, 9, 10))],
)
def test_live_report_has_each_committed_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lanes: str, stopped: int
) -> None:
    """Of a run that goes on after one that was stopped early, late, or in the second lane."""
    job = Job(tmp_path, **(TWO_LANES if lanes == "two" else {}))
    for name, count in (("a.parquet", 14), ("b.parquet", 10)):
        texts = [f"{LONG} {n}" if n % 4 == 2 else f"{name} {n}" for n in range(count)]
        job.write(name, [None if n == 1 else text for n, text in enumerate(texts)])
    in_one_thread(monkeypatch)
    total = 0

    def receipts(plan: Plan, columns: list[str], spec: Any) -> Iterator[Receipt]:
        nonlocal total
        for receipt in receipts_here(plan, columns, spec):
            total += 1
            yield receipt
            if total == stopped:
                raise Interrupted

    monkeypatch.setattr(pipeline.cluster, "receipts", receipts)
    if stopped:
        with pytest.raises(Interrupted):
            job.run()
    monkeypatch.setattr(pipeline.report.reporter, "EVERY_S", 0.0)
    before = total
    live = captured(monkeypatch, job)
    job.run()
    assert len(live) == total - before + 1
    for report, status in live:
        counts, rows = status.counts, report["rows"]
        assert rows["done"] == counts.rows == rows["ok"] + rows["rejected"] + rows["failed"]
        assert {name: rows[name] for name in counts.statuses} == counts.statuses
        assert rows["waiting"] == counts.deferred
        assert rows["all"] == 24
        assert report["tokens"]["prompt"] == counts.usage.prompt_tokens
        assert report["tokens"]["completion"] == counts.usage.completion_tokens
        texts = {text["column"]: text["texts"] for text in report["texts"]}
        assert texts == {name: each.texts for name, each in counts.account.texts.items()}
        assert len(report["runs"]) == (2 if stopped else 1)
        assert report["tokens"]["engine"]["prompt_tokens"] >= counts.usage.prompt_tokens
    assert [report["state"] for report, _ in live] == ["running"] * (len(live) - 1) + ["done"]
    assert live[-1][0]["rows"]["done"] == 24
    if lanes == "two" and stopped < 10:
        assert max(report["rows"]["waiting"] for report, _ in live) > 0


def test_report_that_is_asked_for_while_a_run_goes_on_says_so(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[str] = []

    def asked(plan: Plan, columns: list[str], spec: Any) -> Iterator[Receipt]:
        for receipt in receipts_here(plan, columns, spec):
            yield receipt
            states.append(job.write_report()["state"])

    monkeypatch.setattr(pipeline.cluster, "receipts", asked)
    in_one_thread(monkeypatch)
    job.run()
    assert {*states[:-1]} == {"running"}
    assert states[-1] == job.report["state"] == "done", "all is published"


def test_reports_in_their_own_thread_meet_no_count_that_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job(tmp_path)
    for name in "abcd":
        job.write(f"{name}.parquet", [f"{name} {'word ' * n}" if n else None for n in range(90)])
    monkeypatch.setattr(pipeline.report.reporter, "EVERY_S", 0.0)
    made: list[str] = []

    def counted(*arguments: Any) -> dict[str, Any]:
        report = make_report(*arguments)
        made.append(report["state"])
        return report

    monkeypatch.setattr(pipeline.report.reporter, "make_report", counted)
    job.run()
    assert "the report" not in capsys.readouterr().err
    assert "running" in made
    job.check(job.report)
