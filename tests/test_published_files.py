"""Published files: columns of any type and files of any shape come through, bit for bit."""

import json
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.merging import output_schema
from pipeline.parquet import open_parquet
from pipeline.parts import Stamp, read_stamp
from pipeline.records import Counts, Output
from tests.shards import FIELDS, ROWS, SHARD, Shard, flip_bit_in_a_page

# --- columns of any kind ---------------------------------------------------------------------

N = 200


def odd_columns() -> dict[str, pa.Array]:
    def each(make: Callable[[int], Any], kind: pa.DataType | None = None) -> pa.Array:
        return pa.array([None if n % 5 == 4 else make(n) for n in range(N)], kind)

    now = datetime(2026, 1, 1, tzinfo=UTC)
    return {
        "int8": each(lambda n: n % 100, pa.int8()),
        "uint64": each(lambda n: 2**64 - 1 - n, pa.uint64()),
        "bool": each(lambda n: n % 3 == 0),
        "nan": each(lambda n: math.nan if n % 3 else -0.0),
        "half": each(float, pa.float16()),
        "decimal": each(lambda n: Decimal(n).scaleb(-2), pa.decimal128(30, 2)),
        "time": each(lambda n: now + timedelta(seconds=n), pa.timestamp("us", "Asia/Seoul")),
        "time_ns": each(lambda n: n, pa.timestamp("ns")),
        "date": each(lambda n: (now + timedelta(days=n)).date()),
        "duration": each(lambda n: n, pa.duration("us")),
        "binary": each(lambda n: bytes([n, 0, 255])),
        "fixed": each(lambda n: bytes([n]) * 16, pa.binary(16)),
        "uuid": each(lambda n: bytes([n]) * 16, pa.uuid()),
        "large_string": each(lambda n: "한국어" * n, pa.large_string()),
        "dictionary": each(lambda n: "abcdef"[n * 7 % (n // 40 + 2)]).dictionary_encode(),
        "all_null": pa.nulls(N),
        "all_null_string": pa.nulls(N, pa.string()),
        "list": each(lambda n: [str(n), None, ""][: n % 4]),
        "list_nan": each(lambda n: [math.nan, None][: n % 3], pa.list_(pa.float64())),
        "fixed_list": each(lambda n: [n, None], pa.list_(pa.int32(), 2)),
        "struct": each(lambda n: {"a": n, "b": {"c": [None, str(n)]}}),
        "struct_null": each(lambda n: {"a": None, "b": None if n % 2 else math.nan}),
        "map": each(lambda n: [("k", n), ("l", None)], pa.map_(pa.string(), pa.int64())),
        "a.b": each(str),
        "한국어 이름": each(str),
    }


def bits(column: pa.ChunkedArray) -> list[str]:
    """Each value exactly: NaN equals itself, and -0.0 is not 0.0."""
    return [repr(value) for value in column.to_pylist()]


@pytest.fixture(scope="module")
def published_odd(
    tmp_path_factory: pytest.TempPathFactory,
    commit: Callable[..., bool],
    outputs: Callable[..., list[Output]],
) -> tuple[pa.Table, pa.Table]:
    """Input and output of a shard that has all odd columns, both read back from Parquet."""
    shard = Shard(tmp_path_factory.mktemp("odd"), commit, outputs)
    shard.write(pa.table(odd_columns()), row_group_size=13)
    for start in range(0, N, 7):
        shard.commit(start, min(N, start + 7))
    shard.publish(N)
    return pq.read_table(Path(shard.source.url) / SHARD), shard.published()


@pytest.mark.parametrize("name", odd_columns())
def test_column_of_any_type_survives_bit_for_bit(
    published_odd: tuple[pa.Table, pa.Table], name: str
) -> None:
    given_, made = published_odd
    assert made.schema.field(name).equals(given_.schema.field(name), check_metadata=True)
    assert bits(made[name]) == bits(given_[name])


def test_timestamps_of_old_spark_keep_their_days(shard: Shard) -> None:
    """INT96, of any year; in nanoseconds, 64 bits hold 1677 to 2262."""
    days = [datetime(year, 12, 31, 1, 2, 3, 4) for year in (1, 1582, 1970, 2026, 2262, 9999)]
    table = pa.table({"text": ["x"] * len(days), "at": pa.array(days, pa.timestamp("us"))})
    shard.write(table, use_deprecated_int96_timestamps=True)
    shard.commit(0, len(days))
    shard.publish(len(days))
    assert shard.published()["at"].to_pylist() == days
    assert shard.published().schema.field("at").type == pa.timestamp("us")


def test_result_columns_follow_the_input_columns(
    published_odd: tuple[pa.Table, pa.Table],
) -> None:
    given_, made = published_odd
    assert made.schema.names == [*given_.schema.names, "ko", "_status", "_reason", "_usage"]


def test_schema_metadata_survives_except_the_feature_list_of_datasets(shard: Shard) -> None:
    table = pa.table({"id": range(ROWS)})
    features = {"info": {"features": {"id": {"dtype": "int64", "_type": "Value"}}}}
    pandas = table.schema.with_metadata(pa.Table.from_pandas(table.to_pandas()).schema.metadata)
    metadata = {
        **pandas.metadata,
        b"huggingface": json.dumps(features).encode(),
        b"own": "한국어".encode(),
    }
    shard.write(table.replace_schema_metadata(metadata))
    shard.commit(0, ROWS)
    shard.publish()
    made = shard.published().schema.metadata
    assert b"huggingface" not in made
    assert {key: made[key] for key in (b"pandas", b"own")} == {
        key: metadata[key] for key in (b"pandas", b"own")
    }
    assert shard.published().to_pandas().shape == (ROWS, 5)


def test_output_of_a_job_can_be_the_input_of_the_next(shard: Shard) -> None:
    stamp = Stamp("older", SHARD, "0:z", 0, ROWS, Counts(), "run")
    table = pa.table({"id": range(ROWS)})
    shard.write(table.replace_schema_metadata({b"axbatch": stamp.to_footer().encode()}))
    shard.commit(0, ROWS)
    shard.publish()
    made = read_stamp(shard.output, SHARD)
    assert made is not None and made.identity == "job"
    assert output_schema(table.schema, FIELDS).metadata in (None, {})


def test_datasets_reads_a_published_file(shard: Shard, tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"id": list(range(ROWS)), "text": ["글"] * ROWS})
    rows.to_parquet(str(tmp_path / "features.parquet"))
    table = pq.read_table(tmp_path / "features.parquet")
    assert b"huggingface" in table.schema.metadata
    shard.write(table)
    shard.commit(0, ROWS)
    shard.publish()
    loaded = datasets.load_dataset(
        "parquet",
        data_files=str(Path(shard.output.url) / SHARD),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert loaded.column_names == ["id", "text", "ko", "_status", "_reason", "_usage"]
    assert list(loaded["id"]) == list(range(ROWS))
    assert list(loaded["ko"]) == shard.published()["ko"].to_pylist()


# --- files of any shape ----------------------------------------------------------------------


def test_empty_file_is_published_with_its_columns_and_no_rows(shard: Shard) -> None:
    shard.write(pa.table({"id": pa.array([], pa.int64()), "text": pa.array([], pa.string())}))
    assert shard.publish(0) == Counts()
    assert shard.published().num_rows == 0
    assert shard.published().schema.names == ["id", "text", "ko", "_status", "_reason", "_usage"]
    assert read_stamp(shard.output, SHARD) == Stamp("job", SHARD, "1:a", 0, 0, Counts(), "run")


def test_file_without_any_row_group_is_published(shard: Shard) -> None:
    path = Path(shard.source.url) / SHARD
    path.parent.mkdir(parents=True)
    pq.ParquetWriter(path, pa.schema([("id", pa.int64())])).close()
    shard.publish(0)
    assert shard.published().num_rows == 0


def test_file_with_empty_row_groups_is_published(shard: Shard) -> None:
    path = Path(shard.source.url) / SHARD
    path.parent.mkdir(parents=True)
    table = pa.table({"id": range(ROWS)})
    with pq.ParquetWriter(path, table.schema) as writer:
        for piece in (table[:0], table[:30], table[:0], table[30:], table[:0]):
            writer.write_table(piece)
    shard.commit(0, ROWS)
    shard.publish()
    assert shard.published()["id"].to_pylist() == list(range(ROWS))


@pytest.mark.parametrize(
    ("rows", "group_rows"),
    [pytest.param(3_000, 1, id="tiny groups"), pytest.param(200_000, 200_000, id="one group")],
)
def test_row_groups_of_the_input_do_not_matter(shard: Shard, rows: int, group_rows: int) -> None:
    table = pa.table({"id": range(rows), "text": [f"text {n}" for n in range(rows)]})
    shard.write(table, row_group_size=group_rows)
    unit = max(rows // 8, 1)
    for start in range(0, rows, unit):
        shard.commit(start, min(rows, start + unit))
    counts = shard.publish(rows)
    made = shard.published()
    assert counts.rows == rows
    assert made.select(["id", "text"]).equals(table)
    assert made.drop_columns(["id", "text"]).equals(shard.expected(rows))
    assert pq.read_metadata(Path(shard.output.url) / SHARD).num_row_groups <= rows // 65_536 + 1


def test_published_pages_carry_checksums(shard: Shard) -> None:
    shard.write()
    shard.commit(0, ROWS)
    shard.publish()
    path = Path(shard.output.url) / SHARD
    for column in range(pq.read_metadata(path).num_columns):
        original = path.read_bytes()
        flip_bit_in_a_page(path, column)
        with shard.output.open(SHARD) as file, pytest.raises(OSError, match="CRC"):
            open_parquet(file).read()
        path.write_bytes(original)
