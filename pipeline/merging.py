"""Merging: parts and input become the output file, parts of a retry replace rows of it.

What makes it safe is said in parts.py. Merging streams: it holds about one row group.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.accounting import Account, Usage, bucket_of
from pipeline.errors import Interrupted, RefusedError, StorageError
from pipeline.parquet import input_errors, open_parquet, parquet_writer, read_batches
from pipeline.parts import (
    FOOTER_KEY,
    PARTS,
    TEXTS_TYPE,
    USAGE_TYPE,
    Overlay,
    Stamp,
    check_same_origin,
    count_rows,
    part_path,
    parts_among,
    retry_key,
)
from pipeline.records import DEFERRED, Counts, Unit
from pipeline.signals import interrupted
from pipeline.storage import Folder

# Rows (or bytes) that are held before a row group is written. A tenth of Parquet's usual
# 1M rows: rows here are long texts.
ROW_GROUP_ROWS = 65_536
ROW_GROUP_BYTES = 64 << 20

PARTS_AHEAD, BYTES_AHEAD = 16, 16 << 20
"""Of a shard, most that are read from an object store before it is their turn."""

GROWS = 4
"""Times that an output file may well be as large as its input."""

Part = tuple[Stamp, pa.Table]

Also = Callable[[Stamp], AbstractContextManager[Callable[[pa.Table], None]]]
"""Given the stamp of a shard that is being published, what takes its rows too, to write them in
another form. It is through before the output file appears, whose existence means done."""


def publish(
    source: Folder,
    source_path: str,
    output: Folder,
    stamp: Stamp,
    key: str,
    fields: Sequence[pa.Field],
    check_unchanged: Callable[[], None],
    overlay: Overlay | None = None,
    also: Also | None = None,
) -> Counts:
    """Merge a complete shard's input and the parts of `key`, with those of `overlay` on top, into
    its output file, then drop the parts.

    `stamp` covers the whole shard; counts are computed here, from the rows, on top of its account.
    `check_unchanged` raises RefusedError if the input is not what the parts were made from.
    Memory: about one row group, whatever the size of the shard.

    Raises:
        StorageError: rows are missing.
        InputError: the input or a part is damaged.
        RefusedError: a part was made with another identity or from another input, or the input
            has changed since it was planned.
    """
    results = _Results(output, key, stamp.stop, stamp, overlay)
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

        counts = _write_shard(output, stamp, schema, tables(), results, also)
    output.delete_folder(f"{PARTS}/{stamp.shard}")
    return counts


def republish(
    output: Folder,
    name: str,
    rows: array[int],
    key: str,
    run: str,
    overlay: Overlay | None = None,
    also: Also | None = None,
) -> Counts:
    """Merge the parts of a retry of `rows` into the output file that they are a retry of, then
    drop the parts. A row's `_usage` adds up what all its attempts took; its `_texts`, if there are
    any, keep the input's, which the retry has not counted again.

    Raises as `publish` does; RefusedError also if the file is not the one that was planned with.
    """
    url = f"{output.url}/{name}"
    with input_errors(url), output.open(name) as file:
        parquet = open_parquet(file)
        before = Stamp.from_footer(parquet.metadata.metadata[FOOTER_KEY.encode()])
        if retry_key(before, rows) != key:
            raise RefusedError(f"{url}: was published again meanwhile", "Run the retry again.")
        results = _Results(output, key, len(rows), before, overlay)
        schema = output_schema(parquet.schema_arrow, [])
        tables = (pa.Table.from_batches([batch]) for batch in read_batches(parquet, url))
        stamp = replace(before, run=run)
        overlaid = _overlaid(tables, rows, results)
        counts = _write_shard(output, stamp, schema, overlaid, results, also)
    output.delete_folder(f"{PARTS}/{name}")
    return counts


def _write_shard(
    output: Folder,
    stamp: Stamp,
    schema: pa.Schema,
    tables: Iterator[pa.Table],
    results: _Results,
    also: Also | None,
) -> Counts:
    """Replace the shard's output file by these rows, results included. Returns their counts."""
    counts, prompts, completions = Counts(), Counter[int](), Counter[int]()
    with (
        output.replacing(stamp.shard, GROWS * int(stamp.fingerprint.partition(":")[0])) as sink,
        also(stamp) if also else nullcontext() as add,  # through before the file above appears
        parquet_writer(sink, schema) as writer,
    ):
        buffered: list[pa.Table] = []
        for table in tables:
            if interrupted.is_set():
                raise Interrupted
            count_rows(table, counts)
            prompts += _lengths(table, "prompt_tokens")
            completions += _lengths(table, "completion_tokens")
            if add:
                add(table)
            buffered.append(table)
            if _is_row_group(buffered):
                writer.write_table(pa.concat_tables(buffered))
                buffered = []
        writer.write_table(pa.concat_tables([*buffered, schema.empty_table()]))
        if counts.statuses[DEFERRED]:
            raise StorageError(
                f"{output.url}/{stamp.shard}: {counts.statuses[DEFERRED]:,} rows wait for the next "
                "lane, as another run's parts say",
                "Run the same command again.",
            )
        counts.longest = max(stamp.counts.longest, results.longest)
        counts.account.add(stamp.counts.account)
        counts.account.add(results.account)
        # Their lengths are of attempts; a row that is done again would count twice.
        counts.account.prompts, counts.account.completions = prompts, completions
        footer = replace(stamp, counts=counts).to_footer()
        writer.add_key_value_metadata({FOOTER_KEY: footer})
    return counts


