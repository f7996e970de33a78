"""Parquet as it is read and written everywhere here: streamed, with checksums on every page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError, NoSuchFileError, RowRejected
from pipeline.filesystems import storage_errors
from pipeline.records import Row

READ_ROWS = 4_096
READ_BYTES = 8 << 20


def open_parquet(file: pa.NativeFile) -> pq.ParquetFile:
    """Open for streaming: a row group is read page by page, never fetched whole, so that one
    row group of millions of rows needs no more memory than a small one."""
    return pq.ParquetFile(
        file,
        pre_buffer=False,
        buffer_size=1 << 20,
        page_checksum_verification=True,
        # Spark's timestamps, which are microseconds: as nanoseconds, Arrow's own choice, those
        # before 1677 and after 2262 become others without a word, and Spark can't read them back.
        coerce_int96_timestamp_unit="us",
    )


def read_batches(
    parquet: pq.ParquetFile,
    url: str,
    row_groups: Sequence[int] | None = None,
    columns: Sequence[str] | None = None,
) -> Iterator[pa.RecordBatch]:
    """Batches in row order, each of about READ_BYTES at most. Raises InputError for damage."""
    numbers = range(parquet.num_row_groups) if row_groups is None else row_groups
    groups = [parquet.metadata.row_group(number) for number in numbers]
    size = sum(group.total_byte_size for group in groups)
    rows = int(READ_BYTES * sum(group.num_rows for group in groups) / max(1, size))
    with input_errors(url):
        yield from parquet.iter_batches(
            batch_size=max(1, min(READ_ROWS, rows)), row_groups=row_groups, columns=columns
        )


def python_rows(table: pa.Table | pa.RecordBatch) -> list[Row | RowRejected]:
    """Rows as dicts. One that Python has no value for is its error instead: text that is not
    UTF-8, a date behind the year 9999."""
    try:
        return list(table.to_pylist())
    except (ValueError, OverflowError):  # of all rows; UnicodeDecodeError is a ValueError
        return [_python_row(table, index) for index in range(table.num_rows)]


def _python_row(table: pa.Table | pa.RecordBatch, index: int) -> Row | RowRejected:
    row = {}
    for name in table.column_names:
        try:
            row[name] = table.column(name)[index].as_py()
        except UnicodeDecodeError:
            return RowRejected("invalid_utf8")
        except (ValueError, OverflowError):
            return RowRejected(f"bad_value: {name}")
    return row


@contextmanager
def input_errors(url: str) -> Iterator[None]:
    """Turn what Arrow says of `url` into an InputError, and what its disk says into a
    StorageError."""
    try:
        yield
    except FileNotFoundError as error:
        raise NoSuchFileError(f"{url}: no such file") from error
    except (pa.ArrowException, OSError) as error:
        # Arrow reports damaged pages and headers as OSError too, without an errno.
        if isinstance(error, OSError) and error.errno is not None:
            with storage_errors(url):
                raise
        text = " ".join(str(error).split())[:200]
        raise InputError(
            f"{url}: not readable as Parquet: {text}",
            "Replace or remove the file, then run again.",
        ) from error


def parquet_writer(sink: IO[bytes], schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True)
