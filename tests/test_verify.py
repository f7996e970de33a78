"""verify accepts what a job published, and nothing else: each way of spoiling it is found."""

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import AxbatchError, RefusedError, VerifyError
from pipeline.parts import FOOTER_KEY, Stamp
from pipeline.records import Counts, Output, Unit
from pipeline.status import read_status
from pipeline.verify import verify_output
from tests.conftest import PreparedJob

ROWS = 40
Edit = Callable[[pa.Table], pa.Table]


def verify(job: PreparedJob) -> Counts:
    return verify_output(job.plan(), job.output, "ko")


def spoil(job: PreparedJob, name: str, edit: Edit) -> None:
    """Rewrite an output file, with its footer."""
    key = FOOTER_KEY.encode()
    footer = {key: pq.read_metadata(job.path(name)).metadata[key]}
    table = edit(job.table(name).replace_schema_metadata(footer))
    pq.write_table(table, job.path(name), write_page_checksum=True)


@pytest.fixture
def a_job(prepared: Callable[..., PreparedJob]) -> PreparedJob:
    return prepared(input={"rows_per_unit": 7})


@pytest.fixture
def done(a_job: PreparedJob) -> PreparedJob:
    """A job with two published shards."""
    for name in ("a.parquet", "sub/b.parquet"):
        a_job.write(name, {"id": range(ROWS), "text": [f"text {n}" for n in range(ROWS)]})
    a_job.run()
    return a_job


def test_published_output_is_accepted_and_counted(
    done: PreparedJob, outputs: Callable[..., list[Output]]
) -> None:
    expected = Counts()
    for name in ("a.parquet", "sub/b.parquet"):
        for row in outputs(name, 0, ROWS):
            expected.count(row)
    assert verify(done) == done.run() == expected
    assert read_status(done.plan(), done.output).counts == expected


def test_output_that_a_retry_publishes_meanwhile_is_as_good(done: PreparedJob) -> None:
    before = done.plan()
    again = done.plan_retry("rejected")
    for planned in again.shards:
        for unit in planned.units():
            done.redo(again, unit)
    done.republish(again)
    assert verify_output(before, done.output, "ko") == verify(done)


def test_publishing_leaves_nothing_pending_and_no_parts(done: PreparedJob) -> None:
    assert done.plan().pending_rows == 0
    assert [entry.path for entry in done.output.list()] == ["a.parquet", "sub/b.parquet"]


@pytest.mark.parametrize("rows", [0, 1, 4_095, 4_096, 4_097, 9_000])
@pytest.mark.parametrize("group_rows", [100, 5_000])
def test_files_of_any_size_are_accepted(a_job: PreparedJob, rows: int, group_rows: int) -> None:
    texts = pa.array([f"{n}" for n in range(rows)], pa.string())
    kinds = pa.array([f"kind {n // 11 % 5}" for n in range(rows)], pa.string())
    a_job.config = a_job.config.model_copy(
        update={"input": a_job.config.input.model_copy(update={"rows_per_unit": 4_000})}
    )
    table = pa.table({"text": texts, "kind": kinds.dictionary_encode()})
    a_job.write("a.parquet", table, row_group_size=group_rows)
    a_job.run()
    assert verify(a_job).rows == rows


@pytest.mark.parametrize(
    "values",
    [
        pytest.param([math.nan, 1.0, 0.0], id="nan"),
        pytest.param([None, 1.0, 0.0], id="null"),
        pytest.param([[math.nan], [], [1.0, math.nan]], id="list of nan"),
        pytest.param([{"x": math.nan}, {"x": 1.0}], id="struct of nan"),
    ]
    + [
        pytest.param(
            values,
            id=name,
        )
        for name, values in {
            "nan beside null": [math.nan, None],
            "nan in a list beside null": [[math.nan, None], None, []],
            "nan in a struct beside null": [{"x": math.nan}, {"x": None}, None],
        }.items()
    ],
)
def test_nan_is_the_same_as_itself(a_job: PreparedJob, values: list[Any]) -> None:
    rows = 900
    column = pa.array([values[n % len(values)] for n in range(rows)])
    table = pa.table({"text": [str(n) for n in range(rows)], "value": column})
    a_job.write("a.parquet", table, row_group_size=70)
    a_job.run()
    assert verify(a_job).rows == rows


