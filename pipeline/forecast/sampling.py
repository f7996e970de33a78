"""A sample of a job's rows: few, from everywhere, always the same, and cheap whatever the input.

Places are spread evenly over the rows by their number, each a short run of them. A row group can
only be read from its beginning, so how deep it is read is limited: of a large one, places that lie
deeper are moved towards its head, in proportion.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import NamedTuple

from pipeline.counting import texts_in
from pipeline.errors import RowRejected
from pipeline.parquet import input_errors, open_parquet, python_rows
from pipeline.plan import Plan
from pipeline.records import Row
from pipeline.shards import Shard

PLACES = 64
LEAST_PLACES = 4
"""Of a sample that is not all: with fewer nothing could be said of how far it may be wrong."""
ROWS_PER_PLACE = 8
SAMPLE_BYTES = 2 << 20
"""Of text, about: some ten seconds of cutting and tokenising at most. Where rows are long, fewer
are taken, but LEAST_PLACES always."""
DEPTH_BYTES = 128 << 20
"""Of the task's columns, uncompressed, most that is read in all row groups together to reach rows
that are not at their heads; a page more in each."""
STEP_BYTES = 256 << 10
"""Of one batch on the way there."""
THREADS = 16


class Span(NamedTuple):
    """Rows [start, stop) of a shard."""

    shard: Shard
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def units(self) -> int:
        """As `ShardPlan.units` cuts them."""
        size = self.shard.rows_per_unit
        return -(-self.stop // size) - self.start // size


class SampledRow(NamedTuple):
    """A row, and the place that it is of."""

    place: int
    row: Row | RowRejected
    """RowRejected where Python has no value for it, as in the worker."""


@dataclass(frozen=True)
class RowSample:
    """Rows in the order of the job."""

    rows: Sequence[SampledRow]
    of: int
    """Rows that it stands for."""

    @property
    def share(self) -> float:
        return len(self.rows) / self.of if self.of else 1.0


def pending_spans(plan: Plan) -> list[Span]:
    """Rows without a part."""
    return [Span(s.shard, *pending) for s in plan.shards for pending in s.pending]


def deferring_spans(plan: Plan) -> list[Span]:
    """The units in whose parts rows wait for the next lane, and others beside them."""
    return [Span(s.shard, u.start, u.stop) for s in plan.shards for u in s.deferred.units]


def all_spans(plan: Plan) -> list[Span]:
    return [Span(s.shard, 0, s.shard.rows) for s in plan.shards if s.shard.rows]


def take_sample(spans: Sequence[Span], columns: Sequence[str]) -> RowSample:
    """About PLACES x ROWS_PER_PLACE rows of these spans (of whole files: not of a retry's shards);
    all, if there are no more. Raises InputError, StorageError."""
    total = sum(span.rows for span in spans)
    windows = _windows(spans, total)
    reads = [list(of_group) for _, of_group in groupby(_by_group(windows), _group_key)]
    depth = DEPTH_BYTES / max(1, len(reads))
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda read: _read_group(read, depth, columns), reads)
        rows = _thinned([row for of_group in found for row in of_group])
    return RowSample(rows, total)


def _thinned(rows: Sequence[SampledRow]) -> list[SampledRow]:
    """Fewer, evenly, where they are much longer than their footers said: a footer counts a text
    that is repeated once."""
    rows = list(rows)
    size = sum(map(_bytes_of, rows))
    if size <= SAMPLE_BYTES:
        return rows
    of_places = [list(of_place) for _, of_place in groupby(rows, lambda row: row.place)]
    most = max(map(len, of_places))
    keep = max(1, int(most * SAMPLE_BYTES / size))
    of_places = [of_place[:keep] for of_place in of_places]
    size = sum(_bytes_of(row) for of_place in of_places for row in of_place)
    places = min(len(of_places), max(LEAST_PLACES, int(len(of_places) * SAMPLE_BYTES / size)))
    chosen = [of_places[(2 * n + 1) * len(of_places) // (2 * places)] for n in range(places)]
    return [row for of_place in chosen for row in of_place]


def _bytes_of(row: SampledRow) -> int:
    if isinstance(row.row, RowRejected):
        return 0
    return sum(len(text.encode("utf-8", "replace")) for text in texts_in(row.row))


class _Window(NamedTuple):
    """Rows of a place that lie in one span."""

    place: int
    span: Span


def _windows(spans: Sequence[Span], total: int) -> list[_Window]:
    """The middle rows of each of as many equal stretches of all rows as there are places."""
    ends = list(accumulate(span.rows for span in spans))
    windows = []
    places, rows_per_place = _size(spans, total)
    for place in range(places):
        start, stop = place * total // places, (place + 1) * total // places
        take = min(rows_per_place, stop - start)
        at = start + (stop - start - take) // 2
        end = at + take
        while at < end:
            index = bisect_right(ends, at)
            span, before = spans[index], ends[index] - spans[index].rows
            until = min(end, ends[index])
            own = span._replace(start=span.start + at - before, stop=span.start + until - before)
            windows.append(_Window(place, own))
            at = until
    return windows


def _size(spans: Iterable[Span], total: int) -> tuple[int, int]:
    """Places, and rows in each."""
    size = sum(span.rows * span.shard.bytes_per_row for span in spans)
    rows = max(1, int(SAMPLE_BYTES * total / max(1.0, size)))
    rows_per_place = max(1, min(ROWS_PER_PLACE, rows // PLACES))
    places = min(PLACES, max(LEAST_PLACES, rows // rows_per_place))
    return min(places, -(-total // rows_per_place)), rows_per_place


class _GroupWindow(NamedTuple):
    """Rows [start, stop) of a row group."""

    place: int
    shard: Shard
    group: int
    start: int
    stop: int


def _by_group(windows: Iterable[_Window]) -> Iterator[_GroupWindow]:
    for place, (shard, start, stop) in windows:
        ends = list(accumulate(shard.row_groups))
        while start < stop:
            group = bisect_right(ends, start)
            before, until = ends[group] - shard.row_groups[group], min(stop, ends[group])
            yield _GroupWindow(place, shard, group, start - before, until - before)
            start = until


def _group_key(window: _GroupWindow) -> tuple[str, str, int]:
    return window.shard.source.url, window.shard.path, window.group


def _read_group(
    windows: Sequence[_GroupWindow], depth: float, columns: Sequence[str]
) -> list[SampledRow]:
    """The windows of one row group, which are in order, in one pass over its beginning."""
    shard, group = windows[0].shard, windows[0].group
    step = max(1, min(4096, int(STEP_BYTES / shard.bytes_per_row)))
    wanted = _moved_to_head(windows, int(depth / shard.bytes_per_row))
    sampled: list[SampledRow] = []
    with input_errors(f"{shard.source.url}/{shard.path}"), shard.source.open(shard.path) as file:
        batches = open_parquet(file).iter_batches(step, row_groups=[group], columns=[*columns])
        position = 0
        for batch in batches:
            for window in wanted:
                first, last = window.start - position, window.stop - position
                if first < batch.num_rows and last > 0:
                    part = batch.slice(max(0, first), min(batch.num_rows, last) - max(0, first))
                    sampled += [SampledRow(window.place, row) for row in python_rows(part)]
            position += batch.num_rows
            if position >= wanted[-1].stop:
                break
    return sampled


def _moved_to_head(windows: Sequence[_GroupWindow], reachable: int) -> list[_GroupWindow]:
    """The windows where one may read so many rows of their group; still in order, and apart."""
    rows = windows[0].shard.row_groups[windows[0].group]
    if rows <= reachable:
        return list(windows)
    moved: list[_GroupWindow] = []
    free = 0
    for window in windows:
        length = window.stop - window.start
        start = max(free, window.start * max(0, reachable - length) // rows)
        free = start + length
        moved.append(window._replace(start=start, stop=free))
    return moved
