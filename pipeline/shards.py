"""Shards: the input's files, found and looked into. From listings and footers only."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pyarrow as pa

from pipeline.batch_file import FORMAT, files_beside, stage_requests
from pipeline.config import JobConfig
from pipeline.config.data import InputConfig, InputFormat
from pipeline.errors import InputError, RefusedError
from pipeline.filesystems import absolute_url
from pipeline.parquet import input_errors, open_parquet
from pipeline.parts import result_fields
from pipeline.plain_files import KINDS
from pipeline.staging import STAGED, stage_dataset, stage_file, staged_name, suffix_of
from pipeline.storage import Entry, Folder, find_files
from pipeline.task import Task

FOOTER_THREADS = 32
UNIT_BYTES = 1 << 20
"""Most bytes of task columns in one unit, so that a unit stays far under ten minutes."""

FOOTER_END = 8
"""Bytes after a Parquet footer: its length, and PAR1."""

RAY_PICKLED = "ray.data.arrow_pickled_object"


@dataclass(frozen=True)
class Shard:
    """One input file, or some of its rows; it becomes one output file of the same name."""

    name: str
    """Path of the output file below the output folder."""
    source: Folder
    path: str
    """Path of the Parquet file below `source`."""
    rows: int
    bytes: int
    fingerprint: str
    rows_per_unit: int
    row_groups: tuple[int, ...]
    """Rows of each row group."""
    selected: array[int] | None = None
    """The rows of the file that it consists of, ascending; None for all."""
    bytes_per_row: float = 1.0
    """Of the task's columns, uncompressed, as the footer has them: the mean; 1 at least."""
    is_batch: bool = False
    """Whether its rows are Batch API requests: the answers are written as JSON lines too."""

    @property
    def files(self) -> tuple[str, ...]:
        """All that is written for it, below the output folder."""
        return (self.name, *files_beside(self.name)) if self.is_batch else (self.name,)

    def check_unchanged(self) -> None:
        """Raises RefusedError if the input file was replaced since it was planned."""
        if self.path.startswith(STAGED):
            return  # a staged file is never written over
        with input_errors(f"{self.source.url}/{self.path}"):
            now = self.source.entry(self.path).fingerprint
        if not self.fingerprint.startswith(f"{now}:"):
            raise RefusedError(
                f"{self.source.url}/{self.path}: was replaced while the job ran",
                "Put the old file back, or give the job a new `output.path`.",
            )


def find_shards(job: JobConfig, task: Task, output: Folder) -> list[Shard]:
    """The input's shards, by name. Stages what is not Parquet."""
    files = _parquet_files(job.input, output)
    added = result_fields(job.output.column, task.output_type, job.accounting.rows)
    taken = [field.name for field in added]

    def shard(file: _InputFile) -> Shard:
        read = _read_shard(file, task.columns, taken, job.input.rows_per_unit)
        return replace(read, is_batch=job.input.format == FORMAT)

    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        return list(pool.map(shard, files))


@dataclass(frozen=True)
class _InputFile:
    """A Parquet file to read, the name of its output, and what the user calls it."""

    name: str
    source: Folder
    entry: Entry
    origin: str


def _parquet_files(config: InputConfig, output: Folder) -> list[_InputFile]:
    """Every Parquet file to read, by name."""
    files: dict[str, _InputFile] = {}
    read: set[str] = set()

    def add(name: str, source: Folder, entry: Entry, origin: str) -> None:
        if origin in read:
            raise InputError(
                f"{origin}: more than one entry of input.path names it",
                "Leave it to one of them, or its rows would be done twice.",
            )
        read.add(origin)
        if name in files:
            raise InputError(
                f"two input files would both become {name}",
                "Rename one, or give each its own job and `output.path`.",
            )
        files[name] = _InputFile(name, source, entry, origin)

    if config.dataset is not None:
        entry = stage_dataset(config, output)
        add(entry.path.rpartition("/")[2], output, entry, f"dataset {config.dataset}")
    # All at once: to ask for each of ten thousand takes a store a quarter of an hour.
    staged = {entry.path for entry in output.list(STAGED)}
    for url in config.paths:
        source, entries = find_files(url)
        _refuse_overlap(url, source, output)
        is_only = len(entries) == 1
        for entry in entries:
            file = _read_as(config.format, source, entry, output, staged, is_only)
            add(*file, f"{source.url}/{entry.path}")
    return [files[name] for name in sorted(files)]


