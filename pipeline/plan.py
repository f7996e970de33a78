"""The plan: shards, their units, and what is still to do. From listings and footers only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.config import InputConfig, JobConfig
from pipeline.errors import InputError, RefusedError
from pipeline.parts import (
    STATUS_COLUMNS,
    Stamp,
    check_same_origin,
    input_errors,
    missing_ranges,
    open_parquet,
    part_path,
    parts_among,
    read_stamp,
)
from pipeline.records import Counts, Unit
from pipeline.staging import BUILDERS, stage_dataset, stage_file, staged_name, suffix_of
from pipeline.storage import Entry, Folder, find_files
from pipeline.task import Task

FOOTER_THREADS = 32
UNIT_BYTES = 1 << 20
"""Most bytes of task columns in one unit, so that a unit stays far under ten minutes."""

RAY_PICKLED = "ray.data.arrow_pickled_object"


@dataclass(frozen=True)
class Shard:
    """One input file, which becomes one output file of the same name."""

    name: str
    """Path of the output file below the output folder."""
    source: Folder
    path: str
    """Path of the Parquet file below `source`."""
    rows: int
    bytes: int
    fingerprint: str
    rows_per_unit: int
    schema: pa.Schema


@dataclass(frozen=True)
class ShardPlan:
    """A shard and its state on storage."""

    shard: Shard
    published: Stamp | None
    """The stamp of its output file, if it has one."""
    pending: list[tuple[int, int]]
    """Row ranges without a part; empty and unpublished means ready to publish."""

    @property
    def pending_rows(self) -> int:
        return sum(stop - start for start, stop in self.pending)

    @property
    def done_rows(self) -> int:
        return self.shard.rows - self.pending_rows

    def units(self) -> Iterator[Unit]:
        """Pending units in row order, cut on a grid that follows from the shard alone."""
        size = self.shard.rows_per_unit
        for start, stop in self.pending:
            while start < stop:
                cut = min(stop, (start // size + 1) * size)
                yield Unit(self.shard.name, start, cut)
                start = cut


@dataclass(frozen=True)
class Plan:
    """All shards, by name."""

    identity: str
    shards: list[ShardPlan]

    @property
    def rows(self) -> int:
        return sum(s.shard.rows for s in self.shards)

    @property
    def pending_rows(self) -> int:
        return sum(s.pending_rows for s in self.shards)

    @property
    def unpublished(self) -> list[ShardPlan]:
        return [s for s in self.shards if s.published is None]

    @property
    def published_counts(self) -> Counts:
        counts = Counts()
        for shard in self.shards:
            if shard.published:
                counts.add(shard.published.counts)
        return counts

    def to_json(self) -> dict[str, Any]:
        return {
            "identity": self.identity,
            "shards": len(self.shards),
            "rows": self.rows,
            "bytes": sum(s.shard.bytes for s in self.shards),
            "units_pending": sum(1 for s in self.shards for _ in s.units()),
            "rows_pending": self.pending_rows,
            "shards_published": len(self.shards) - len(self.unpublished),
        }


def make_plan(job: JobConfig, task: Task, identity: str) -> Plan:
    """List the input, read its footers, and compare with what the output holds.

    Raises:
        InputError: nothing there, not Parquet, a missing column, a taken column name.
        RefusedError: output made by another identity or from an input that has changed since.
    """
    output = Folder(job.output.path)
    shards = find_shards(job, task, output)
    entries = output.list()
    parts = parts_among(entries)
    existing = {entry.path for entry in entries}

    def state(shard: Shard) -> ShardPlan:
        published = _published(shard, output, identity) if shard.name in existing else None
        if published:
            return ShardPlan(shard, published, [])
        committed = parts.get(shard.name, [])
        if committed:
            _check_part(shard, output, committed[0], identity)
        return ShardPlan(shard, None, missing_ranges(shard.rows, committed))

    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        return Plan(identity, list(pool.map(state, shards)))


def find_shards(job: JobConfig, task: Task, output: Folder) -> list[Shard]:
    """The input's shards, by name. Stages what is not Parquet."""
    files = _parquet_files(job.input, output)
    taken = [job.output.column, *STATUS_COLUMNS]

    def shard(name: str, source: Folder, entry: Entry) -> Shard:
        return _read_shard(name, source, entry, task.columns, taken, job.input.rows_per_unit)

    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        return list(pool.map(lambda item: shard(*item), files))


