"""Parts and publishing: whatever ranges were committed, each row comes out once, in order."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.accounting import Usage
from pipeline.errors import AxbatchError, RefusedError, StorageError
from pipeline.parts import (
    PARTS,
    Stamp,
    check_same_origin,
    missing_ranges,
    part_path,
    parts_among,
    read_stamp,
    result_table,
)
from pipeline.records import Counts, Output, Unit
from tests.shards import ROWS, SHARD, Shard, flip_bit_in_a_page

ranges = st.tuples(st.integers(0, ROWS), st.integers(0, ROWS)).filter(lambda r: r[0] < r[1])
coverings = st.lists(ranges, max_size=12, unique=True)


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
