"""Batch API files: runs that go on after a crash, retries, and a run of the command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from pipeline.errors import RefusedError, StorageError, VerifyError
from pipeline.plan import Plan
from pipeline.records import Output
from pipeline.retry import Retry, plan_retry
from pipeline.storage import Folder
from pipeline.verify import verify_output
from tests.batches import (
    ANSWERS,
    COLUMN,
    ERRORS,
    NAME,
    Batch,
    as_line,
    batch_job,
    lines_in_order,
    mixed,
    request,
)


def failing_first(batch: Batch, row_ids: set[str]) -> Callable[[dict[str, Any]], Any]:
    async def do(row: dict[str, Any]) -> Output:
        messages = json.loads(row["body"])["messages"] if row["body"] else []
        if any(message["content"] in row_ids for message in messages):
            return Output(None, "failed", "engine_error: it fell over")
        return await Batch.do(batch, row)

    return do


def failed_once(batch: Batch) -> Plan:
    """The plan of a retry: of four requests one failed."""
    batch.write(b"{", *(as_line(request(number)) for number in range(4)))
    batch.do = failing_first(batch, {"text 2"})  # type: ignore[method-assign]
    batch.run()
    del batch.do
    [line] = [line for line in batch.lines(ERRORS) if line["error"]["code"] != "bad_line"]
    assert (line["custom_id"], line["response"]["status_code"]) == ("r2", 500)
    assert line["error"]["message"] == "it fell over"
    return plan_retry(batch.plan(), batch.output, Retry("failed", None))


def test_retry_writes_both_files_anew(batch: Batch) -> None:
    plan = failed_once(batch)
    before = batch.lines(ANSWERS)
    batch.run(plan, run="second")
    answers = batch.lines(ANSWERS)
    assert [line["custom_id"] for line in answers] == ["r0", "r1", "r2", "r3"]
    assert [line for line in answers if line["custom_id"] != "r2"] == before
    assert [line["error"]["code"] for line in batch.lines(ERRORS)] == ["bad_line"]
    assert verify_output(batch.plan(), batch.output, COLUMN).rows == 5


@contextmanager
def no_room_for(path: str) -> Iterator[None]:
    """The disk is full when the file is to appear under its name."""
    replacing = Folder.replacing

    @contextmanager
    def failing(folder: Folder, target: str, expected_bytes: int = 0) -> Iterator[IO[bytes]]:
        with replacing(folder, target, expected_bytes) as sink:
            yield sink
            if target == path:
                raise StorageError(f"{path}: no space left")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "replacing", failing)
        yield


@pytest.mark.parametrize("target", [NAME, ANSWERS, ERRORS])
def test_what_a_crash_left_is_made_whole_by_the_same_command(batch: Batch, target: str) -> None:
    mixed(batch)
    with pytest.raises(StorageError), no_room_for(target):
        batch.run()
    assert not (batch.out / NAME).exists()
    assert (batch.out / ERRORS).exists() == (target != ERRORS)
    assert batch.run(run="second").rows == 6
    assert verify_output(batch.plan(), batch.output, COLUMN).rows == 6


@pytest.mark.parametrize("target", [NAME, ANSWERS, ERRORS])
def test_what_a_crash_of_a_retry_left_is_made_whole_by_a_retry(batch: Batch, target: str) -> None:
    plan = failed_once(batch)
    with pytest.raises(StorageError), no_room_for(target):
        batch.run(plan, run="second")
    if target != ERRORS:
        with pytest.raises(VerifyError, match="repeat the retry"):
            verify_output(batch.plan(), batch.output, COLUMN)
    again = plan_retry(batch.plan(), batch.output, Retry("failed", None))
    assert again.pending_rows == 0
    batch.run(again, run="third")
    assert len(batch.lines(ANSWERS)) == 4
    assert verify_output(batch.plan(), batch.output, COLUMN).rows == 5


@pytest.mark.parametrize("name", [ANSWERS, ERRORS])
def test_file_of_others_is_not_written_over(batch: Batch, name: str) -> None:
    mixed(batch)
    batch.out.mkdir()
    (batch.out / name).write_text('{"id": "batch_req_wnaDys", "custom_id": "request-2"}\n')
    with pytest.raises(RefusedError, match=name):
        batch.plan()


@pytest.mark.ray
def test_command_line_answers_a_file_and_resumes(tmp_path: Path) -> None:
    lines = [as_line(request(number)) for number in range(500)]
    lines[100], lines[300] = b"{", b""
    job = batch_job(tmp_path, lines, {"id": "echo", "backend": "echo"})
    summary = job.run()
    assert summary["job"]["statuses"] == {"ok": 498, "rejected": 1, "failed": 0}
    assert job.run()["this_run"]["rows"] == 0
    assert job.verify() == summary["job"]
    expected = [None if n == 100 else f"r{n}" for n in range(500) if n != 300]
    assert [line["custom_id"] for line in lines_in_order(tmp_path)] == expected