def set_cell(name: str, row: int, value: Any) -> Edit:
    def edit(table: pa.Table) -> pa.Table:
        index, column = table.schema.get_field_index(name), table[name].to_pylist()
        column[row] = value
        field = table.schema.field(name)
        return table.set_column(index, field, pa.array(column, field.type))

    return edit


def row_of(status: str, table: pa.Table) -> int:
    return int(table["_status"].to_pylist().index(status))


def swap_rows(first: int, second: int) -> Edit:
    order = list(range(ROWS))
    order[first], order[second] = second, first
    return lambda table: table.take(order)


def swap_input_cells(table: pa.Table) -> pa.Table:
    texts = table["text"].to_pylist()
    return set_cell("text", 0, texts[1])(set_cell("text", 1, texts[0])(table))


SPOILT: dict[str, tuple[Edit, str]] = {
    "changed cell": (set_cell("text", 17, "text 18"), "column `text` differs"),
    "changed number": (set_cell("id", 39, -1), "column `id` differs"),
    "cell made null": (set_cell("text", 0, None), "column `text` differs"),
    "swapped rows": (swap_rows(3, 30), "column `id` differs"),
    "swapped cells": (swap_input_cells, "column `text` differs"),
    "dropped row": (lambda t: pa.concat_tables([t[:5], t[6:]]), "has 39 rows, its input has 40"),
    "dropped last row": (lambda t: t[:-1], "has 39 rows"),
    "doubled row": (lambda t: pa.concat_tables([t, t[-1:]]), "has 41 rows"),
    "no rows": (lambda t: t[:0], "has 0 rows"),
    "other type": (
        lambda t: t.set_column(0, "id", t["id"].cast(pa.int32())),
        "is not the input's `id`",
    ),
    "other name": (lambda t: t.set_column(0, "ID", t["id"]), "has columns"),
    "other order of columns": (
        lambda t: t.select(["text", "id", "ko", "_status", "_reason", "_usage"]),
        "has columns",
    ),
    "dropped input column": (lambda t: t.drop_columns(["text"]), "has columns"),
    "value beside rejected": (
        lambda t: set_cell("ko", row_of("rejected", t), "a value")(t),
        "`ko` must hold a value just where",
    ),
    "value beside failed": (
        lambda t: set_cell("ko", row_of("failed", t), "")(t),
        "`ko` must hold a value just where",
    ),
    "ok without value": (
        lambda t: set_cell("ko", row_of("ok", t), None)(t),
        "`ko` must hold a value just where",
    ),
    "ok with reason": (
        lambda t: set_cell("_reason", row_of("ok", t), "null")(t),
        "`_reason` must be given just where",
    ),
    "rejected without reason": (
        lambda t: set_cell("_reason", row_of("rejected", t), None)(t),
        "`_reason` must be given just where",
    ),
    "unknown status": (set_cell("_status", 0, "done"), "a `_status` that is none of"),
    "no status": (set_cell("_status", 0, None), "a `_status` that is none of"),
    "rejected counted as failed": (
        lambda t: set_cell("_status", row_of("rejected", t), "failed")(t),
        "footer's counts",
    ),
    "other reason": (
        lambda t: set_cell("_reason", row_of("rejected", t), "null")(t),
        "footer's counts",
    ),
    "other usage": (
        set_cell(
            "_usage",
            5,
            {"requests": 2, "prompt_tokens": 5, "cached_tokens": 0, "completion_tokens": 1},
        ),
        "footer's counts",
    ),
}


@pytest.mark.parametrize("way", SPOILT)
def test_spoilt_output_is_rejected_and_named(done: PreparedJob, way: str) -> None:
    edit, message = SPOILT[way]
    verify(done)
    spoil(done, "sub/b.parquet", edit)
    with pytest.raises(VerifyError) as raised:
        verify(done)
    assert message in str(raised.value)
    assert str(done.path("sub/b.parquet")) in str(raised.value)


