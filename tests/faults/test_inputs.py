"""Input that is damaged, bad or changed: a clear refusal or a row's status; all else is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.faults.asking import ROWS, AskingJob
from tests.faults.observed import Observer
from tests.openai_server import answer, text_of
from tests.runs import Job

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip_a_bit(file: Path) -> None:
    """In the middle of a page; Parquet's checksums tell."""
    pq.write_table(pq.read_table(file), file, write_page_checksum=True, compression=None)
    data = bytearray(file.read_bytes())
    data[data.index(b"text 150")] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit])
def test_damaged_file(asking_job: Callable[..., AskingJob], damage: Callable[[Path], None]) -> None:
    job = asking_job()
    file = job.folder / "in/a.parquet"
    whole = file.read_bytes()
    damage(file)
    run = job.start("run")
    assert run.wait() == 2
    assert "in/a.parquet: not readable as Parquet" in run.errors
    file.write_bytes(whole)
    name = damage.__name__.replace("_", " ")
    # A file that was written again is another one; nothing was made of the damaged one.
    again = job.start("run", "--set", "input.on_change=reprocess")
    job.see_end(again, f"input: {name}", "the run ends and names the file", before=run)


def test_bad_rows(tmp_path: Path, observe: Observer) -> None:
    texts = [b"fine", None, b"", b"long " * 600, b"\xff\xfe", b"fine too"]
    task = {"kind": "translate", "text": "en", "source": "en", "target": "ko", "overflow": "reject"}
    job = Job(
        tmp_path,
        task=task,
        model={"id": "echo", "backend": "echo", "engine": {"max_model_len": 512}},
        sampling={"max_tokens": 128},
        limits={"max_failed_fraction": 0.7},
    )
    # No check of UTF-8 stands between these bytes and the file.
    column = pa.Array.from_buffers(pa.string(), 6, pa.array(texts, pa.binary()).buffers())
    job.write_input("a.parquet", pa.table({"id": range(6), "en": column}))
    summary = job.run()
    assert summary["job"]["reasons"] == {
        "rejected: null": 1,
        "rejected: empty": 1,
        "rejected: too_long": 1,
        "rejected: invalid_utf8": 1,
    }
    assert job.verify()["statuses"] == {"ok": 2, "rejected": 4, "failed": 0}
    made = pq.read_table(job.output / "a.parquet", columns=["id"])["id"].to_pylist()
    observe(
        "rows: null, empty, over-long, invalid UTF-8",
        "rejected, each with its reason; the others are ok",
        given=range(6),
        made=made,
    )


def test_lone_surrogate_in_an_answer(asking_job: Callable[..., AskingJob]) -> None:
    job = asking_job(limits={"max_failed_fraction": 0.1})
    job.server.respond = lambda body: answer(
        "\ud800" if text_of(body) == "text 150" else f"<{text_of(body)}>"
    )
    run = job.start("run")
    assert run.wait() == 0, run.errors
    [row] = [row for row in pq.read_table(job.output / "a.parquet").to_pylist() if row["id"] == 150]
    assert (row["ko"], row["_status"], row["_reason"]) == (None, "failed", "invalid_utf8")
    job.server.respond = lambda body: answer(f"<{text_of(body)}>")
    retry = job.start("retry")
    assert retry.wait() == 0, retry.errors
    assert len(job.server.bodies) == ROWS + 1, "the one row is asked for again"
    job.see_output(
        "a lone surrogate in an answer, then `retry`", "that row is failed; a retry mends it", [run]
    )


def test_input_replaced_between_runs(asking_job: Callable[..., AskingJob]) -> None:
    job = asking_job()
    first = job.start_and_do(100)
    first.kill()
    file = job.folder / "in/a.parquet"
    whole = file.read_bytes()
    job.write_input("a.parquet", pa.table({"id": range(3), "en": ["other", "rows", "here"]}))
    refused = job.start("run")
    assert refused.wait() == 4
    assert "its input file has changed since" in refused.errors
    file.write_bytes(whole)
    again = job.start("run", "--set", "input.on_change=reprocess")
    job.see_end(again, "an input file is replaced between runs", "refused", before=refused)


def test_job_file_edited_between_runs(asking_job: Callable[..., AskingJob]) -> None:
    job = asking_job()
    first = job.start_and_do(100)
    first.kill()
    refused = job.start("run", "--set", "task.instructions=Be brief.")
    assert refused.wait() == 4
    assert "task.instructions" in refused.errors
    job.see_end(
        job.start("run"),
        "the prompt is edited between runs",
        "refused, with the difference; the old file goes on",
        before=refused,
    )
