"""Parts and published shards: what is on storage, and why it is always exact.

    <output>/_axbatch/parts/<shard>/<origin>/<unit>.parquet   results of one unit, no input columns
    <output>/<shard>                                          the published shard: input and results

1. A part is created by one atomic create under a name that follows from its shard, its origin (a
   hash of the identity and the input's fingerprint) and its range. Its existence is the commit of
   its rows: there is no marker and no pending state. A second writer of the same unit loses (disk,
   S3) or overwrites whole with whole (stores without conditional writes); either way the rows are
   there once.
2. A shard is published, from its input file and its parts, by one atomic replace, once parts cover
   all of its rows. Publishing twice writes the same rows.
3. Only then are its parts deleted. So a shard is done if its output file is there; else what is
   left to do is its rows minus the ranges that its parts cover.
4. A retry does some rows of a published shard again: these rows, counted from 0, are a shard of
   their own, whose origin is the run that published and a hash of the rows' positions. Merging
   replaces the output file as in 2, with the new results in the place of the old ones; from then
   on the parts' origin names a file that is gone, so that they are never merged twice.

Whatever is killed when: before 1 a unit's rows are still to do, after it they are done; before 2
readers see the old file or none, after it the new one; what is left over after that is dropped by
the next run. Both kinds of file carry, in their footer, the identity and the input's fingerprint,
so that nothing computed for another prompt or another version of the input is ever merged in.
Pages carry checksums, verified on every read.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import IO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import InputError, NoSuchFileError, RefusedError, StorageError
from pipeline.records import Counts, Output, Unit, Usage, counted_as
from pipeline.storage import Entry, Folder

PARTS = "_axbatch/parts"
FOOTER_KEY = "axbatch"
USAGE_TYPE = pa.struct([(name, pa.int64()) for name in Usage.__dataclass_fields__])
STATUS_COLUMNS = ("_status", "_reason", "_usage")

# Rows (or bytes) that are held before a row group is written. A tenth of Parquet's usual
# 1M rows: rows here are long texts.
ROW_GROUP_ROWS = 65_536
ROW_GROUP_BYTES = 64 << 20
READ_ROWS = 4_096
READ_BYTES = 8 << 20


@dataclass(frozen=True)
class Stamp:
    """What a part or a published shard was made from; stands in its footer."""

    identity: str
    shard: str
    fingerprint: str
    """Of the input file: size and etag or mtime."""
    start: int
    stop: int
    counts: Counts
    run: str

    def to_footer(self) -> str:
        fields = {**asdict(self), "counts": self.counts.to_json(), "version": 1}
        return json.dumps(fields, ensure_ascii=False)

    @classmethod
    def from_footer(cls, footer: bytes) -> Stamp:
        fields = json.loads(footer)
        fields.pop("version")
        return cls(**{**fields, "counts": Counts.from_json(fields["counts"])})


def result_fields(column: str, value_type: pa.DataType) -> list[pa.Field]:
    """The columns that are added to the input's."""
    return [
        pa.field(column, value_type),
        pa.field("_status", pa.string()),
        pa.field("_reason", pa.string()),
        pa.field("_usage", USAGE_TYPE),
    ]


def result_table(outputs: Sequence[Output], column: str, value_type: pa.DataType) -> pa.Table:
    """Outputs as Arrow, one row each, in order. Shape: len(outputs) x 4."""
    arrays = [
        pa.array([output.value for output in outputs], value_type),
        pa.array([output.status for output in outputs], pa.string()),
        pa.array([output.reason for output in outputs], pa.string()),
        pa.array([asdict(output.usage) for output in outputs], USAGE_TYPE),
    ]
    return pa.table(arrays, schema=pa.schema(result_fields(column, value_type)))


def key_of(name: str, *origin: str) -> str:
    """What the units and parts of a shard are named after: its output's name, and a hash of all
    that their results follow from. Parts of another job, or of another version of the input, are
    never found under it."""
    return f"{name}/{hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:12]}"


def retry_key(published: Stamp, rows: array[int]) -> str:
    """The key of a retry of these rows, on top of what was published."""
    return retries_of(published) + hashlib.sha256(rows.tobytes()).hexdigest()[:12]


def retries_of(published: Stamp) -> str:
    """What the keys of all retries of it begin with. Once one has been merged, they name a run
    that the file is no longer of."""
    return f"{published.shard}/{published.run}."


def name_of(key: str) -> str:
    """The inverse of `key_of`: the name of the output file."""
    return key.rpartition("/")[0]


