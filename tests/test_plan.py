"""The plan: from listings and footers alone it follows exactly what is left to do."""

import os
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import RefusedError
from pipeline.plan import ShardPlan, cut_units
from pipeline.shards import UNIT_BYTES
from pipeline.source import task_ranges
from tests.plans import (
    Commit,
    MakeJob,
    MakePlan,
    Write,
    commit_all,
    output_of,
    publish_shard,
    ranges_of,
    texts,
)


def test_units_cover_every_row_once_on_a_grid(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write
) -> None:
    write_parquet(tmp_path / "in/b.parquet", texts(10))
    write_parquet(tmp_path / "in/sub/a.parquet", texts(3))
    write_parquet(tmp_path / "in/empty.parquet", pa.table(texts(1))[:0])
    made = plan(job(tmp_path, input={"rows_per_unit": 4}))
    assert ranges_of(made) == [
        ("b.parquet", 0, 4),
        ("b.parquet", 4, 8),
        ("b.parquet", 8, 10),
        ("sub/a.parquet", 0, 3),
    ]
    assert (made.rows, made.pending_rows) == (13, 13)
    assert [s.shard.name for s in made.unpublished] == [
        "b.parquet",
        "empty.parquet",
        "sub/a.parquet",
    ]


def test_planning_twice_gives_the_same_plan_and_writes_nothing(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write
) -> None:
    write_parquet(tmp_path / "in/a.parquet", texts(1000), row_group_size=7)
    first, second = (plan(job(tmp_path, input={"rows_per_unit": 64})) for _ in range(2))
    assert first.to_json() == second.to_json()
    assert ranges_of(first) == ranges_of(second)
    assert not (tmp_path / "out").exists()


