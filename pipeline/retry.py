"""A retry: the rows of published shards that are to be done again, as shards of their own."""

from __future__ import annotations

from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from pipeline.parts import PARTS, missing_ranges, not_ok_rows, parts_among, retry_key
from pipeline.plan import Deferred, Plan, ShardPlan, with_deferred
from pipeline.records import Counts
from pipeline.shards import FOOTER_THREADS
from pipeline.storage import Folder


@dataclass(frozen=True)
class Retry:
    """Which rows to do again: those of a status, of a reason's code, or of both."""

    status: str | None
    reason: str | None

    def wants(self, counted: str) -> bool:
        """`counted` is a key of Counts.reasons."""
        status, _, code = counted.partition(": ")
        return self.status in (None, status) and self.reason in (None, code)


def plan_retry(plan: Plan, output: Folder, retry: Retry) -> Plan:
    """The rows of published shards that `retry` wants, as shards of their own."""
    wanted: list[ShardPlan] = []
    untouched = Counts()
    parts = parts_among(output.list(PARTS))

    def select(planned: ShardPlan) -> ShardPlan | None:
        stamp = planned.published
        if stamp is None or not any(map(retry.wants, stamp.counts.reasons)):
            return None
        not_ok = not_ok_rows(output, planned.shard.name)
        rows = array("q", [row for row, counted in not_ok if retry.wants(counted)])
        key = retry_key(stamp, rows)
        count = len(rows)
        shard = replace(planned.shard, rows=count, row_groups=(count,), selected=rows)
        deferred = Deferred(longest=stamp.counts.longest)
        pending = missing_ranges(count, parts.get(key, []))
        return ShardPlan(shard, key, None, pending, deferred=deferred)

    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        for planned, selected in zip(plan.shards, pool.map(select, plan.shards), strict=True):
            if selected:
                wanted.append(selected)
            elif planned.published:
                untouched.add(planned.published.counts)
    if plan.may_defer:
        wanted = with_deferred(wanted, output, parts)
    return Plan(plan.identity, wanted, untouched, plan.leftovers, plan.may_defer)
