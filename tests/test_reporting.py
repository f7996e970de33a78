"""The report of whole runs, without Ray on the echo engine: it says what is on storage, whatever
happened to the run; and whatever happens to the report, the run goes on."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
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
from pipeline.config import JobConfig, ModelConfig
from pipeline.engine.echo import EchoEngine
from pipeline.errors import ClusterError, Interrupted, RowFailed, StorageError
from pipeline.lease import LEASE
from pipeline.plan import Plan, Retry
from pipeline.records import Output, Receipt
from pipeline.report.reporter import PLAN_FILE, make_report, read_runs, write_report
from pipeline.run import Summary, run_job
from pipeline.status import Status, read_status
from pipeline.storage import Folder
from tests.conftest import make_job, make_plan_of, write_table
from tests.faults.without_ray import ONE, InTurn, no_cluster, receipts_here
from tests.runs import Job as CommandLine

LONG = " ".join(["long"] * 400)
TWO_LANES = {
    "task": {"overflow": "reject"},
    "model": {"engine": {"max_model_len": 400}, "context": "auto"},
}
"""Of a job whose long rows wait for the second lane."""

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


class Job:
    """Translates a few files in this process: units of three rows."""

    def __init__(self, folder: Path, **changes: dict[str, Any]) -> None:
        self.folder = folder
        limits = {"limits": {"max_failed_fraction": 1.0}}
        self.config: JobConfig = make_job(folder, input={"rows_per_unit": 3}, **limits, **changes)
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

    def check(self, report: dict[str, Any], again: int = 0) -> None:
        """That its rows and tokens are those of the published files, which are all. Lengths are
        those of attempts, of which so many were not the row's first."""
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
        assert seen == sum(row["_usage"]["prompt_tokens"] > 0 for row in rows) + again


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
    live = captured(monkeypatch, job)
    job.run(Retry("failed", None))
    assert [report["state"] for report, _ in live] == ["done"]
    job.check(job.report, again=first["rows"]["failed"])
    assert job.report["rows"]["failed"] == 0
    assert job.report["tokens"]["wasted"]["not_ok"] == asdict(wasted)
    assert job.report["tokens"]["prompt"] == first["tokens"]["prompt"] + wasted.prompt_tokens
    assert job.report["tokens"]["engine"] == asdict(usage_of(job.rows()))
    assert [run["rows"] for run in job.report["runs"]] == [31, first["rows"]["failed"]]
    columns = {text["column"]: text["texts"] for text in job.report["texts"]}
    assert columns == {"text": 27, "ko": 27}
    assert job.report["plan"] == first["plan"]


def captured(monkeypatch: pytest.MonkeyPatch, job: Job) -> list[tuple[dict[str, Any], Status]]:
    """Each report that is stored, and what storage alone says at that moment."""
    reports: list[tuple[dict[str, Any], Status]] = []
    store = pipeline.report.reporter.store_report

    def capture(report: dict[str, Any], output: Folder) -> None:
        reports.append((report, job.status()))
        store(report, output)

    monkeypatch.setattr(pipeline.report.reporter, "store_report", capture)
    return reports


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


def own_files(job: Job) -> dict[str, str]:
    """All beside the output files, but for the run's log."""
    entries = [entry.path for entry in job.output.list("_axbatch")]
    return {path: job.output.read(path).decode() for path in entries if "/logs/" not in path}


