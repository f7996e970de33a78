"""verify: the output is the input plus results, row for row; proven by reading both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.batch_file import check_lines
from pipeline.errors import InputError, VerifyError
from pipeline.parquet import input_errors, open_parquet, read_batches
from pipeline.parts import FOOTER_KEY, STATUS_COLUMNS, Stamp, count_rows
from pipeline.plan import Plan, ShardPlan
from pipeline.records import STATUSES, Counts
from pipeline.shards import Shard
from pipeline.storage import Folder

THREADS = 4


def verify_output(plan: Plan, output: Folder, column: str, has_texts: bool = False) -> Counts:
    """Read every shard's input and output side by side, all checksums on. `has_texts` as
    `accounting.rows`.

    `make_plan` has compared identities and fingerprints already.

    Raises:
        VerifyError: a shard is not published, or differs; names the file and the rows.
    """
    for shard in plan.unpublished:
        raise VerifyError(
            f"{shard.shard.name}: not published, {shard.to_do_rows:,} of "
            f"{shard.shard.rows:,} rows still to do",
            "Run the job to its end first: axbatch run.",
        )
    total = Counts()
    with ThreadPoolExecutor(THREADS) as pool:
        for counts in pool.map(
            lambda shard: _verify_shard(shard, output, column, has_texts), plan.shards
        ):
            total.add(counts)
    return total


def _verify_shard(planned: ShardPlan, output: Folder, column: str, has_texts: bool) -> Counts:
    shard = planned.shard
    url = f"{output.url}/{shard.name}"
    counts = Counts()
    added = [column, *STATUS_COLUMNS, *(["_texts"] if has_texts else [])]
    try:
        with _opened(shard, output) as (given_file, made_file):
            # Its own: a retry may have published it anew since the plan was made.
            stamp = Stamp.from_footer(made_file.metadata.metadata[FOOTER_KEY.encode()])
            for start, given, made in _side_by_side(given_file, made_file, shard, url, added):
                rows = f"rows {start} to {start + given.num_rows}"
                _check_input_columns(given, made, f"{url}: {rows}")
                _check_results(made, column, f"{url}: {rows}")
                if has_texts:
                    _check_texts(made, column, f"{url}: {rows}")
                count_rows(pa.Table.from_batches([made]), counts)
    except InputError as error:
        hint = "Restore the file; if it is the output's, delete it and run the job again."
        raise VerifyError(str(error.args[0]), hint) from error
    _check_stamp(stamp, shard, counts, url)
    if shard.is_batch:
        check_lines(output, column, stamp)
    return counts


@contextmanager
def _opened(shard: Shard, output: Folder) -> Iterator[tuple[pq.ParquetFile, pq.ParquetFile]]:
    """Input and output."""
    with (
        input_errors(f"{shard.source.url}/{shard.path}"),
        shard.source.open(shard.path) as input_file,
        output.open(shard.name) as output_file,
    ):
        yield open_parquet(input_file), open_parquet(output_file)


def _side_by_side(
    given: pq.ParquetFile, made: pq.ParquetFile, shard: Shard, url: str, added: Sequence[str]
) -> Iterator[tuple[int, pa.RecordBatch, pa.RecordBatch]]:
    """Batches of the same rows of input and output, with the number of their first row; the output
    has the columns `added` after the input's."""
    if given.metadata.num_rows != made.metadata.num_rows:
        raise VerifyError(
            f"{url}: has {made.metadata.num_rows:,} rows, its input has {given.metadata.num_rows:,}"
        )
    expected = [*given.schema_arrow.names, *added]
    if made.schema_arrow.names != expected:
        raise VerifyError(f"{url}: has columns {made.schema_arrow.names}, not {expected}")
    made_rows = _Rows(read_batches(made, url))
    start = 0
    for batch in read_batches(given, f"{shard.source.url}/{shard.path}"):
        yield start, batch, made_rows.take(batch.num_rows)
        start += batch.num_rows


class _Rows:
    """Re-cuts batches: row groups end elsewhere in the input than in the output."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches = batches
        self._held: list[pa.RecordBatch] = []
        self._rows = 0

    def take(self, rows: int) -> pa.RecordBatch:
        while self._rows < rows:
            batch = next(self._batches)
            self._held.append(batch)
            self._rows += batch.num_rows
        table = pa.Table.from_batches(self._held).combine_chunks()
        self._held = table.slice(rows).to_batches()
        self._rows -= rows
        return table.slice(0, rows).combine_chunks().to_batches()[0]


def _check_input_columns(given: pa.RecordBatch, made: pa.RecordBatch, where: str) -> None:
    for index, field in enumerate(given.schema):
        other = made.column(index)
        if made.schema.field(index).name != field.name or other.type != field.type:
            raise VerifyError(f"{where}: column {index} is not the input's `{field.name}`")
        if not given.column(index).equals(other) and not _same_with_nans(
            given.column(index), other
        ):
            raise VerifyError(f"{where}: column `{field.name}` differs from the input's")


def _same_with_nans(given: pa.Array, made: pa.Array) -> bool:
    """Arrow's `equals` holds NaN unequal to itself, at any depth; its text does not."""
    return repr(given.to_pylist()) == repr(made.to_pylist())


def _check_results(made: pa.RecordBatch, column: str, where: str) -> None:
    status, value, reason = made["_status"], made[column], made["_reason"]
    if not pc.all(pc.is_in(status, pa.array(STATUSES))).as_py():
        raise VerifyError(f"{where}: a `_status` that is none of {', '.join(STATUSES)}")
    ok = pc.equal(status, "ok")
    if not pc.equal(ok, pc.is_valid(value)).equals(pa.array([True] * len(ok))):
        raise VerifyError(f"{where}: `{column}` must hold a value just where `_status` is ok")
    if not pc.equal(ok, pc.is_null(reason)).equals(pa.array([True] * len(ok))):
        raise VerifyError(f"{where}: `_reason` must be given just where `_status` is not ok")


def _check_texts(made: pa.RecordBatch, column: str, where: str) -> None:
    counted = pc.is_valid(pc.struct_field(made["_texts"], "output"))
    if not counted.equals(pc.is_valid(made[column])):
        raise VerifyError(f"{where}: `_texts` must count an output just where `{column}` holds one")


def _check_stamp(stamp: Stamp, shard: Shard, counts: Counts, url: str) -> None:
    if stamp.shard != shard.name or (stamp.start, stamp.stop) != (0, shard.rows):
        raise VerifyError(f"{url}: its footer speaks of another shard")
    # Of these the rows say nothing any more.
    counts.longest, counts.account = stamp.counts.longest, stamp.counts.account
    if stamp.counts.to_json() != counts.to_json():
        raise VerifyError(f"{url}: its footer's counts are not those of its rows")
