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
5. A row may be committed as deferred (see lanes). A shard's deferred rows, counted from 0, are a
   shard of their own, whose origin is the shard's and a hash of their positions; 2 and 4 wait for
   its parts, and take them in the place of the deferred ones.

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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.accounting import RowTexts, TextSize, Usage, numbers_of
from pipeline.errors import NoSuchFileError, RefusedError
from pipeline.parquet import input_errors, open_parquet, parquet_writer, read_batches
from pipeline.records import DEFERRED, Counts, Output, Unit, counted_as
from pipeline.storage import Entry, Folder

PARTS = "_axbatch/parts"
FOOTER_KEY = "axbatch"
USAGE_TYPE = pa.struct([(name, pa.int64()) for name in Usage.__dataclass_fields__])
TEXT_TYPE = pa.struct([(name, pa.int64()) for name in TextSize.__dataclass_fields__])
TEXTS_TYPE = pa.struct([(name, TEXT_TYPE) for name in RowTexts.__dataclass_fields__])
STATUS_COLUMNS = ("_status", "_reason", "_usage")


@dataclass(frozen=True)
class Stamp:
    """What a part or a published shard was made from; stands in its footer."""

    identity: str
    shard: str
    fingerprint: str
    """Of the input file: size, etag or mtime, and a hash of its Parquet footer."""
    start: int
    stop: int
    counts: Counts
    run: str

    def to_footer(self) -> str:
        fields = {**vars(self), "counts": self.counts.to_json(), "version": 1}
        return json.dumps(fields, ensure_ascii=False)

    @classmethod
    def from_footer(cls, footer: bytes) -> Stamp:
        fields = json.loads(footer)
        fields.pop("version")
        return cls(**{**fields, "counts": Counts.from_json(fields["counts"])})


def result_fields(column: str, value_type: pa.DataType, has_texts: bool = False) -> list[pa.Field]:
    """The columns that are added to the input's; `has_texts` as `accounting.rows`."""
    return [
        pa.field(column, value_type),
        pa.field("_status", pa.string()),
        pa.field("_reason", pa.string()),
        pa.field("_usage", USAGE_TYPE),
        *([pa.field("_texts", TEXTS_TYPE)] if has_texts else []),
    ]


def result_table(
    outputs: Sequence[Output],
    column: str,
    value_type: pa.DataType,
    texts: Sequence[RowTexts] | None = None,
) -> pa.Table:
    """Outputs as Arrow, one row each, in order. Shape: len(outputs) x 4, or 5 with `texts`."""
    arrays = [
        pa.array([output.value for output in outputs], value_type),
        pa.array([output.status for output in outputs], pa.string()),
        pa.array([output.reason for output in outputs], pa.string()),
        pa.array([numbers_of(output.usage) for output in outputs], USAGE_TYPE),
    ]
    if texts is not None:
        arrays.append(pa.array([asdict(each) for each in texts], TEXTS_TYPE))
    fields = result_fields(column, value_type, has_texts=texts is not None)
    return pa.table(arrays, schema=pa.schema(fields))


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


@dataclass(frozen=True)
class Overlay:
    """Results of some rows of a shard that are to take the place of what its parts say of them."""

    key: str
    """Of their parts."""
    rows: array[int]
    """Their positions in the shard, ascending."""


def overlay_key(key: str, rows: array[int]) -> str:
    """The key of the deferred rows of a shard whose own is `key`."""
    return overlays_of(key) + hashlib.sha256(rows.tobytes()).hexdigest()[:12]


def overlays_of(key: str) -> str:
    """What the keys of all deferred rows of it begin with. There is one once its own rows are
    committed; more only where two writers disagreed on a row that killed an engine."""
    return f"{key}-deferred-"


def name_of(key: str) -> str:
    """The inverse of `key_of`: the name of the output file."""
    return key.rpartition("/")[0]


def commit_part(output: Folder, stamp: Stamp, results: pa.Table) -> bool:
    """Create the part of rows [stamp.start, stamp.stop). False if it was there already."""
    unit = Unit(stamp.shard, stamp.start, stamp.stop)
    buffer = io.BytesIO()
    with parquet_writer(buffer, results.schema) as writer:
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
    with input_errors(f"{output.url}/{path}"), _opened(output, path) as source:
        metadata = pq.read_metadata(source).metadata or {}
    footer = metadata.get(FOOTER_KEY.encode())
    return Stamp.from_footer(footer) if footer else None


def _opened(output: Folder, path: str) -> pa.NativeFile:
    """A part in an object store is read whole, in one request; else what is asked for."""
    is_small = path.startswith(f"{PARTS}/") and not output.is_local
    return pa.BufferReader(output.read(path)) if is_small else output.open(path)


def read_part_counts(output: Folder, unit: Unit) -> Counts | None:
    """The counts of the unit's part; None if there is none."""
    try:
        stamp = read_stamp(output, part_path(unit))
    except NoSuchFileError:
        return None
    return stamp.counts if stamp else None


def read_counts_inside(output: Folder, unit: Unit) -> dict[Unit, Counts]:
    """The counts of every part that lies in the unit's range; lists all parts of its shard."""
    parts = parts_among(output.list(f"{PARTS}/{unit.shard}")).get(unit.shard, [])
    inside = [part for part in parts if unit.start <= part.start and part.stop <= unit.stop]
    stamps = [read_stamp(output, part_path(part)) for part in inside]
    return {part: stamp.counts for part, stamp in zip(inside, stamps, strict=True) if stamp}


def part_path(unit: Unit) -> str:
    return f"{PARTS}/{unit.shard}/{unit.id}.parquet"


def not_ok_rows(output: Folder, path: str) -> Iterator[tuple[int, str]]:
    """Rows of a part or a published shard that are not ok, by their position in it, with
    `status: code` as in Counts.reasons. Deferred rows have no status yet and are left out."""
    for start, batch in _batches(output, path, ["_status", "_reason"]):
        statuses, reasons = batch["_status"], batch["_reason"]
        not_ok = pc.invert(pc.is_in(statuses, pa.array(["ok", DEFERRED])))
        for row in pc.indices_nonzero(not_ok).to_pylist():
            yield start + row, counted_as(statuses[row].as_py(), reasons[row].as_py())


def deferred_rows(output: Folder, path: str) -> Iterator[int]:
    """Positions of a part's rows that it leaves to the next lane."""
    for start, batch in _batches(output, path, ["_status"]):
        for row in pc.indices_nonzero(pc.equal(batch["_status"], DEFERRED)).to_pylist():
            yield start + row


def _batches(
    output: Folder, path: str, columns: Sequence[str]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """These columns of a part or a published shard, with the number of each batch's first row."""
    url, start = f"{output.url}/{path}", 0
    with input_errors(url), _opened(output, path) as file:
        for batch in read_batches(open_parquet(file), url, columns=columns):
            yield start, batch
            start += batch.num_rows


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
