"""Parts and publishing: whatever ranges were committed, each row comes out once, in order."""

import json
import math
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.accounting import Usage
from pipeline.errors import AxbatchError, RefusedError, StorageError
from pipeline.merging import output_schema, publish
from pipeline.parquet import open_parquet
from pipeline.parts import (
    PARTS,
    Stamp,
    check_same_origin,
    missing_ranges,
    part_path,
    parts_among,
    read_stamp,
    result_fields,
    result_table,
)
from pipeline.records import Counts, Output, Unit
from pipeline.storage import Folder

SHARD = "news.parquet"
FIELDS = result_fields("ko", pa.string())
ROWS = 60

ranges = st.tuples(st.integers(0, ROWS), st.integers(0, ROWS)).filter(lambda r: r[0] < r[1])
coverings = st.lists(ranges, max_size=12, unique=True)


class Shard:
    """An input file, its output folder, and what a job does to both."""

    def __init__(self, folder: Path, commit: Callable[..., bool], outputs: Callable[..., Any]):
        self.source, self.output = Folder(str(folder / "in")), Folder(str(folder / "out"))
        self._commit, self._outputs = commit, outputs

    def write(self, table: pa.Table | None = None, **options: Any) -> pa.Table:
        table = pa.table({"id": range(ROWS)}) if table is None else table
        path = Path(self.source.url) / SHARD
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, **options)
        return table

    def commit(
        self, start: int, stop: int, identity: str = "job", fingerprint: str = "1:a"
    ) -> bool:
        return self._commit(self.output, Unit(SHARD, start, stop), identity, fingerprint)

    def publish(self, rows: int = ROWS) -> Counts:
        stamp = Stamp("job", SHARD, "1:a", 0, rows, Counts(), "run")
        return publish(self.source, SHARD, self.output, stamp, SHARD, FIELDS, lambda: None)

    def published(self) -> pa.Table:
        return pq.read_table(Path(self.output.url) / SHARD)

    def expected(self, rows: int = ROWS) -> pa.Table:
        return result_table(self._outputs(SHARD, 0, rows), "ko", pa.string())


@pytest.fixture
def shard(
    tmp_path: Path, commit: Callable[..., bool], outputs: Callable[..., list[Output]]
) -> Shard:
    return Shard(tmp_path, commit, outputs)


@pytest.fixture(scope="session")
def new_shard(
    tmp_path_factory: pytest.TempPathFactory,
    commit: Callable[..., bool],
    outputs: Callable[..., list[Output]],
) -> Callable[[], Shard]:
    return lambda: Shard(tmp_path_factory.mktemp("shard"), commit, outputs)


def covered(parts: list[tuple[int, int]]) -> set[int]:
    return {row for start, stop in parts for row in range(start, stop)}


@given(coverings)
def test_missing_ranges_are_exactly_the_rows_without_a_part(parts: list[tuple[int, int]]) -> None:
    gaps = missing_ranges(ROWS, [Unit(SHARD, *part) for part in parts])
    assert [row for gap in gaps for row in range(*gap)] == sorted(set(range(ROWS)) - covered(parts))
    assert all(start < stop for start, stop in gaps)
    assert all(before[1] < after[0] for before, after in pairwise(gaps))


@settings(max_examples=40)
@given(coverings, st.integers(1, ROWS))
def test_every_row_comes_out_once_and_in_order_however_parts_overlap(
    new_shard: Callable[[], Shard], parts: list[tuple[int, int]], group_rows: int
) -> None:
    shard = new_shard()
    shard.write(row_group_size=group_rows)
    for part in parts:
        assert shard.commit(*part)
    for gap in missing_ranges(ROWS, [Unit(SHARD, *part) for part in parts]):
        assert shard.commit(*gap)
    counts = shard.publish()
    made = shard.published()
    assert made["id"].to_pylist() == list(range(ROWS))
    assert made.select(["ko", "_status", "_reason", "_usage"]).equals(shard.expected())
    assert counts.rows == ROWS
    assert counts.usage == Usage(ROWS, sum(range(ROWS)), 0, ROWS)
    assert counts.statuses == {
        status: made["_status"].to_pylist().count(status) for status in ("ok", "rejected", "failed")
    }