def _parquet_files(config: InputConfig, output: Folder) -> list[tuple[str, Folder, Entry]]:
    """Output name, folder and entry of every Parquet file to read, by name."""
    files: dict[str, tuple[str, Folder, Entry]] = {}

    def add(name: str, source: Folder, entry: Entry) -> None:
        if name in files:
            raise InputError(
                f"two input files would both become {name}",
                "Rename one, or give each its own job and `output.path`.",
            )
        files[name] = (name, source, entry)

    if config.dataset is not None:
        entry = stage_dataset(config, output)
        add(entry.path.rpartition("/")[2], output, entry)
    for url in config.paths:
        source, entries = find_files(url)
        _refuse_overlap(source, output)
        for entry in entries:
            if suffix_of(entry.path) in BUILDERS:
                add(staged_name(entry.path), output, stage_file(source, entry, output))
            elif suffix_of(entry.path) in (".parquet", ".pq") or len(entries) == 1:
                add(entry.path, source, entry)
            else:
                raise InputError(
                    f"{source.url}/{entry.path}: not a kind of file that can be read",
                    "Known: .parquet, .jsonl, .json, .csv, .txt. Narrow `input.path` with a glob.",
                )
    return [files[name] for name in sorted(files)]


def _refuse_overlap(source: Folder, output: Folder) -> None:
    inside = source.url.rstrip("/") + "/"
    if output.url.rstrip("/") + "/" == inside or output.url.startswith(inside):
        raise InputError(
            f"output.path {output.url} lies inside the input folder {source.url}",
            "The next run would read its own output; put `output.path` beside the input.",
        )


def _read_shard(
    name: str, source: Folder, entry: Entry, columns: Sequence[str], taken: Sequence[str], rows: int
) -> Shard:
    url = f"{source.url}/{entry.path}"
    with source.open(entry.path) as file, input_errors(url):
        parquet = open_parquet(file)
        schema, metadata = parquet.schema_arrow, parquet.metadata
        wide = {c for c in range(metadata.num_columns)
                if metadata.schema.column(c).path.split(".")[0] in columns}  # fmt: skip
        column_bytes = sum(
            metadata.row_group(g).column(c).total_uncompressed_size
            for g in range(metadata.num_row_groups)
            for c in wide
        )
    check_schema(schema, columns, taken, url)
    bytes_per_row = max(1.0, column_bytes / max(1, metadata.num_rows))
    return Shard(
        name=name,
        source=source,
        path=entry.path,
        rows=metadata.num_rows,
        bytes=entry.size,
        fingerprint=entry.fingerprint,
        rows_per_unit=max(1, min(rows, int(UNIT_BYTES / bytes_per_row))),
        schema=schema,
    )


def check_schema(schema: pa.Schema, columns: Sequence[str], taken: Sequence[str], url: str) -> None:
    """Raises InputError if the task's columns are missing or the result's are there already."""
    for column in columns:
        if schema.get_field_index(column) < 0:
            raise InputError(
                f"{url}: has no column `{column}` (it has {', '.join(schema.names)})",
                "Name one of these under `task:`.",
            )
    for column in taken:
        if column in schema.names:
            raise InputError(
                f"{url}: already has a column `{column}`, which the result needs",
                "Choose another `output.column`, or leave the column out of the input.",
            )
    if len(set(schema.names)) < len(schema.names):
        raise InputError(f"{url}: has two columns of the same name", "Rename one of them.")
    for field in schema:
        if getattr(field.type, "extension_name", None) == RAY_PICKLED:
            raise InputError(
                f"{url}: column `{field.name}` holds pickled Python objects, which are code",
                "Write the column with a plain Arrow type.",
            )


def _published(shard: Shard, output: Folder, identity: str) -> Stamp:
    stamp = read_stamp(output, shard.name)
    if stamp is None:
        raise RefusedError(
            f"{output.url}/{shard.name}: is there already and is not axbatch's",
            "Choose an empty `output.path`.",
        )
    check_same_origin(stamp, identity, shard.fingerprint, f"{output.url}/{shard.name}")
    return stamp


def _check_part(shard: Shard, output: Folder, unit: Unit, identity: str) -> None:
    """One part speaks for its shard here; publishing checks every one."""
    stamp = read_stamp(output, part_path(unit))
    if stamp:
        url = f"{output.url}/{part_path(unit)}"
        check_same_origin(stamp, identity, shard.fingerprint, url)
