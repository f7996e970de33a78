"""The publisher: a shard appears when its last receipt is in, and its troubles stop the run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import pipeline.merging
from pipeline.errors import Interrupted, RefusedError
from pipeline.publishing import Publisher
from pipeline.records import Counts, Receipt, Unit
from tests.conftest import PreparedJob


class Running:
    """A job of two files of 40 rows, its plan, and its units committed one by one."""

    def __init__(self, job: PreparedJob) -> None:
        self.job = job
        self.input = [
            job.write(name, {"text": [str(row) for row in range(40)]})
            for name in ("a.parquet", "b.parquet")
        ]
        self.plan = job.plan()

    def publisher(self) -> Publisher:
        return self.job.publisher(self.plan)

    def receipts(self, shard: int) -> list[Receipt]:
        units = list(self.plan.shards[shard].units())
        for unit in units:
            self.job.commit(self.plan, unit)
        return [Receipt(unit, Counts(), "here:1", 0.0) for unit in units]


@pytest.fixture
def running(prepared: Callable[..., PreparedJob]) -> Running:
    return Running(prepared(input={"rows_per_unit": 10}))


def test_shard_is_published_only_with_its_last_receipt_and_repeated_ones_count_once(
    running: Running,
) -> None:
    with running.publisher() as publisher:
        first, *others = running.receipts(0)
        for receipt in [first, first, first, first, *others[:-1]]:
            publisher.received(receipt)
    assert not running.job.path("a.parquet").exists()

    with running.publisher() as publisher:
        for receipt in running.receipts(0):
            publisher.received(receipt)
    assert running.job.table("a.parquet").num_rows == 40
    assert publisher.counts.rows == 40


def test_shards_complete_before_the_run_are_published_by_it(running: Running) -> None:
    running.receipts(0)
    running.receipts(1)
    running.plan = running.job.plan()
    with running.publisher() as publisher:
        pass
    assert publisher.counts.rows == 80
    assert not running.job.plan().unpublished


def test_interrupt_ends_a_merge_that_has_begun(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted = threading.Event()
    monkeypatch.setattr(pipeline.merging, "interrupted", interrupted)
    receipts = running.receipts(0)
    interrupted.set()
    with pytest.raises(Interrupted), running.publisher() as publisher:
        for receipt in receipts:
            publisher.received(receipt)
    assert not running.job.path("a.parquet").exists()
    interrupted.clear()
    running.plan = running.job.plan()
    with running.publisher():
        pass
    assert running.job.table("a.parquet").num_rows == 40


def test_input_replaced_while_the_job_runs_is_refused_and_stops_it(
    running: Running, write_parquet: Callable[..., Path]
) -> None:
    receipts = running.receipts(0)
    write_parquet(running.input[0], {"text": ["another text"] * 40})
    with pytest.raises(RefusedError, match=r"a\.parquet"), running.publisher() as publisher:
        for receipt in receipts:
            publisher.received(receipt)
    assert not running.job.path("a.parquet").exists()


def test_parts_that_outlived_their_publishing_are_dropped(running: Running) -> None:
    with running.publisher() as publisher:
        for receipt in running.receipts(0):
            publisher.received(receipt)
    running.job.commit(running.plan, Unit(running.plan.shards[0].key, 0, 10))
    running.plan = running.job.plan()
    with running.publisher():
        pass
    assert not running.job.output.list("_axbatch/parts")
    assert running.job.table("a.parquet").num_rows == 40


def test_input_replaced_after_its_rows_were_done_is_not_published(
    running: Running, write_parquet: Callable[..., Path]
) -> None:
    receipts = running.receipts(0)
    write_parquet(running.input[0], {"text": [f"new {row}" for row in range(40)]})
    refused = pytest.raises(RefusedError, match="was replaced while the job ran")
    with refused, running.publisher() as publisher:
        for receipt in receipts:
            publisher.received(receipt)
    assert not running.job.output.exists("a.parquet")