@settings(max_examples=40)
@given(coverings.filter(lambda parts: len(covered(parts)) < ROWS))
def test_nothing_is_published_while_a_row_has_no_part(
    new_shard: Callable[[], Shard], parts: list[tuple[int, int]]
) -> None:
    shard = new_shard()
    shard.write()
    for part in parts:
        shard.commit(*part)
    before = shard.output.list(PARTS)
    with pytest.raises(StorageError):
        shard.publish()
    assert shard.output.list() == before


def test_parts_are_gone_once_their_shard_is_published(shard: Shard) -> None:
    shard.write()
    shard.commit(0, ROWS)
    shard.publish()
    assert [entry.path for entry in shard.output.list()] == [SHARD]


@pytest.mark.parametrize("rows", [ROWS - 10, ROWS + 10])
def test_input_that_shrank_or_grew_since_the_plan_is_refused_and_keeps_its_parts(
    shard: Shard, rows: int
) -> None:
    shard.write(pa.table({"id": range(rows)}))
    shard.commit(0, ROWS)
    with pytest.raises(RefusedError, match=SHARD):
        shard.publish()
    assert not (Path(shard.output.url) / SHARD).exists()
    assert parts_among(shard.output.list())[SHARD] == [Unit(SHARD, 0, ROWS)]


def test_second_commit_of_a_unit_changes_nothing(shard: Shard) -> None:
    assert shard.commit(0, 10) is True
    before = shard.output.read(part_path(Unit(SHARD, 0, 10)))
    assert shard.commit(0, 10, identity="another") is False
    assert shard.output.read(part_path(Unit(SHARD, 0, 10))) == before


def test_publishing_twice_writes_the_same_rows(shard: Shard) -> None:
    shard.write()
    made = []
    for _ in range(2):
        for start in range(0, ROWS, 10):
            shard.commit(start, start + 10)
        shard.publish()
        made.append(shard.published())
    assert made[0].equals(made[1], check_metadata=True)


def test_publishing_goes_on_where_a_driver_died_before_dropping_the_parts(shard: Shard) -> None:
    shard.write()
    shard.commit(0, ROWS)
    shard.output.replace(SHARD, b"an older output of the same shard")
    shard.publish()
    assert shard.published().num_rows == ROWS


@pytest.mark.parametrize(
    ("origin", "message"),
    [({"identity": "another"}, "another"), ({"fingerprint": "2:b"}, "input file has changed")],
)
@pytest.mark.parametrize("start", [0, 20, 40])
def test_part_of_another_job_or_input_is_refused_and_nothing_published(
    shard: Shard, origin: dict[str, str], message: str, start: int
) -> None:
    shard.write()
    for other in {0, 20, 40} - {start}:
        shard.commit(other, other + 20)
    shard.commit(start, start + 20, **origin)
    with pytest.raises(RefusedError, match=message):
        shard.publish()
    assert not shard.output.exists(SHARD)
    assert len(shard.output.list(PARTS)) == 3


def test_origin_is_the_same_only_if_identity_and_fingerprint_are() -> None:
    made = Stamp("job", SHARD, "1:a", 0, 1, Counts(), "run")
    check_same_origin(made, "job", "1:a", "url")
    with pytest.raises(RefusedError, match="job2"):
        check_same_origin(made, "job2", "1:a", "url")
    with pytest.raises(RefusedError, match="url: its input file has changed"):
        check_same_origin(made, "job", "1:b", "url")


def flip_bit_in_a_page(path: Path, column: int) -> None:
    """Change one bit of the data of `column`: the last one of its last page."""
    chunk = pq.read_metadata(path).row_group(0).column(column)
    data = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start + chunk.total_compressed_size - 1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("column", range(4))
