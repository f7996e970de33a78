"""Plans in tests: input rows, parts and outputs of planned shards, and what is left to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.config import JobConfig
from pipeline.merging import publish
from pipeline.parts import Stamp, name_of, result_fields
from pipeline.plan import Plan, ShardPlan
from pipeline.records import Counts
from pipeline.storage import Folder

MakeJob = Callable[..., JobConfig]
MakePlan = Callable[[JobConfig], Plan]
Write = Callable[..., Path]
Commit = Callable[..., bool]


def texts(rows: int) -> dict[str, list[Any]]:
    return {"id": list(range(rows)), "text": [f"text {n}" for n in range(rows)]}


def output_of(job: JobConfig) -> Folder:
    return Folder(job.output.path)


def commit_all(job: JobConfig, plan: Plan, commit: Commit) -> None:
    for shard in plan.shards:
        for unit in shard.units():
            commit(output_of(job), unit, plan.identity, shard.shard.fingerprint)


def publish_shard(job: JobConfig, plan: Plan, planned: ShardPlan) -> None:
    shard = planned.shard
    stamp = Stamp(plan.identity, shard.name, shard.fingerprint, 0, shard.rows, Counts(), "run")
    fields = result_fields("ko", pa.string())
    output, unchanged = output_of(job), shard.check_unchanged
    publish(shard.source, shard.path, output, stamp, planned.key, fields, unchanged)


def ranges_of(plan: Plan) -> list[tuple[str, int, int]]:
    return [(name_of(u.shard), u.start, u.stop) for shard in plan.shards for u in shard.units()]
