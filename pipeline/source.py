"""The Ray Data source: one dataset row is a bundle, some units of a shard that travel together.

Ray Data does not keep block boundaries, so a unit must be in a row to stay whole. Its rows travel
as one Arrow IPC message: files whose column types differ then need no common schema. And a row is
a task, which costs Ray 25 ms of CPU in all, as much as 256 short rows cost us: so in a large job
several units share one.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, chain, islice
from typing import Any, TypeAlias, TypeVar

import pyarrow as pa
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from pipeline.errors import AxbatchError, InputError, error_from_json
from pipeline.lease import Watch
from pipeline.parquet import input_errors, open_parquet, read_batches
from pipeline.plan import Plan, ShardPlan
from pipeline.records import Unit
from pipeline.shards import Shard
from pipeline.storage import Folder

BUNDLE_SCHEMA = pa.schema([
    ("shard", pa.string()),
    ("fingerprint", pa.string()),
    ("units", pa.list_(pa.struct([
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("rows", pa.large_binary()),
    ]))),
    ("error", pa.string()),  # instead of units, where reading failed
])  # fmt: skip

T = TypeVar("T")
Bundle: TypeAlias = list[tuple[Unit, pa.Table]]
"""Units, and their rows."""

TASK_ROWS = 1 << 18
"""Rows that one read task covers, so that a very large file is read by several at once. A task
ends with a row group: two that share one would both decode it from its beginning."""


def encode_bundle(fingerprint: str, bundle: Bundle) -> pa.Table:
    """Units of one shard, and its fingerprint, as one row of BUNDLE_SCHEMA."""
    units = [
        {"start": unit.start, "stop": unit.stop, "rows": _message(rows)} for unit, rows in bundle
    ]
    row = {"shard": bundle[0][0].shard, "fingerprint": fingerprint, "units": units, "error": None}
    return pa.Table.from_pylist([row], schema=BUNDLE_SCHEMA)


def _message(rows: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    return bytes(sink.getvalue())


def encode_failure(error: AxbatchError) -> pa.Table:
    """A row that stands for units that could not be read: Ray would make text of the error."""
    row = {**dict.fromkeys(BUNDLE_SCHEMA.names), "error": error.to_json()}
    return pa.Table.from_pylist([row], schema=BUNDLE_SCHEMA)


def decode_bundle(block: pa.Table) -> tuple[str, Bundle]:
    """The fingerprint of the units' input, and the units: the inverse of `encode_bundle`.

    Raises the AxbatchError of `encode_failure`.
    """
    fields = {name: block[name][0] for name in BUNDLE_SCHEMA.names}
    if fields["error"].is_valid:
        raise error_from_json(fields["error"].as_py())
    shard, bundle = fields["shard"].as_py(), []
    for each in fields["units"]:
        with pa.ipc.open_stream(each["rows"].as_buffer()) as reader:
            unit = Unit(shard, each["start"].as_py(), each["stop"].as_py())
            bundle.append((unit, reader.read_all()))
    return fields["fingerprint"].as_py(), bundle


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
            if unit.start >= _count(selected, row + group_rows):
                row += group_rows
                continue
            for batch in read_batches(parquet, f"{source.url}/{path}", [group], columns):
                start, end = _count(selected, row), _count(selected, row + batch.num_rows)
                counted = batch
                if selected is not None:
                    # Not `take`, which some types don't have (string_view).
                    rows = [batch.slice(position - row, 1) for position in selected[start:end]]
                    counted = pa.concat_batches(rows) if rows else batch.slice(0, 0)
                row += batch.num_rows
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

    def __init__(
        self, plan: Plan, columns: list[str], watch: Watch, bundle: int = 1, single: int = 0
    ) -> None:
        """So many units are a `bundle`; but the last ones, `single` of them, are one each."""
        left = sum(1 for shard in plan.shards for _ in shard.units())
        self._tasks = []
        for shard in plan.shards:
            for units in _task_units(shard):
                bundles = list(in_bundles(units, bundle, left - single))
                left -= len(units)
                self._tasks.append(_read_task(shard.shard, columns, bundles, watch))

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        return self._tasks

    @property
    def task_count(self) -> int:
        """Ray Data splits blocks further unless it is told just this number of them."""
        return len(self._tasks)


def in_bundles(units: Sequence[T], size: int, bundled: int) -> Iterator[Sequence[T]]:
    """The units in their order, the first `bundled` of them by `size`, the others one by one."""
    start = 0
    while start < len(units):
        stop = start + (min(size, bundled - start) if start < bundled else 1)
        yield units[start:stop]
        start = stop


def _read_task(
    shard: Shard, columns: list[str], bundles: Sequence[Sequence[Unit]], watch: Watch
) -> ReadTask:
    metadata = BlockMetadata(
        num_rows=len(bundles), size_bytes=None, input_files=[shard.path], exec_stats=None
    )
    return ReadTask(_reader(shard, columns, bundles, watch), metadata, schema=BUNDLE_SCHEMA)


def _reader(
    shard: Shard, columns: list[str], bundles: Sequence[Sequence[Unit]], watch: Watch
) -> Callable[[], Iterable[pa.Table]]:
    source, path, fingerprint = shard.source, shard.path, shard.fingerprint
    selected = shard.selected

    def read() -> Iterator[pa.Table]:
        units = read_units(source, path, columns, chain.from_iterable(bundles), selected)
        try:
            for bundle in bundles:
                rows = list(islice(units, len(bundle)))
                shard.check_unchanged()  # now, as it would be committed for the version planned
                if watch.says_stop():
                    return
                yield encode_bundle(fingerprint, rows)
        except AxbatchError as error:
            yield encode_failure(error)

    return read


def _task_units(shard: ShardPlan) -> Iterator[list[Unit]]:
    """Units of one read task each, in row order."""
    group_ends = accumulate(shard.shard.row_groups)
    units: list[Unit] = []
    group_end, rows = next(group_ends, 0), 0
    for unit in shard.units():
        if rows >= TASK_ROWS and unit.start >= group_end:
            yield units
            units, rows = [], 0
        while unit.stop > group_end:
            group_end = next(group_ends)
        units.append(unit)
        rows += unit.rows
    if units:
        yield units