@pytest.mark.parametrize("samples", [0, 3])
def test_row_text_is_in_the_report_only_where_samples_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: int
) -> None:
    job = Job(tmp_path, report={"samples": samples})
    for name in "ab":
        job.write(
            f"{name}.parquet",
            [f"text quoxel-{name}{n}-end {'word ' * (n % 5)}" if n else None for n in range(30)],
        )
    fail_on(monkeypatch, lambda text: "5-end" in text)
    monkeypatch.setattr(pipeline.report.reporter, "EVERY_S", 0.0)
    in_one_thread(monkeypatch)
    stop_after(monkeypatch, 12, Interrupted())
    with pytest.raises(Interrupted):
        job.run()
    monkeypatch.setattr(pipeline.cluster, "receipts", receipts_here)
    job.run()
    job.run(Retry("failed", None))
    files = own_files(job)
    quoting = {path for path, text in files.items() if "quoxel" in text}
    assert {"_axbatch/report.json", "_axbatch/report.html", "_axbatch/plan.json"} <= {*files}
    assert len(job.records()) == 3
    if not samples:
        assert not quoting and not job.report["samples"]
        return
    assert quoting == {"_axbatch/report.json", "_axbatch/report.html"}
    shown = job.report["samples"]
    assert [(each["file"], each["row"]) for each in shown] == [
        ("a.parquet", 0), ("a.parquet", 1), ("b.parquet", 0),
    ]  # fmt: skip
    texts = shown[1]["texts"]
    assert texts[0] == ["text", "text quoxel-a1-end word "]
    assert texts[1][0] == "ko" and "quoxel-a1-end" in texts[1][1]
    markers = {word for word in job.text("report.html").split() if word.startswith("quoxel-")}
    assert markers == {"quoxel-a1-end"}, "the others' texts are null"


TROUBLES = {
    "storage": StorageError("s3://x: no answer", "Wait."),
    "a missing file": FileNotFoundError("gone"),
    "a bug": ZeroDivisionError("division by zero"),
}


@pytest.mark.parametrize(
    ("where", "trouble"),
    [*(("report", trouble) for trouble in TROUBLES), ("runs", "storage"), ("plan", "storage")],
)
def test_trouble_with_the_report_is_told_and_changes_no_run(
    job: Job,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trouble: str,
    where: str,
) -> None:
    replace_file = Folder.replace

    def refuse(self: Folder, path: str, data: bytes) -> None:
        if path.startswith(f"_axbatch/{where}"):
            raise TROUBLES[trouble]
        replace_file(self, path, data)

    monkeypatch.setattr(Folder, "replace", refuse)
    monkeypatch.setattr(pipeline.report.reporter, "EVERY_S", 0.0)
    summary = job.run()
    assert (summary.exit_code, summary.state, summary.counts.rows) == (0, "done", 31)
    said = capsys.readouterr()
    assert "axbatch: the report" in said.err and str(TROUBLES[trouble]) in said.err
    assert "the report" not in said.out, "which may be a program's JSON"

    monkeypatch.setattr(Folder, "replace", replace_file)
    job.check(job.write_report())


def test_trouble_with_the_report_does_not_hide_what_ended_the_run(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(report: dict[str, Any]) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr(pipeline.report.reporter, "render_page", bug)
    stop_after(monkeypatch, 2, Interrupted())
    with pytest.raises(Interrupted) as ended:
        job.run()
    assert ended.value.__context__ is None
    assert job.read("runs/run-001.json")["state"] == "interrupted"


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


def test_names_with_html_in_them_are_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(tmp_path, report={"samples": 2})
    name = "<script>alert('1')<&\">.parquet"
    job.write(name, ["<script>alert(2)", None, "</script> x"])
    fail_on(monkeypatch, lambda text: text.endswith("x"))
    job.run()
    job.check(job.report)
    examples = {row["file"] for each in job.report["reasons"] for row in each["examples"]}
    assert examples == {name}
    page = job.text("report.html")
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#39;1&#39;)" in page and "&lt;script&gt;alert(2)" in page


def test_half_a_character_in_a_report_is_no_trouble(job: Job) -> None:
    job.run()
    report = {**job.report, "name": "caf\udce9"}  # as Python reads a file's name in Latin-1
    pipeline.report.reporter.store_report(report, job.output)
    assert job.report == report
    assert "caf\ufffd" in job.text("report.html")


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


def test_command_writes_the_report_and_says_where_it_is(tmp_path: Path) -> None:
    job = CommandLine(tmp_path, model={"id": "echo", "backend": "echo"})
    job.write_input("a.parquet", pa.table({"en": ["a text"]}))
    run = job.start("report")
    assert run.wait() == 0, run.errors
    assert [Path(line).name for line in run.printed.split()] == ["report.html", "report.json"]
    assert all(Path(line).is_file() for line in run.printed.split())