def commit_part(output: Folder, stamp: Stamp, results: pa.Table) -> bool:
    """Create the part of rows [stamp.start, stamp.stop). False if it was there already."""
    unit = Unit(stamp.shard, stamp.start, stamp.stop)
    buffer = io.BytesIO()
    with _writer(buffer, results.schema) as writer:
        writer.write_table(results)
        writer.add_key_value_metadata({FOOTER_KEY: stamp.to_footer()})
    return output.create(part_path(unit), buffer.getvalue())


def parts_among(entries: Iterable[Entry]) -> dict[str, list[Unit]]:
    """Committed units by key, in row order, from a listing of the output."""
    parts: dict[str, list[Unit]] = {}
    for entry in entries:
        if entry.path.startswith(PARTS + "/"):
            key, _, file = entry.path.removeprefix(PARTS + "/").rpartition("/")
            if re.fullmatch(r"\d+-\d+\.parquet", file):  # file systems leave names of their own
                unit = Unit.from_id(key, file.removesuffix(".parquet"))
                parts.setdefault(key, []).append(unit)
    return {key: sorted(units) for key, units in parts.items()}


def is_result(path: str) -> bool:
    """Whether it is the path of a part, or may be that of a published shard."""
    return path.startswith(PARTS + "/") or not path.startswith("_axbatch/")


def missing_ranges(rows: int, parts: Iterable[Unit]) -> list[tuple[int, int]]:
    """Ranges [start, stop) of [0, rows) that no part covers."""
    gaps, position = [], 0
    for part in sorted(parts):
        if part.start > position:
            gaps.append((position, part.start))
        position = max(position, part.stop)
    if position < rows:
        gaps.append((position, rows))
    return gaps


def read_stamp(output: Folder, path: str) -> Stamp | None:
    """The stamp in the footer of `path`; None if axbatch didn't write the file."""
    with input_errors(f"{output.url}/{path}"), output.open(path) as source:
        metadata = pq.read_metadata(source).metadata or {}
    footer = metadata.get(FOOTER_KEY.encode())
    return Stamp.from_footer(footer) if footer else None


def read_part_counts(output: Folder, unit: Unit) -> dict[Unit, Counts]:
    """The counts of every part that lies in the unit's range."""
    parts = parts_among(output.list(f"{PARTS}/{unit.shard}")).get(unit.shard, [])
    inside = [part for part in parts if unit.start <= part.start and part.stop <= unit.stop]
    stamps = [read_stamp(output, part_path(part)) for part in inside]
    return {part: stamp.counts for part, stamp in zip(inside, stamps, strict=True) if stamp}


def part_path(unit: Unit) -> str:
    return f"{PARTS}/{unit.shard}/{unit.id}.parquet"


def publish(
    source: Folder,
    source_path: str,
    output: Folder,
    stamp: Stamp,
    key: str,
    fields: Sequence[pa.Field],
    check_unchanged: Callable[[], None],
) -> Counts:
    """Merge a complete shard's input and the parts of `key` into its output file, then drop the
    parts.

    `stamp` covers the whole shard; its counts are ignored and computed here, from the rows.
    `check_unchanged` raises RefusedError if the input is not what the parts were made from.
    Memory: about one row group, whatever the size of the shard.

    Raises:
        StorageError: rows are missing.
        InputError: the input or a part is damaged.
        RefusedError: a part was made with another identity or from another input, or the input
            has changed since it was planned.
    """
    results = _Results(output, key, stamp.stop, stamp)
    url = f"{source.url}/{source_path}"
    with input_errors(url), source.open(source_path) as file:
        parquet = open_parquet(file)
        if parquet.metadata.num_rows != stamp.stop:
            raise RefusedError(
                f"{url}: has {parquet.metadata.num_rows:,} rows, had {stamp.stop:,} when planned",
                "Run again once nothing writes to the input any more.",
            )
        schema = output_schema(parquet.schema_arrow, fields)

        def tables() -> Iterator[pa.Table]:
            for batch in read_batches(parquet, url):
                taken = results.take(batch.num_rows)
                yield pa.table([*batch.columns, *taken.columns], schema=schema)
            results.finish()
            check_unchanged()

        counts = _write_shard(output, stamp, schema, tables())
    output.delete_folder(f"{PARTS}/{stamp.shard}")
    return counts


