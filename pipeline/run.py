"""One run of a job: plan, run, commit, publish, report. It resumes by itself."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from jobs import load_task
from pipeline import __version__
from pipeline.attempts import forget_journals
from pipeline.config import JobConfig
from pipeline.counting import check_accounting
from pipeline.errors import (
    EXIT_TOO_MANY_NOT_OK,
    ClusterError,
    RefusedError,
    StorageError,
    TooManyNotOkError,
)
from pipeline.identity import identity_fields, identity_hash
from pipeline.lanes import Lane, LaneUse, check_lanes, first_lane, plan_deferred, yarn_lane
from pipeline.lease import Lease, Watch
from pipeline.ledger import Ledger, State
from pipeline.logs import engines_lock, machine_folder, redirect_output, run_log
from pipeline.parts import is_result
from pipeline.plan import Plan, plan_shards
from pipeline.progress import Progress, running_costs, shown
from pipeline.publishing import Publisher
from pipeline.ray_settings import apply_ray_settings, cluster_address
from pipeline.reaper import wait_for_guards
from pipeline.records import Counts
from pipeline.report.reporter import Reporter
from pipeline.retry import Retry, plan_retry
from pipeline.shards import find_shards
from pipeline.signals import draining_first, interrupt
from pipeline.storage import RACERS, Folder
from pipeline.task import Task

JOB_FILE = "_axbatch/job.json"
SURE_AFTER_ROWS = 1_000
"""A smaller job ends before it is worth stopping, and shows all that is wrong."""


@dataclass(frozen=True)
class Summary:
    """What a run came to."""

    run: str
    state: State
    output: str
    log: str | None
    """None if there was nothing to do."""
    creates: str | None
    """What the store makes of racing creates; None if there was nothing to do."""
    identity: str
    counts: Counts
    """Of all rows of the job."""
    run_counts: Counts
    """Of the rows that this run computed."""
    lanes: list[LaneUse]
    """That had something to do in this run."""
    workers: int
    """That took part in this run."""
    seconds: float
    """Of computing, without the engines' start."""
    wall_seconds: float
    max_failed_fraction: float
    replicas: int
    """As many as there may be."""
    exit_code: int
    ledger: Ledger | None
    """None if there was nothing to do."""

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "state": self.state,
            "version": __version__,
            "output": self.output,
            "log": self.log,
            "creates": self.creates,
            "identity": self.identity,
            "job": self.counts.to_json(),
            "this_run": self.run_counts.to_json(),
            "lanes": [lane.to_json() for lane in self.lanes],
            "workers": self.workers,
            "replicas": self.replicas,
            "seconds": round(self.seconds, 3),
            "wall_seconds": round(self.wall_seconds, 3),
            "exit_code": self.exit_code if self.state == "done" else None,
            **(self.ledger.to_json() if self.ledger else {}),
        }


class Watchers(NamedTuple):
    """What each receipt concerns."""

    ledger: Ledger
    progress: Progress
    publisher: Publisher
    reporter: Reporter