@pytest.mark.parametrize("column", ["ko", "_status", "_reason", "_usage"])
def test_output_without_a_result_column_is_rejected(done: PreparedJob, column: str) -> None:
    spoil(done, "a.parquet", lambda table: table.drop_columns([column]))
    with pytest.raises(VerifyError, match=column):
        verify(done)


def test_output_with_a_column_too_many_is_rejected(done: PreparedJob) -> None:
    spoil(done, "a.parquet", lambda table: table.append_column("more", table["id"]))
    with pytest.raises(VerifyError, match="more"):
        verify(done)


def stamped(change: Callable[[Stamp], Stamp]) -> Edit:
    """Change what the footer says."""

    def edit(table: pa.Table) -> pa.Table:
        metadata = dict(table.schema.metadata)
        stamp = change(Stamp.from_footer(metadata[FOOTER_KEY.encode()]))
        metadata[FOOTER_KEY.encode()] = stamp.to_footer().encode()
        return table.replace_schema_metadata(metadata)

    return edit


def one_more(stamp: Stamp) -> Stamp:
    stamp.counts.count(Output("more"))
    return stamp


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_more, "counts"),
        (lambda stamp: replace(stamp, counts=Counts()), "counts"),
        (lambda stamp: replace(stamp, shard="sub/b.parquet"), "another shard"),
        (lambda stamp: replace(stamp, stop=ROWS - 1), "another shard"),
        (lambda stamp: replace(stamp, start=1), "another shard"),
    ],
)
def test_footer_that_is_wrong_is_rejected(
    done: PreparedJob, change: Callable[[Stamp], Stamp], message: str
) -> None:
    spoil(done, "a.parquet", stamped(change))
    with pytest.raises(VerifyError, match=rf"a\.parquet.*{message}"):
        verify(done)


@pytest.mark.parametrize("change", [{"identity": "another"}, {"fingerprint": "1:x"}])
def test_footer_of_another_job_or_input_is_refused(
    done: PreparedJob, change: dict[str, str]
) -> None:
    spoil(done, "a.parquet", stamped(lambda stamp: replace(stamp, **change)))
    with pytest.raises(RefusedError, match=r"a\.parquet"):
        verify(done)


def test_shard_that_is_not_published_is_named_with_what_it_lacks(done: PreparedJob) -> None:
    done.write("c.parquet", {"text": [str(n) for n in range(ROWS)]})
    plan = done.plan()
    planned = next(shard for shard in plan.shards if shard.shard.name == "c.parquet")
    done.commit(plan, Unit(planned.key, 0, 7))
    with pytest.raises(VerifyError, match=r"c\.parquet: not published, 33 of 40 rows"):
        verify(done)
    status = read_status(done.plan(), done.output)
    assert not status.is_done
    assert status.counts.rows == 2 * ROWS + 7


def test_deleted_output_file_is_found_and_redone(done: PreparedJob) -> None:
    before = done.table("a.parquet")
    done.path("a.parquet").unlink()
    with pytest.raises(VerifyError, match=r"a\.parquet: not published, 40 of 40 rows"):
        verify(done)
    done.run()
    assert done.table("a.parquet").equals(before)
    assert verify(done).rows == 2 * ROWS


def flip_last_bit(path: Path, column: int) -> None:
    """One bit in the last data page of `column`."""
    chunk = pq.read_metadata(path).row_group(0).column(column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(path.read_bytes())
    data[start + chunk.total_compressed_size - 1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("column", range(5))
def test_flipped_bit_is_found_by_its_checksum(done: PreparedJob, column: int) -> None:
    flip_last_bit(done.path("a.parquet"), column)
    with pytest.raises(VerifyError, match=r"out/a\.parquet: not readable"):
        verify(done)


def test_damaged_input_is_not_blamed_on_the_output(a_job: PreparedJob) -> None:
    table = pa.table({"text": [str(n) for n in range(ROWS)]})
    path = a_job.write("a.parquet", table, write_page_checksum=True)
    before = path.stat()
    a_job.run()
    flip_last_bit(path, 0)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # a disk's fault leaves no trace
    with pytest.raises(AxbatchError) as raised:
        verify(a_job)
    assert str(path) in str(raised.value)
    assert f"Delete {a_job.path('a.parquet')}" not in str(raised.value)
