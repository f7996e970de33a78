"""Writes reports: of what is on storage, and while a run goes on.

<output>/_axbatch/report.json, report.html   of the whole job, written anew while a run goes on
<output>/_axbatch/runs/<run>.json            the record of one run, see ledger.py
<output>/_axbatch/plan.json                  what its first run was expected to take
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any

from pipeline.config import JobConfig
from pipeline.errors import AxbatchError, Interrupted, StorageError, place_of
from pipeline.forecast.estimate import estimate_job
from pipeline.lease import Holder, read_holder
from pipeline.ledger import RUNS, Ledger, State
from pipeline.plan import Plan, make_plan
from pipeline.progress import Progress
from pipeline.records import Counts
from pipeline.report.document import make_report
from pipeline.report.page import render_page
from pipeline.status import Status, read_status
from pipeline.storage import Folder
from pipeline.task import Task

REPORT = "_axbatch/report"
PLAN_FILE = "_axbatch/plan.json"
EVERY_S = 30.0
"""Between two versions of the report while a run goes on."""
FEW_UNITS = 10_000
"""Of more, the last report of a run that is cut short looks at no parts: a store may take minutes
for them, and whoever has pressed Ctrl-C wants it to end."""


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

    @property
    def is_due(self) -> bool:
        """Whether it is time for `tick`, and the last one is through."""
        return time.monotonic() >= self._next and (not self._writing or self._writing.done())

    def tick(self) -> None:
        """To be called when it is due."""
        self._next = time.monotonic() + EVERY_S
        if self._ledger is None or not (self._plan.is_retry or self._before):
            return
        record = self._record("running")
        if self._before is None:
            # Rows of a retry are among those counted before: there is no report of them yet.
            self._writing = self._pool.submit(self._keep, self._ledger, record)
            return
        status = self._status_now(self._before)
        self._writing = self._pool.submit(self._write_live, self._ledger, status, record)

    def _status_now(self, before: Status) -> Status:
        """From what it was before the run, and the run's own counts."""
        counts = Counts()
        counts.add(before.counts)
        counts.add(self._progress.counts)
        if self._progress.lane:
            # The second lane's are all that wait, those too that waited before this run.
            counts.deferred = self._progress.counts.deferred
        return replace(before, counts=counts)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)
        if isinstance(error, StorageError):
            return
        if self._ledger is None:
            if error is None:
                self._catch_up()
            return
        state: State = "done" if error is None else "stopped"
        if isinstance(error, Interrupted):
            state = "interrupted"
        with _never_mind("the report is not written"):
            self._ledger.read_the_dead()
            record = self._record(state)
            if state != "done" and self._before and self._plan.unpublished_units > FEW_UNITS:
                self._write_live(self._ledger, self._status_now(self._before), record)
            else:
                store_record(self._output, self._ledger.run, record)
                write_report(self._job, self._task, self._plan.identity, self._output)
            with _never_mind("the readings of dead engines stay"):
                self._ledger.forget_the_dead()

    def _catch_up(self) -> None:
        """The run before this one may have been killed when all was published but its report."""
        with _never_mind("the report is not written"):
            try:
                state = json.loads(self._output.read(f"{REPORT}.json"))["state"]
            except FileNotFoundError:
                state = None
            if state != "done" and self._plan.rows:
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
            identity = self._plan.identity
            if self._expected is None or self._expected.get("identity") != identity:
                estimate = estimate_job(self._job, self._task, self._plan, self._output)
                self._expected = {"identity": identity, **estimate.to_json()}
                self._output.replace(PLAN_FILE, json.dumps(self._expected, indent=1).encode())

    def _keep(self, ledger: Ledger, record: dict[str, Any]) -> None:
        """In a thread too: so all that grows meanwhile has been copied for it."""
        with _never_mind("the run's record is not written"):
            ledger.read_the_dead()
            store_record(self._output, ledger.run, record)

    def _write_live(self, ledger: Ledger, status: Status, record: dict[str, Any]) -> None:
        self._keep(ledger, record)
        with _never_mind("the report is not written"):
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
    except Exception as bug:
        print(f"axbatch: {what}: {place_of(bug)}", file=sys.stderr, flush=True)


def store_record(output: Folder, run: str, record: Mapping[str, Any]) -> None:
    output.replace(f"{RUNS}/{run}.json", json.dumps(record).encode())