def _read_as(
    form: InputFormat,
    source: Folder,
    entry: Entry,
    output: Folder,
    staged: Collection[str],
    is_only: bool,
) -> tuple[str, Folder, Entry]:
    """The name of the output file, and the Parquet file to read: the entry itself, or what it is
    staged to. `is_only`: whatever its suffix, it is meant."""
    if form == FORMAT:
        return staged_name(entry.path), output, stage_requests(source, entry, output, staged)
    if suffix_of(entry.path) in KINDS:
        return staged_name(entry.path), output, stage_file(source, entry, output, staged)
    if suffix_of(entry.path) in (".parquet", ".pq") or is_only:
        return entry.path, source, entry
    raise InputError(
        f"{source.url}/{entry.path}: not a kind of file that can be read",
        "Known: .parquet, .jsonl, .json, .ndjson, .csv, .txt. Narrow `input.path` with a glob.",
    )


def _refuse_overlap(url: str, source: Folder, output: Folder) -> None:
    """A file, or a glob of one folder's files, may have the output in a folder beside it."""
    given, made = (_real_path(folder) + "/" for folder in (source, output))
    pattern = absolute_url(url).removeprefix(source.url).lstrip("/")
    reads_subfolders = not pattern or "/" in pattern or "**" in pattern
    if made == given or (reads_subfolders and made.startswith(given)):
        raise InputError(
            f"output.path {output.url} lies inside the input folder {source.url}",
            "The next run would read its own output; put `output.path` beside the input.",
        )


def _real_path(folder: Folder) -> str:
    path = folder.url.rstrip("/")
    return os.path.realpath(path) if folder.is_local else path


def _read_shard(file: _InputFile, columns: Sequence[str], taken: Sequence[str], rows: int) -> Shard:
    with input_errors(file.origin), file.source.open(file.entry.path) as opened:
        parquet = open_parquet(opened)
        schema, metadata = parquet.schema_arrow, parquet.metadata
        paths = [metadata.schema.column(c).path for c in range(metadata.num_columns)]
        wide = [c for c, path in enumerate(paths)
                if any(f"{path}.".startswith(f"{column}.") for column in columns)]  # fmt: skip
        column_bytes = sum(
            metadata.row_group(g).column(c).total_uncompressed_size
            for g in range(metadata.num_row_groups)
            for c in wide
        )
        fingerprint = file.entry.fingerprint
        if not file.entry.path.startswith(STAGED):  # which has the fingerprint of its source
            fingerprint += f":{_footer_hash(opened, metadata.serialized_size)}"
    check_schema(schema, columns, taken, file.origin)
    bytes_per_row = max(1.0, column_bytes / max(1, metadata.num_rows))
    return Shard(
        name=file.name,
        source=file.source,
        path=file.entry.path,
        rows=metadata.num_rows,
        bytes=file.entry.size,
        fingerprint=fingerprint,
        rows_per_unit=max(1, min(rows, int(UNIT_BYTES / bytes_per_row))),
        row_groups=tuple(metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)),
        bytes_per_row=bytes_per_row,
    )


def _footer_hash(file: pa.NativeFile, length: int) -> str:
    """Tells files apart that have the same size and time: the footer holds row counts, offsets
    and, nearly always, the least and greatest value of every column."""
    file.seek(file.size() - FOOTER_END - length)
    return hashlib.sha256(file.read(length)).hexdigest()[:8]


def check_schema(schema: pa.Schema, columns: Sequence[str], taken: Sequence[str], url: str) -> None:
    """Raises InputError if the task's columns are missing or the result's are there already."""
    if len(set(schema.names)) < len(schema.names):
        raise InputError(f"{url}: has two columns of the same name", "Rename one of them.")
    for column in columns:
        if column not in schema.names:
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
    for column_field in schema:
        if _holds_pickles(column_field):
            raise InputError(
                f"{url}: column `{column_field.name}` holds pickled Python objects, which are code",
                "Write the column with a plain Arrow type.",
            )


def _holds_pickles(field: pa.Field) -> bool:
    """Whether a column, or one nested in it, has Ray's type of pickled Python objects. Its name
    stands in the metadata where that type is not registered, as in a process without Ray."""
    named = (field.metadata or {}).get(b"ARROW:extension:name", b"").decode()
    if RAY_PICKLED in (named, getattr(field.type, "extension_name", None)):
        return True
    return any(_holds_pickles(field.type.field(i)) for i in range(field.type.num_fields))
