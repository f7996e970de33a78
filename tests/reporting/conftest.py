"""Jobs that run in this process, without Ray on the echo engine, and checks of their reports."""

from __future__ import annotations

import io
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

import pipeline.cluster
import pipeline.publishing
import pipeline.report.reporter
import pipeline.run
import pipeline.worker
from jobs import load_task
from jobs.translate import Translate
from pipeline.accounting import NOTHING_USED, Usage
from pipeline.config import JobConfig
from pipeline.errors import RowFailed
from pipeline.plan import Plan
from pipeline.records import Output, Receipt
from pipeline.report.reporter import write_report
from pipeline.retry import Retry
from pipeline.run import Summary, run_job
from pipeline.status import Status, read_status
from pipeline.storage import Folder
from tests.conftest import make_job, make_plan_of, write_table
from tests.faults.without_ray import ONE, InTurn, no_cluster, receipts_here


class Job:
    """Translates a few files in this process: units of three rows."""

    def __init__(self, folder: Path, **changes: dict[str, Any]) -> None:
        self.folder = folder
        limits = {"limits": {"max_failed_fraction": 1.0}}
        changes["input"] = {"rows_per_unit": 3} | changes.get("input", {})
        self.config: JobConfig = make_job(folder, **limits, **changes)
        self.output = Folder(self.config.output.path)

    def write(self, name: str, texts: list[str | None]) -> None:
        write_table(self.folder / "in" / name, {"text": pa.array(texts, pa.string())})

    def run(self, retry: Retry | None = None) -> Summary:
        return run_job(self.config, Console(file=io.StringIO()), retry)

    def write_report(self) -> dict[str, Any]:
        """As `axbatch report` does."""
        identity = make_plan_of(self.config).identity
        return write_report(self.config, load_task(self.config), identity, self.output)

    @property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = self.read("report.json")
        return report

    def read(self, name: str) -> Any:
        return json.loads(self.text(name))

    def text(self, name: str) -> str:
        return self.output.read(f"_axbatch/{name}").decode()

    def records(self) -> list[str]:
        return [entry.path for entry in self.output.list("_axbatch/runs")]

    def status(self) -> Status:
        return read_status(make_plan_of(self.config), self.output)

    def rows(self) -> list[dict[str, Any]]:
        """Of all published files."""
        paths = [e.path for e in self.output.list() if not e.path.startswith("_axbatch")]
        return [
            row
            for path in paths
            for row in pq.read_table(pa.BufferReader(self.output.read(path))).to_pylist()
        ]

    def check(self, report: dict[str, Any]) -> None:
        """That its rows and tokens are those of the published files, which are all."""
        rows = self.rows()
        statuses = Counter(row["_status"] for row in rows)
        assert report["rows"] == {
            "all": len(rows),
            "done": len(rows),
            **{status: statuses[status] for status in ("ok", "rejected", "failed")},
            "waiting": 0,
        }
        used = usage_of(rows)
        tokens = report["tokens"]
        assert (tokens["requests"], tokens["prompt"]) == (used.requests, used.prompt_tokens)
        assert (tokens["cached"], tokens["completion"]) == (
            used.cached_tokens, used.completion_tokens,
        )  # fmt: skip
        not_ok = Counter(row["_reason"].partition(":")[0] for row in rows if row["_reason"])
        assert {each["reason"]: each["rows"] for each in report["reasons"]} == not_ok
        seen = sum(bucket["rows"] for bucket in report["lengths"]["prompt"])
        assert seen == sum(row["_usage"]["prompt_tokens"] > 0 for row in rows)


def usage_of(rows: list[dict[str, Any]]) -> Usage:
    total = NOTHING_USED
    for row in rows:
        total += Usage(**row["_usage"])
    return total


def in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (pipeline.report.reporter, pipeline.publishing):
        monkeypatch.setattr(module, "ThreadPoolExecutor", InTurn)


def leave_empty(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `leave_ray_out` does, for one test, in one thread, and with this process's output."""
    monkeypatch.setattr(pipeline.cluster, "ray_cluster", no_cluster)
    monkeypatch.setattr(pipeline.cluster, "receipts", receipts_here)
    monkeypatch.setattr(pipeline.cluster, "machines", set)
    monkeypatch.setattr(pipeline.cluster, "replica_resources", lambda job, lane, units: ONE)
    monkeypatch.setattr(pipeline.worker, "guard_children", lambda lock: None)
    for module in (pipeline.run, pipeline.worker):
        monkeypatch.setattr(module, "redirect_output", leave_empty)
    numbers = itertools.count(1)
    # Two runs of a test may begin in one second; their order is that of their names.
    monkeypatch.setattr(pipeline.run, "new_run_id", lambda: f"run-{next(numbers):03d}")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Two files, with rows of which the tenth has no text."""
    job = Job(tmp_path)
    job.write("a.parquet", [f"a text {n}" if n % 10 else None for n in range(20)])
    job.write("b.parquet", [f"b text {n}" if n % 10 else None for n in range(11)])
    return job


def stop_after(monkeypatch: pytest.MonkeyPatch, receipts: int, error: BaseException) -> None:
    def some(plan: Plan, columns: list[str], spec: Any) -> Iterator[Receipt]:
        yield from itertools.islice(receipts_here(plan, columns, spec), receipts)
        raise error

    monkeypatch.setattr(pipeline.cluster, "receipts", some)


def fail_on(monkeypatch: pytest.MonkeyPatch, is_bad: Callable[[str], bool]) -> None:
    """After the engine has worked for them."""
    translate = Translate.run

    async def run(self: Translate, row: Any, generate: Any) -> Output:
        output = await translate(self, row, generate)
        if is_bad(str(row["text"])):
            raise RowFailed("engine_error")
        return output

    monkeypatch.setattr(Translate, "run", run)


def captured(monkeypatch: pytest.MonkeyPatch, job: Job) -> list[tuple[dict[str, Any], Status]]:
    """Each report that is stored, and what storage alone says at that moment."""
    reports: list[tuple[dict[str, Any], Status]] = []
    store = pipeline.report.reporter.store_report

    def capture(report: dict[str, Any], output: Folder) -> None:
        reports.append((report, job.status()))
        store(report, output)

    monkeypatch.setattr(pipeline.report.reporter, "store_report", capture)
    return reports
