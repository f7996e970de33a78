"""What the rows that are done say of those that are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

from pipeline.accounting import Interval
from pipeline.errors import NoSuchFileError
from pipeline.forecast.intervals import deviation
from pipeline.forecast.sampling import PLACES, THREADS
from pipeline.parts import PARTS, part_path, parts_among, read_stamp
from pipeline.plan import Plan
from pipeline.records import Counts
from pipeline.storage import Folder

ENOUGH_ROWS = 200
"""Answered ones, ok or not, that say more of answers than any expectation."""


@dataclass(frozen=True)
class DoneRows:
    """What is known of a few of the job's committed units and files, or of all."""

    counts: Sequence[Counts]

    @cached_property
    def total(self) -> Counts:
        total = Counts()
        for each in self.counts:
            total.add(each)
        return total

    @property
    def is_enough(self) -> bool:
        answered = self.total.account.completions.items()
        return sum(rows for bucket, rows in answered if bucket >= 0) >= ENOUGH_ROWS

    def completion_per(self, size: Callable[[Counts], float]) -> Interval:
        """Completion tokens for each of what `size` counts. The interval is that of a sample of
        units: of rows like these, that is, and not of others that are still to come."""
        pairs = [(size(each), each.usage.completion_tokens) for each in self.counts]
        whole = sum(pair[0] for pair in pairs)
        ratio = sum(pair[1] for pair in pairs) / max(1.0, whole)
        return Interval.around(ratio, deviation(pairs, ratio) / max(1.0, whole))


def read_done(plan: Plan, output: Folder) -> DoneRows:
    """From published files' stamps, which the plan has, and from the footers of PLACES parts."""
    counts = [plan.untouched] if plan.untouched.rows else []
    counts += [s.published.counts for s in plan.shards if s.published]
    committed = parts_among(output.list(PARTS))
    units = [unit for s in plan.unpublished for unit in committed.get(s.key, [])]
    some = units[:: max(1, len(units) // PLACES)][:PLACES]

    def counts_of(path: str) -> Counts:
        try:
            stamp = read_stamp(output, path)
        except NoSuchFileError:
            return Counts()  # published, and dropped, while we looked
        return stamp.counts if stamp else Counts()

    with ThreadPoolExecutor(THREADS) as pool:
        counts += pool.map(counts_of, map(part_path, some))
    return DoneRows([each for each in counts if each.rows])
