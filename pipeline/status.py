"""status: how far a job is, from storage alone."""

from __future__ import annotations

import json
from array import array
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.errors import NoSuchFileError
from pipeline.ledger import RUNS
from pipeline.parts import PARTS, not_ok_rows, part_path, parts_among, read_stamp
from pipeline.plan import Plan, ShardPlan, find_deferred
from pipeline.records import Counts, Unit
from pipeline.shards import FOOTER_THREADS
from pipeline.storage import Folder

EXAMPLES = 3
KEPT_FILES = 8
"""With a reason, in which its examples are looked for."""
AT_ONCE = 4_096
"""Parts whose footers are asked for before the next are."""


class RowPosition(NamedTuple):
    """Where a row is: its input file, and its number there, from 0."""

    file: str
    row: int


@dataclass(frozen=True)
class Status:
    """A job's state on storage."""

    plan: Plan
    counts: Counts
    """Of all committed rows, published or not, by whichever lane."""
    examples: dict[str, list[RowPosition]]
    """By reason, as in `counts.reasons`: the first few rows that have it."""
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
            "not_ok": [
                {
                    "reason": reason,
                    "rows": count,
                    "examples": [row._asdict() for row in self.examples.get(reason, [])],
                }
                for reason, count in self.counts.reasons.most_common()
            ],
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


def read_status(plan: Plan, output: Folder, without: str | None = None) -> Status:
    """Add the counts of parts (their footers), but not those of the run `without`, and of
    published shards."""
    committed = parts_among(output.list(PARTS))
    units = [
        (shard, unit)
        for shard in plan.unpublished
        for unit in (*committed.get(shard.key, []), *shard.deferred.done)
    ]

    def counts_of(of: tuple[ShardPlan, Unit]) -> Counts:
        _, unit = of
        try:
            stamp = read_stamp(output, part_path(unit))
        except NoSuchFileError:
            return Counts()  # published, and dropped, while we looked
        return stamp.counts if stamp and stamp.run != without else Counts()

    counts, files, kept = Counts(), list[_File](), Counter[str]()

    def take(file: _File) -> None:
        counts.add(file.counts)
        reasons = file.counts.reasons
        if any(kept[reason] < KEPT_FILES for reason in reasons):  # there may be a million
            files.append(file)
            kept.update(reasons.keys())

    for shard in plan.shards:
        if shard.published:
            take(_File(shard.shard.name, shard, 0, shard.published.counts))
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        for first in range(0, len(units), AT_ONCE):
            some = units[first : first + AT_ONCE]
            for (shard, unit), of_unit in zip(some, pool.map(counts_of, some), strict=True):
                take(_File(part_path(unit), shard, unit.start, of_unit, unit.shard != shard.key))
    counts.deferred = plan.waiting_rows
    return Status(plan, counts, _examples(files, output, committed), _last_run(output))


class _File(NamedTuple):
    """A published file or a part, the shard it belongs to, and its first row there."""

    path: str
    shard: ShardPlan
    start: int
    counts: Counts
    is_later: bool = False
    """Whether its rows are counted among those that the shard's own parts have deferred."""


def _examples(
    files: Sequence[_File], output: Folder, parts: Mapping[str, list[Unit]]
) -> dict[str, list[RowPosition]]:
    """Reads no more files than it needs to find EXAMPLES rows of each reason."""
    found: defaultdict[str, list[RowPosition]] = defaultdict(list)
    deferred: dict[str, array[int]] = {}
    for file in files:
        name, key = file.shard.shard.name, file.shard.key
        lacking = {reason for reason in file.counts.reasons if len(found[reason]) < EXAMPLES}
        if not lacking:
            continue
        with suppress(NoSuchFileError):  # published, and dropped, while we looked
            if file.is_later and key not in deferred:
                deferred |= find_deferred([file.shard], output, parts)
            for row, reason in not_ok_rows(output, file.path):
                if len(found[reason]) < EXAMPLES:
                    position = file.start + row
                    if file.is_later:
                        if position >= len(deferred[key]):
                            break  # the shard's own parts were dropped first
                        position = deferred[key][position]
                    found[reason].append(RowPosition(name, position))
                    if all(len(found[reason]) == EXAMPLES for reason in lacking):
                        break
    return {reason: rows for reason, rows in found.items() if rows}


def _last_run(output: Folder) -> dict[str, Any] | None:
    for path in sorted((entry.path for entry in output.list(RUNS)), reverse=True):
        record: dict[str, Any] = json.loads(output.read(path))
        if record.get("state", "done") == "done":
            return record
    return None