def republish(output: Folder, name: str, rows: array[int], key: str, run: str) -> Counts:
    """Merge the parts of a retry of `rows` into the output file that they are a retry of, then
    drop the parts. A row's `_usage` adds up what all its attempts took.

    Raises as `publish` does; RefusedError also if the file is not the one that was planned with.
    """
    url = f"{output.url}/{name}"
    with input_errors(url), output.open(name) as file:
        parquet = open_parquet(file)
        before = Stamp.from_footer(parquet.metadata.metadata[FOOTER_KEY.encode()])
        if retry_key(before, rows) != key:
            raise RefusedError(f"{url}: was published again meanwhile", "Run the retry again.")
        results = _Results(output, key, len(rows), before)
        schema = output_schema(parquet.schema_arrow, [])

        def tables() -> Iterator[pa.Table]:
            start = first = 0
            for batch in read_batches(parquet, url):
                table = pa.Table.from_batches([batch])
                last = bisect_left(rows, start + batch.num_rows, first)
                if last > first:
                    inside = [row - start for row in rows[first:last]]
                    table = _replaced(table, inside, results.take(last - first))
                yield table
                start, first = start + batch.num_rows, last
            results.finish()

        counts = _write_shard(output, replace(before, run=run), schema, tables())
    output.delete_folder(f"{PARTS}/{name}")
    return counts


def not_ok_rows(output: Folder, path: str) -> Iterator[tuple[int, str]]:
    """Rows of a part or a published shard that are not ok, by their position in it, with
    `status: code` as in Counts.reasons."""
    url = f"{output.url}/{path}"
    with input_errors(url), output.open(path) as file:
        start = 0
        for batch in read_batches(open_parquet(file), url, columns=["_status", "_reason"]):
            rows = pc.indices_nonzero(pc.not_equal(batch["_status"], "ok")).to_pylist()
            for row in rows:
                status, reason = batch["_status"][row].as_py(), batch["_reason"][row].as_py()
                yield start + row, counted_as(status, reason)
            start += batch.num_rows


def _write_shard(
    output: Folder, stamp: Stamp, schema: pa.Schema, tables: Iterator[pa.Table]
) -> Counts:
    """Replace the shard's output file by these rows, results included. Returns their counts."""
    counts = Counts()
    with output.replacing(stamp.shard) as sink, _writer(sink, schema) as writer:
        buffered: list[pa.Table] = []
        for table in tables:
            count_rows(table, counts)
            buffered.append(table)
            if _is_row_group(buffered):
                writer.write_table(pa.concat_tables(buffered))
                buffered = []
        writer.write_table(pa.concat_tables([*buffered, schema.empty_table()]))
        footer = replace(stamp, counts=counts).to_footer()
        writer.add_key_value_metadata({FOOTER_KEY: footer})
    return counts


def _replaced(table: pa.Table, rows: Sequence[int], results: pa.Table) -> pa.Table:
    """`table` with other results in these of its rows, their usage on top of what it was."""
    order = list(range(table.num_rows))
    for index, row in enumerate(rows):
        order[row] = table.num_rows + index
    for name in results.column_names:
        new = results[name]
        if name == "_usage":
            new = _sum_of_usage(table[name].take(pa.array(rows)), new)
        both = pa.chunked_array([*table[name].chunks, *new.chunks], table.schema.field(name).type)
        position = table.schema.get_field_index(name)
        table = table.set_column(position, table.schema.field(name), both.take(pa.array(order)))
    return table


def _sum_of_usage(before: pa.ChunkedArray, now: pa.ChunkedArray) -> pa.ChunkedArray:
    sums = [
        pc.add(pc.struct_field(before, name), pc.struct_field(now, name)).combine_chunks()
        for name in Usage.__dataclass_fields__
    ]
    return pa.chunked_array([pa.StructArray.from_arrays(sums, fields=[*USAGE_TYPE])])


def output_schema(input_schema: pa.Schema, fields: Sequence[pa.Field]) -> pa.Schema:
    """The input's columns, then the result's."""
    metadata = dict(input_schema.metadata or {})
    # `datasets` refuses a file whose own feature list lacks columns; without it, it infers them.
    metadata.pop(b"huggingface", None)
    metadata.pop(FOOTER_KEY.encode(), None)
    return pa.schema([*input_schema, *fields], metadata=metadata)


def read_batches(
    parquet: pq.ParquetFile,
    url: str,
    row_groups: Sequence[int] | None = None,
    columns: Sequence[str] | None = None,
) -> Iterator[pa.RecordBatch]:
    """Batches in row order, each of about READ_BYTES at most. Raises InputError for damage."""
    metadata = parquet.metadata
    size = sum(metadata.row_group(g).total_byte_size for g in range(metadata.num_row_groups))
    rows = int(READ_BYTES * metadata.num_rows / max(1, size))
    with input_errors(url):
        yield from parquet.iter_batches(
            batch_size=max(1, min(READ_ROWS, rows)), row_groups=row_groups, columns=columns
        )


def open_parquet(file: pa.NativeFile) -> pq.ParquetFile:
    """Open for streaming: a row group is read page by page, never fetched whole, so that one
    row group of millions of rows needs no more memory than a small one."""
    return pq.ParquetFile(
        file, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True
    )


