"""Whole runs on real vLLM with the demo model: content, tensor parallel, replicas, kills."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from infra.demo_model.exam import held_out_sentences
from tests.runs import Job, engines_among

pytestmark = [pytest.mark.engine, pytest.mark.ray]

NTREX = Path(__file__).parents[2] / "shared" / "data" / "parallel" / "ntrex128_en_ko.tsv"
CPU_OPTIONS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 4096,
}


def demo_job(folder: Path, **sections: object) -> Job:
    return Job(
        folder,
        **{
            "model": {"id": "demo", "engine": CPU_OPTIONS},
            "input": {"path": str(folder / "in"), "rows_per_unit": 32},
            "sampling": {"temperature": 0.0, "max_tokens": 256},
            **sections,
        },
    )


def tsv(path: Path, *columns: str) -> pa.Table:
    """Columns of a tab-separated file without quoting."""
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    rows = [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines]
    return pa.table({column: [row[column] for row in rows] for column in columns})


def with_odd_columns(table: pa.Table) -> pa.Table:
    rows = table.num_rows
    start = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    times = [start + datetime.timedelta(seconds=row) for row in range(rows)]
    return (
        table.append_column("n", pa.array(range(rows), pa.int64()))
        .append_column("tags", pa.array([["a", None], None, []] * (rows // 3 + 1))[:rows])
        .append_column("time", pa.array(times, pa.timestamp("us", "UTC")))
        .append_column("rare", pa.array([1.5 if i % 50 == 0 else None for i in range(rows)]))
    )


def unseen_sentences(count: int) -> pa.Table:
    """Sentences that the demo model was not trained on, with the right translations."""
    chosen = held_out_sentences(count)
    return pa.table({"en": [s.en for s in chosen], "right": [s.ko for s in chosen]})


@pytest.mark.slow
def test_translations_of_two_replicas_are_right(tmp_path: Path) -> None:
    job = demo_job(tmp_path, cluster={"replicas": 2})
    table = unseen_sentences(200)
    job.write_input("a.parquet", table[:110])
    job.write_input("b.parquet", table[110:])
    summary = job.run()
    assert summary["workers"] == 2
    assert job.verify() == summary["job"]
    check_translations(job, {"a.parquet": table[:110], "b.parquet": table[110:]})


@pytest.mark.slow
@pytest.mark.skipif(not NTREX.is_file(), reason="the NTREX sentences are not beside the checkout")
def test_ntrex_mirrors_its_input_and_a_second_run_starts_no_engine(tmp_path: Path) -> None:
    sentences = tsv(NTREX, "en", "ko").rename_columns(["en", "reference"])
    table = with_odd_columns(sentences[:300])
    # News is not the model's world: of some sentences it loses what must be kept.
    job = demo_job(tmp_path, limits={"max_failed_fraction": 0.3})
    cuts = [0, 1, 70, 150, 300]
    files = {f"part-{i}.parquet": table[a:b] for i, (a, b) in enumerate(pairwise(cuts))}
    for name, rows in files.items():
        job.write_input(name, rows)

    first = job.run()
    again = job.run()

    assert first["this_run"]["rows"] == table.num_rows == 300
    assert (again["this_run"]["rows"], again["log"]) == (0, None)
    assert job.verify()["rows"] == 300
    for name, rows in files.items():
        made = pq.read_table(job.output / name)
        assert made.select(rows.column_names).cast(rows.schema).equals(rows)
        assert pc.all(pc.equal(pc.equal(made["_status"], "ok"), pc.is_valid(made["ko"]))).as_py()


def test_killed_engine_is_replaced_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """`make faults` has the other processes, and what a driver is ended by."""
    # Few sequences at once make it slow enough to be caught in the middle.
    engine = {**CPU_OPTIONS, "max_num_seqs": 8, "tensor_parallel_size": 2}
    job = demo_job(tmp_path, model={"id": "demo", "engine": engine})
    table = with_odd_columns(unseen_sentences(160))
    files = {
        f"part-{i}.parquet": table[a:b] for i, (a, b) in enumerate(pairwise([0, 0, 1, 60, 160]))
    }
    for name, rows in files.items():
        job.write_input(name, rows)
    run = job.start("run", "--json")
    run.wait_for_rows(32)
    engines = engines_among(run.family())
    next(process for process in engines if "EngineCore" in "".join(process.cmdline())).kill()
    assert not psutil.wait_procs(engines, timeout=30)[1], "a dead engine's workers were left"
    assert run.wait() == 0, run.errors
    again = job.run()
    assert (again["this_run"]["rows"], again["log"]) == (0, None)
    assert job.verify() == again["job"]
    check_translations(job, files)


def check_translations(job: Job, files: Mapping[str, pa.Table]) -> None:
    """All rows are there in their order, none failed, and of 100 translations 88 are right."""
    made = {name: pq.read_table(job.output / name) for name in files}
    for name, given in files.items():
        assert made[name].select(given.column_names).cast(given.schema).equals(given)
    rows = pa.concat_tables(made.values())
    assert "failed" not in rows["_status"].to_pylist()
    assert pc.mean(pc.equal(rows["_status"], "ok")).as_py() >= 0.98
    right = pc.fill_null(pc.equal(rows["right"], rows["ko"]), False)
    assert pc.mean(right).as_py() >= 0.88
