"""The ways in which Ray Data's own checkpoint loses or doubles rows, each one against ours."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.openai_server import Body, OpenAIServer, Reply, answer, error, serving, text_of
from tests.runs import Job, Run

ROWS = 24


class QuickJob(Job):
    """24 rows in two files, without Ray."""

    module = "tests.faults.without_ray"

    def __init__(self, folder: Path, server: OpenAIServer, **sections: Any) -> None:
        model = {"id": "served", "backend": "http", "base_url": server.url,
                 "engine": {"max_retries": 0}}  # fmt: skip
        source = {"path": str(folder / "in"), "rows_per_unit": 4}
        limits = {"max_failed_fraction": 1.0}
        super().__init__(folder, **{"model": model, "input": source, "limits": limits, **sections})
        for name, start in (("a", 0), ("b", ROWS // 2)):
            rows = range(start, start + ROWS // 2)
            texts = [f"row {row}" for row in rows]
            self.write_input(f"{name}.parquet", pa.table({"id": rows, "en": texts}))

    def rows(self) -> list[tuple[int, str | None]]:
        tables = [pq.read_table(self.output / f"{name}.parquet") for name in ("a", "b")]
        table = pa.concat_tables(tables)
        return list(zip(table["id"].to_pylist(), table["ko"].to_pylist(), strict=True))

    def is_whole(self) -> bool:
        return self.rows() == [(row, f"<row {row}>") for row in range(ROWS)]


def bracketed(body: Body) -> Reply:
    return answer(f"<{text_of(body)}>")


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with serving(OpenAIServer(bracketed)) as running:
        yield running


def kill_at(server: OpenAIServer, count: int, job: QuickJob) -> None:
    """Run the job; kill it while it waits for the answer to so many requests."""
    runs: list[Run] = []

    def respond(body: Body) -> Reply:
        if len(server.bodies) == count:
            runs[0].signal(signal.SIGKILL)
            runs[0].wait()
        return bracketed(body)

    server.respond = respond
    runs.append(job.start("run"))
    assert runs[0].wait() == -signal.SIGKILL
    server.respond = bracketed


def test_1_crash_between_the_steps_of_a_commit(tmp_path: Path, server: OpenAIServer) -> None:
    """There: a pending and a committed marker; recovery deletes the data, keeps the ids."""
    job = QuickJob(tmp_path, server)
    kill_at(server, 6, job)
    parts = job.parts()
    assert parts
    # A writer that dies after the link and before it drops its temporary file leaves both names.
    temporary = job.output / "_axbatch/tmp/left"
    temporary.parent.mkdir(exist_ok=True)
    os.link(parts[0], temporary)
    job.run()
    assert job.is_whole()
    # One that dies after publishing and before it drops the parts leaves the rows twice.
    parts[0].parent.mkdir(parents=True)
    os.link(temporary, parts[0])
    job.run()
    assert job.is_whole()
    assert not job.parts()


def test_2_resuming_keeps_what_is_done(tmp_path: Path, server: OpenAIServer) -> None:
    """There: `overwrite` wipes the output of rows that are then skipped."""
    job = QuickJob(tmp_path, server)
    kill_at(server, ROWS // 2 + 5, job)
    published = job.output / "a.parquet"
    before = published.read_bytes()
    job.run()
    assert published.read_bytes() == before
    assert job.is_whole()


def test_3_crash_in_the_middle_of_a_row_of_many_requests(
    tmp_path: Path, server: OpenAIServer
) -> None:
    """There: one row becomes many, and those after the crash are never made."""
    task = {"kind": "translate", "text": "en", "source": "en", "target": "ko", "chunk_tokens": 64}
    job = QuickJob(tmp_path, server, task=task)
    texts = [" ".join(f"Sentence {i} of row {row}." for i in range(30)) for row in range(4)]
    job.write_input("a.parquet", pa.table({"id": range(4), "en": texts}))
    (tmp_path / "in/b.parquet").unlink()
    kill_at(server, 9, job)
    assert not job.parts()
    server.respond = lambda body: answer(text_of(body))
    job.run()
    assert len(server.bodies) > 3 * len(texts), "a row takes several requests"
    assert pq.read_table(job.output / "a.parquet")["ko"].to_pylist() == texts


def test_4_second_run_leaves_the_first_ones_files_alone(
    tmp_path: Path, server: OpenAIServer
) -> None:
    """There: it deletes the file that the first one writes."""
    job = QuickJob(tmp_path, server)
    second: list[int] = []

    def respond(body: Body) -> Reply:
        if len(server.bodies) == 6:
            in_flight.parent.mkdir(exist_ok=True)
            in_flight.write_bytes(b"half a part")
            later = job.start("run")
            second.append(later.wait())
            assert "another run of this job is running" in later.errors
        return bracketed(body)

    in_flight = job.output / "_axbatch/tmp/in-flight"
    server.respond = respond
    job.run()
    assert second == [4]
    assert in_flight.exists()
    assert job.is_whole()


def test_5_source_that_is_not_a_parquet_file_is_done_once(
    tmp_path: Path, server: OpenAIServer
) -> None:
    """There: a materialised source is never filtered, and its rows come out twice."""
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"en": f"row {i}"}) for i in range(9))
    )
    job = QuickJob(tmp_path, server, input={"path": str(tmp_path / "rows.jsonl")})
    kill_at(server, 5, job)
    job.run()
    assert job.run()["this_run"]["rows"] == 0
    made = pq.read_table(job.output / "rows.parquet")
    assert made["ko"].to_pylist() == [f"<row {i}>" for i in range(9)]


def test_6_running_again_after_success_changes_nothing(
    tmp_path: Path, server: OpenAIServer
) -> None:
    """There: all rows are doubled, as success deletes the checkpoint."""
    job = QuickJob(tmp_path, server)
    job.run()
    before = [path.read_bytes() for path in sorted(job.output.glob("*.parquet"))]
    job.run()
    assert [path.read_bytes() for path in sorted(job.output.glob("*.parquet"))] == before
    assert len(server.bodies) == ROWS


@pytest.mark.parametrize(
    "change",
    ["task.instructions=Be brief.", "model.revision=v2", "sampling.temperature=0.5"],
)
def test_7_changed_job_is_refused(tmp_path: Path, server: OpenAIServer, change: str) -> None:
    """There: it goes unnoticed, and old and new output are mixed."""
    job = QuickJob(tmp_path, server)
    kill_at(server, 6, job)
    refused = job.start("run", "--set", change)
    assert refused.wait() == 4
    assert change.partition("=")[0] in refused.errors
    job.run()
    assert job.is_whole()


def test_7_job_that_has_no_results_yet_may_be_changed(tmp_path: Path, server: OpenAIServer) -> None:
    job = QuickJob(tmp_path, server)
    away = job.start("run", "--set", "model.base_url=http://127.0.0.1:9/v1")
    assert away.wait() == 1
    summary = job.run("--set", "task.instructions=Be brief.")
    assert summary["job"]["statuses"]["ok"] == ROWS


def test_8_failed_row_is_not_done(tmp_path: Path, server: OpenAIServer) -> None:
    """There: it is recorded as done, and after mending the cause a rerun does nothing."""
    job = QuickJob(tmp_path, server)
    server.respond = lambda body: error(500, "no") if text_of(body) == "row 7" else bracketed(body)
    assert job.run()["job"]["statuses"]["failed"] == 1
    server.respond = bracketed
    retry = job.start("retry")
    assert retry.wait() == 0, retry.errors
    assert job.is_whole()
    assert server.asked.count("row 7") == 2
    assert len(server.bodies) == ROWS + 1