def _lengths(table: pa.Table, tokens: str) -> Counter[int]:
    """Rows by the `bucket_of` what all their attempts took."""
    rows = Counter[int]()
    for each in pc.struct_field(table["_usage"], tokens).value_counts().to_pylist():
        rows[bucket_of(each["values"])] += each["counts"]
    return rows


def _overlaid(
    tables: Iterator[pa.Table], rows: array[int], results: _Results
) -> Iterator[pa.Table]:
    """`tables` with other results in these of their rows."""
    start = first = 0
    for table in tables:
        last = bisect_left(rows, start + table.num_rows, first)
        if last > first:
            inside = [row - start for row in rows[first:last]]
            table = _replaced(table, inside, results.take(last - first))
        yield table
        start, first = start + table.num_rows, last
    results.finish()


def _replaced(table: pa.Table, rows: Sequence[int], results: pa.Table) -> pa.Table:
    """`table` with other results in these of its rows, their usage on top of what it was, their
    input's text as it was if it has been counted."""
    order = list(range(table.num_rows))
    for index, row in enumerate(rows):
        order[row] = table.num_rows + index
    for name in results.column_names:
        new = results[name]
        if join := JOINED.get(name):
            new = join(table[name].take(pa.array(rows)), new)
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


def _with_input_of(before: pa.ChunkedArray, now: pa.ChunkedArray) -> pa.ChunkedArray:
    sizes = [
        pc.coalesce(pc.struct_field(before, "input"), pc.struct_field(now, "input")),
        pc.struct_field(now, "output"),
    ]
    texts = [size.combine_chunks() for size in sizes]
    return pa.chunked_array([pa.StructArray.from_arrays(texts, fields=[*TEXTS_TYPE])])


JOINED = {"_usage": _sum_of_usage, "_texts": _with_input_of}
"""Columns that keep something of what they were where a row's result is replaced."""


def output_schema(input_schema: pa.Schema, fields: Sequence[pa.Field]) -> pa.Schema:
    """The input's columns, then the result's."""
    metadata = dict(input_schema.metadata or {})
    # `datasets` refuses a file whose own feature list lacks columns; without it, it infers them.
    metadata.pop(b"huggingface", None)
    metadata.pop(FOOTER_KEY.encode(), None)
    return pa.schema([*input_schema, *fields], metadata=metadata)


def _is_row_group(tables: Sequence[pa.Table]) -> bool:
    rows = sum(table.num_rows for table in tables)
    size: int = sum(table.nbytes for table in tables)
    return rows >= ROW_GROUP_ROWS or size >= ROW_GROUP_BYTES


class _Results:
    """Hands out the results of a complete shard, `rows` of them in all, in row order."""

    def __init__(
        self, output: Folder, key: str, rows: int, stamp: Stamp, overlay: Overlay | None = None
    ) -> None:
        self.longest = 0
        """Of the rows handed out, see Counts."""
        self.account = Account()
        """The same; of parts that are used whole, as nearly all are."""
        self._tables = self._in_order(output, key, rows, stamp)
        if overlay:
            later = _Results(output, overlay.key, len(overlay.rows), stamp)
            self._tables = _overlaid(self._tables, overlay.rows, later)
            self.account = later.account
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

    def _in_order(self, output: Folder, key: str, rows: int, stamp: Stamp) -> Iterator[pa.Table]:
        """Results of all rows once, from parts that may overlap where two runs cut units apart."""
        position = 0
        units = _one_after_the_other(parts_among(output.list(f"{PARTS}/{key}")).get(key, []))
        read = partial(_read_part, output, stamp)
        parts = ((unit, read(unit)) for unit in units) if output.is_local else _ahead(read, units)
        for unit, (made, table) in parts:
            self.longest = max(self.longest, made.counts.longest)
            if unit.start == position:
                self.account.add(made.counts.account)
            yield table.slice(position - unit.start)
            position = unit.stop
        if position != rows:
            raise StorageError(
                f"{output.url}: rows {position} to {rows} of {key} have no part",
                "Run the same command again; it redoes what is missing.",
            )


def _one_after_the_other(parts: Iterable[Unit]) -> Iterator[Unit]:
    """Of these, ascending, the parts that are needed; up to the first row that none has."""
    position = 0
    for unit in parts:
        if unit.start <= position < unit.stop:
            yield unit
            position = unit.stop


def _ahead(read: Callable[[Unit], Part], units: Iterable[Unit]) -> Iterator[tuple[Unit, Part]]:
    """Each unit with its part, of which some are read at once: a store takes a while to answer."""
    reading: deque[tuple[Unit, Future[Part]]] = deque()
    most = 0  # until it is known how large they are

    def first() -> tuple[Unit, Part]:
        unit, future = reading.popleft()
        return unit, future.result()

    with ThreadPoolExecutor(PARTS_AHEAD, thread_name_prefix="parts") as pool:
        try:
            for unit in units:
                reading.append((unit, pool.submit(read, unit)))
                while len(reading) > most:
                    before, part = first()
                    most = min(PARTS_AHEAD, BYTES_AHEAD // max(1, part[1].nbytes))
                    yield before, part
            while reading:
                yield first()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _read_part(output: Folder, stamp: Stamp, unit: Unit) -> Part:
    path = part_path(unit)
    with input_errors(f"{output.url}/{path}"):
        content = pa.BufferReader(output.read(path))
        parquet = pq.ParquetFile(content, page_checksum_verification=True)
        made = Stamp.from_footer(parquet.metadata.metadata[FOOTER_KEY.encode()])
        check_same_origin(made, stamp.identity, stamp.fingerprint, f"{output.url}/{path}")
        return made, parquet.read().replace_schema_metadata(None)