def run_job(job: JobConfig, console: Console, retry: Retry | None = None) -> Summary:
    """Complete the job, or what is left of it; or do again the rows that `retry` wants. This
    process's stdout and stderr go to the run's log from the first unit on; `console` must not
    depend on them.

    Raises:
        AxbatchError: see errors.py.
        Interrupted: after SIGINT or SIGTERM; what was committed stays.
    """
    started, run = time.monotonic(), new_run_id()
    task, output = load_task(job), Folder(job.output.path)
    fields = identity_fields(job, task.identity())
    identity = identity_hash(fields)
    shards = find_shards(job, task, output)

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    log = creates = ledger = None
    lanes: list[LaneUse] = []

    def summary(state: State) -> Summary:
        return Summary(
            run=run,
            state=state,
            output=output.url,
            log=str(log) if log else None,
            creates=creates,
            identity=identity,
            counts=publisher.counts,
            run_counts=progress.counts,
            lanes=lanes,
            workers=progress.workers,
            seconds=progress.seconds,
            wall_seconds=time.monotonic() - started,
            max_failed_fraction=job.limits.max_failed_fraction,
            replicas=job.cluster.range.max,
            exit_code=exit_code(publisher.counts, job),
            ledger=ledger,
        )

    with Lease(output, run, say) as lease:
        check_identity(output, fields)
        may_defer = job.model.context == "auto"
        plan = plan_shards(shards, output, identity, job.input.on_change, may_defer)
        if retry:
            if plan.unpublished:
                say(f"{len(plan.unpublished):,} file(s) are not complete and stay as they are")
            plan = plan_retry(plan, output, retry)
            if not plan.shards:
                reasons = ", ".join(f"{why} {n:,}" for why, n in plan.untouched.reasons.items())
                say(f"no row is to be done again (not ok are: {reasons or 'none'})")
        ledger = Ledger(run, output, job.cluster.range.max)
        costs = partial(running_costs, job.accounting, ledger)
        progress = Progress(plan, job.cluster.range.max, costs)
        with (
            Reporter(job, task, plan, output, progress) as reporter,
            Publisher(plan, output, task, job.output.column, run, job.accounting.rows) as publisher,
        ):
            if plan.unpublished:
                record_job(output, job, fields)
                reporter.begin(ledger, lambda state: summary(state).to_json())
            if plan.pending_rows or plan.deferred_rows:
                say(_opening(plan))
                check_lanes(job.model)
                check_accounting(job.accounting)
                log = run_log(output, run)
                redirect_output(log)
                sweep(output, plan)
                creates = describe_creates(output)
                with shown(progress, console):
                    watchers = Watchers(ledger, progress, publisher, reporter)
                    _compute(job, plan, task, log, lanes, watchers, lease)
    return summary("done")


def _compute(
    job: JobConfig,
    plan: Plan,
    task: Task,
    log: Path,
    lanes: list[LaneUse],
    watchers: Watchers,
    lease: Lease,
) -> None:
    """Adds to `lanes` those that had something to do."""
    ledger, progress, publisher, reporter = watchers
    run = ledger.run
    not_ok_before = plan.published_counts.not_ok
    # Ray takes a second to import, which a run with nothing to do needn't.
    apply_ray_settings(remote=cluster_address(job) is not None)
    from pipeline.cluster import machines, ray_cluster, receipts, replica_resources
    from pipeline.worker import WorkerSpec

    output = Folder(job.output.path)
    watch = Watch(output, run)

    def compute(lane: Lane, plan: Plan) -> None:
        lanes.append(use := LaneUse(lane))
        share = replica_resources(job, lane, plan.pending_units)
        ledger.begin_lane(share.replicas.max, share.gpus, at_once=share.replicas.min)
        spec = WorkerSpec(
            job, lane, plan.identity, run, log, share, output, watch, is_retry=is_retry
        )
        for receipt in receipts(plan, task.columns, spec):
            use.counts.add(receipt.counts)
            ledger.add(receipt)
            progress.add(receipt)
            publisher.received(receipt)
            if reporter.is_due:
                ledger.see_machines(machines())
                reporter.tick()
            # Rows to retry may well be not ok again; that says nothing about the job.
            if publisher.missing_rows and not is_retry:
                limit = job.limits.max_failed_fraction
                check_hope(progress.counts, not_ok_before, progress.rows, limit)
        ledger.end_lane()
        if publisher.missing_rows:
            if not watch.says_stop():
                raise ClusterError(f"Ray gave up {publisher.missing_rows:,} rows without a reason")
            print(f"axbatch: drained: {publisher.missing_rows:,} rows are left to do", flush=True)
            interrupt()

    def second_lane() -> tuple[Lane, Plan] | None:
        """And what it is to do; None if that is nothing."""
        longest = max(plan.longest, progress.counts.longest)
        if not publisher.waiting:
            return None
        deferred = plan_deferred(plan.identity, publisher.waiting, output, longest)
        lane = replace(yarn_lane(job.model, longest), is_second=True)
        publisher.expect(deferred)
        progress.expect(deferred, lane.title)
        return (lane, deferred) if deferred.pending_rows else None

    is_retry = plan.is_retry
    later = None if plan.pending_rows else second_lane()
    if not (plan.pending_rows or later):
        return
    try:
        with ray_cluster(job), draining_first(lease.drain, job.cluster.grace_s):
            if plan.pending_rows:
                compute(first_lane(job.model), plan)
                if publisher.waiting and watch.says_stop():
                    interrupt()
                # The first lane's engines make room; on other machines a start that comes too
                # early is tried again.
                wait_for_guards(engines_lock(run))
                later = second_lane()
            if later:
                compute(*later)
    finally:
        # Whoever comes next on this machine needs the memory that engines still hold.
        wait_for_guards(engines_lock(run))
        ledger.end_lane()  # if an error did, no engine is paid for while files are published
        forget_journals(machine_folder(), run)


