"""Whole runs of two lanes, without Ray: each row is done by the engine that it needs."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

from tests.lanes_job import LONG, TOO_LONG, WORDS, LanesJob
from tests.runs import printed


def lanes_of(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {lane["name"]: lane for lane in summary["lanes"]}


def test_each_row_is_done_once_by_its_lane(tmp_path: Path) -> None:
    job = LanesJob(tmp_path)
    lanes = lanes_of(job.run())

    rows = job.rows()
    for row, words in zip(
        rows, [count for counts in WORDS.values() for count in counts], strict=True
    ):
        expected = "rejected" if words in (None, *TOO_LONG) else "ok"
        assert (row["_status"], len((row["ko"] or "").split())) == (
            expected, words if expected == "ok" else 0,
        )  # fmt: skip
    assert lanes["native"]["deferred"] == lanes["yarn"]["rows"] == len(LONG)
    long = [row["_usage"] for row in rows if len((row["en"] or "").split()) in LONG]
    assert lanes["yarn"]["usage"]["requests"] == len(LONG), "a short row met the YaRN engine"
    assert lanes["yarn"]["usage"]["prompt_tokens"] == sum(u["prompt_tokens"] for u in long)
    assert lanes["yarn"]["engine"]["max_model_len"] == 1480
    assert job.verify()["statuses"] == {"ok": 12, "rejected": 3, "failed": 0}
    assert not job.parts()
    assert job.run()["lanes"] == []


def test_no_second_engine_without_a_long_row(tmp_path: Path) -> None:
    job = LanesJob(tmp_path)
    for name in ("a.parquet", "b.parquet"):
        (tmp_path / "in" / name).unlink()
    assert [lane["name"] for lane in job.run()["lanes"]] == ["native"]


def test_resumed_job_starts_only_the_engines_it_needs(tmp_path: Path) -> None:
    """Killed while the second lane has one row after the other for a second each."""
    options = {"engine": {"max_num_seqs": 1, "seconds_per_request": 0.7}}
    job = LanesJob(tmp_path, yarn=options)
    run = job.start("run")
    run.wait_until((job.output / "a.parquet").is_file)
    run.kill()
    summary = job.run()
    lanes = lanes_of(summary)
    assert list(lanes) == ["yarn"]
    assert lanes["yarn"]["engine"]["max_model_len"] == 1480
    assert 0 < lanes["yarn"]["rows"] < len(LONG)
    assert summary["job"]["statuses"] == {"ok": 12, "rejected": 3, "failed": 0}
    assert job.verify()["rows"] == len(job.rows())


def test_rows_done_again_go_through_both_lanes(tmp_path: Path) -> None:
    """With few tokens for an answer long rows are cut off; a row that is again is as it was."""
    job = LanesJob(tmp_path)
    job.run("--set", "sampling.max_tokens=200")
    before = job.rows()
    retried = json.loads(
        printed(job, "retry", "--json", "--reason", "truncated", "--set", "sampling.max_tokens=200")
    )
    assert lanes_of(retried)["yarn"]["rows"] == retried["lanes"][0]["deferred"] == 4
    for row, was in zip(job.rows(), before, strict=True):
        assert (row["_status"], row["_reason"], row["ko"]) == (
            was["_status"], was["_reason"], was["ko"],
        )  # fmt: skip
        again = 2 if was["_reason"] and "truncated" in was["_reason"] else 1
        assert row["_usage"]["requests"] == again * was["_usage"]["requests"]


def test_what_is_too_long_for_both_lanes_is_cut_for_the_first(tmp_path: Path) -> None:
    job = LanesJob(tmp_path)
    summary = job.run("--set", "task.overflow=chunk")
    assert summary["job"]["statuses"] == {"ok": 14, "rejected": 1, "failed": 0}
    assert summary["lanes"][1]["usage"]["requests"] == len(LONG)
    assert all(row["ko"].split() == row["en"].split() for row in job.rows() if row["en"])


def test_sigterm_between_the_lanes_loses_nothing(tmp_path: Path) -> None:
    job = LanesJob(tmp_path, yarn={"engine": {"max_num_seqs": 1, "seconds_per_request": 0.7}})
    run = job.start("run")
    run.wait_for_rows(sum(map(len, WORDS.values())))
    run.signal(signal.SIGTERM)
    assert run.wait() == 130
    assert job.run()["exit_code"] == 0
    assert job.verify()["statuses"] == {"ok": 12, "rejected": 3, "failed": 0}


def test_context_is_part_of_the_identity(tmp_path: Path) -> None:
    job = LanesJob(tmp_path)
    job.run()
    run = job.start("run", "--set", "model.yarn.factor=2.0")
    assert run.wait() == 4
    assert "model.yarn.factor: was 4.0, is 2.0" in run.errors