@contextmanager
def input_errors(url: str) -> Iterator[None]:
    """Turn Arrow's and the filesystem's complaints about `url` into an InputError."""
    try:
        yield
    except FileNotFoundError as error:
        raise NoSuchFileError(f"{url}: no such file") from error
    except (pa.ArrowException, OSError) as error:
        # Arrow reports damaged pages and headers as OSError too, without an errno.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        text = " ".join(str(error).split())[:200]
        raise InputError(
            f"{url}: not readable as Parquet: {text}",
            "Replace or remove the file, then run again.",
        ) from error


class _Results:
    """Hands out the results of a complete shard, `rows` of them in all, in row order."""

    def __init__(self, output: Folder, key: str, rows: int, stamp: Stamp) -> None:
        self._tables = _tables_in_order(output, key, rows, stamp)
        self._current = next(self._tables, None)
        self._used = 0

    def take(self, rows: int) -> pa.Table:
        """The results of the next rows."""
        taken: list[pa.Table] = []
        while rows:
            if self._current is None:
                raise StorageError("the parts of a shard do not cover its rows")
            piece = self._current.slice(self._used, rows)
            taken.append(piece)
            rows -= piece.num_rows
            self._used += piece.num_rows
            if self._used == self._current.num_rows:
                self._current, self._used = next(self._tables, None), 0
        return pa.concat_tables(taken)

    def finish(self) -> None:
        """Raises StorageError if there are more results than rows."""
        if self._current is not None:
            raise StorageError("the parts of a shard hold more rows than its input")


def _tables_in_order(output: Folder, key: str, rows: int, stamp: Stamp) -> Iterator[pa.Table]:
    """Results of all rows once, from parts that may overlap where two runs cut units apart."""
    position = 0
    for unit in parts_among(output.list(f"{PARTS}/{key}")).get(key, []):
        if unit.stop <= position or unit.start > position:
            continue
        yield _read_part(output, unit, stamp).slice(position - unit.start)
        position = unit.stop
    if position != rows:
        raise StorageError(
            f"{output.url}: rows {position} to {rows} of {key} have no part",
            "Run the same command again; it redoes what is missing.",
        )


def _read_part(output: Folder, unit: Unit, stamp: Stamp) -> pa.Table:
    path = part_path(unit)
    with input_errors(f"{output.url}/{path}"), output.open(path) as file:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        made = Stamp.from_footer(parquet.metadata.metadata[FOOTER_KEY.encode()])
        check_same_origin(made, stamp.identity, stamp.fingerprint, f"{output.url}/{path}")
        return parquet.read().replace_schema_metadata(None)


def check_same_origin(made: Stamp, identity: str, fingerprint: str, url: str) -> None:
    """Raises RefusedError if `made` belongs to another job or another version of its input."""
    if made.identity != identity:
        raise RefusedError(
            f"{url}: was made by a job with identity {made.identity}, this one is {identity}",
            "Give this job an `output.path` of its own.",
        )
    if made.fingerprint != fingerprint:
        raise RefusedError(
            f"{url}: its input file has changed since "
            f"({_difference(made.fingerprint, fingerprint)})",
            "Put the old file back, or have it done again with `input.on_change: reprocess`.",
        )


def _difference(before: str, now: str) -> str:
    (size_before, _, _), (size_now, _, _) = before.partition(":"), now.partition(":")
    if size_before != size_now:
        return f"was {int(size_before):,} bytes, is {int(size_now):,}"
    return "same size, written again"


def count_rows(results: pa.Table, counts: Counts) -> None:
    """Add the statuses, reasons and usage of a table with the result columns to `counts`."""
    results = results.select(STATUS_COLUMNS)
    for entry in results["_status"].value_counts().to_pylist():
        counts.statuses[entry["values"]] += entry["counts"]
    not_ok = results.filter(pc.is_valid(results["_reason"]))
    for status, reason in zip(
        not_ok["_status"].to_pylist(), not_ok["_reason"].to_pylist(), strict=True
    ):
        counts.reasons[counted_as(status, reason)] += 1
    totals = {
        name: pc.sum(pc.struct_field(results["_usage"], name)).as_py() or 0
        for name in Usage.__dataclass_fields__
    }
    counts.usage += Usage(**totals)


def _is_row_group(tables: Sequence[pa.Table]) -> bool:
    rows = sum(table.num_rows for table in tables)
    size: int = sum(table.nbytes for table in tables)
    return rows >= ROW_GROUP_ROWS or size >= ROW_GROUP_BYTES


def _writer(sink: IO[bytes], schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True)
