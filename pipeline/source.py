"""The Ray Data source: one dataset row is one unit, with the unit's rows nested in it.

Ray Data does not keep block boundaries, so a unit must be a row to stay whole. Its rows travel as
one Arrow IPC message: files whose column types differ then need no common schema.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import accumulate
from typing import Any

import pyarrow as pa
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from pipeline.errors import AxbatchError, InputError, error_from_json
from pipeline.lease import Watch
from pipeline.parquet import input_errors, open_parquet, read_batches
from pipeline.plan import Plan, ShardPlan, cut_units
from pipeline.records import Unit
from pipeline.shards import Shard
from pipeline.storage import Folder

UNIT_SCHEMA = pa.schema([
    ("shard", pa.string()),
    ("start", pa.int64()),
    ("stop", pa.int64()),
    ("fingerprint", pa.string()),
    ("rows", pa.large_binary()),
    ("error", pa.string()),  # instead of rows, where reading failed
])  # fmt: skip

Range = tuple[int, int]
"""Rows [start, stop) of a shard, of one unit or many."""

TASK_ROWS = 1 << 18
"""Rows that one read task covers, so that a very large file is read by several at once. A task
ends with a row group: two that share one would both decode it from its beginning."""


def encode_unit(unit: Unit, fingerprint: str, rows: pa.Table) -> pa.Table:
    """A unit as one row of UNIT_SCHEMA."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    return pa.table(
        {
            "shard": [unit.shard],
            "start": [unit.start],
            "stop": [unit.stop],
            "fingerprint": [fingerprint],
            "rows": [sink.getvalue().to_pybytes()],
            "error": [None],
        },
        schema=UNIT_SCHEMA,
    )


def encode_failure(error: AxbatchError) -> pa.Table:
    """A row that stands for units that could not be read: Ray would make text of the error."""
    row = {**dict.fromkeys(UNIT_SCHEMA.names), "error": error.to_json()}
    return pa.Table.from_pylist([row], schema=UNIT_SCHEMA)


def decode_unit(block: pa.Table) -> tuple[Unit, str, pa.Table]:
    """The unit, its input's fingerprint, and its rows: the inverse of `encode_unit`.

    Raises the AxbatchError of `encode_failure`.
    """
    fields = {name: block[name][0] for name in UNIT_SCHEMA.names}
    if fields["error"].is_valid:
        raise error_from_json(fields["error"].as_py())
    unit = Unit(fields["shard"].as_py(), fields["start"].as_py(), fields["stop"].as_py())
    with pa.ipc.open_stream(fields["rows"].as_buffer()) as reader:
        return unit, fields["fingerprint"].as_py(), reader.read_all()


def read_units(
    source: Folder,
    path: str,
    columns: list[str],
    units: Iterable[Unit],
    selected: array[int] | None = None,
) -> Iterator[tuple[Unit, pa.Table]]:
    """Rows of each unit (ascending, disjoint), read as a stream; row groups without one of them
    are skipped, and no more than a batch is held. With `selected`, units count only these rows."""
    wanted = iter(units)
    unit = next(wanted, None)
    if unit is None:
        return
    with input_errors(f"{source.url}/{path}"), source.open(path) as file:
        parquet = open_parquet(file)
        row = 0  # of the file
        held: list[pa.RecordBatch] = []
        for group in range(parquet.num_row_groups):
            group_rows = parquet.metadata.row_group(group).num_rows
            end = _count(selected, row + group_rows)
            if unit.start >= end or end == _count(selected, row):
                row += group_rows
                continue
            for batch in read_batches(parquet, f"{source.url}/{path}", [group], columns):
                start, end = _count(selected, row), _count(selected, row + batch.num_rows)
                counted = batch
                if selected is not None and start < end:
                    # Not `take`, which some types don't have (string_view).
                    rows = [batch.slice(position - row, 1) for position in selected[start:end]]
                    counted = pa.concat_batches(rows)
                row += batch.num_rows
                if start == end:
                    continue  # an empty slice of it would keep all of it
                while unit.start < end:
                    first, last = max(unit.start, start) - start, min(unit.stop, end) - start
                    held.append(counted.slice(first, last - first))
                    if unit.stop > end:
                        break
                    yield unit, pa.Table.from_batches(held)
                    held, unit = [], next(wanted, None)
                    if unit is None:
                        return
    raise InputError(
        f"{source.url}/{path}: ends before row {unit.stop:,}, which was planned",
        "Run again once nothing writes to the input any more.",
    )


def _count(selected: array[int] | None, rows: int) -> int:
    """How many of the file's first `rows` rows units count."""
    return rows if selected is None else bisect_left(selected, rows)


class UnitSource(Datasource):  # type: ignore[misc]  # ray is untyped here
    """Pending units of a plan, until `watch` says stop. One read task per shard, more for a very
    large one."""

    def __init__(self, plan: Plan, columns: list[str], watch: Watch) -> None:
        self._tasks = [
            _read_task(shard, ranges, columns, watch)
            for shard in plan.shards
            for ranges in task_ranges(shard)
        ]

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        return self._tasks

    @property
    def task_count(self) -> int:
        """Ray Data splits blocks further unless it is told just this number of them."""
        return len(self._tasks)


def _read_task(
    planned: ShardPlan, ranges: list[Range], columns: list[str], watch: Watch
) -> ReadTask:
    shard = planned.shard
    # The ranges, not their units, which for a hundred million rows are hundreds of thousands.
    units = partial(cut_units, planned.key, ranges, shard.rows_per_unit)
    metadata = BlockMetadata(
        num_rows=sum(1 for _ in units()), size_bytes=None, input_files=[shard.path], exec_stats=None
    )
    return ReadTask(_reader(shard, columns, units, watch), metadata, schema=UNIT_SCHEMA)


def _reader(
    shard: Shard, columns: list[str], units: Callable[[], Iterable[Unit]], watch: Watch
) -> Callable[[], Iterable[pa.Table]]:
    source, path, fingerprint = shard.source, shard.path, shard.fingerprint
    selected = shard.selected

    def read() -> Iterator[pa.Table]:
        try:
            for unit, rows in read_units(source, path, columns, units(), selected):
                shard.check_unchanged()  # now, as it would be committed for the version planned
                if watch.says_stop():
                    return
                yield encode_unit(unit, fingerprint, rows)
        except AxbatchError as error:
            yield encode_failure(error)

    return read


def task_ranges(planned: ShardPlan) -> Iterator[list[Range]]:
    """Pending rows of one read task each, in row order, cut where units begin."""
    group_ends = accumulate(planned.shard.row_groups)
    group_end, rows = next(group_ends, 0), 0
    ranges: list[Range] = []
    for unit in planned.units():
        if rows >= TASK_ROWS and unit.start >= group_end:
            yield ranges
            ranges, rows = [], 0
        while unit.stop > group_end:
            group_end = next(group_ends)
        if ranges and ranges[-1][1] == unit.start and not unit.start % planned.shard.rows_per_unit:
            ranges[-1] = ranges[-1][0], unit.stop
        else:
            ranges.append((unit.start, unit.stop))
        rows += unit.rows
    if ranges:
        yield ranges
