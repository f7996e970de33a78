"""The source: each unit carries exactly its rows, and no row group is ever held whole."""

import subprocess
import sys
from array import array
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.lease import Lease, Watch
from pipeline.records import Unit
from pipeline.source import UNIT_SCHEMA, UnitSource, decode_unit, encode_unit, read_units
from pipeline.storage import Folder
from tests.conftest import PreparedJob

Write = Callable[..., Path]
ROWS = 3000


def table_of(rows: int) -> pa.Table:
    texts = [None if n % 9 == 8 else f"텍스트 {n}" for n in range(rows)]
    return pa.table({
        "id": range(rows),
        "text": texts,
        "tags": [[str(n)] * (n % 3) for n in range(rows)],
        "kind": pa.array([f"kind {n % 7}" for n in range(rows)]).dictionary_encode(),
    })  # fmt: skip


TABLE = table_of(ROWS)

# Units as plans cut them: ascending and disjoint, with gaps where rows were done before.
cuts = st.lists(st.integers(0, ROWS), min_size=2, max_size=40, unique=True).map(sorted)


@st.composite
def pending_units(draw: st.DrawFn) -> list[Unit]:
    bounds = draw(cuts)
    units = [Unit("a.parquet", *bounds[i : i + 2]) for i in range(len(bounds) - 1)]
    keep = draw(st.lists(st.booleans(), min_size=len(units), max_size=len(units)))
    return [unit for unit, kept in zip(units, keep, strict=True) if kept]


@given(pending_units(), st.sampled_from([1, 7, 256, 1000, 1024, 1025, ROWS]))
def test_units_hold_exactly_their_rows_whatever_the_row_groups(
    tmp_path_factory: pytest.TempPathFactory,
    write_parquet: Write,
    units: list[Unit],
    group_rows: int,
) -> None:
    folder = tmp_path_factory.getbasetemp() / f"groups-{group_rows}"
    if not folder.exists():
        write_parquet(folder / "a.parquet", TABLE, row_group_size=group_rows)
    read = list(read_units(Folder(str(folder)), "a.parquet", ["id", "text", "kind"], units))
    assert [unit for unit, _ in read] == units
    for unit, rows in read:
        expected = TABLE.slice(unit.start, unit.rows).select(["id", "text", "kind"])
        assert rows.to_pylist() == expected.to_pylist()


@given(st.data(), st.sets(st.integers(0, ROWS - 1), min_size=1), st.sampled_from([7, 1000, ROWS]))
def test_units_of_selected_rows_hold_exactly_these(
    tmp_path_factory: pytest.TempPathFactory,
    write_parquet: Write,
    data: st.DataObject,
    chosen: set[int],
    group_rows: int,
) -> None:
    folder = tmp_path_factory.getbasetemp() / f"groups-{group_rows}"
    if not folder.exists():
        write_parquet(folder / "a.parquet", TABLE, row_group_size=group_rows)
    selected = array("q", sorted(chosen))
    size = data.draw(st.integers(1, len(selected)))
    starts = sorted(data.draw(st.sets(st.sampled_from(range(0, len(selected), size)))))
    units = [Unit("a/0", start, min(len(selected), start + size)) for start in starts]
    read = list(read_units(Folder(str(folder)), "a.parquet", ["id", "tags"], units, selected))
    assert [unit for unit, _ in read] == units
    for unit, rows in read:
        assert rows["id"].to_pylist() == list(selected[unit.start : unit.stop])
        assert rows["tags"].to_pylist() == [[str(n)] * (n % 3) for n in rows["id"].to_pylist()]


def test_selected_rows_may_be_of_a_type_that_arrow_cannot_take_from(
    tmp_path: Path, write_parquet: Write
) -> None:
    texts = pa.array([str(row) for row in range(10)], pa.string_view())
    write_parquet(tmp_path / "a.parquet", {"text": texts})
    units, selected = [Unit("a/0", 0, 2)], array("q", [3, 7])
    [(_, rows)] = read_units(Folder(str(tmp_path)), "a.parquet", ["text"], units, selected)
    assert rows["text"].type == pa.string_view()
    assert rows["text"].to_pylist() == ["3", "7"]


@given(st.integers(0, ROWS - 1), st.integers(1, 50))
def test_unit_comes_back_whole_from_its_row(start: int, size: int) -> None:
    unit = Unit("뉴스/a.parquet", start, min(ROWS, start + size))
    rows = TABLE.slice(unit.start, unit.rows)
    block = encode_unit(unit, '9:"etag"', rows)
    assert (block.num_rows, block.schema) == (1, UNIT_SCHEMA)
    again, fingerprint, decoded = decode_unit(block)
    assert (again, fingerprint) == (unit, '9:"etag"')
    assert decoded.to_pylist() == rows.to_pylist()
    assert decoded.schema == rows.schema


def test_encoded_unit_holds_its_own_rows_only() -> None:
    many = pa.table({"text": ["x" * 1000] * 10_000})
    block = encode_unit(Unit("a.parquet", 5000, 5010), "1:a", many.slice(5000, 10))
    assert block["rows"][0].as_buffer().size < 20_000


def test_rows_are_those_of_the_columns_asked_for(tmp_path: Path, write_parquet: Write) -> None:
    write_parquet(tmp_path / "a.parquet", TABLE)
    [(_, rows)] = read_units(Folder(str(tmp_path)), "a.parquet", ["tags"], [Unit("a", 3, 6)])
    assert rows.schema.names == ["tags"]


