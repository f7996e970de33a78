"""The report of whole runs: it says what is on storage, whatever happened to the run."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import pipeline.cluster
import pipeline.forecast.estimate
import pipeline.report.reporter
import pipeline.run
import pipeline.worker
from pipeline.config.model import ModelConfig
from pipeline.engine.echo import EchoEngine
from pipeline.errors import ClusterError, Interrupted
from pipeline.lease import LEASE
from pipeline.report.reporter import PLAN_FILE, read_runs, store_record
from pipeline.retry import Retry
from pipeline.storage import Folder
from tests.conftest import make_plan_of
from tests.faults.without_ray import receipts_here
from tests.reporting.conftest import Job, captured, fail_on, stop_after, usage_of
from tests.runs import Job as CommandLine

KILL = """
import os, sys
import pipeline.report.reporter
from pipeline.cli import main
from pipeline.publishing import Publisher
from tests.faults.without_ray import leave_ray_out

leave_ray_out()
pipeline.report.reporter.EVERY_S = float(sys.argv[2])
received, left = Publisher.received, [int(sys.argv[3])]

def kill(self, receipt):
    received(self, receipt)
    left[0] -= 1
    if left[0] < 0:
        os._exit(77)

Publisher.received = kill
sys.exit(main(["run", sys.argv[1]]))
"""


def test_report_record_and_plan_are_there_and_right(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_on(monkeypatch, lambda text: text.endswith("7"))
    summary = job.run()
    job.check(job.report)
    assert job.report["state"] == "done"
    assert job.report["rows"]["failed"] == 3 and job.report["rows"]["rejected"] == 4
    assert "<title>test: done</title>" in job.text("report.html")
    record = job.read(f"runs/{summary.run}.json")
    assert (record["state"], record["exit_code"]) == ("done", 0)
    assert record["this_run"]["rows"] == record["job"]["rows"] == 31
    used = asdict(usage_of(job.rows()))
    assert record["engine"] == record["committed"] == used
    assert not any(record["lost"].values())
    assert job.read("plan.json")["rows"] == 31
    assert job.report["plan"]["prompt"]["mid"] > 0
    assert "the report" not in capsys.readouterr().err


def test_wasted_are_the_tokens_of_rows_that_are_not_ok(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_on(monkeypatch, lambda text: text.endswith("7"))
    job.run()
    bad = asdict(usage_of([row for row in job.rows() if row["_status"] != "ok"]))
    assert bad["prompt_tokens"] > 0
    assert job.report["tokens"]["wasted"]["not_ok"] == bad


@pytest.mark.parametrize(
    ("error", "state"), [(Interrupted(), "interrupted"), (ClusterError("gone"), "stopped")]
)
def test_run_that_is_cut_short_says_so_and_the_next_one_completes_it(
    job: Job, monkeypatch: pytest.MonkeyPatch, error: BaseException, state: str
) -> None:
    stop_after(monkeypatch, 4, error)
    with pytest.raises(type(error)):
        job.run()
    assert job.report["state"] == state
    assert job.report["rows"]["done"] == job.status().counts.rows == 12
    assert job.report["rows"]["all"] == 31
    assert [run["state"] for run in job.report["runs"]] == [state]
    assert job.read("runs/run-001.json")["exit_code"] is None

    monkeypatch.setattr(pipeline.cluster, "receipts", receipts_here)
    job.run()
    job.check(job.report)
    assert job.report["state"] == "done"
    runs = job.report["runs"]
    assert [run["state"] for run in runs] == [state, "done"]
    assert [run["rows"] for run in runs] == [12, 19]
    engine = job.report["tokens"]["engine"]
    assert engine == asdict(usage_of(job.rows()))


@pytest.mark.parametrize(("every_s", "receipts", "rows"), [(30, 4, 15), (0, 0, 3), (0, 8, 26)])
def test_killed_run_is_reported_as_stopped_and_the_next_one_completes_it(
    job: Job, every_s: float, receipts: int, rows: int
) -> None:
    """With a live report, which says that it runs, and without any."""
    file = job.folder / "job.yaml"
    file.write_text(job.config.model_dump_json(exclude_unset=True))
    command = [sys.executable, "-c", KILL, str(file), str(every_s), str(receipts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 77, done.stderr
    assert job.output.exists(LEASE)
    assert job.output.exists("_axbatch/report.json") == (every_s == 0 and receipts > 0)

    report = job.write_report()
    assert json.loads(json.dumps(report)) == job.report
    assert report["state"] == "stopped"
    assert report["rows"]["done"] == rows
    assert [run["state"] for run in report["runs"]] == ["stopped"]
    assert report["time"]["eta_s"] is None
    assert "<title>test: stopped</title>" in job.text("report.html")

    summary = job.run()
    assert summary.run_counts.rows == 31 - rows
    job.check(job.report)
    assert job.report["state"] == "done"
    assert sorted(run["state"] for run in job.report["runs"]) == ["done", "stopped"]


def test_run_with_nothing_to_do_writes_nothing(job: Job) -> None:
    job.run()
    before = {entry.path: entry for entry in job.output.list("_axbatch")}
    page = job.text("report.html")
    assert job.run().run_counts.rows == 0
    assert {entry.path: entry for entry in job.output.list("_axbatch")} == before
    assert job.text("report.html") == page


@pytest.mark.parametrize("left", ["nothing", "that of a running job"])
def test_run_with_nothing_to_do_makes_up_for_a_killed_ones_report(job: Job, left: str) -> None:
    job.run()
    whole = job.text("report.json")
    if left == "nothing":
        job.output.delete("_axbatch/report.json")
    else:
        halfway = json.dumps({**json.loads(whole), "state": "running"})
        job.output.replace("_axbatch/report.json", halfway.encode())
    assert job.run().run_counts.rows == 0
    assert json.loads(job.text("report.json")) | {"made": ""} == json.loads(whole) | {"made": ""}


def test_retry_leaves_exact_totals_and_what_the_first_attempt_wasted(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as failing:
        fail_on(failing, lambda text: text.endswith(("3", "7")))
        job.run()
    first = job.report
    wasted = usage_of([row for row in job.rows() if row["_status"] == "failed"])
    monkeypatch.setattr(pipeline.report.reporter, "EVERY_S", 0.0)  # and no live report of a retry
    live, kept = captured(monkeypatch, job), []

    def keep(output: Folder, run: str, record: dict[str, Any]) -> None:
        kept.append(record)
        store_record(output, run, record)

    monkeypatch.setattr(pipeline.report.reporter, "store_record", keep)
    job.run(Retry("failed", None))
    assert [report["state"] for report, _ in live] == ["done"]
    assert [record["state"] for record in kept] == ["running"] * (len(kept) - 1) + ["done"]
    done = [record["this_run"]["rows"] for record in kept]
    assert done[0] == 0 < done[1] < done[-1], "it would be missed, should the run be killed"
    job.check(job.report)
    assert job.report["rows"]["failed"] == 0
    assert job.report["tokens"]["wasted"]["not_ok"] == asdict(wasted)
    assert job.report["tokens"]["prompt"] == first["tokens"]["prompt"] + wasted.prompt_tokens
    assert job.report["tokens"]["engine"] == asdict(usage_of(job.rows()))
    assert [run["rows"] for run in job.report["runs"]] == [31, first["rows"]["failed"]]
    columns = {text["column"]: text["texts"] for text in job.report["texts"]}
    assert columns == {"text": 27, "ko": 27}
    assert job.report["plan"] == first["plan"]


def test_what_is_done_again_is_paid_for_again(tmp_path: Path) -> None:
    prices = {"input": 1.0, "output": 1.0}
    job = Job(tmp_path, input={"on_change": "reprocess"}, accounting={"prices": prices})
    job.write("a.parquet", ["one", "two"])
    job.run()
    first = job.report["money"]["cost"]
    job.write("a.parquet", ["three", "four", "five"])
    job.run()
    engine = job.report["tokens"]["engine"]
    paid = engine["prompt_tokens"] + engine["completion_tokens"]
    assert job.report["money"]["cost"] == pytest.approx(paid / 1e6)
    committed = usage_of(job.rows())
    assert paid / 1e6 == pytest.approx(
        first + (committed.prompt_tokens + committed.completion_tokens) / 1e6
    )


def test_job_without_any_run_has_a_report_and_may_run_after_it(job: Job) -> None:
    report = job.write_report()
    assert (report["state"], report["runs"], report["plan"]) == ("stopped", [], None)
    assert report["rows"]["all"] == 31 and report["rows"]["done"] == 0
    assert report["time"]["rows_per_s"] is None
    assert "0 of 31 rows done" in job.text("report.html")
    job.run()
    job.check(job.report)


def test_model_without_a_tokenizer_has_no_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = {"id": "/nowhere/model", "backend": "http", "base_url": "http://127.0.0.1:9/v1"}
    job = Job(tmp_path, model=served)
    job.write("a.parquet", ["a text", "another"])
    echo = ModelConfig(id="echo", backend="echo")
    monkeypatch.setattr(pipeline.run, "check_lanes", lambda model: None)
    monkeypatch.setattr(pipeline.worker, "_start_engine", lambda spec: EchoEngine(echo))

    def unknown(*_: Any) -> Any:
        raise pipeline.forecast.estimate.ModelError("nobody knows its tokenizer")

    monkeypatch.setattr(pipeline.forecast.estimate, "load_tokens", unknown)
    job.run()
    job.check(job.report)
    assert job.read("plan.json")["prompt"] is None
    assert job.report["plan"] is None


def test_last_run_is_the_last_that_ended_by_itself(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert job.status().last_run is None
    stop_after(monkeypatch, 2, Interrupted())
    with pytest.raises(Interrupted):
        job.run()
    assert job.status().last_run is None
    monkeypatch.setattr(pipeline.cluster, "receipts", receipts_here)
    done = job.run().run
    job.write("c.parquet", ["one more"])
    stop_after(monkeypatch, 0, ClusterError("gone"))
    with pytest.raises(ClusterError):
        job.run()
    last = job.status().last_run
    assert last is not None and last["run"] == done
    assert [run["state"] for run in read_runs(job.output)] == ["interrupted", "done", "stopped"]


def test_plan_of_the_first_run_stays(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 2, Interrupted())
    with pytest.raises(Interrupted):
        job.run()
    first = job.output.read(PLAN_FILE)
    monkeypatch.setattr(pipeline.cluster, "receipts", receipts_here)
    job.run()
    assert job.output.read(PLAN_FILE) == first
    assert job.report["plan"]["rows"] == 31


def test_plan_is_that_of_this_job_and_its_cost_that_of_these_prices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prices(currency: str) -> dict[str, Any]:
        return {"accounting": {"prices": {"input": 1.0, "output": 2.0, "currency": currency}}}

    before = Job(tmp_path, task={"instructions": "Be brief."}, **prices("USD"))
    before.write("a.parquet", ["one", "two"])
    stop_after(monkeypatch, 0, ClusterError("the engine did not start"))
    with pytest.raises(ClusterError):
        before.run()
    monkeypatch.setattr(pipeline.cluster, "receipts", receipts_here)
    mended = Job(tmp_path, **prices("USD"))
    mended.run()
    assert before.read("plan.json")["identity"] == make_plan_of(mended.config).identity
    assert mended.report["plan"]["cost"]
    Job(tmp_path, **prices("KRW")).write_report()
    assert mended.report["plan"]["prompt"] and mended.report["plan"]["cost"] is None


def test_command_writes_the_report_and_says_where_it_is(tmp_path: Path) -> None:
    job = CommandLine(tmp_path, model={"id": "echo", "backend": "echo"})
    job.write_input("a.parquet", pa.table({"en": ["a text"]}))
    run = job.start("report")
    assert run.wait() == 0, run.errors
    assert [Path(line).name for line in run.printed.split()] == ["report.html", "report.json"]
    assert all(Path(line).is_file() for line in run.printed.split())