@given(
    st.integers(1, 50),
    st.integers(1, 20),
    st.lists(st.tuples(st.integers(0, 49), st.integers(1, 20)), max_size=6),
    st.integers(1, 20),
)
def test_units_are_exactly_the_pending_rows_cut_on_the_grid(
    rows: int, size: int, cuts: list[tuple[int, int]], task_rows: int
) -> None:
    pending = sorted({(start, min(rows, start + n)) for start, n in cuts if start < rows})
    pending = [r for i, r in enumerate(pending) if i == 0 or r[0] >= max(p[1] for p in pending[:i])]
    fields = {"rows_per_unit": size, "name": "a", "rows": rows, "row_groups": [1] * rows}
    shard: Any = type("Shard", (), fields)
    planned = ShardPlan(shard, "a/0", None, pending)
    units = list(planned.units())
    assert [row for unit in units for row in range(unit.start, unit.stop)] == [
        row for start, stop in pending for row in range(start, stop)
    ]
    assert all(unit.start // size == (unit.stop - 1) // size for unit in units)
    assert all(before.stop <= after.start for before, after in pairwise(units))
    assert planned.done_rows + planned.pending_rows == rows
    assert planned.pending_units == len(units)
    with patch("pipeline.source.TASK_ROWS", task_rows):
        tasks = [[*cut_units("a/0", ranges, size)] for ranges in task_ranges(planned)]
    assert [unit for task in tasks for unit in task] == units
    assert all(sum(unit.rows for unit in task[:-1]) < task_rows for task in tasks)


@settings(max_examples=25)
@given(data=st.data())
def test_resuming_gives_exactly_the_rest_whatever_was_committed(
    tmp_path_factory: pytest.TempPathFactory,
    job: MakeJob,
    plan: MakePlan,
    write_parquet: Write,
    commit: Commit,
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("job")
    for name, rows in (("a", 23), ("b", 5), ("sub/c", 16)):
        write_parquet(folder / f"in/{name}.parquet", texts(rows))
    sizes = st.integers(1, 9)
    first = job(folder, input={"rows_per_unit": data.draw(sizes)})
    before = plan(first)
    units = [unit for shard in before.shards for unit in shard.units()]
    done = data.draw(st.sets(st.sampled_from(units)))
    fingerprints = {shard.key: shard.shard.fingerprint for shard in before.shards}
    for unit in done:
        commit(output_of(first), unit, before.identity, fingerprints[unit.shard])
    same = plan(first)
    assert {u for shard in same.shards for u in shard.units()} == set(units) - done
    # A job file with another size of unit goes on as well: it has no part in the identity.
    after = plan(job(folder, input={"rows_per_unit": data.draw(sizes)}))
    left = [
        (u.shard, row) for s in after.shards for u in s.units() for row in range(u.start, u.stop)
    ]
    all_rows = [(u.shard, row) for u in units for row in range(u.start, u.stop)]
    gone = {(u.shard, row) for u in done for row in range(u.start, u.stop)}
    assert left == [row for row in all_rows if row not in gone]
    assert after.rows - after.pending_rows == len(gone)


def test_published_shard_has_nothing_left_to_do(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write, commit: Commit
) -> None:
    for name in "ab":
        write_parquet(tmp_path / f"in/{name}.parquet", texts(9))
    config = job(tmp_path)
    made = plan(config)
    commit_all(config, made, commit)
    publish_shard(config, made, made.shards[0])
    after = plan(config)
    assert [s.shard.name for s in after.unpublished] == ["b.parquet"]
    assert after.pending_rows == 0
    assert after.published_counts.rows == 9


def test_new_input_files_are_added_to_what_is_done(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write, commit: Commit
) -> None:
    write_parquet(tmp_path / "in/b.parquet", texts(9))
    config = job(tmp_path, input={"rows_per_unit": 4})
    made = plan(config)
    commit_all(config, made, commit)
    publish_shard(config, made, made.shards[0])
    write_parquet(tmp_path / "in/a.parquet", texts(5))
    assert ranges_of(plan(config)) == [("a.parquet", 0, 4), ("a.parquet", 4, 5)]


@pytest.mark.parametrize("published", [False, True])
def test_changed_input_is_refused_and_named(
    tmp_path: Path,
    job: MakeJob,
    plan: MakePlan,
    write_parquet: Write,
    commit: Commit,
    published: bool,
) -> None:
    for name in ("same", "sub/changed"):
        write_parquet(tmp_path / f"in/{name}.parquet", texts(9))
    config = job(tmp_path)
    made = plan(config)
    commit_all(config, made, commit)
    if published:
        publish_shard(config, made, made.shards[1])
    write_parquet(tmp_path / "in/sub/changed.parquet", texts(10))
    with pytest.raises(RefusedError, match=r"sub/changed\.parquet.*: its input file has changed"):
        plan(config)


def test_file_of_the_same_size_and_time_but_other_rows_is_refused(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write, commit: Commit
) -> None:
    path = write_parquet(tmp_path / "in/a.parquet", {"text": ["one", "two"]})
    before = path.stat()
    config = job(tmp_path)
    commit_all(config, plan(config), commit)
    write_parquet(path, {"text": ["one", "six"]})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    with pytest.raises(RefusedError, match="same size, written again"):
        plan(config)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("interrupted", [False, True])
def test_reprocess_does_a_changed_file_again_and_no_other(
    tmp_path: Path,
    job: MakeJob,
    plan: MakePlan,
    write_parquet: Write,
    commit: Commit,
    published: bool,
    interrupted: bool,
) -> None:
    for name in "ab":
        write_parquet(tmp_path / f"in/{name}.parquet", texts(9))
    config = job(tmp_path, input={"rows_per_unit": 4, "on_change": "reprocess"})
    made = plan(config)
    commit_all(config, made, commit)
    publish_shard(config, made, made.shards[0])
    if published:
        publish_shard(config, made, made.shards[1])
    write_parquet(tmp_path / "in/b.parquet", {"text": [f"new {n}" for n in range(5)]})

    changed = plan(config)
    assert ranges_of(changed) == [("b.parquet", 0, 4), ("b.parquet", 4, 5)]
    assert changed.shards[1].leftovers == (() if published else (made.shards[1].key,))
    if interrupted:
        first = next(changed.shards[1].units())
        commit(output_of(config), first, changed.identity, changed.shards[1].shard.fingerprint)
        assert ranges_of(plan(config)) == [("b.parquet", 4, 5)]
    commit_all(config, plan(config), commit)
    publish_shard(config, changed, changed.shards[1])

    assert plan(config).pending_rows == 0 and not plan(config).unpublished
    rows = pq.read_table(tmp_path / "out/b.parquet")["text"].to_pylist()
    assert rows == [f"new {n}" for n in range(5)]
    assert not output_of(config).list("_axbatch/parts")


@pytest.mark.parametrize("suffix", [".parquet", ".pq"])
@pytest.mark.parametrize("published", [False, True])
def test_vanished_input_is_refused_and_kept_with_reprocess(
    tmp_path: Path,
    job: MakeJob,
    plan: MakePlan,
    write_parquet: Write,
    commit: Commit,
    published: bool,
    suffix: str,
) -> None:
    for name in ("here", "sub/gone"):
        write_parquet(tmp_path / f"in/{name}{suffix}", texts(9))
    config = job(tmp_path)
    made = plan(config)
    commit_all(config, made, commit)
    if published:
        publish_shard(config, made, made.shards[1])
    (tmp_path / f"in/sub/gone{suffix}").unlink()
    with pytest.raises(RefusedError, match=rf"sub/gone\{suffix}: its input file is not among"):
        plan(config)
    before = output_of(config).list()
    kept = plan(job(tmp_path, input={"on_change": "reprocess"}))
    assert [shard.shard.name for shard in kept.shards] == [f"here{suffix}"]
    assert output_of(config).list() == before


@pytest.mark.parametrize(
    ("characters", "column"),
    [
        (1_000, "text"),
        (20_000, "text"),
        (3 << 20, "text"),
        pytest.param(
            20_000,
            "doc.text",
        ),
    ],
)
def test_unit_of_long_rows_has_fewer_of_them(
    tmp_path: Path,
    job: MakeJob,
    plan: MakePlan,
    write_parquet: Write,
    characters: int,
    column: str,
) -> None:
    rows = [f"{n:08d}" + "x" * (characters - 8) for n in range(30)]
    write_parquet(tmp_path / "in/a.parquet", {column: rows, "ignored": ["y" * 10_000] * 30})
    config = job(
        tmp_path,
        task={"kind": "translate", "text": column, "source": "en", "target": "ko"},
        input={"rows_per_unit": 256},
    )
    size = plan(config).shards[0].shard.rows_per_unit
    exact = min(256, UNIT_BYTES / characters)
    assert max(1, 0.9 * exact) <= size <= max(1, exact)


def test_plan_reads_no_column_data(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write
) -> None:
    path = write_parquet(tmp_path / "in/a.parquet", texts(5000), compression="none")
    chunk = pq.read_metadata(path).row_group(0).column(1)
    data = bytearray(path.read_bytes())
    stop = chunk.data_page_offset + 1000
    data[chunk.data_page_offset : stop] = bytes(1000)
    path.write_bytes(data)
    with pytest.raises((OSError, pa.ArrowException)):
        pq.read_table(path)
    assert plan(job(tmp_path)).rows == 5000