def test_row_groups_without_a_pending_unit_are_not_read(
    tmp_path: Path, write_parquet: Write
) -> None:
    import pyarrow.parquet as pq

    path = write_parquet(tmp_path / "a.parquet", TABLE, row_group_size=1000, compression="none")
    data = bytearray(path.read_bytes())
    for group in (0, 2):  # damaged, so that reading them would fail
        chunk = pq.read_metadata(path).row_group(group).column(1)
        data[chunk.data_page_offset : chunk.data_page_offset + 50] = bytes(50)
    path.write_bytes(data)
    source, unit = Folder(str(tmp_path)), Unit("a.parquet", 1100, 1200)
    [(_, rows)] = read_units(source, "a.parquet", ["text"], [unit])
    assert rows.to_pylist() == TABLE.slice(1100, 100).select(["text"]).to_pylist()
    with pytest.raises(InputError, match=r"a\.parquet"):
        list(read_units(source, "a.parquet", ["text"], [Unit("a.parquet", 900, 1100)]))


def test_file_with_empty_row_groups_gives_all_rows(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    with pq.ParquetWriter(tmp_path / "a.parquet", TABLE.schema) as writer:
        for piece in (TABLE[:0], TABLE[:10], TABLE[:0], TABLE[10:20], TABLE[:0]):
            writer.write_table(piece)
    units = [Unit("a.parquet", 0, 15), Unit("a.parquet", 15, 20)]
    read = list(read_units(Folder(str(tmp_path)), "a.parquet", ["id"], units))
    assert [row for _, rows in read for row in rows["id"].to_pylist()] == list(range(20))


def test_tasks_of_a_retry_read_its_rows_alone_until_the_run_drains(
    published: Callable[[], PreparedJob],
) -> None:
    job = published()
    plan = job.plan_retry("failed")
    watch = Watch(job.output, "run")
    tasks = UnitSource(plan, ["text"], watch).get_read_tasks(1)
    assert len(tasks) == 2
    for planned, task in zip(plan.shards, tasks, strict=True):
        read = [decode_unit(block) for block in task()]
        statuses = job.table(planned.shard.name)["_status"].to_pylist()
        wanted = [row for row, status in enumerate(statuses) if status == "failed"]
        texts = [text for _, _, rows in read for text in rows["text"].to_pylist()]
        assert texts == [f"{planned.shard.name[0]} {row}" for row in wanted]
        assert [unit for unit, _, _ in read] == list(planned.units())
    with Lease(job.output, "another"):
        assert not [*UnitSource(plan, ["text"], Watch(job.output, "run")).get_read_tasks(1)[0]()]


def test_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises((InputError, FileNotFoundError), match=r"none\.parquet"):
        list(read_units(Folder(str(tmp_path)), "none.parquet", ["a"], [Unit("a", 0, 1)]))


# In a process of its own, whose Arrow pool has held nothing else.
READ_ALL = """
import sys
import pyarrow as pa
from pipeline.records import Unit
from pipeline.source import read_units
from pipeline.storage import Folder

rows = int(sys.argv[2])
units = [Unit("a", start, min(rows, start + 256)) for start in range(0, rows, 256)]
read = sum(t.num_rows for _, t in read_units(Folder(sys.argv[1]), "a.parquet", ["text"], units))
print(read, pa.default_memory_pool().max_memory())
"""


def test_row_group_of_two_million_rows_is_never_held_whole(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    rows, piece = 2_000_000, 100_000
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(tmp_path / "a.parquet", schema, use_dictionary=False) as writer:
        texts = pa.array([f"{n:0200d}" for n in range(piece)])
        writer.write_table(pa.table([pa.chunked_array([texts] * (rows // piece))], schema), rows)
    metadata = pq.read_metadata(tmp_path / "a.parquet")
    column_bytes = metadata.row_group(0).column(0).total_uncompressed_size
    assert (metadata.num_row_groups, metadata.num_rows) == (1, rows)
    assert column_bytes > 400_000_000
    command = [sys.executable, "-c", READ_ALL, str(tmp_path), str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    read, peak = map(int, done.stdout.split())
    assert read == rows
    assert peak < column_bytes // 8


READ_FEW = """
import sys
from array import array
import pyarrow as pa
from pipeline.records import Unit
from pipeline.source import read_units
from pipeline.storage import Folder

rows = int(sys.argv[2])
selected = array("q", [0, rows // 2, rows - 1])
units = [Unit("a/0", 0, 3)]
read = read_units(Folder(sys.argv[1]), "a.parquet", ["text"], units, selected)
print(sum(t.num_rows for _, t in read), pa.default_memory_pool().max_memory())
"""


@pytest.mark.parametrize("group_rows", [50_000, 400_000])
def test_nothing_is_held_of_what_lies_between_selected_rows(
    tmp_path: Path, write_parquet: Write, group_rows: int
) -> None:
    rows = 400_000
    texts = [f"{n:0200d}" for n in range(rows)]
    write_parquet(tmp_path / "a.parquet", {"text": texts}, row_group_size=group_rows)
    command = [sys.executable, "-c", READ_FEW, str(tmp_path), str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    read, peak = map(int, done.stdout.split())
    assert read == 3
    assert peak < 200 * rows // 2


def test_file_that_ends_too_early_is_an_input_error(tmp_path: Path, write_parquet: Write) -> None:
    write_parquet(tmp_path / "a.parquet", TABLE[:10])
    units = [Unit("a/0", 0, 8), Unit("a/0", 8, 16)]
    with pytest.raises(InputError, match=r"a\.parquet: ends before row 16"):
        list(read_units(Folder(str(tmp_path)), "a.parquet", ["id"], units))