def check_identity(output: Folder, fields: dict[str, Any]) -> None:
    """Raises RefusedError, naming the fields that differ, if `output` holds another job's rows. A
    job that has none yet, as its engine did not start, may be mended."""
    try:
        before = json.loads(output.read(JOB_FILE))["identity"]
    except FileNotFoundError:
        return
    changed = [
        f"{key}: was {_short(before.get(key))}, is {_short(fields.get(key))}"
        for key in sorted(before.keys() | fields.keys())
        if before.get(key) != fields.get(key)
    ]
    if changed and any(is_result(entry.path) for entry in output.list()):
        raise RefusedError(
            f"{output.url} was made by a different job ({'; '.join(changed)})",
            "Put these back, or give the job a new `output.path`; mixing both is never right.",
        )


def record_job(output: Folder, job: JobConfig, fields: dict[str, Any]) -> None:
    """Write the identity and the resolved job file beside the output, where status finds them."""
    record = {"version": __version__, "identity": fields, "job": job.model_dump()}
    output.replace(JOB_FILE, json.dumps(record, indent=1, ensure_ascii=False).encode())


def sweep(output: Folder, plan: Plan) -> None:
    """Clear away what dead writers left. Not all who may write may do that; then it stays."""
    try:
        output.sweep({file for planned in plan.shards for file in planned.shard.files})
    except StorageError as error:
        print(f"axbatch: what dead writers left is not cleared away: {error}", flush=True)


def describe_creates(output: Folder) -> str:
    """See whether the store's creates are atomic, and say so in the log. The output is exact either
    way: a part that is written twice is replaced by the same rows."""
    won = output.winners_of_a_race()
    creates = "atomic" if won == 1 else f"racing: {won} of {RACERS} writers of one file won"
    print(f"axbatch: {output.url}: creates are {creates}", flush=True)
    return creates


def check_hope(counts: Counts, not_ok_before: int, rows: int, max_failed_fraction: float) -> None:
    """Raises TooManyNotOkError if, after SURE_AFTER_ROWS rows of this run or more, so many are not
    ok, published ones included, that the job exceeds its limit already; or surely would, as they
    are more than half of this run's, among which are those that it has deferred. `counts` are this
    run's, `rows` the job's."""
    if counts.rows < SURE_AFTER_ROWS:
        return
    seen = counts.rows + counts.deferred
    exceeded = not_ok_before + counts.not_ok > max_failed_fraction * rows
    if exceeded or counts.not_ok > max(0.5, max_failed_fraction) * seen:
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in counts.reasons.most_common(3))
        raise TooManyNotOkError(
            f"stopped: {counts.not_ok:,} of this run's {seen:,} rows are not ok "
            f"({reasons}); "
            f"limits.max_failed_fraction is {max_failed_fraction:g}",
            "What is committed stays. To go on all the same: --set limits.max_failed_fraction=1",
        )


def exit_code(counts: Counts, job: JobConfig) -> int:
    """0 within `limits`, else 3."""
    allowed = job.limits.max_failed_fraction * counts.rows
    return EXIT_TOO_MANY_NOT_OK if counts.not_ok > allowed else 0


def new_run_id() -> str:
    """Sorts by start time; unique where two start in one second."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}"


def _opening(plan: Plan) -> str:
    to_do, done = plan.to_do_rows, plan.done_rows
    before = f", {done:,} rows done before" if done else ""
    again = " again" if plan.is_retry else ""
    long = f", {plan.waiting_rows:,} of them too long for the first lane"
    deferred = long if plan.waiting_rows else ""
    return f"{to_do:,} rows to do{again} in {len(plan.unpublished):,} file(s){before}{deferred}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
