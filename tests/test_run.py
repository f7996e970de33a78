"""Whole runs on a real Ray cluster, with the echo engine: order, resuming, interruption."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import TooManyNotOkError
from pipeline.records import Counts
from pipeline.run import check_hope
from tests.faults import without_ray
from tests.runs import Job

needs_ray = pytest.mark.ray

ECHO = {"id": "echo", "backend": "echo"}
SLOW = {**ECHO, "engine": {"seconds_per_request": 0.4, "max_num_seqs": 32}}


def sentences(rows: int, seed: int = 0) -> pa.Table:
    """`rows` rows; every 50th text is null, every 51st empty; some columns to carry along."""
    texts = [None if i % 50 == 7 else "" if i % 51 == 8 else f"{seed}:{i}" for i in range(rows)]
    return pa.table({
        "id": pa.array(range(rows), pa.int64()),
        "en": pa.array(texts, pa.string()),
        "tags": pa.array([["a", None], None, []] * (rows // 3 + 1), pa.list_(pa.string()))[:rows],
    })  # fmt: skip


def job_with_input(folder: Path, model: dict[str, Any], sizes: list[int], **more: Any) -> Job:
    job = Job(
        folder,
        model=model,
        limits={"max_failed_fraction": 0.2},
        input={"path": str(folder / "in"), "rows_per_unit": 32},
        **more,
    )
    for number, size in enumerate(sizes):
        job.write_input(f"f{number}.parquet", sentences(size, number))
    return job


@needs_ray
def test_output_mirrors_input_and_a_second_run_starts_nothing(tmp_path: Path) -> None:
    job = job_with_input(tmp_path, ECHO, [500, 0, 1, 333], cluster={"replicas": 2})

    first = job.run()
    again = job.run()

    assert first["this_run"]["rows"] == 834
    assert (again["this_run"]["rows"], again["log"]) == (0, None)
    assert again["job"] == first["job"] == job.verify()
    for number, size in enumerate([500, 0, 1, 333]):
        given, made = sentences(size, number), pq.read_table(job.output / f"f{number}.parquet")
        assert made.column_names == [*given.column_names, "ko", "_status", "_reason", "_usage"]
        assert made.select(given.column_names).cast(given.schema).equals(given)
        for text, ko, status in zip(given["en"], made["ko"], made["_status"], strict=True):
            assert (status.as_py() == "ok") == bool(text.as_py())
            assert ko.as_py() == (text.as_py() or None), "echo answers its own text"
    assert not job.parts(), "parts of a published shard are dropped"


@needs_ray
@pytest.mark.parametrize("fault", ["kill driver", "kill worker", "SIGINT"])
def test_run_cut_short_is_completed_by_the_same_command(tmp_path: Path, fault: str) -> None:
    sizes = [700, 300]
    job, lease = job_with_input(tmp_path, SLOW, sizes), tmp_path / "out/_axbatch/lease.json"
    run = job.start("run")
    run.wait_for_rows(96)
    workers = [run.worker()]
    match fault:
        case "kill driver":
            run.signal(signal.SIGKILL)
        case "kill worker":
            run.worker().kill()
        case _:
            run.signal(signal.Signals[fault])

    code = run.wait()

    if fault == "kill worker":
        assert code == 0, "Ray replaces the worker and the job goes on"
    else:
        assert code == (-signal.SIGKILL if fault == "kill driver" else 130)
        assert not psutil.wait_procs(workers, timeout=60)[1], "a process was left behind"
    if code == 130:
        assert "Go on with: axbatch run" in run.errors
    assert lease.exists() == (fault == "kill driver"), "the next run finds out that it is dead"
    done = job.rows_done()
    summary = job.run("--set", "model.engine={}")
    assert summary["this_run"]["rows"] == sum(sizes) - done, "finished units are not done again"
    assert not lease.exists()
    assert job.verify()["rows"] == sum(sizes)


@needs_ray
def test_elastic_replicas_grow_while_there_is_work(tmp_path: Path) -> None:
    job = job_with_input(tmp_path, SLOW, [1500], cluster={"replicas": {"min": 1, "max": 2}})
    assert job.run()["workers"] == 2
    assert job.verify()["rows"] == 1500


def test_new_files_are_added_and_changed_prompt_is_refused(tmp_path: Path) -> None:
    job = job_with_input(tmp_path, ECHO, [40])
    job.module = without_ray.__name__
    job.run()
    job.write_input("f1.parquet", sentences(30, 1))

    refused = job.start("run", "--set", "task.instructions=Be brief.")
    assert refused.wait() == 4
    assert "task.instructions" in refused.errors

    assert job.run()["this_run"]["rows"] == 30
    assert job.verify()["rows"] == 70


def test_too_many_rows_not_ok_is_exit_code_3(tmp_path: Path) -> None:
    job = job_with_input(tmp_path, ECHO, [100])
    job.module = without_ray.__name__
    run = job.start("run", "--set", "limits.max_failed_fraction=0.01")
    assert run.wait() == 3
    assert "limits.max_failed_fraction" in run.printed
    assert job.verify()["statuses"]["rejected"] == 4


@needs_ray
def test_s3_to_s3(tmp_path: Path, s3_url: str) -> None:
    import s3fs

    job = job_with_input(tmp_path, ECHO, [200, 100])
    s3fs.S3FileSystem().put(f"{tmp_path}/in/", f"{s3_url}/in/", recursive=True)
    remote = Job(
        tmp_path,
        model=ECHO,
        limits={"max_failed_fraction": 0.2},
        input={"path": f"{s3_url}/in/*.parquet", "rows_per_unit": 32},
        output={"path": f"{s3_url}/out", "column": "ko"},
    )
    assert remote.run()["this_run"]["rows"] == 300
    assert remote.run()["this_run"]["rows"] == 0
    assert remote.verify()["rows"] == 300
    assert not list(job.output.glob("*")), "nothing is written beside the bucket"


@pytest.mark.parametrize(
    ("rows", "not_ok", "limit", "stops"),
    [
        (999, 999, 0.01, False),
        (1_000, 501, 0.01, True),
        (1_000, 500, 0.01, False),
        (5_000, 1_000, 0.01, False),
        (5_000, 1_001, 0.01, True),
        (5_000, 5_000, 1.0, False),
        (5_000, 4_000, 0.8, False),
    ],
)
def test_hopeless_job_is_stopped_and_no_other(
    rows: int, not_ok: int, limit: float, stops: bool
) -> None:
    counts = Counts(Counter(ok=rows - not_ok, rejected=not_ok), Counter({"rejected: null": not_ok}))
    if not stops:
        check_hope(counts, 0, 100_000, limit)
        return
    with pytest.raises(
        TooManyNotOkError, match=f"{not_ok:,} of this run's {rows:,} rows"
    ) as raised:
        check_hope(counts, 0, 100_000, limit)
    assert raised.value.exit_code == 3


@needs_ray
def test_hopeless_run_ends_early_and_goes_on_with_another_limit(tmp_path: Path) -> None:
    job = job_with_input(tmp_path, {**SLOW, "engine": {"seconds_per_request": 0.02}}, [])
    job.write_input("a.parquet", pa.table({"en": pa.nulls(10_000, pa.string())}))
    job.write_input("b.parquet", pa.table({"en": [f"text {row}" for row in range(10_000)]}))
    run = job.start("run")
    assert run.wait() == 3
    assert "of this run's" in run.errors and "rejected: null" in run.errors
    assert "--set limits.max_failed_fraction=1" in run.errors
    done = job.rows_done()
    assert 1_000 <= done < 20_000
    job.module = without_ray.__name__  # the rest is quicker so
    summary = job.run("--set", "limits.max_failed_fraction=1", "--set", "model.engine={}")
    assert summary["this_run"]["rows"] == 20_000 - done
    assert job.verify()["statuses"] == {"ok": 10_000, "rejected": 10_000, "failed": 0}


@needs_ray
def test_sigterm_lets_what_has_begun_be_committed_and_begins_no_more(tmp_path: Path) -> None:
    slow = {**ECHO, "engine": {"seconds_per_request": 1.0, "max_num_seqs": 8}}
    job = Job(tmp_path, model=slow, input={"path": str(tmp_path / "in"), "rows_per_unit": 8})
    job.write_input("a.parquet", pa.table({"en": [str(row) for row in range(400)]}))
    run = job.start("run")
    run.wait_for_rows(8)
    workers = [run.worker()]
    run.signal(signal.SIGTERM)
    assert run.wait() == 130
    assert not psutil.wait_procs(workers, timeout=60)[1], "a process was left behind"
    assert "no unit begins any more" in run.printed
    assert "Go on with: axbatch run" in run.errors
    [log] = job.output.glob("_axbatch/logs/*.log")
    done = job.rows_done()
    assert f"drained: {400 - done} rows are left to do" in log.read_text()
    assert 16 <= done < 400, "the units that had begun were committed"
    job.module = without_ray.__name__
    assert job.run("--set", "model.engine={}")["this_run"]["rows"] == 400 - done
    assert job.verify()["rows"] == 400


@needs_ray
def test_sigterm_gives_up_what_takes_longer_than_the_grace(tmp_path: Path) -> None:
    slow = {**ECHO, "engine": {"seconds_per_completion_token": 0.1}}
    job = Job(
        tmp_path,
        model=slow,
        cluster={"grace_s": 0.1},
        input={"path": str(tmp_path / "in"), "rows_per_unit": 8},
        sampling={"max_tokens": 10_000},
    )
    job.write_input("a.parquet", pa.table({"en": ["word"] * 8 + ["word " * 5_000] * 8}))
    run = job.start("run")
    run.wait_for_rows(8)
    run.signal(signal.SIGTERM)
    assert run.wait() == 130
    assert job.rows_done() == 8
    job.module = without_ray.__name__
    assert job.run("--set", "model.engine={}")["this_run"]["rows"] == 8
