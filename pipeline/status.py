"""status: how far a job is, from storage alone."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pipeline.parts import part_path, parts_among, read_stamp
from pipeline.plan import FOOTER_THREADS, Plan
from pipeline.records import Counts, Unit
from pipeline.storage import Folder


@dataclass(frozen=True)
class Status:
    """A job's state on storage."""

    plan: Plan
    counts: Counts
    """Of all committed rows, published or not."""
    last_run: dict[str, Any] | None
    """The record of the last run that ended by itself."""

    @property
    def is_done(self) -> bool:
        return not self.plan.unpublished

    def to_json(self) -> dict[str, Any]:
        return {
            **self.plan.to_json(),
            "done": self.is_done,
            "committed": self.counts.to_json(),
            "files": [
                {
                    "name": shard.shard.name,
                    "rows": shard.shard.rows,
                    "rows_done": shard.done_rows,
                    "published": shard.published is not None,
                }
                for shard in self.plan.shards
            ],
            "last_run": self.last_run,
        }


def read_status(plan: Plan, output: Folder) -> Status:
    """Add the counts of parts (their footers) and of published shards."""
    counts = plan.published_counts
    names = {shard.shard.name for shard in plan.unpublished}
    committed = parts_among(output.list("_axbatch/parts"))
    units = [unit for name, units in committed.items() if name in names for unit in units]

    def counts_of(unit: Unit) -> Counts:
        try:
            stamp = read_stamp(output, part_path(unit))
        except FileNotFoundError:
            return Counts()  # published, and dropped, while we looked
        return stamp.counts if stamp else Counts()

    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        for unit_counts in pool.map(counts_of, units):
            counts.add(unit_counts)
    return Status(plan, counts, _last_run(output))


def _last_run(output: Folder) -> dict[str, Any] | None:
    runs = [entry.path for entry in output.list("_axbatch/runs")]
    record: dict[str, Any] | None = json.loads(output.read(runs[-1])) if runs else None
    return record