def test_part_with_a_flipped_bit_is_refused(shard: Shard, column: int) -> None:
    shard.write()
    shard.commit(0, ROWS)
    flip_bit_in_a_page(Path(shard.output.full(part_path(Unit(SHARD, 0, ROWS)))), column)
    with pytest.raises(AxbatchError, match=part_path(Unit(SHARD, 0, ROWS))):
        shard.publish()
    assert not shard.output.exists(SHARD)


def test_input_with_a_flipped_bit_is_refused_by_its_checksum(shard: Shard) -> None:
    shard.write(write_page_checksum=True, compression="none", use_dictionary=False)
    shard.commit(0, ROWS)
    flip_bit_in_a_page(Path(shard.source.full(SHARD)), 0)
    with pytest.raises(AxbatchError, match=SHARD):
        shard.publish()
    assert not shard.output.exists(SHARD)


def test_truncated_part_is_refused(shard: Shard) -> None:
    shard.write()
    shard.commit(0, ROWS)
    path = Path(shard.output.full(part_path(Unit(SHARD, 0, ROWS))))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(AxbatchError, match=SHARD):
        shard.publish()
    assert not shard.output.exists(SHARD)


def test_stamp_comes_back_from_the_footer_of_part_and_output(shard: Shard) -> None:
    shard.write()
    shard.commit(0, ROWS)
    part = read_stamp(shard.output, part_path(Unit(SHARD, 0, ROWS)))
    counts = shard.publish()
    published = read_stamp(shard.output, SHARD)
    assert part == published == Stamp("job", SHARD, "1:a", 0, ROWS, counts, "run")


def test_stamp_survives_its_footer() -> None:
    counts = Counts()
    counts.count(Output(None, "rejected", "too_long: 9", Usage(1, 2, 3, 4)))
    stamp = Stamp("0123", "뉴스/a b.parquet", '9:"etag"', 3, 4, counts, "20260101T000000Z-abc")
    assert Stamp.from_footer(stamp.to_footer().encode()) == stamp


def test_file_of_others_has_no_stamp(shard: Shard) -> None:
    shard.write()
    assert read_stamp(shard.source, SHARD) is None


def test_parts_are_told_apart_by_shard_and_sorted_by_row(shard: Shard) -> None:
    units = [Unit(name, start, start + 5) for name in ("a.parquet", "sub/a.parquet", "a.parquet.x")
             for start in (0, 5, 100)]  # fmt: skip
    for unit in reversed(units):
        shard.output.create(part_path(unit), b"x")
    shard.output.create("a.parquet", b"published")
    found = parts_among(shard.output.list())
    assert found == {
        name: [unit for unit in units if unit.shard == name]
        for name in ("a.parquet", "sub/a.parquet", "a.parquet.x")
    }


@pytest.mark.parametrize("stray", [".nfs000001", "notes.txt", "a-b.parquet"])
def test_stray_file_among_the_parts_is_no_internal_error(shard: Shard, stray: str) -> None:
    shard.commit(0, 10)
    shard.output.create(f"{PARTS}/{SHARD}/{stray}", b"x")
    try:
        assert parts_among(shard.output.list()) == {SHARD: [Unit(SHARD, 0, 10)]}
    except AxbatchError as error:
        assert stray in str(error)  # a refusal that names it is right as well


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


@given(st.lists(st.text(max_size=5) | st.none(), max_size=20))
def test_result_table_holds_the_outputs_row_for_row(values: list[str | None]) -> None:
    def make() -> Iterator[Output]:
        for n, value in enumerate(values):
            made = Output(value, "ok" if value is not None else "rejected", None, Usage(n, 1, 2, 3))
            yield made if value is not None else made._replace(reason="null")

    table = result_table(list(make()), "ko", pa.string())
    assert table.num_rows == len(values)
    assert table["ko"].to_pylist() == values
    assert [usage["requests"] for usage in table["_usage"].to_pylist()] == list(range(len(values)))
    assert table["_reason"].to_pylist() == [None if v is not None else "null" for v in values]
